"""Kinds of expressions are told apart in one room: elsewhere nothing changes when there is another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import streammerge
from streammerge.compute.expressions import Node

PACKAGE = Path(streammerge.__file__).parent
KINDS = {kind.__name__ for kind in get_args(Node)} | {"Applied"}
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "compute" not in path.parents]


def matched(code: str) -> list[str]:
    """The kinds by which the code chooses what to do."""
    names = (name for tree in patterns(ast.parse(code)) for name in ast.walk(tree))
    return [name.id for name in names if isinstance(name, ast.Name) and name.id in KINDS]


def patterns(code: ast.Module) -> Iterator[ast.AST]:
    for part in ast.walk(code):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "isinstance":
            yield part.args[1]
        elif isinstance(part, ast.MatchClass):
            yield part.cls


def test_what_matches_a_kind_is_found():
    code = "isinstance(a, Stored | Viewed)\nmatch a:\n    case External(model=b):\n        isinstance(b, int)\n"
    assert sorted(matched(code)) == ["External", "Stored", "Viewed"]
    assert any(matched(path.read_text("utf-8")) for path in (PACKAGE / "compute").glob("*.py"))


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_kinds_are_matched_in_compute_alone(path):
    assert not matched(path.read_text("utf-8")), "ask compute/ a question about the expression instead"
