"""Adapters added up to one adapter, exactly: the sum of products is a product too, of the factors side by side.

The rank of the sum is the sum of the ranks. Factors are never averaged. Modules are matched by what their names mean
(`matching`), and named in one dialect; what is no product, and no plain difference, is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.compute.combining import combine
from streammerge.compute.expressions import Node, Term
from streammerge.compute.matrices import transposed
from streammerge.compute.parts import in_shape
from streammerge.errors import PlanError, count
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.products import Share, as_lora, side_by_side
from streammerge.models.adapters.together import Together
from streammerge.tensors import DType, TensorInfo, described

Weights = Callable[[str], Sequence[float]]
"""How much of each adapter is in the module of this name."""

TURNED: Final = {"turned up": "down", "turned down": "up"}
"""The factors of what lies transposed, each with the one of which it is the transpose."""

REASONS: Final[Mapping[str, str]] = {
    "DoRA": "it goes by the lengths of the weights that it finds",
    "GLoRA": "it goes by the weights that it finds",
    "(IA)³": "it multiplies weights",
    "OFT": "it turns weights",
    "BOFT": "it turns weights",
    "LoKr": "it is no product of two small factors",
    "LoHa": "with cores it is no product of two small factors",
    "saved": "it stands in a tensor's place",
}
"""Why a kind can't be added up in factors."""


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of adapters, each module with its own weights."""

    together: Together
    weights: Weights
    dtype: DType | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        if not self.tensors:
            raise PlanError("nothing is left of the adapters: all weights are 0", advice="Give one a weight.")

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of the sum, in the order in which modules come in the adapters."""
        return {name: self._stored(info) for name, (_, info, _) in self._places.items()}

    def node(self, name: str) -> Node:
        """A tensor of the sum."""
        module, info, part = self._places[name]
        shares = self._shares(module, "bias" if part == "bias" else "weight")
        if part in TURNED:
            return transposed(side_by_side(shares, described(info.dtype, info.shape[::-1]), TURNED[part]))
        if part in ("up", "down"):
            return side_by_side(shares, info, part)
        return combine(
            info, tuple(Term(share.coefficient, in_shape(share.change.value, info.shape)) for share in shares)
        )

    @functools.cached_property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each module that has one."""
        return {
            module: info.shape[0] for module, info, part in self._places.values() if part in ("down", "turned down")
        }

    def _stored(self, info: TensorInfo) -> TensorInfo:
        return described(self.dtype, info.shape) if self.dtype else info

    @functools.cached_property
    def _places(self) -> dict[str, tuple[str, TensorInfo, str]]:
        """Every tensor's module, its shape with the first adapter's dtype, and which part of the module it is."""
        found: dict[str, tuple[str, TensorInfo, str]] = {}
        for module in self.together.matched.modules:
            for part in ("weight", "bias"):
                if shares := self._shares(module, part):
                    for role, info, which in self._parts(module, part, shares):
                        found[self.together.tensor(module, role)] = module, info, which
        return found

    def _parts(self, module: str, part: str, shares: Sequence[Share]) -> Iterator[tuple[str, TensorInfo, str]]:
        """The tensors that a module's change of its weight, or of its bias, is stored as, by their role."""
        first = shares[0].change
        rank, (rows, *behind) = sum(share.change.rank for share in shares), first.shape
        if not first.rank:
            role = "diff" if part == "weight" else "diff_b"
            yield role, described(self.together.dtype(module, role), first.shape), part
        elif self.together.is_turned(module):
            embedding = "embedding." * self.together.has(module, "embedding.up")
            yield f"{embedding}down", described(self.together.dtype(module, "down"), (rank, rows)), "turned down"
            yield f"{embedding}up", described(self.together.dtype(module, "up"), (*behind, rank)), "turned up"
        else:
            dtype = self.together.dtype(module, "up")
            yield "up", described(dtype, (rows, rank, *(1 for _ in behind[1:]))), "up"
            yield "down", described(dtype, (rank, *behind)), "down"

    def _shares(self, module: str, part: str) -> list[Share]:
        """What each adapter has of a module's part, those left out that have no weight."""
        weights = self._weights(module)
        having = [name for name, weight in weights.items() if weight]
        return [Share(as_lora(change), weights[name]) for name, change in self.together.changes(module, part, having)]

    def _weights(self, module: str) -> Mapping[str, float]:
        """How much of each adapter is in a module."""
        return dict(zip(self.together.adapters, self.weights(self.together.first(module)), strict=True))

    def _check_kinds(self) -> None:
        """PlanError for what does not add up to one adapter, or not with the others."""
        problems = [problem for module in self.together.matched.modules for problem in self._problems(module)]
        if problems:
            raise PlanError(
                f"{count(problems, 'module')} of the adapters can't be added up in one adapter",
                found=problems,
                advice="LoRAs and LoHas are, and plain differences; bake others into their model: streammerge bake.",
            )

    def _problems(self, module: str) -> Iterator[str]:
        for part in ("weight", "bias"):
            first: Change | None = None
            for own in self.together.own(module):
                change = own.change(part)
                if change is None or not self._weights(module)[own.adapter]:
                    continue
                made, rows = as_lora(change), own.rows
                first = first or (None if rows else made)
                if not made.is_linear or made.kind not in ("LoRA", "difference") or (rows and made.kind != "LoRA"):
                    reason = f": {REASONS[made.kind]}" if made.kind in REASONS else ""
                    yield f"{own.module}   is {made.kind}{reason}"
                elif first and (made.kind != first.kind or not (rows or made.fits(first.shape))):
                    yield f"{own.module}   is {first.kind} {list(first.shape)} and {made.kind} {list(made.shape)}"
