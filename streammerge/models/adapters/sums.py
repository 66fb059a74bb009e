"""Adapters added up to one adapter: the sum of products is a product too, of the factors side by side.

    Σᵢ cᵢ Bᵢ Aᵢ = [√c₁ B₁, √c₂ B₂, …] [√c₁ A₁; √c₂ A₂; …]        cᵢ = wᵢ · scaleᵢ, a negative sign being B's

So nothing is lost, whatever the ranks; the rank of the sum is the sum of the ranks. Factors are never averaged.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.compute.expressions import Node, Term, combine
from streammerge.compute.matrices import factors_of, transposed
from streammerge.compute.parts import in_shape, joined
from streammerge.errors import PlanError, count
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.files import Adapter
from streammerge.models.adapters.modules import PEFT
from streammerge.tensors import DType, TensorInfo, described

Weights = Callable[[str], Sequence[float]]
"""How much of each adapter is in the module of this name."""

DIALECTS: Final[Mapping[str, str]] = {
    "PEFT's": r"base_model\.model\.",
    "kohya's, original blocks": r"(?:lora_unet|lycoris)_(?:input_blocks|middle_block|output_blocks)_",
    "kohya's, diffusers' blocks": r"(?:lora_unet|lycoris)_(?:down_blocks|mid_block|up_blocks)_",
    "kohya's, joined": r"lora_unet_(?:double|single)_blocks_",
    "kohya's, apart": r"lora_(?:unet|transformer)_(?:single_)?transformer_blocks_",
    "ComfyUI's": r"(?:model\.)?diffusion_model\.",
    "diffusers'": r"(?:unet|transformer|text_encoder\w*)\.",
    "kohya's text encoders": r"lora_te\d?_",
}
"""Ways to name modules, each with how names begin: of several in one file some would be without effect."""


@dataclass(frozen=True)
class Share:
    """What an adapter has of a module: a change, and how often it is taken."""

    change: Change
    weight: float

    @property
    def coefficient(self) -> float:
        """w · scale"""
        return self.weight * self.change.scale


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of adapters, by name, each module with its own weights."""

    adapters: Mapping[str, Adapter]
    weights: Weights
    dtype: DType | None = None

    def __post_init__(self) -> None:
        self._check_dialects()
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
        if part in ("up", "down"):
            return _side_by_side(shares, info, part)
        return combine(
            info, tuple(Term(share.coefficient, in_shape(share.change.value, info.shape)) for share in shares)
        )

    @functools.cached_property
    def ranks(self) -> Counter[int]:
        """How many modules have which rank."""
        return Counter(info.shape[0] for _, info, part in self._places.values() if part == "down")

    def _stored(self, info: TensorInfo) -> TensorInfo:
        return described(self.dtype, info.shape) if self.dtype else info

    @functools.cached_property
    def _places(self) -> dict[str, tuple[str, TensorInfo, str]]:
        """Every tensor's module, its shape with the first adapter's dtype, and which part of the module it is."""
        found: dict[str, tuple[str, TensorInfo, str]] = {}
        for module in self._modules:
            for part in ("weight", "bias"):
                if shares := self._shares(module, part):
                    for name, info, role in self._parts(module, part, shares):
                        found[name] = module, info, role
        return found

    def _parts(self, module: str, part: str, shares: Sequence[Share]) -> Iterator[tuple[str, TensorInfo, str]]:
        """The tensors that a module's change of its weight, or of its bias, is stored as."""
        first, roles = shares[0].change, self._roles(module)
        rank, (rows, *behind) = sum(share.change.rank for share in shares), first.shape
        if first.rank:
            dtype = self._dtype(module, "up")
            yield roles["up"], described(dtype, (rows, rank, *(1 for _ in behind[1:]))), "up"
            yield roles["down"], described(dtype, (rank, *behind)), "down"
        else:
            role = "diff" if part == "weight" else "diff_b"
            yield roles[role], described(self._dtype(module, role), first.shape), part

    def _dtype(self, module: str, role: str) -> DType:
        adapter = next(each for each in self.adapters.values() if role in each.roles.get(module, {}))
        return adapter.checkpoint.tensors[adapter.roles[module][role]].dtype

    @functools.cached_property
    def _modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(module for adapter in self.adapters.values() for module in adapter.roles))

    def _roles(self, module: str) -> Mapping[str, str]:
        """What the tensors of a module are called: as in the first adapter that has them."""
        found: dict[str, str] = {}
        for adapter in self.adapters.values():
            found = {**adapter.roles.get(module, {}), **found}
        return found

    def _shares(self, module: str, part: str) -> list[Share]:
        """What each adapter has of a module's part, those left out that have no weight."""
        having = zip(self.adapters.values(), self.weights(module), strict=True)
        return [
            Share(adapter.changes(module)[part], weight)
            for adapter, weight in having
            if weight and module in adapter.roles and part in adapter.changes(module)
        ]

    def _check_dialects(self) -> None:
        """PlanError if modules are named in several ways, of which nobody can tell which are the same."""
        found: dict[str, str] = {}
        for name, adapter in self.adapters.items():
            for module in adapter.roles:
                found.setdefault(dialect_of(module), f"{name}   {module}")
        beside = {dialect for dialect in found if dialect != "kohya's text encoders"}
        if any(module.startswith(PEFT) for adapter in self.adapters.values() for module in adapter.roles):
            raise PlanError(
                "an adapter of PEFT's is no sum's: its adapter_config.json would have to be written too",
                found=list(found.values()),
                advice="Bake the adapters into their model: streammerge bake MODEL ADAPTER ADAPTER -o OUT.",
            )
        if len(beside) > 1:
            raise PlanError(
                f"the adapters' modules are named in {len(beside)} ways, so that the same may have two names",
                found=[f"{example}   {dialect}" for dialect, example in found.items() if dialect in beside],
                advice="Bake the adapters into their model: streammerge bake MODEL ADAPTER ADAPTER -o OUT.",
            )

    def _check_kinds(self) -> None:
        """PlanError for what does not add up to one adapter, or not with the others."""
        problems = [problem for module in self._modules for problem in self._problems(module)]
        if problems:
            raise PlanError(
                f"{count(problems, 'module')} of the adapters can't be added up in one adapter",
                found=problems,
                advice="LoRAs and plain differences are; put others into their model with streammerge bake.",
            )

    def _problems(self, module: str) -> Iterator[str]:
        for part in ("weight", "bias"):
            shares = self._shares(module, part)
            first = shares[0].change if shares else None
            for share in shares:
                change = share.change
                if not change.is_linear or change.kind not in ("LoRA", "difference"):
                    yield f"{module}   is {change.kind}"
                elif first and (change.kind != first.kind or not change.fits(first.shape)):
                    yield f"{module}   is {first.kind} {list(first.shape)} and {change.kind} {list(change.shape)}"


def dialect_of(module: str) -> str:
    """How a module is named, "plain" where nothing tells."""
    return next((dialect for dialect, begin in DIALECTS.items() if re.match(begin, module)), "plain")


def _side_by_side(shares: Sequence[Share], info: TensorInfo, part: str) -> Node:
    """The factors of one side: those on the right one below the other, those on the left side by side."""
    rows = [_scaled(share, part) for share in shares]
    total = sum(row.info.elements for row in rows) // rows[0].info.shape[0] if part == "up" else 0
    if part == "down":
        return joined([in_shape(row, (row.info.shape[0], *info.shape[1:])) for row in rows], info)
    turned = [transposed(row) for row in rows]
    below = joined(turned, described(info.dtype, (total, info.shape[0])))
    return in_shape(transposed(below), info.shape)


def _scaled(share: Share, part: str) -> Node:
    """A factor, times the root of what their product is multiplied by."""
    left, right = factors_of(share.change.value)
    root = math.sqrt(abs(share.coefficient))
    node, number = (left, math.copysign(root, share.coefficient)) if part == "up" else (right, root)
    return node if number == 1 else combine(node.info, (Term(number, node),))
