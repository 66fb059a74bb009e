"""What models have that the layout has not: what is missing there, what is left out of the output, and what is not."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.models.averaged import never_averaged
from streammerge.models.prediction import is_mark
from streammerge.models.presence import Names, names_beside, names_lacking, names_outside
from streammerge.models.quantised import CodedModels
from streammerge.plan.globs import RuleIndex
from streammerge.plan.meaning import Meaning
from streammerge.plan.problems import Problems, Unshared
from streammerge.recipe.recipe import Recipe, Rule
from streammerge.tensors import Model, TensorInfo


@dataclass(frozen=True)
class Comparison:
    """The models of a merge, of which the `inputs` are merged, by what some of them have and others lack."""

    recipe: Recipe
    models: Mapping[str, Model]
    inputs: Sequence[str]
    coded: CodedModels
    rules: RuleIndex
    meaning: Meaning

    @functools.cached_property
    def compared(self) -> dict[str, Mapping[str, TensorInfo]]:
        """The models that the recipe brings together, the layout first."""
        taken = [rule.model for rule in self.recipe.rules if rule.action == "take"]
        return {name: self.models[name].tensors for name in (self.recipe.layout_name, *self.inputs, *taken)}

    @functools.cached_property
    def _parts(self) -> frozenset[str]:
        """The models from which only components are taken: nobody expects them to have the rest."""
        taken = {rule.model for rule in self.recipe.rules if rule.component and rule.action == "take"}
        return frozenset(taken - {self.recipe.layout_name, *self.inputs})

    def unshared(self, name: str, *, taken: bool) -> Unshared:
        """Who has the tensor and who lacks it."""
        having = [model for model, tensors in self.compared.items() if name in tensors]
        return Unshared(name, having, [model for model in self.compared if model not in having], taken)

    def lacking(self) -> Names:
        """What each model lacks of the layout's tensors, but for what it says otherwise."""
        layout = self.models[self.recipe.layout_name].tensors
        weights = [name for name in layout if not self.coded.is_beside(name)]
        whole = {name: model for name, model in self.models.items() if name not in self._parts}
        return {
            name: told
            for name, names in names_lacking(whole, weights, self.coded).items()
            if (told := tuple(own for own in names if not self.meaning.said[name].says(own)))
        }

    def left_out(self, problems: Problems) -> Names:
        """The names that the layout has not, without those that rules drop, and what the output says otherwise.

        Those that the user misses are noted as missing in the layout, as what is missing in other models: which of them
        it is, is chance.
        """
        outside = names_outside(self.models, self.models[self.recipe.layout_name].tensors.keys(), self.coded)
        wanted: dict[str, bool] = {}
        told: set[str] = set()
        for model, names in outside.items():
            for name in names_beside(names, self.coded.weights[self.recipe.layout_name]):
                rule = self.rules.peek(name)
                if rule and rule.action == "drop":
                    self.rules.find(name)
                    told.add(name)
                elif rule and rule.action == "take" and rule.model == model:
                    wanted[name] = True
                elif is_mark(name) and self.meaning.tells(name):
                    told.add(name)
                elif self._would_be_merged(model, name, rule):
                    wanted.setdefault(name, False)
        self._note(wanted, problems)
        left = {model: self._expected(model, names_beside(names, told)) for model, names in outside.items()}
        return {model: names for model, names in left.items() if names}

    def _would_be_merged(self, model: str, name: str, rule: Rule | None) -> bool:
        """Whether a model's tensor would be merged, if the others had it."""
        is_input = model in self.inputs and (rule is None or rule.action == "merge")
        return is_input and not never_averaged(name, self.models[model].tensors[name])

    def _note(self, wanted: Mapping[str, bool], problems: Problems) -> None:
        """Note what the layout has not, of each whether a rule takes it."""
        if not self.recipe.rules:
            problems.alone.extend(wanted)
        if self.recipe.on_missing == "error":
            problems.missing.extend(self.unshared(name, taken=taken) for name, taken in wanted.items())

    def _expected(self, model: str, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of a model's tensors that somebody may miss: of one that only gives components, theirs."""
        if model not in self._parts:
            return names
        rules = ((name, self.rules.peek(name)) for name in names)
        return tuple(name for name, rule in rules if rule and rule.action == "take" and rule.model == model)
