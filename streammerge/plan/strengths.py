"""A recipe's parameters over the modules of adapters that are merged alone: how much of each goes into which."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from streammerge.methods.linear import normalized
from streammerge.models.adapters.addresses import Addresses
from streammerge.models.adapters.together import Together
from streammerge.plan.tuning import Tuning, Values
from streammerge.recipe.parameters import WEIGHT
from streammerge.recipe.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Strengths:
    """The values of parameters for each module, as for the tensor that it would be in a model."""

    recipe: Recipe
    together: Together

    def values(self, module: str) -> Values:
        """Of all parameters, for a module of what is made of the adapters."""
        return self._tuning.values(self._addresses.of(module), None)

    def of(self, module: str) -> Sequence[float]:
        """How much of each adapter goes into a module, where they are added up: strengths add up, they are not divided
        by their sum, unless `normalize` is said to be true."""
        found = self.values(module)[WEIGHT]
        own = [float(each) for each in found] if isinstance(found, tuple) else [float(found)] * len(self.recipe.models)
        is_normalised = self.recipe.parameters.get("normalize") is True
        return normalized(tuple(own)) if is_normalised else own

    def remarks(self) -> Iterator[str]:
        """What is to be known of the values, once all modules have theirs."""
        for module in self.together.matched.modules:
            self.values(module)  # only then it is known what has an effect
        yield from self._tuning.remarks()
        if self._tuning.layers.counts:
            yield from self._addresses.remarks()

    @functools.cached_property
    def _tuning(self) -> Tuning:
        return Tuning(self.recipe, self._addresses)

    @functools.cached_property
    def _addresses(self) -> Addresses:
        return Addresses(self.together)
