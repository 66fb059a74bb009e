"""Every example of mergekit's repository runs as it is, and gives what mergekit gives."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import streammerge
from tests.make.folders import save_llama
from tests.peers.environments import SCRIPTS, interpreter
from tests.peers.source import mergekit_source
from tests.peers.test_mergekit_slices import compare

pytestmark = pytest.mark.peers

LAYERS = 40
"""Of a Llama of 13 billion parameters, which most of the examples are about."""


def models_of(raw: Any) -> Iterator[str]:
    """Every model that is named in a recipe."""
    entries = raw.items() if isinstance(raw, dict) else [("", each) for each in raw] if isinstance(raw, list) else []
    for key, value in entries:
        if key in ("model", "base_model") and isinstance(value, str):
            yield value
        else:
            yield from models_of(value)


def make_models(names: list[str], cache: Path, here: Path) -> dict[str, str]:
    """Small models of these names: those of the hub in its cache, others where we are; where each of them is."""
    made = {}
    for seed, name in enumerate(names, 1):
        on_hub = cache / f"models--{name.replace('/', '--')}" / "snapshots" / f"{seed:040x}"
        place = on_hub if "/" in name else here / name
        save_llama(place, seed, layers=LAYERS)
        if "/" in name:
            (on_hub.parents[1] / "refs").mkdir()
            (on_hub.parents[1] / "refs" / "main").write_text(on_hub.name)
        made[name] = str(place)
    return made


def with_paths(raw: Any, places: dict[str, str]) -> Any:
    """The recipe with paths in place of names, and in float32: mergekit computes in the dtype of the output."""
    if isinstance(raw, dict):
        found = {key: with_paths(value, places) for key, value in raw.items()}
        return {**found, "dtype": "float32"} if "merge_method" in raw else found
    if isinstance(raw, list):
        return [with_paths(each, places) for each in raw]
    return places.get(raw, raw) if isinstance(raw, str) else raw


def test_examples_run_and_give_the_same(tmp_path, pytestconfig, monkeypatch):
    python, source = interpreter("mergekit", pytestconfig), mergekit_source(pytestconfig)
    examples = sorted((source / "examples").glob("*.yml"))
    assert len(examples) == 6
    raws = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in examples}
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    places = make_models(sorted(set(models_of(list(raws.values())))), tmp_path / "cache", tmp_path)
    for path, raw in raws.items():
        recipe = tmp_path / path.name
        recipe.write_bytes(path.read_bytes())
        streammerge.merge(recipe, output=tmp_path / f"{path.stem}.half")
        recipe.with_suffix(".yaml").write_text(yaml.safe_dump(with_paths(raw, places)), encoding="utf-8")
        streammerge.merge(recipe.with_suffix(".yaml"), output=tmp_path / f"{path.stem}.ours")
    words = [str(python), str(SCRIPTS / "mergekit_recipes.py"), *(str(tmp_path / f"{each.stem}.yaml") for each in raws)]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    for path in raws:
        compare(tmp_path / f"{path.stem}.mergekit", tmp_path / f"{path.stem}.ours", path.stem)
