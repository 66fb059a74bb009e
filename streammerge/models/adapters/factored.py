"""Adapters whose tensors are factors of matrices that expressions describe: what is written of each, and how large.

    Δ (an expression)  ─►  B A ≈ Δ of rank r      one decomposition for both factors, made when a worker comes to it
                       ─►  alpha = r              so that the scale is 1

A rank that hangs on singular values has to be known before the header is written: what is measured for that is a merge
of its own, whose outputs are the singular values of every matrix.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from streammerge.compute.expressions import ByBlock, ByWhole, Node
from streammerge.compute.matrices import products_of, zeros
from streammerge.compute.parts import in_shape, range_of
from streammerge.errors import PlanError, count, listed, plural
from streammerge.methods.contract import Parameters
from streammerge.methods.factoring import (
    BEFORE,
    FACTORS,
    FACTORS_OF_PRODUCTS,
    TOLD,
    VALUES,
    VALUES_OF_PRODUCTS,
    is_exact,
)
from streammerge.methods.registry import BlockMethod, Needs, WholeMethod
from streammerge.models.adapters.ranks import LowRank, Spectrum
from streammerge.models.decisions import Decision, Decisions
from streammerge.tensors import DTYPES, DType, TensorInfo, described

if TYPE_CHECKING:
    from torch import Tensor

PART_BYTES: Final = 1500
"""What is kept in memory of a part: its names, its shape, what was measured of it."""

WHOLES: Final = 64
"""Of so many matrices the expression of the factors is at hand: that of one has to be the same for both factors."""


ALWAYS: Final = "always"
"""The group of what is written wherever anything is."""


def _filled(zero: Tensor, *, value: float) -> Tensor:
    """θ = value"""
    return zero + value


FILLED: Final = BlockMethod("filled", (), "none", (1, 1), "θ = value", function=_filled, needs=Needs(temporaries=1))


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What an adapter has of a difference of this shape: a matrix's factors, or all of it.

    `names` are those of the tensors that are written, by their roles: up, down and perhaps alpha, or diff, or saved.
    There are none of what is only looked at, and `reason` says why. `make` gives the difference; if it is `turned`, the
    factors are those of its transpose. `why` is how the difference is made. What is saved is what `whole` gives, with
    all of its `group` if any of that differs (in `ALWAYS` with any part), but not without the part that it `needs`.
    """

    name: str
    names: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: DType
    make: Callable[[], Node]
    why: str
    turned: bool = False
    reason: str = ""
    whole: Callable[[], Node] | None = None
    group: str = ""
    needs: str = ""

    @property
    def has_factors(self) -> bool:
        """Whether it is written as factors."""
        return "up" in self.names

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as that of a matrix, whose rows are filters."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape) // max(rows, 1)

    @property
    def products(self) -> tuple[tuple[float, ...], tuple[Node, ...]] | None:
        """The coefficients and factors of the products whose sum it is, if it is one of fewer directions than it has
        rows and columns."""
        found = products_of(self.make()) if self.has_factors else None
        return None if found is None or _inner(found[1]) > min(self.matrix) else found

    def info(self, role: str, rank: int) -> TensorInfo:
        """What a tensor of it looks like."""
        if role == "alpha":
            return described(DTYPES["F32"], ())
        if not self.has_factors:
            return described(self.dtype, self.shape)
        rows, *behind = self.shape[::-1] if self.turned else self.shape
        up = (rows, rank, *(1 for _ in behind[1:]))
        return described(self.dtype, up if role == "up" else (rank, *behind))


def _inner(factors: Sequence[Node]) -> int:
    """Over how many directions these products go together."""
    return sum(factor.info.shape[0] for factor in factors[1::2])


