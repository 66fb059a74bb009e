"""Where a block lies: in which tensor, and where in it. Random numbers follow from that and the seed alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.methods.random_numbers import Stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Within = tuple[int | str, ...]
"""Where a merge stands in the recipe: which input of the outermost it is, which input of that, …; () the outermost."""


@dataclass(frozen=True, slots=True)
class Target:
    """The tensor that a method makes: its name and shape, how many inputs it is made of, and the seed of the merge.

    `within` is where in the whole recipe the merge stands. The tensor is made in blocks of `step` elements; `wide` says
    whether in float64, or if it is of a whole model, whether any tensor of it is. Where statistics are taken over all
    tensors of a model together, its blocks
    are counted from `first_block` in them; what is measured then has them as its `parts`.
    """

    name: str
    shape: tuple[int, ...]
    inputs: int
    seed: int = 0
    step: int = 2**18
    first_block: int = 0
    parts: tuple[Target, ...] = ()
    wide: bool = False
    within: Within = ()

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def place(self, block: int) -> Place:
        """The place of a block of it."""
        return Place(self, block)

    def stream(self, model: int) -> Stream:
        """Random numbers for one of the models (0: the first beside the base), one for each element of the tensor.

        They depend on the seed, the tensor's name, the merge's place in the recipe and the model, on nothing else:
        not on the device, nor on what is computed at once.
        """
        return Stream.of(self.key(model))

    def key(self, *numbers: int) -> bytes:
        """What random numbers follow from."""
        return repr((self.seed, self.name, *numbers, *self.within)).encode()


@dataclass(frozen=True, slots=True)
class Place:
    """A block of a tensor: the `block`-th of `tensor`."""

    tensor: Target
    block: int

    @property
    def start(self) -> int:
        """The block's first element in the flattened tensor."""
        return self.block * self.tensor.step

    @property
    def counted(self) -> int:
        """The number under which statistics know the block."""
        return self.tensor.first_block + self.block

    def generator(self, model: int) -> torch.Generator:
        """torch's random numbers for one of the models, on the CPU: for methods that are given whole tensors."""
        import torch

        digest = hashlib.blake2b(self.tensor.key(model, self.block), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def uniform(self, model: int, like: Tensor) -> Tensor:
        """A number of [0, 1) for each element of the block, in float32, where and in the shape that `like` has."""
        return self.tensor.stream(model).uniform(self.start, like.numel(), like.device).reshape(like.shape)

    def drawn(self, model: int, like: Tensor, share: float) -> Tensor:
        """For each element of the block whether it is drawn, with this probability."""
        return self.uniform(model, like) < share

    def normal(self, model: int, like: Tensor) -> Tensor:
        """A normally distributed number for each element of the block, where and in the shape that `like` has."""
        stream = self.tensor.stream(model)
        return stream.normal(self.start, like.numel(), like.device, like.dtype).reshape(like.shape)
