"""Models of constant values, what a merge of them came to, and recipes for them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

VALUES = {"a": 1.0, "b": 3.0, "base": 10.0, "depth": 11.0, "waifu": 20.0, "c": 3.5}
UNET = "model.diffusion_model.x"
VAE = "first_stage_model.x"


def value(path="out.safetensors", name=UNET) -> float:
    """The value that all elements of a tensor of the output have."""
    found = set(load_file(path)[name].flatten().tolist())
    assert len(found) == 1
    return round(float(found.pop()), 5)


def write_recipe(path: str = "recipe.yaml", **keys) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"merge_method": "linear", "models": ["a.safetensors", "b.safetensors"], **keys}))
    return path
