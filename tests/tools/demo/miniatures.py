"""Miniature models of noise, and what they hold."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.demo.files import CHUNK
from streammerge.tools.demo.layouts import MINIATURE, checkpoint
from streammerge.tools.demo.noise import FineTune, Noise

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"


def info(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(DTYPES[dtype], shape)


ODD = {
    "first.weight": info("F32", 3, 21),
    "nothing": info("F16", 0, 4),
    "scale": info("F16"),
    "embeddings.position_ids": info("I64", 1, 77),
    "one": info("BF16", 1),
    "several.chunks": info("F16", 3, CHUNK - 5),
    "exactly.a.chunk": info("F32", CHUNK),
    "norm.weight": info("F64", 63),
}
ODD_NOISE = Noise(ODD, seed=7)


def miniature_depth() -> tuple[FineTune, dict[str, TensorInfo]]:
    tensors = checkpoint("sd2-depth", scale=MINIATURE)
    return FineTune("depth", tensors, Noise(checkpoint("sd2-base", scale=MINIATURE))), tensors


def read(model: Noise | FineTune, name: str) -> torch.Tensor:
    return model.values(name, 0, model.tensors[name].elements)


def stored(model: Noise | FineTune, name: str) -> torch.Tensor:
    described = model.tensors[name]
    return read(model, name).to(getattr(torch, described.dtype.torch_name)).view(described.shape)


def load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    loaded = torch.load(path, weights_only=True)["state_dict"]
    assert isinstance(loaded, dict)
    return loaded


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.flatten().view(torch.uint8).tolist())


def assert_holds(loaded: dict[str, torch.Tensor], tensors: dict[str, TensorInfo], model: Noise | FineTune) -> None:
    assert loaded.keys() == tensors.keys()
    for name in tensors:
        torch.testing.assert_close(loaded[name], stored(model, name), rtol=0, atol=0)
