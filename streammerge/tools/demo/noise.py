"""Random values for models nobody trained: the same for every way of asking, and as large as real weights are.

A tensor's values come in fixed blocks. Each block is a slice of one pool of normal numbers, stretched a little; where
it starts and how far it is stretched follow from a hash of seed, tensor and block. So any range can be made on its
own, at the speed of memory, and no two tensors are alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from streammerge.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

BLOCK: Final = 2**18
"""Elements in a block, the unit in which values are made: few enough to stay in a core's cache."""

STARTS: Final = 2**20
"""Places in the pool at which a block may start."""

STRETCH: Final = 0.1
"""By how much a block is stretched or shrunk at most."""

SMALLEST: Final = 2.0**-10
"""No number in the pool is nearer to zero, lest weights vanish in float16."""


class Noise:
    """A model made of noise: weights near 0, gains near 1, small biases, and positions that count from 0."""

    def __init__(self, tensors: Mapping[str, TensorInfo], seed: int = 0) -> None:
        self.tensors = tensors
        self.seed = seed

    def values(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in float32."""
        import torch

        info = self.tensors[name]
        if not info.dtype.mergeable:
            return torch.arange(start, stop, dtype=torch.float32)
        mean, spread = _size_of_values(name, info)
        values = _normal(self.seed, name, start, stop, spread)
        return values.add_(mean) if mean else values


class FineTune:
    """A model made of noise that was trained further: a base plus a task vector of 5 to 50 % of its size."""

    def __init__(self, task: str, tensors: Mapping[str, TensorInfo], base: Noise) -> None:
        self.task = task
        self.tensors = tensors
        self.base = base
        self._initial = Noise(tensors, base.seed)

    def values(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in float32."""
        values = self._before_training(name, start, stop)
        if not self.tensors[name].dtype.mergeable:
            return values
        return values.add_(_normal(self.base.seed, f"{self.task}: {name}", start, stop, self._step(name)))

    def _step(self, name: str) -> float:
        """How far training moved a tensor: weights by 1e-3 to 1e-2, another distance for each tensor."""
        _, spread = _size_of_values(name, self.tensors[name])
        luck, _ = _draw(self.base.seed, f"{self.task} moves {name}", 0)
        return spread * 0.05 * math.pow(10, luck)

    def _before_training(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The base's values; a convolution that was given more input channels started with zeros there."""
        import torch

        wide, narrow = self.tensors[name], self.base.tensors.get(name)
        if narrow is None or narrow.shape == wide.shape:
            return self._initial.values(name, start, stop)
        widened = torch.zeros(wide.shape)
        widened[:, : narrow.shape[1]] = self.base.values(name, 0, narrow.elements).view(narrow.shape)
        return widened.flatten()[start:stop]


def _size_of_values(name: str, info: TensorInfo) -> tuple[float, float]:
    """The mean and the standard deviation of a tensor's values."""
    if not info.shape:  # CLIP's temperature
        return 4.6, 0.01
    if name.endswith("bias"):
        return 0.0, 0.005
    if len(info.shape) == 1:  # the gain of a norm
        return 1.0, 0.05
    return 0.0, 0.02


def _normal(seed: int, name: str, start: int, stop: int, spread: float) -> torch.Tensor:
    """Elements [start, stop) of the normal values that belong to a name."""
    import torch

    pool = _pool(seed)
    values = torch.empty(stop - start)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        origin, luck = _draw(seed, name, block)
        shift = int(origin * STARTS) - block * BLOCK
        stretch = spread * (1 + STRETCH * (2 * luck - 1))
        torch.mul(pool[first + shift : last + shift], stretch, out=values[first - start : last - start])
    return values


def _draw(seed: int, name: str, block: int) -> tuple[float, float]:
    """Two numbers in [0, 1) that belong to a block."""
    digest = hashlib.blake2b(f"{seed} {block} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little") / 2**32, int.from_bytes(digest[4:], "little") / 2**32


@lru_cache(maxsize=1)
def _pool(seed: int) -> torch.Tensor:
    """Normal numbers, none of them zero, from any of whose first places a whole block can be taken."""
    import torch

    pool = torch.randn(STARTS + BLOCK, generator=torch.Generator().manual_seed(seed))
    return pool.masked_fill_(pool.abs() < SMALLEST, SMALLEST)
