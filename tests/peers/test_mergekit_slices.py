"""The same stacks as mergekit makes of the same recipes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from tests.make.folders import save_llama
from tests.peers.environments import SCRIPTS, interpreter

pytestmark = pytest.mark.peers


def source(model: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [start, stop], **({"parameters": parameters} if parameters else {})}


def recipes(a: str, b: str) -> dict[str, dict[str, Any]]:
    weights = {"weight": [{"filter": "mlp", "value": [0.1, 0.9]}]}
    first = {"sources": [source(a, 0, 3), source(b, 0, 3)], "parameters": weights}
    ts = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}]
    scales = [{"filter": "o_proj", "value": 0.5}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
    return {
        "stack": {
            "merge_method": "passthrough",
            "slices": [{"sources": [source(a, 0, 4)]}, {"sources": [source(b, 2, 6)]}],
        },
        "gradient": {
            "merge_method": "slerp",
            "base_model": a,
            "slices": [{"sources": [source(a, 0, 6), source(b, 0, 6)]}],
            "parameters": {"t": ts},
        },
        "of each its own": {
            "merge_method": "linear",
            "slices": [first, {"sources": [source(a, 3, 4), source(b, 5, 6, weight=3)]}],
            "parameters": {"weight": [{"filter": "q_proj", "value": [1, 2]}, {"value": [0.5, 1]}]},
        },
        "of a base": {
            "merge_method": "ties",
            "base_model": a,
            "slices": [
                {"sources": [source(a, 0, 3), source(b, 2, 5)]},
                {"sources": [source(a, 1, 3), source(b, 0, 2)]},
            ],
            "parameters": {"weight": 0.7, "density": [0.3, 0.9], "normalize": False},
        },
        "scaled": {
            "merge_method": "passthrough",
            "slices": [{"sources": [source(a, 0, 2, scale=scales)]}, {"sources": [source(a, 1, 6)]}],
        },
    }


def test_mergekit_stacks_the_same(tmp_path, pytestconfig):
    python = interpreter("mergekit", pytestconfig)
    a, b = (str(save_llama(tmp_path / name, seed, layers=6)) for seed, name in enumerate("ab"))
    made = recipes(a, b)
    paths = [tmp_path / f"{number}.yaml" for number in range(len(made))]
    for path, recipe in zip(paths, made.values(), strict=True):
        path.write_text(json.dumps({**recipe, "dtype": "float32"}), encoding="utf-8")
    words = [str(python), str(SCRIPTS / "mergekit_recipes.py"), *map(str, paths)]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    for path, name in zip(paths, made, strict=True):
        streammerge.merge(path, output=path.with_suffix(".ours"))
        compare(path.with_suffix(".mergekit"), path.with_suffix(".ours"), name)


def compare(theirs: Path, ours: Path, name: str) -> None:
    """The same tensors, of the same values but for rounding, and a config of as many layers."""
    expected, found = (load_file(folder / "model.safetensors") for folder in (theirs, ours))
    assert found.keys() == expected.keys(), name
    for each in expected:
        torch.testing.assert_close(found[each], expected[each], rtol=1e-5, atol=1e-6, msg=f"{name}: {each}")
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (theirs, ours)]
    assert configs[0]["num_hidden_layers"] == configs[1]["num_hidden_layers"], name
