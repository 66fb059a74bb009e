"""The values of a merge's parameters, tensor by tensor: from the recipe, and the layout's layers and blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from streammerge.errors import PlanError
from streammerge.methods import find_method
from streammerge.methods.contract import ParameterValue
from streammerge.models.blocks import Blocks, blocks_of
from streammerge.models.layers import Layers, layers_of
from streammerge.recipe.blockwise import BlockSetting, list_remark
from streammerge.recipe.effects import ignored_notes
from streammerge.recipe.parameters import (
    NO_BLOCKS,
    ParameterSources,
    Setting,
    check_blocks,
    filters_of,
    hidden_filters,
    is_by_block,
    is_gradient,
    values_of,
)
from streammerge.recipe.recipe import Recipe, Rule
from streammerge.tensors import TensorInfo

MAX_CONDITIONS: Final = 20_000_000
"""How many conditions on names are gone through for all tensors of one merge at most."""

Values = Mapping[str, ParameterValue]


@dataclass(frozen=True, slots=True)
class _OfRule:
    """Where the parameters of a rule's tensors come from, what finding their values takes, whether any are by block,
    and the values if they are the same for all tensors."""

    sources: ParameterSources
    cost: int
    by_block: bool
    constant: Values | None


class Named(Protocol):
    """What has tensors of its own names, as a model has."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors by their names."""
        ...


@dataclass
class Tuning:
    """The recipe's parameters over the tensors of the layout. Tensors with the same values share them."""

    recipe: Recipe
    layout: Named
    gone_through: int = 0
    shared: dict[tuple[Any, ...], Values] = field(default_factory=dict)
    by_rule: dict[int, _OfRule] = field(default_factory=dict)
    heard: set[tuple[int, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.method = find_method(self.recipe.method)
        self.models = [entry.name for entry in self.recipe.models]
        self.by_model = {entry.name: entry.parameters for entry in self.recipe.models}
        self.blocks = self._blocks()

    @functools.cached_property
    def layers(self) -> Layers:
        """The layout's layers, if a gradient goes over them: a config.json is not read for anything else."""
        return layers_of(self.layout) if any(map(is_gradient, self._settings())) else Layers({})

    def values(self, name: str, rule: Rule | None) -> Values:
        """The value of each of the method's parameters for a tensor; RecipeError if one that is needed isn't set."""
        found = self._of(rule)
        if found.constant is not None:
            return found.constant
        self.gone_through += found.cost
        if self.gone_through > MAX_CONDITIONS:
            raise PlanError(
                f"the parameters have so many conditions and elements that more than {MAX_CONDITIONS:,} would be gone "
                "through for all tensors and models",
                advice="Give fewer, or use rules: their globs are looked up by how names begin.",
            )
        return self._resolved(found.sources, name)

    def block(self, name: str, rule: Rule | None) -> str:
        """`BASE (VAE)`: the tensor's block, if any parameter is given by block."""
        if not self._of(rule).by_block:
            return ""
        part, *whole = self.blocks.places[name]
        return f"{whole[0]} ({part})" if whole else part

    def remarks(self) -> Iterator[str]:
        """What the user should know: parameters without effect, and filters that fit no name."""
        places = list(self.recipe.places(self.recipe.where))
        yield from ignored_notes(places, self.method)
        names = "\n".join(self.layout.tensors)
        for place in places:
            for name, setting in place.settings.items():
                if (id(place.settings), name) not in self.heard and not place.ignores(self.method, name):
                    yield f"{place.where}: {name} changes nothing: no tensor takes its value from here"
                for value in values_of(setting):
                    if isinstance(value, BlockSetting) and (remark := list_remark(value, self.blocks)):
                        yield f"{place.where}: {name}: {remark}"
                for part in dict.fromkeys(filters_of(setting)):
                    if part not in names and not place.ignores(self.method, name):
                        yield f"{place.where}: the filter {part!r} of {name} fits no tensor"
                for part, hiding in hidden_filters(setting):
                    late = repr(part) if part else "all others"
                    first = f"the filter {hiding!r}" if hiding else "a value without a filter"
                    yield f"{place.where}: the value of {name} for {late} is never taken: {first} stands before it"

    def _resolved(self, sources: ParameterSources, name: str) -> Values:
        found = sources.resolve(self.method, name, self.models, self.layers, self.blocks)
        return self.shared.setdefault(tuple(found.items()), found)

    def _of(self, rule: Rule | None) -> _OfRule:
        if id(rule) not in self.by_rule:
            own = rule.parameters if rule else {}
            sources = ParameterSources(own, self.by_model, self.recipe.parameters, self.heard)
            cost = sources.cost * len(self.models)
            constant = None if cost else self._resolved(sources, next(iter(self.layout.tensors), ""))
            self.by_rule[id(rule)] = _OfRule(sources, cost, bool(sources.by_block(self.method)), constant)
        return self.by_rule[id(rule)]

    def _settings(self) -> Iterator[Setting]:
        for place in self.recipe.places(self.recipe.where):
            yield from place.settings.values()

    def _blocks(self) -> Blocks:
        """The layout's blocks if parameters are given by block; RecipeError where their values don't fit these."""
        if not any(map(is_by_block, self._settings())):
            return NO_BLOCKS
        blocks = blocks_of(self.layout)
        for place in self.recipe.places(self.recipe.where):
            check_blocks(place.settings, blocks, place.where)
        return blocks
