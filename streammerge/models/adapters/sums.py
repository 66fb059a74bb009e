"""Adapters added up to one adapter, exactly: the sum of products is a product too, of the factors side by side.

The rank of the sum is the sum of the ranks. Factors are never averaged. Modules are matched by what their names mean
(`matching`), and named in one dialect; what is no product, and no plain difference, is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from streammerge.compute.combining import combine
from streammerge.compute.expressions import Node, Term
from streammerge.compute.matrices import transposed
from streammerge.compute.parts import in_shape
from streammerge.errors import PlanError, count, plural
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.experts import KIND, Experts
from streammerge.models.adapters.products import Share, as_lora, side_by_side
from streammerge.models.adapters.together import Together
from streammerge.tensors import DType, TensorInfo, described

Weights = Callable[[str], Sequence[float]]
"""How much of each adapter is in the sum's module of this name."""

REASONS: Final[Mapping[str, str]] = {
    "DoRA": "it goes by the lengths of the weights that it finds",
    "GLoRA": "it goes by the weights that it finds",
    "(IA)³": "it multiplies weights",
    "OFT": "it turns weights",
    "BOFT": "it turns weights",
    "LoKr": "it is no product of two small factors, of kernels, with a core, or where its larger part is whole",
    "LoHa": "with cores it is no product of two small factors",
}
"""Why a kind can't be added up in factors."""

ADDED: Final = ("LoRA", KIND, "difference")
"""The kinds that add up."""

REPLACES: Final = "it stands in a tensor's place"
"""Why no saved module can, nor a trained token."""


