"""Adapters added up to one adapter, exactly: the sum of products is a product too, of the factors side by side.

The rank of the sum is the sum of the ranks. Factors are never averaged. Modules are matched by what their names mean
(`matching`), and named in one dialect; what is no product, and no plain difference, is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.compute.combining import combine
from streammerge.compute.expressions import Node, Term
from streammerge.compute.matrices import transposed
from streammerge.compute.parts import in_shape
from streammerge.errors import PlanError, count
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.config import config_of
from streammerge.models.adapters.dialects import SPELLINGS, Dialect
from streammerge.models.adapters.files import Adapter
from streammerge.models.adapters.matching import Matched, matched
from streammerge.models.adapters.meanings import Part
from streammerge.models.adapters.products import Share, as_lora, lifted, side_by_side
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
    """The sum of adapters, by name, each module with its own weights, under the names of a dialect.

    Without a dialect it is the first adapter's.
    """

    adapters: Mapping[str, Adapter]
    weights: Weights
    dtype: DType | None = None
    names: Dialect | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        if not self.tensors:
            raise PlanError("nothing is left of the adapters: all weights are 0", advice="Give one a weight.")

    @functools.cached_property
    def matched(self) -> Matched:
        """Which modules of the adapters are the same, and what they are called."""
        return matched({name: adapter.roles.keys() for name, adapter in self.adapters.items()}, self.names)

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
        for module in self.matched.modules:
            for part in ("weight", "bias"):
                if shares := self._shares(module, part):
                    for role, info, which in self._parts(module, part, shares):
                        found[self._tensor(module, role)] = module, info, which
        return found

    def _parts(self, module: str, part: str, shares: Sequence[Share]) -> Iterator[tuple[str, TensorInfo, str]]:
        """The tensors that a module's change of its weight, or of its bias, is stored as, by their role."""
        first = shares[0].change
        rank, (rows, *behind) = sum(share.change.rank for share in shares), first.shape
        if not first.rank:
            role = "diff" if part == "weight" else "diff_b"
            yield role, described(self._dtype(module, role), first.shape), part
        elif self._is_turned(module):
            embedding = "embedding." * self._has(module, "embedding.up")
            yield f"{embedding}down", described(self._dtype(module, "down"), (rank, rows)), "turned down"
            yield f"{embedding}up", described(self._dtype(module, "up"), (*behind, rank)), "turned up"
        else:
            dtype = self._dtype(module, "up")
            yield "up", described(dtype, (rows, rank, *(1 for _ in behind[1:]))), "up"
            yield "down", described(dtype, (rank, *behind)), "down"

    def _own(self, module: str) -> Iterator[tuple[str, Adapter, str, Part | None]]:
        """The modules of adapters that a module is."""
        for name, own in self.matched.modules[module].items():
            yield from ((name, self.adapters[name], each, part) for each, part in own)

    def _has(self, module: str, role: str) -> bool:
        return any(role in adapter.roles[own] for _, adapter, own, _ in self._own(module))

    def _is_turned(self, module: str) -> bool:
        """Whether PEFT keeps the factors of a module the other way round: of embeddings, and by `fan_in_fan_out`."""
        configs = (config_of(adapter.configs, own) for _, adapter, own, _ in self._own(module))
        return self._has(module, "embedding.up") or any(config and config.fan_in_fan_out for config in configs)

    def _dtype(self, module: str, role: str) -> DType:
        """The dtype of the first tensor that plays the role, or else of any."""
        infos = [
            (each, adapter.checkpoint.tensors[name])
            for _, adapter, own, _ in self._own(module)
            for each, name in adapter.roles[own].items()
        ]
        own = [info for each, info in infos if each.removeprefix("embedding.") == role]
        return (own or [info for each, info in infos if each != "alpha"])[0].dtype

    def _tensor(self, module: str, role: str) -> str:
        """A tensor's name: as in the first adapter that has this module under this name, else as the dialect has it."""
        for _, adapter, own, _ in self._own(module):
            if own == module and role in adapter.roles[own]:
                return adapter.roles[own][role]
        dialect = self.matched.dialect or "kohya"
        tensors = SPELLINGS[dialect].tensors
        if role not in tensors:
            raise PlanError(
                f"{module} is {role.replace('_b', ' of a bias')}, for which {dialect} has no name",
                advice="Write it under other names: --names kohya or comfy.",
            )
        return f"{module}.{tensors[role]}"

    def _shares(self, module: str, part: str) -> list[Share]:
        """What each adapter has of a module's part, those left out that have no weight."""
        weights = self._weights(module)
        having = [
            (as_lora(change), weights[name], rows)
            for name, adapter, own, rows in self._own(module)
            if weights[name] and (change := adapter.changes(own).get(part)) is not None
        ]
        height = next((change.shape[0] for change, _, rows in having if rows is None), 0)
        last = max((_stop(change, rows) for change, _, rows in having if rows), default=0)
        return [
            Share(change if rows is None else _raised(module, change, rows, height or last), weight)
            for change, weight, rows in having
        ]

    def _weights(self, module: str) -> Mapping[str, float]:
        """How much of each adapter is in a module."""
        [first, *_] = self._own(module)
        return dict(zip(self.adapters, self.weights(first[2]), strict=True))

    def _check_kinds(self) -> None:
        """PlanError for what does not add up to one adapter, or not with the others."""
        problems = [problem for module in self.matched.modules for problem in self._problems(module)]
        if problems:
            raise PlanError(
                f"{count(problems, 'module')} of the adapters can't be added up in one adapter",
                found=problems,
                advice="LoRAs and LoHas are, and plain differences; bake others into their model: streammerge bake.",
            )

    def _problems(self, module: str) -> Iterator[str]:
        for part in ("weight", "bias"):
            first: Change | None = None
            for name, adapter, own, rows in self._own(module):
                change = adapter.changes(own).get(part)
                if change is None or not self._weights(module)[name]:
                    continue
                made = as_lora(change)
                first = first or (None if rows else made)
                if not made.is_linear or made.kind not in ("LoRA", "difference") or (rows and made.kind != "LoRA"):
                    yield f"{own}   is {made.kind}" + (f": {REASONS[made.kind]}" if made.kind in REASONS else "")
                elif first and (made.kind != first.kind or not (rows or made.fits(first.shape))):
                    yield f"{own}   is {first.kind} {list(first.shape)} and {made.kind} {list(made.shape)}"


def _start(change: Change, part: Part) -> int:
    """With which row a part of a module begins."""
    return part.index * (math.prod(change.shape[1:]) if part.is_wide else change.shape[0])


def _stop(change: Change, part: Part) -> int:
    """How many rows the whole module has, as far as this part of it tells."""
    return _start(change, part) + change.shape[0] if part.is_wide else part.count * change.shape[0]


def _raised(module: str, change: Change, part: Part, height: int) -> Change:
    """A change of a part of a module as one of the whole; PlanError if that has not so many rows."""
    first, is_last = _start(change, part), part.index == part.count - 1
    fits = _stop(change, part) == height if is_last or not part.is_wide else first + change.shape[0] < height
    if not fits:
        raise PlanError(
            f"{module} has {height} rows in one adapter, of which {change.shape[0]} are no part {part.index + 1} of "
            f"{part.count}",
            advice="Are these adapters of one model?",
        )
    return lifted(change, first, height)
