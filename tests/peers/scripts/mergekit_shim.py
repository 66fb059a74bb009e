"""A plugin of pytest: mergekit's own tests, of what streammerge makes of their recipes in mergekit's place.

What a test asks of the output stays as it is, but for two things. Errors of ours are ValueErrors, which mergekit
raises. And where a test would have an inferred architecture's names, which are those of a model in memory, it gets
those of the layout's files: transformers writes others than it has, and loads what has the files' names, as it must
here, without a tensor missing or left.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.errors import MergeError


def merge(config: Any, out_path: str, options: Any = None) -> None:
    """What mergekit's `run_merge` does. Its recipes are written to a file, and read as any file is."""
    recipe = Path(out_path).with_name(f"{Path(out_path).name}.yaml")
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    try:
        streammerge.merge(recipe, output=out_path)
    except MergeError as error:
        raise ValueError(str(error)) from error


@dataclass
class Weight:
    """What mergekit knows of a tensor."""

    name: str
    optional: bool = False
    aliases: tuple[str, ...] = ()


@dataclass
class Files:
    """The tensors of a model's files, all of which the output has to have."""

    names: list[str]

    def all_weights(self, config: Any) -> list[Weight]:
        """Every tensor."""
        import transformers

        architecture = getattr(transformers, config.architectures[0])
        _, told = architecture.from_pretrained(config.name_or_path, output_loading_info=True)
        assert not told["missing_keys"], told
        assert not told["unexpected_keys"], told
        return [Weight(name) for name in self.names]


def files_of(config: Any, options: Any = None) -> Files:
    """In place of mergekit's `get_architecture_info`."""
    with streammerge.open_model(config.models[0].model.model.path) as layout:
        return Files(list(layout.tensors))


@pytest.fixture(autouse=True)
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test calls us."""
    import tests.common

    monkeypatch.setattr(tests.common, "run_merge", merge)
    monkeypatch.setattr(tests.common, "get_architecture_info", files_of)
