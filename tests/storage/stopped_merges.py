"""Merges that are stopped after so many windows, and what they come to if they are not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streammerge.engine import run_merge
from streammerge.methods import METHODS
from streammerge.recipe.options import Options
from streammerge.recipe.parse import parse_recipe
from streammerge.storage import resume
from streammerge.workers.windows import MergeWork, NeighboursWork, Window
from tests.storage.outputs import digests

SHAPES = {**{f"layers.{number}.w": (512, 300) for number in range(12)}, "bias": (63,), "scalar": (), "empty": (0, 2)}


def recipe_of(paths, name="linear", **keys) -> dict[str, Any]:
    base = {"base_model": str(paths["base"])} if METHODS[name].base == "required" else {}
    return {"merge_method": name, "models": [str(paths["a"]), str(paths["b"])], **base, **keys}


class Stopping:
    """Records after every window, and stops the merge after so many of them."""

    def __init__(self, monkeypatch, after: int, error: BaseException | None = None) -> None:
        self.left = after
        self.error = error or KeyboardInterrupt()
        self.windows: list[str] = []
        self.lock = threading.Lock()
        keepers: list[resume.Bookkeeper] = []
        every = resume.Bookkeeper.every

        def noted(keeper, seconds):
            keepers[:] = [keeper]
            return every(keeper, 1000.0 if seconds else 0.0)

        def stopping(whole: Callable[..., None]) -> Callable[..., None]:
            def write(work: MergeWork, window: Window, *arguments: Any) -> None:
                whole(work, window, *arguments)
                with self.lock:
                    if not keepers:  # what is measured before there is a plan is not written
                        return
                    self.windows += [job.name for job in work.jobs] if isinstance(work, NeighboursWork) else [work.name]
                    keepers[0].record()
                    self.left -= 1
                    if not self.left:
                        raise self.error

            return write

        monkeypatch.setattr(resume.Bookkeeper, "every", noted)
        for kind in (MergeWork, NeighboursWork):
            monkeypatch.setattr(kind, "write", stopping(kind.write))


def noting(notes: list[str], what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a note of every call."""

    def noted(*arguments: Any) -> Any:
        notes.append(what)
        return function(*arguments)

    return noted


def run(raw: dict[str, Any], output: Path, tell: Callable[[str], None] = lambda _: None, **options: Any):
    return run_merge(parse_recipe(raw, Path()), output, Options(threads=1, **options), None, tell)


def stop(monkeypatch, raw, output, *, after=4, error=None, **options) -> Stopping:
    """Run it and stop it."""
    with monkeypatch.context() as patches:
        stopping = Stopping(patches, after, error)
        with pytest.raises(type(stopping.error)):
            run(raw, output, **options)
    return stopping


def whole(raw, folder: Path, **options) -> dict[str, str]:
    """The right bytes."""
    run(raw, folder / "out.safetensors", **options)
    return digests(folder)
