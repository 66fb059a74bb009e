"""Small checkpoints for tests: every kind of shape that ever broke a loop over blocks, near models and far ones.

    base = make_tensors(0)                              names to tensors, the same for the same arguments
    paths = save_models(tmp_path, base=base, a=near(base, 1), b=make_tensors(2))
    run = merge_to(tmp_path / "out.safetensors", streammerge.linear(paths["a"], paths["b"]))

Files are written with the real `safetensors.torch.save_file` and read back with its `load_file`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.compute.expressions import BLOCK, Stored
from streammerge.formats.files import ByteFile
from streammerge.tensors import DTYPES, TensorInfo

torch.set_num_threads(1)  # tests' tensors are small: threads would only wait for each other

Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

SHAPES: Final[Shapes] = MappingProxyType(
    {
        "scalar": (),
        "empty": (0,),
        "empty.rows": (3, 0, 2),
        "one": (1,),
        "layers.0.bias": (63,),
        "layers.0.odd": (7, 13),
        "layers.1.conv": (4, 3, 3, 3),
        "layers.1.block": (BLOCK,),
        "layers.2.large": (BLOCK + 17,),
    }
)
"""Floating-point tensors: 0-d, empty, of one element, odd, 4-d, of exactly one block, and of a little more."""

LARGE_NAMES: Final = ("layers.1.block", "layers.2.large")

SMALL: Final[Shapes] = MappingProxyType({name: shape for name, shape in SHAPES.items() if name not in LARGE_NAMES})
"""The same without those of a block and more."""

DTYPE_NAMES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
)
"""The dtypes in which models usually are stored, by the format's names."""


def make_tensors(
    seed: int = 0, dtype: torch.dtype = torch.float32, shapes: Shapes = SHAPES, *, scale: float = 1.0
) -> Tensors:
    """Normal values of these shapes, each tensor's own from the seed and its place; far from those of other seeds."""
    return {
        name: normal(shape, 1000 * seed + place, dtype, scale) for place, (name, shape) in enumerate(shapes.items())
    }


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """A tensor of normal values, rounded once to the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale).to(dtype)


def near(tensors: Mapping[str, torch.Tensor], seed: int, noise: float = 1e-3) -> Tensors:
    """A fine-tune: the floating-point tensors with a little noise added, in their dtype; the others as they are."""
    return {
        name: (tensor.double() + normal(tensor.shape, 1000 * seed + place, torch.float64, noise)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for place, (name, tensor) in enumerate(tensors.items())
    }


def with_integers(tensors: Mapping[str, torch.Tensor], start: int = 0) -> Tensors:
    """The tensors and two that are never averaged: int64 positions that count from `start`, and a bool mask."""
    positions = torch.arange(start, start + 77, dtype=torch.int64).reshape(1, 77)
    return {**tensors, "positions": positions, "mask": torch.tensor([True, False, True])}


def save_model(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write the tensors to a safetensors file, with the format's own library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata or {"format": "pt"})
    return path


def save_models(folder: Path, **models: Mapping[str, torch.Tensor]) -> dict[str, Path]:
    """Write each model to `NAME.safetensors` in the folder; their paths by name."""
    return {name: save_model(folder / f"{name}.safetensors", tensors) for name, tensors in models.items()}


def load_model(path: Path) -> Tensors:
    """All tensors of a safetensors file, or of the shards in a folder, with the format's own library."""
    if path.is_dir():
        return {name: tensor for part in sorted(path.glob("*.safetensors")) for name, tensor in load_file(part).items()}
    return load_file(path)


def merge_to(path: Path, recipe: Any, **options: Any) -> Tensors:
    """Merge to the path with few threads and without syncing, unless the options say otherwise; what was written."""
    streammerge.merge(recipe, output=path, **{"sync": False, "threads": 2, "force": True, **options})
    return load_model(path)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The elements' bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same_bytes(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same names, dtypes, shapes and bits, NaNs and the signs of zeros included."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(actual[name]) == raw_bytes(tensor), f"{name} differs"


def store_tensors(path: Path, tensors: Iterable[torch.Tensor]) -> list[Stored]:
    """Write the tensors one after the other to a bare file, and the nodes that find them there again."""
    values = list(tensors)
    path.write_bytes(b"".join(map(raw_bytes, values)))
    file = ByteFile(path)
    nodes, start = [], 0
    for tensor in values:
        info = info_of(tensor)
        nodes.append(Stored(info, file, start))
        start += info.nbytes
    return nodes


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """What a header would say of the tensor."""
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = next(dtype for dtype in DTYPES.values() if dtype.torch_name == name)
    return TensorInfo(dtype, tuple(tensor.shape))


class MemoryModel:
    """A model that is none of streammerge's own: it has tensors and can read ranges of them, and nothing else."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.values = {name: tensor.clone() for name, tensor in tensors.items()}
        self.tensors: Mapping[str, TensorInfo] = {name: info_of(tensor) for name, tensor in tensors.items()}
        self.ranges: list[tuple[str, int, int]] = []

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, as a copy; every call is noted in `ranges`."""
        self.ranges.append((name, start, stop))
        return self.values[name].reshape(-1)[start:stop].clone()
