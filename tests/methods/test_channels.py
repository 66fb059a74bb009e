"""Inpainting, pix2pix and depth models: first convolutions of more channels, merged as A1111 does, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.make.models import Tensors, merge_to, save_models

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
OTHER = "model.diffusion_model.out.2.weight"
CHANNELS = {"inpainting": 9, "pix2pix": 8, "upscaler": 7, "depth": 5, "the usual": 4}


def unet(seed: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {FIRST: (12, channels, 3, 3), OTHER: (4, 12, 3, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def named(paths: dict[str, Path], *names: str) -> list[dict[str, Any]]:
    return [{"model": str(paths[name]), "name": name} for name in names]


@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_weighted_sum_of_the_channels_that_both_have(tmp_path, channels, dtype, alpha):
    a, b = unet(1, channels, dtype), unet(2, 4, dtype)
    recipe = {
        "merge_method": "weighted_sum",
        "models": named(save_models(tmp_path, a=a, b=b), "a", "b"),
        "parameters": {"alpha": alpha},
        "on_shape_mismatch": "overlap",
    }
    made = merge_to(tmp_path / "out.safetensors", recipe)[FIRST]
    expected = a[FIRST].double()
    expected[:, :4] = (1 - alpha) * expected[:, :4] + alpha * b[FIRST].double()
    assert torch.equal(made[:, 4:], a[FIRST][:, 4:])
    assert torch.allclose(made.double(), expected, atol=0, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_what_inpainting_learned_goes_over_to_another_model(tmp_path, channels, alpha):
    """A + α (B − C), A the model of more channels: what A alone has stays, bit for bit."""
    models = {"a": unet(1, channels), "b": unet(2, 4), "c": unet(3, 4)}
    paths = save_models(tmp_path, **models)
    recipe = {
        "merge_method": "add_difference",
        "models": named(paths, "a", "b"),
        "base_model": {"model": str(paths["c"]), "name": "c"},
        "parameters": {"alpha": alpha},
        "on_shape_mismatch": "pad",
    }
    made = merge_to(tmp_path / "out.safetensors", recipe)
    a, b, c = (models[name][FIRST].double() for name in "abc")
    expected = a.clone()
    expected[:, :4] += alpha * (b - c)
    assert torch.equal(made[FIRST][:, 4:], models["a"][FIRST][:, 4:])
    assert torch.allclose(made[FIRST].double(), expected, atol=1e-6, rtol=1e-6)
    whole = sum(factor * models[name][OTHER].double() for name, factor in (("a", 1), ("b", alpha), ("c", -alpha)))
    assert torch.allclose(made[OTHER].double(), torch.as_tensor(whole), atol=1e-6, rtol=1e-6)
