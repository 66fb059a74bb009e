"""Which input a recipe means where it names one: as its base, its layout, what a rule takes, where tokens are from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from streammerge.errors import RecipeError
from streammerge.recipe.entries import Entries
from streammerge.recipe.naming import check_one_is_meant, has_adapted, same_source, unused_name
from streammerge.recipe.recipe import Input, Recipe


@dataclass(frozen=True, slots=True)
class References:
    """Finds inputs by their name, or by what they are, as `entries` are read.

    Names that are `shared` by several files mean none of them, and those that are `given` are no paths.
    """

    entries: Entries
    shared: Collection[str] = ()
    given: Collection[str] = ()

    def find(self, recipe: Recipe, raw: Any, where: str) -> Input:  # noqa: ANN401
        """The input that is meant: by its name, by its path, or a new one."""
        if isinstance(raw, str) and raw in recipe.named:
            check_one_is_meant(raw, recipe, self.shared, where)
            return recipe.named[raw]
        return self._at(recipe, raw, where)

    def _at(self, recipe: Recipe, raw: Any, where: str) -> Input:  # noqa: ANN401
        """The input at a path, or a new one."""
        entry = self.entries.input(raw, where)
        for known in recipe.named.values():
            if same_source(known, entry):
                return known
        return replace(entry, name=unused_name(entry.name, recipe))

    def base(self, recipe: Recipe, raw: Any, where: str) -> Input:  # noqa: ANN401
        """The base: one of the models, or a new input that is called `base` unless it has a name of its own."""
        find = self._at if self._is_adapted(recipe, raw, where) else self.find
        base = find(recipe, raw, f"{where}: base_model")
        named = raw in self.entries.bindings if isinstance(raw, str) else raw.get("name") is not None
        if base.name in recipe.named or named:
            return base
        return replace(base, name=unused_name("base", recipe))

    def _is_adapted(self, recipe: Recipe, raw: Any, where: str) -> bool:  # noqa: ANN401
        """Whether a word is the path of a model that is an input with adapters in it, which has its name from there:
        mergekit's `base_model: llama` beside `model: llama+lora` is the model without them."""
        if not isinstance(raw, str) or raw not in recipe.named or raw in self.given or not self.entries.is_there(raw):
            return False
        return has_adapted(recipe, self.entries.input(raw, where))

    def mention(self, recipe: Recipe, raw: Any, where: str) -> tuple[Recipe, str]:  # noqa: ANN401
        """The name of the input that is meant, and the recipe with that input among its own."""
        entry = self.find(recipe, raw, where)
        if entry.name not in recipe.named:
            recipe = replace(recipe, others=(*recipe.others, entry))
        return recipe, entry.name

    def among(self, recipes: Iterable[Recipe]) -> Callable[[Any, str], str]:
        """What gives the name of the input of these recipes that is meant."""
        named = {name: entry for recipe in recipes for name, entry in recipe.named.items()}
        one = Recipe("linear", tuple(replace(entry, parameters={}) for entry in named.values()))

        def name_of(raw: Any, where: str) -> str:  # noqa: ANN401
            entry = self.find(one, raw, where)
            if entry.name in named:
                return entry.name
            raise RecipeError(
                f"{where}: {str(raw)[:80]!r} is none of the models", advice=f"Models: {', '.join(named)}."
            )

        return name_of
