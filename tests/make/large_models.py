"""Models of many megabytes, written without ever being held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import torch

from streammerge.formats.safetensors import build_header
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import normal, raw_bytes

POOL: Final = 3_000_017
"""Random values of which every tensor is made, from one place or another; far from a round number of anything."""

MakeModels = Callable[[int], dict[str, Path]]
"""Gives the paths of `base`, `a` and `b`, of so many megabytes each."""


def shapes(megabytes: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a model of about this size in float16: one of two fifths of it, some middling, many small ones."""
    middling = {f"layers.{layer}.weight": (megabytes * 1000 // 32, 1000) for layer in range(8)}
    small = {f"layers.{layer}.norm": (1000 + layer,) for layer in range(200)}
    return {"embed.weight": (megabytes * 1000 // 4, 1000), **middling, **small}


def write_model(path: Path, megabytes: int, seed: int, pool: bytes, base: bytes) -> Path:
    """Write a model of these sizes without ever holding it: pieces of the pools, which is as good as random here."""
    infos = {name: TensorInfo(DTYPES["F16"], shape) for name, shape in shapes(megabytes).items()}
    header = build_header(infos, {"format": "pt"})
    source = base if seed == 0 else pool
    with path.open("wb") as file:
        file.write(header.encoded)
        for number, name in enumerate(header.offsets):
            left, start = infos[name].nbytes, 2 * (number * 7919 + seed * 104_729)
            while left:
                piece = source[start % len(source) :][:left]
                file.write(piece)
                left -= len(piece)
                start = 0
    return path


def models_of_sizes(folders: pytest.TempPathFactory) -> Iterator[MakeModels]:
    """What makes three models of a size, once; they are deleted when it is left."""
    base = normal((POOL,), 0, torch.float16)
    pools = [raw_bytes((base.float() + normal((POOL,), seed, scale=0.01)).half()) for seed in (1, 2)]
    made: dict[int, dict[str, Path]] = {}

    def models(megabytes: int) -> dict[str, Path]:
        if megabytes not in made:
            folder = folders.mktemp(f"{megabytes}MB")
            made[megabytes] = {
                name: write_model(folder / f"{name}.safetensors", megabytes, seed, pools[seed - 1], raw_bytes(base))
                for seed, name in enumerate(("base", "a", "b"))
            }
        return made[megabytes]

    yield models
    for paths in made.values():
        for path in paths.values():
            path.unlink()
