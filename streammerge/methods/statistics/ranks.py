"""The k largest values of a vector, told by a threshold: of what equals it, the first ones by flat index are in."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

ALL: Final = -(2**63)
"""A key that no value is below, nor at it."""

INFINITE: Final = 0x7F800000
"""The key of infinity; those of what is no number are greater."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The k largest values of a vector: those whose key is above `key`, and of those that have it, the first ones.

    These are all in the blocks before `last_block`, and so many as `quota` says in it; without it they are all that
    have the key. With k = 0 `key` is None. Keys are those of float32, or if `wide` of float64.
    """

    key: int | None
    last_block: int | None = None
    quota: int = 0
    signed: bool = False
    wide: bool = False

    @property
    def value(self) -> float:
        """The k-th largest value, or magnitude: −∞ where all are taken, ∞ where none is."""
        if self.key is None:
            return float("inf")
        if self.key == ALL:
            return float("-inf")
        return number_of(self.key, wide=self.wide)

    def mask(self, values: Tensor, block: int) -> Tensor:
        """Which of the block's values are among the k largest; `block` is the number statistics know it under."""
        import torch

        if self.key is None or self.key == ALL:
            return torch.full_like(values, self.key is not None, dtype=torch.bool)
        found = keys(values, signed=self.signed, wide=self.wide)
        if self.last_block is None or block < self.last_block:
            return found >= self.key
        if block > self.last_block:
            return found > self.key
        equal = found == self.key
        first = equal.reshape(-1).cumsum(0).reshape(equal.shape) <= self.quota
        return (found > self.key) | (equal & first)

    def keep(self, values: Tensor, block: int) -> Tensor:
        """The block's values with all that are not among the k largest magnitudes set to zero."""
        import torch

        if self.key == ALL:
            return values
        shrinks = values.dtype == torch.float32 and not self.wide and block != self.last_block
        if not shrinks or self.key is None or self.key > INFINITE:
            return torch.where(self.mask(values, block), values, 0.0)
        all_equal = self.last_block is None or block < self.last_block
        below = max(self.key - all_equal, 0)  # the shrinking is much faster than a mask, and leaves what is equal out
        return torch.nn.functional.hardshrink(values, number_of(below))


def quotas(key: int, k: int, equals: Mapping[int, int], *, signed: bool, wide: bool = False) -> Cut:
    """The cut that takes `k` of the values that have the key, which are so many in each block."""
    for block in sorted(equals):
        if equals[block] >= k:
            return Cut(key, block, k, signed, wide)
        k -= equals[block]
    return Cut(key, None, 0, signed, wide)


def number_of(key: int, *, wide: bool = False) -> float:
    """The float32 number that has this key, or the float64 one."""
    number, whole, rest = ("<d", "<q", 2**63 - 1) if wide else ("<f", "<i", 2**31 - 1)
    bits = key ^ rest if key < 0 else key
    return float(struct.unpack(number, struct.pack(whole, bits))[0])


def keys(values: Tensor, *, signed: bool, wide: bool = False) -> Tensor:
    """int32 numbers that sort as the values do in float32, or as their magnitudes; what is no number sorts last.

    If `wide`, int64 numbers that sort as they do in float64.
    """
    import torch

    number, whole, sign, rest = (
        (torch.float64, torch.int64, 63, 2**63 - 1) if wide else (torch.float32, torch.int32, 31, 2**31 - 1)
    )
    if not signed:
        return values.abs().to(number).view(whole)
    values = values.to(number) + 0.0  # −0 becomes 0
    bits = torch.where(values.isnan(), values.abs(), values).view(whole)
    return bits ^ ((bits >> sign) & rest)
