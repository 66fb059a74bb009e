"""What ComfyUI's own library makes of weights that are stored with scales, and of the same weights itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.make.diffusion import diffusion_model
from tests.make.models import Tensors, merge_to, near, save_models

ck = pytest.importorskip("comfy_kitchen")
layouts = pytest.importorskip("comfy_kitchen.tensor")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""What ComfyUI's `QUANT_ALGOS` calls the dtypes that it reads with one scale a tensor."""


def read(found: Tensors, layer: str, dtype: torch.dtype) -> torch.Tensor:
    """A layer's weight as ComfyUI's loader reads it: what the mark says, with the scale."""
    layout = json.loads(found[f"{layer}.comfy_quant"].numpy().tobytes())
    assert found[f"{layer}.weight"].dtype == FORMATS[layout["format"]]
    weight = found[f"{layer}.weight"]
    fields: dict[str, Any] = {"orig_dtype": dtype, "orig_shape": tuple(weight.shape)}
    parameters = layouts.TensorCoreFP8Layout.Params(scale=found[f"{layer}.weight_scale"], **fields)
    made = layouts.QuantizedTensor(weight, "TensorCoreFP8Layout", parameters).dequantize()
    assert isinstance(made, torch.Tensor)
    return made


@pytest.mark.parametrize("dtype", ["fp8_scaled", "fp8_scaled_e5m2"])
@pytest.mark.parametrize("name", ["flux", "sdxl", "wan", "z-image"])
def test_it_decodes_what_is_written(tmp_path: Path, name: str, dtype: str):
    a = diffusion_model(name, 1, torch.bfloat16)
    b = near(a, 2, 0.1)
    paths = save_models(tmp_path, a=a, b=b)
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(paths["b"])], "dtype": dtype}
    found = merge_to(tmp_path / "out.safetensors", recipe)
    layers = [own.removesuffix(".comfy_quant") for own in found if own.endswith(".comfy_quant")]
    assert layers
    for layer in layers:
        wanted = (a[f"{layer}.weight"].double() + b[f"{layer}.weight"].double()) / 2
        made = read(found, layer, torch.float32).double()
        steps = 16 if dtype == "fp8_scaled" else 8  # half a quantum is a 16th or an 8th at the most, of each number
        bound = wanted.abs() / steps + wanted.abs().max() * 2.0**-16
        assert ((made - wanted).abs() <= bound).all()


def test_it_makes_the_same_codes_of_the_same_weights(tmp_path: Path):
    model = diffusion_model("flux", 1, torch.float32)
    paths = save_models(tmp_path, a=model)
    recipe = {"merge_method": "linear", "models": [str(paths["a"])], "dtype": "fp8_scaled"}
    found = merge_to(tmp_path / "out.safetensors", recipe)
    for name in [own for own in found if own.endswith(".weight") and f"{own}_scale" in found]:
        theirs, parameters = layouts.TensorCoreFP8Layout.quantize(model[name])
        assert torch.equal(theirs.view(torch.uint8), found[name].view(torch.uint8))
        assert torch.equal(parameters.scale, found[f"{name}_scale"])
