"""A request is read once: whatever is asked for, files of methods are run once, and one plan is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from streammerge import engine
from streammerge.methods import METHODS
from streammerge.plan.plan import plan_merge

COUNTED = """
from pathlib import Path
from streammerge.methods import LinearMethod, method

with Path("runs").open("a") as runs:
    runs.write("x")

@method(LinearMethod, base="required", models=(1, 1))
def halfway(*, share: float = 0.5) -> list[float]:
    \"\"\"θ = (1 − s) θ₀ + s θ₁\"\"\"
    return [1.0 - share, share]
"""


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize(
    "words",
    [
        ["out.safetensors", "--recipe-from-metadata", "-o", "again.safetensors", "-v"],
        ["out.safetensors", "--recipe-from-metadata", "-o", "again.safetensors", "--hash-inputs", "-q"],
        ["plan", "out.safetensors", "--recipe-from-metadata"],
        ["verify", "out.safetensors"],
        ["verify", "out.safetensors", "--all"],
        ["b.safetensors", "--base", "a.safetensors", "-m", "halfway", "-o", "again.safetensors", "-v"],
    ],
)
def test_a_file_of_methods_is_run_once_and_planned_once(folder, run, monkeypatch, words):
    Path("own.py").write_text(COUNTED, encoding="utf-8")
    own = ("--methods", "own.py")
    made = run(
        *("b.safetensors", "--base", "a.safetensors", "-m", "halfway", "-o", "out.safetensors", "--hash-inputs", "-q"),
        *own,
    )
    assert made.code == 0, made.err
    Path("runs").unlink()
    plans = []

    def counted(*given, **named):
        plans.append(1)
        return plan_merge(*given, **named)

    monkeypatch.setattr(engine, "plan_merge", counted)
    result = run(*words, *own)
    assert (result.code, result.err) == (0, "")
    assert (Path("runs").read_text(), plans) == ("x", [1])
