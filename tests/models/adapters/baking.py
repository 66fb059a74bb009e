"""Small models, adapters of them, and what comes of putting these in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.make.models import Tensors, merge_to, normal, save_model

MODULE = "lora_unet_mid_x"
"""A module as an adapter calls it."""

WEIGHT, BIAS = "mid.x.weight", "mid.x.bias"
"""Its tensors in the model."""


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> torch.Tensor:
    """Values of this shape, others for every seed."""
    return normal(shape, seed, dtype, scale)


def parts(module: str = MODULE, /, **tensors: torch.Tensor | float) -> Tensors:
    """A module's tensors, `lora_up__weight` for `lora_up.weight`; numbers are 0-d tensors."""
    return {
        f"{module}.{name.replace('__', '.')}": torch.tensor(value) if isinstance(value, float) else value
        for name, value in tensors.items()
    }


def bake(
    folder: Path,
    model: Mapping[str, torch.Tensor],
    *adapters: Mapping[str, torch.Tensor] | Path | str,
    weights: Any = 1.0,
    **options: Any,
) -> Tensors:
    """The model with these adapters in it, all with the same weight or each with its own."""
    save_model(folder / "model.safetensors", dict(model))
    given = weights if isinstance(weights, list) else [weights] * len(adapters)
    entries = []
    for number, (adapter, weight) in enumerate(zip(adapters, given, strict=True)):
        path = folder / f"adapter{number}.safetensors" if isinstance(adapter, Mapping) else Path(adapter)
        if isinstance(adapter, Mapping):
            save_model(path, dict(adapter))
        entries.append({"adapter": str(path), "weight": weight})
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(folder / "model.safetensors"), "adapters": entries}],
    }
    return merge_to(folder / "out.safetensors", recipe, **options)


def peft_folder(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """A folder as PEFT writes it, its tensors under `base_model.model.`."""
    save_model(
        folder / "adapter_model.safetensors",
        {
            name if name.startswith("base_model.") else f"base_model.model.{name}": value
            for name, value in tensors.items()
        },
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder
