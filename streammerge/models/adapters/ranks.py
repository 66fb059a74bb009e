"""How large the factors of an adapter are to be: a rank, or what of a matrix they have to hold.

    energy E            the least rank with Σ σᵢ² of those kept ≥ E Σ σᵢ²
    sv_fro F            the same of the norm: energy F²                             kohya's `sv_fro`
    sv_cumulative C     the least rank with Σ σᵢ of those kept ≥ C Σ σᵢ              kohya's `sv_cumulative`
    sv_ratio R          as many as are greater than σ₁ / R                          kohya's `sv_ratio`
    sv_epsilon T        as many as are greater than T                               mergekit's `sv-epsilon`

One at the least; with a rank beside it, that is the most. Older versions of kohya's tools keep one more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from streammerge.methods.factoring import is_exact
from streammerge.models.adapters.dialects import Dialect


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What was measured of a matrix: its norm, its greatest magnitude, and its singular values, as far as wanted."""

    whole: float
    greatest: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is asked for: of matrices at most `rank` singular values, of kernels `conv_rank`, as a criterion wants.

    `clamp_quantile` cuts the elements of factors; what differs by no more than `min_diff` anywhere is left out. With
    `biases` vectors are written as whole differences; `names` is whose names are written.
    """

    rank: int | None = None
    conv_rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None
    sv_epsilon: float | None = None
    svd: str = "auto"
    clamp_quantile: float = 1.0
    min_diff: float = 0.0
    biases: bool = False
    names: Dialect | None = None

    @property
    def criteria(self) -> dict[str, float]:
        """The criteria that are given."""
        return {name: value for name in CRITERIA if (value := getattr(self, name)) is not None}

    def most(self, shape: Sequence[int], inner: int | None = None) -> int:
        """The greatest rank of a matrix of this shape, which may be a product over so many."""
        is_kernel = math.prod(shape[2:]) > 1
        asked = self.conv_rank if is_kernel and self.conv_rank is not None else self.rank
        bounds = [shape[0], math.prod(shape[1:]), inner, asked]
        return min(bound for bound in bounds if bound is not None)

    def chosen(self, found: Spectrum, most: int) -> int:
        """The rank of a matrix with these singular values."""
        if not found.whole or found.greatest <= self.min_diff:
            return 0
        if not self.criteria:
            return most
        [(name, wanted)] = self.criteria.items()
        return max(min(_rank(name, wanted, found), most), 1)

    def wants_all_of(self, shape: Sequence[int]) -> bool:
        """Whether a criterion needs all singular values of a matrix that isn't decomposed exactly."""
        rows, columns = shape[0], math.prod(shape[1:])
        if not self.criteria or is_exact(self.svd, rows, columns):
            return False
        return "sv_cumulative" in self.criteria or self.most(shape) == min(rows, columns)

    def described(self) -> dict[str, Any]:
        """What is not at its default, as a recipe writes it."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field.name: own[field.name] for field in fields(self) if own[field.name] != field.default}


CRITERIA: Final = ("energy", "sv_ratio", "sv_fro", "sv_cumulative", "sv_epsilon")
"""What says how much a matrix has to hold; one of them is given at the most."""

ROUNDING: Final = 1e-12
"""What a sum may lack of a wanted share by rounding alone."""


def _rank(name: str, wanted: float, found: Spectrum) -> int:
    """The least rank that a criterion is content with."""
    values = found.values
    if name == "sv_ratio":
        return sum(value > values[0] / wanted for value in values)
    if name == "sv_epsilon":
        return sum(value > wanted for value in values)
    if name == "sv_cumulative":
        return _least(values, wanted * math.fsum(values))
    share = wanted if name == "energy" else wanted * wanted
    return _least([value * value for value in values], share * found.whole**2)


def _least(values: Sequence[float], wanted: float) -> int:
    """How many of the values it takes to come to so much; all of them if they never do."""
    sums = itertools.accumulate(values)
    return next((n for n, total in enumerate(sums, 1) if total >= wanted * (1 - ROUNDING)), len(values))