Side = Literal["up", "down"]
"""A factor: the left or the right one."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the sum: its role in a module, of which `part`, and what it looks like.

    Of a product it is one `side`; where that is kept the other way round it is the other side's transpose: `is_turned`.
    Of products of several `experts` it is a side of all of them.
    """

    module: str
    part: str
    role: str
    info: TensorInfo
    side: Side | None = None
    is_turned: bool = False
    experts: int = 1


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of adapters, each module with its own weights."""

    together: Together
    weights: Weights
    dtype: DType | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_shapes()
        if not self.tensors:
            raise PlanError("nothing is left of the adapters: all weights are 0", advice="Give one a weight.")

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of the sum, in the order in which modules come in the adapters."""
        return {name: self._stored(place.info) for name, place in self._places.items()}

    def node(self, name: str) -> Node:
        """A tensor of the sum."""
        place = self._places[name]
        shares, info = self._shares(place.module, place.part), place.info
        if place.side is None:
            terms = (Term(share.coefficient, in_shape(share.change.value, info.shape)) for share in shares)
            return combine(info, tuple(terms))
        if place.is_turned:
            return transposed(side_by_side(shares, described(info.dtype, info.shape[::-1]), place.side))
        return side_by_side(shares, info, place.side)

    @functools.cached_property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each module that has one."""
        downs = (place for place in self._places.values() if place.role.removeprefix("embedding.") == "down")
        return {place.module: place.info.shape[0] // place.experts for place in downs}

    def _stored(self, info: TensorInfo) -> TensorInfo:
        return described(self.dtype, info.shape) if self.dtype else info

    @functools.cached_property
    def _places(self) -> dict[str, Place]:
        """Every tensor of the sum by its name."""
        names = self.together.matched.modules
        modules = ((module, part) for module in names for part in self.together.parts(module))
        return {
            self.together.tensor(module, place.role): place
            for module, part in modules
            if (shares := self._shares(module, part))
            for place in self._tensors(module, part, shares)
        }

    def _tensors(self, module: str, part: str, shares: Sequence[Share]) -> Iterator[Place]:
        """What a module's change of its weight, or of its bias, is stored as, with the first adapter's dtypes."""
        first, dtype = shares[0].change, functools.partial(self.together.dtype, module)
        rank, (rows, *behind) = sum(share.change.rank for share in shares), first.shape
        if isinstance(first, Experts):
            shapes: dict[Side, tuple[int, int]] = {"up": (behind[0], rows * rank), "down": (rows * rank, behind[1])}
            for side, shape in shapes.items():
                yield Place(module, part, side, described(dtype("up"), shape), side, experts=first.count)
        elif not first.rank:
            role = "diff" if part == "weight" else "diff_b"
            yield Place(module, part, role, described(dtype(role), first.shape))
        elif self.together.is_turned(module):
            table = "embedding." * self.together.has(module, "embedding.up")
            down, up = described(dtype("down"), (rank, rows)), described(dtype("up"), (*behind, rank))
            yield Place(module, part, f"{table}down", down, "up", is_turned=True)
            yield Place(module, part, f"{table}up", up, "down", is_turned=True)
        else:
            up, down = (
                described(dtype("up"), (rows, rank, *(1 for _ in behind[1:]))),
                described(dtype("up"), (rank, *behind)),
            )
            yield Place(module, part, "up", up, "up")
            yield Place(module, part, "down", down, "down")

    def _shares(self, module: str, part: str) -> list[Share]:
        """What each adapter has of a module's part, those left out that have no weight."""
        weights = self._weights(module)
        having = [name for name, weight in weights.items() if weight]
        return [Share(as_lora(change), weights[name]) for name, change in self.together.changes(module, part, having)]

    def _weights(self, module: str) -> Mapping[str, float]:
        """How much of each adapter is in a module."""
        return dict(zip(self.together.adapters, self.weights(module), strict=True))

    def _check_kinds(self) -> None:
        """PlanError for what does not add up to one adapter, or not with the others."""
        problems = [problem for module in self.together.matched.modules for problem in self._problems(module)]
        if problems:
            raise PlanError(
                f"{count(problems, 'module')} of the adapters can't be added up in one adapter",
                found=problems,
                advice="LoRAs, LoHas, plain differences and LoKrs whose larger part is factored add up; other LoKrs, "
                "and LoHas with cores, to a rank (--rank R). Bake others into their model: streammerge bake MODEL "
                "ADAPTER ADAPTER -o TUNED. One adapter of that is made by streammerge extract TUNED MODEL --rank R.",
            )

    def _problems(self, module: str) -> Iterator[str]:
        for part in self.together.parts(module):
            first: Change | None = None
            for own in self.together.own(module):
                change = own.change(part)
                if change is None or not self._weights(module)[own.adapter]:
                    continue
                made, rows = as_lora(change), own.rows
                if not made.is_linear or made.kind not in ADDED or (rows and made.kind != "LoRA"):
                    reason = REPLACES if made.way == "replace" else REASONS.get(made.kind, "")
                    yield f"{own.module}   of {own.adapter} is {made.kind}" + (f": {reason}" if reason else "")
                elif first and made.kind != first.kind:
                    yield _two(own.module, first, made)
                else:
                    first = first or (None if rows else made)

    def _check_shapes(self) -> None:
        """PlanError for modules that have another shape in each adapter: these are of different models."""
        names = self.together.matched.modules
        wrong = [told for module in names for part in self.together.parts(module) for told in self._unfit(module, part)]
        if wrong:
            raise PlanError(
                f"{count(wrong, 'module')} of the adapters {plural(wrong, 'has', 'have')} another shape in each",
                found=wrong,
                advice="Name adapters of one model; put those of different models each into its own: streammerge bake.",
            )

    def _unfit(self, module: str, part: str) -> Iterator[str]:
        weights, first = self._weights(module), None
        for own in self.together.own(module):
            change = own.change(part)
            if change is None or own.rows or not weights[own.adapter]:
                continue
            first = first or change
            if not _fit(change, first):
                yield _two(own.module, first, change)


def _two(module: str, one: Change, other: Change) -> str:
    return f"{module}   is {one.kind} {list(one.shape)} and {other.kind} {list(other.shape)}"


def _fit(one: Change, other: Change) -> bool:
    """Whether both are of one shape; matrices of experts lie one way in all adapters."""
    return one.shape == other.shape if isinstance(one, Experts) else one.fits(other.shape)
