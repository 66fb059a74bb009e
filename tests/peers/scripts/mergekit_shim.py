"""A plugin of pytest: mergekit's own tests, of what streammerge makes of their recipes in place of mergekit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import streammerge


def merge(config: Any, out_path: str, options: Any = None) -> None:
    """What mergekit's `run_merge` does. Its recipes are written to a file, and read as any file is."""
    Path(out_path).mkdir(parents=True, exist_ok=True)
    recipe = Path(out_path).with_name(f"{Path(out_path).name}.yaml")
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    streammerge.merge(recipe, output=out_path)


@pytest.fixture(autouse=True)
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test calls us."""
    import tests.common

    monkeypatch.setattr(tests.common, "run_merge", merge)
