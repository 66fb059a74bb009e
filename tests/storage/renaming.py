"""Putting an output in place, which fails or is killed at any step of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """What nothing is done after."""


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[None]:
    """The renaming of this number fails, those before and after it do not."""
    with _counted(monkeypatch, lambda count: OSError(1, "Operation not permitted") if count == at else None):
        yield


@contextlib.contextmanager
def killed(monkeypatch: pytest.MonkeyPatch, at: int, *others: str) -> Iterator[None]:
    """The process is gone from the renaming of this number on. `others` are functions that count, and do nothing."""
    with _counted(monkeypatch, lambda count: Killed() if count >= at else None, *others) as patches:
        patches.setattr("streammerge.storage.placing.Step.undo", lambda *_: None)
        yield


@contextlib.contextmanager
def _counted(
    monkeypatch: pytest.MonkeyPatch, problem: Callable[[int], BaseException | None], *others: str
) -> Iterator[pytest.MonkeyPatch]:
    """Renaming, and the others, with the problem that there is at each step."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keys: Any) -> Any:
            nonlocal count
            count += 1
            if (found := problem(count)) is not None:
                raise found
            return function(*arguments, **keys)

        return call

    with monkeypatch.context() as patches:
        patches.setattr(Path, "replace", counted(Path.replace))
        for other in others:
            patches.setattr(other, counted(lambda *_, **__: None))
        yield patches
