"""Adapters that a recipe puts into its inputs: opened, and given to the models with the strength that it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from streammerge.methods.contract import ParameterValue
from streammerge.models.adapters.adapted import Adapted, Given, Strength, adapted
from streammerge.models.adapters.files import read_adapter
from streammerge.models.adapters.recognition import refuse_adapters
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.merged import Merged
from streammerge.models.views import View, beneath
from streammerge.plan.tuning import Tuning
from streammerge.recipe.parameters import WEIGHT
from streammerge.recipe.recipe import Input, Recipe
from streammerge.tensors import Model


def with_adapters(entry: Input, model: Model, opening: Callable[[Path, str], Checkpoint], *, drop: bool) -> Model:
    """The model of an input with the input's adapters in it; itself if it has none."""
    if not entry.adapters:
        return model
    refuse_adapters({entry.name: model.tensors})
    given = []
    for each in entry.adapters:
        read = read_adapter(opening(each.path, each.entry), str(each.path))
        given.append(Given(each.name, read, strength_of(each, model)))
    return adapted(entry.name, model, given, drop=drop)


def strength_of(entry: Input, model: Model) -> Strength:
    """How strong an adapter is in each of the model's tensors: a number, or by block, layer or name."""
    tuning = Tuning(Recipe("linear", (entry,)), model)

    def strength(name: str) -> float:
        return weight_of(tuning.values(name, None)[WEIGHT])

    return strength


def weight_of(value: ParameterValue) -> float:
    """The one model's weight."""
    return float(value[0]) if isinstance(value, tuple) else float(value)


def told_of(merged: Merged, models: dict[str, Model]) -> Merged:
    """The merge, with the accounts of adapters that are in its inputs, and what is kept of these."""
    own = [found for model in models.values() if (found := _adapted_in(model)) is not None]
    inner = [account for model in models.values() for account in getattr(beneath(model), "accounts", ())]
    accounts = tuple(account for model in own for account in model.accounts)
    if not accounts and not inner:
        return merged
    remarks = (remark for account in accounts for remark in account.remarks())
    return replace(
        merged,
        remarks=(*dict.fromkeys(remarks), *merged.remarks),
        accounts=(*accounts, *inner),
        kept_bytes=merged.kept_bytes + sum(model.kept_bytes for model in own),
    )


def _adapted_in(model: Model) -> Adapted | None:
    """The model with adapters in it that this is, or is a view of."""
    while isinstance(model, View) and not isinstance(model, Adapted):
        model = model.model
    return model if isinstance(model, Adapted) else None