@dataclass(frozen=True, eq=False)
class Factored:
    """An adapter of these parts; `spectra` are what was measured of them, if anything was.

    What `differs` where it is written has to be looked at first in any case.
    """

    parts: Sequence[Part]
    rule: LowRank
    differs: bool = False
    spectra: Mapping[str, Spectrum] | None = None

    def __post_init__(self) -> None:
        hard = [part.name for part in self.parts if self._is_random(part) and self.rule.wants_all_of(part.shape)]
        if hard:
            raise PlanError(
                f"{len(hard):,} {plural(hard, 'matrix is', 'matrices are')} too large to be decomposed exactly, and "
                f"{listed(list(self.rule.criteria))} wants all singular values",
                found=hard,
                advice="Say with --rank how many at the most, or use --svd exact.",
            )

    @functools.cached_property
    def decisions(self) -> Decisions:
        """What becomes of the adapter's tensors."""
        return Decisions(self._places, self._decide)

    @functools.cached_property
    def _places(self) -> dict[str, tuple[Part, str]]:
        """Every tensor's part, and its role there."""
        return {name: (part, role) for part in self.written for role, name in part.names.items()}

    @functools.cached_property
    def written(self) -> Sequence[Part]:
        """The parts that are written: those with names, and with a difference as far as that is known."""
        return [part for part in self.parts if self._has_place(part) and self.ranks[part.name]]

    def _has_place(self, part: Part) -> bool:
        """Whether a part has names, and what it needs is written."""
        return bool(part.names) and (not part.needs or part.needs in self._with_factors)

    @functools.cached_property
    def _with_factors(self) -> frozenset[str]:
        """The parts of which factors are written, by their names."""
        return frozenset(part.name for part in self.parts if part.has_factors and self.ranks[part.name])

    @functools.cached_property
    def ranks(self) -> Mapping[str, int]:
        """Every part's rank, at the most if nothing was measured; 1 of what has none, 0 of what does not differ, nor
        any of its group."""
        own = {part.name: self._rank(part) for part in self.parts}
        groups = {part.group for part in self.parts if part.names and own[part.name]}
        there = groups - {""} | ({ALWAYS} if groups else set())
        return {part.name: own[part.name] or int(part.group in there) for part in self.parts}

    def _rank(self, part: Part) -> int:
        most = self._most(part) if part.has_factors else 1
        return most if self.spectra is None else self.rule.chosen(self.spectra[part.name], most)

    def _most(self, part: Part) -> int:
        products = part.products
        return self.rule.most(part.shape, None if products is None else _inner(products[1]))

    def _decide(self, name: str) -> Decision:
        part, role = self._places[name]
        rank, why = self.ranks[part.name], part.why
        info = part.info(role, rank)
        if not part.has_factors:
            return Decision(name, "merged", why, info, in_shape((part.whole or part.make)(), part.shape))
        why = f"{why}, rank {rank}"
        if role == "alpha":
            return Decision(name, "merged", why, info, ByBlock(info, FILLED, {"value": float(rank)}, (zeros(()),)))
        first = 0 if role == "up" else part.info("up", rank).elements
        return Decision(name, "merged", why, info, range_of(self._whole(part.name), first, info.shape))

    @functools.cached_property
    def _whole(self) -> Callable[[str], ByWhole]:
        """Both factors of a part, by its name: the same object for both."""
        parts = {part.name: part for part in self.written}

        @functools.lru_cache(maxsize=WHOLES)
        def made(name: str) -> ByWhole:
            part, rank = parts[name], self.ranks[name]
            info = described(DTYPES["F32"], (sum(part.matrix) * rank + TOLD,))
            own: Parameters = {"rank": rank, "clamp": self.rule.clamp_quantile, "turned": part.turned}
            return self._applied(part, info, own, FACTORS, FACTORS_OF_PRODUCTS)

        return made

    def _applied(
        self,
        part: Part,
        info: TensorInfo,
        own: Parameters,
        of_matrix: WholeMethod,
        of_products: WholeMethod,
        asked: Parameters = MappingProxyType({}),
    ) -> ByWhole:
        """One of the methods on the part's matrix, or the other on the products whose sum it is, of which more may be
        asked."""
        (rows, columns), products = part.matrix, part.products
        sizes: Parameters = {"rows": rows, "columns": columns, **own}
        if products is not None:
            coefficients, factors = products
            more: Parameters = {**sizes, **asked, "coefficients": coefficients, "inner": _inner(factors)}
            return ByWhole(info, of_products, more, factors, part.name)
        node = in_shape(part.make(), part.matrix)
        return ByWhole(info, of_matrix, {**sizes, "svd": self.rule.svd}, (node,), part.name)

    # ── what is measured before ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_to_be_measured(self) -> bool:
        """Whether what is written hangs on what the differences are, and that isn't known."""
        return self.spectra is None and (self.differs or bool(self.rule.criteria) or self.rule.min_diff > 0)

    def measures(self) -> Decisions:
        """A merge whose outputs are what has to be known of every part."""
        parts = {part.name: part for part in self.parts}

        def decide(name: str) -> Decision:
            part = parts[name]
            wanted = self._values_wanted(part)
            info = described(DTYPES["F32"], (BEFORE + wanted,))
            own: Parameters = {"count": wanted}
            node = self._applied(part, info, own, VALUES, VALUES_OF_PRODUCTS, {"measured": self.rule.min_diff > 0})
            return Decision(name, "merged", "measured", info, node)

        return Decisions(parts, decide)

    def _values_wanted(self, part: Part) -> int:
        """How many singular values have to be known: all that there are, where their sum counts."""
        if not self.rule.criteria or not part.has_factors:
            return 0
        everything = replace(self.rule, rank=None, conv_rank=None) if "sv_cumulative" in self.rule.criteria else None
        return self._most(part) if everything is None else replace(self, rule=everything)._most(part)

    def settled(self, spectra: Mapping[str, Spectrum]) -> Factored:
        """The same with the ranks that follow from what was measured; PlanError for what has no factors."""
        bad = [name for name, found in spectra.items() if not math.isfinite(found.whole)]
        if bad:
            raise PlanError(
                f"{count(bad, 'difference')} {plural(bad, 'holds', 'hold')} infinite values or NaNs",
                found=bad,
                advice="Mend the models, or leave such tensors out with --drop GLOB.",
            )
        made = replace(self, spectra=spectra)
        if not made.written:
            raise PlanError(
                "nothing is left to be written: no difference is larger than "
                + (f"--min-diff {self.rule.min_diff:g}" if self.rule.min_diff else "0"),
                found=list(made.left_out),
                advice="Name two models that differ.",
            )
        return made

    # ── what is told ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def kept_bytes(self) -> int:
        """What is kept in memory of the parts."""
        return PART_BYTES * len(self.parts)

    @functools.cached_property
    def by_rank(self) -> Counter[int]:
        """How many modules have which rank."""
        return Counter(self.ranks[part.name] for part in self.written if part.has_factors)

    def remarks(self) -> Iterator[str]:
        """What the user should know of what is written, and of what isn't."""
        if self.by_rank:
            low, high = min(self.by_rank), max(self.by_rank)
            most = "at most " if self.spectra is None and self.rule.criteria else ""
            ranks = f"{low}" if low == high else f"{low} to {high}"
            yield f"{count(range(self.by_rank.total()), 'module')} of rank {most}{ranks}; alpha is the rank"
        if random := [part.name for part in self.written if self._is_random(part)]:
            yield (
                f"{len(random):,} {plural(random, 'matrix is', 'matrices are')} decomposed at random, with an error of "
                "on average at most (1 + 4 √(2n / (r − 1)))^(1/5) times the least one in spectral norm (--svd exact "
                f"takes more memory and time): {listed(random)}"
            )
        same = [part.name for part in self.parts if part.names and not self.ranks[part.name]]
        if same:
            is_same = "differ" if not self.rule.min_diff else f"differ by more than {self.rule.min_diff:g}"
            told = f"{plural(same, 'does', 'do')} not {is_same}, and {plural(same, 'is', 'are')} left out"
            yield f"{count(same, 'tensor')} {told}: {listed(same)}"
        yield from self.left_out

    def _is_random(self, part: Part) -> bool:
        return part.has_factors and not is_exact(self.rule.svd, *part.matrix) and part.products is None

    @property
    def left_out(self) -> Iterator[str]:
        """What has no place in the adapter, and differs, or may do so: a sentence for each reason."""
        reasons: dict[str, list[str]] = {}
        for part in self.parts:
            if not self._has_place(part) and self.ranks[part.name]:
                reasons.setdefault(part.reason, []).append(part.name)
        for reason, names in reasons.items():
            differ = "may differ" if self.spectra is None else plural(names, "differs", "differ")
            told = f"{count(names, 'tensor')} {differ}, and {plural(names, 'is', 'are')} not in the adapter ({reason})"
            yield f"{told}: {listed(names)}"
