"""Adapters that a recipe puts into its inputs: opened, and given to the models with the strength that it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from streammerge.compute.expressions import Node
from streammerge.errors import PlanError, counted, listed
from streammerge.methods.contract import ParameterValue
from streammerge.models.adapters.accounts import UNCHANGED, Account, Given, Strength
from streammerge.models.adapters.adapted import adapted, adapted_in
from streammerge.models.adapters.files import read_adapter
from streammerge.models.adapters.reach import reaching
from streammerge.models.adapters.recognition import refuse_adapters
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.merged import Merged
from streammerge.models.views import beneath
from streammerge.plan.tuning import Tuning
from streammerge.recipe.parameters import WEIGHT
from streammerge.recipe.recipe import Input, Recipe
from streammerge.tensors import Model


def with_adapters(entry: Input, model: Model, opening: Callable[[Path, str], Checkpoint], *, drop: bool) -> Model:
    """The model of an input with the input's adapters in it; itself if it has none."""
    if not entry.adapters:
        return model
    refuse_adapters({entry.name: model.tensors})
    given, tunings = [], [Tuning(Recipe("linear", (each,)), model) for each in entry.adapters]
    for each, tuning in zip(entry.adapters, tunings, strict=True):
        read = read_adapter(opening(each.path, each.entry), str(each.path), drop=drop)
        given.append(Given(each.name, read, strength_of(tuning)))
    made = adapted(entry.name, model, given, drop=drop)
    changed = {use.given.name: name for name, uses in made.uses.items() for use in uses}
    told = (
        replace(account, told=(*account.told, *remarks_of(tuning, changed.get(account.adapter))))
        for account, tuning in zip(made.accounts, tunings, strict=True)
    )
    return replace(made, accounts=tuple(told))


def remarks_of(tuning: Tuning, changed: str | None) -> Iterator[str]:
    """What is to be known of an adapter's weight, such as a filter that fits no tensor of the model; `changed` is one
    of those that it changes."""
    if changed is not None:
        tuning.values(changed, None)  # only then it is known that it has an effect
    where = f"{tuning.recipe.where}: model {tuning.models[0]}: "
    return (remark.removeprefix(where) for remark in tuning.remarks())


def strength_of(tuning: Tuning) -> Strength:
    """How strong an adapter is in each of the model's tensors: a number, or by block, layer or name."""

    def strength(name: str) -> float:
        return weight_of(tuning.values(name, None)[WEIGHT])

    return strength


def weight_of(value: ParameterValue) -> float:
    """The one model's weight."""
    return float(value[0]) if isinstance(value, tuple) else float(value)


def told_of(merged: Merged, models: dict[str, Model]) -> Merged:
    """The merge, with the accounts of adapters that are in its inputs, and what is kept of these."""
    own = [found for model in models.values() if (found := adapted_in(model)) is not None]
    inner = [account for model in models.values() for account in getattr(beneath(model), "accounts", ())]
    accounts = tuple(account for model in own for account in model.accounts)
    if not accounts and not inner:
        return merged
    kept = sum(model.kept_bytes for model in own)
    return replace(merged, accounts=(*accounts, *inner), kept_bytes=merged.kept_bytes + kept)


def accounted(merged: Merged, recipe: Recipe) -> Merged:
    """The whole merge, with accounts that are true of its output, and told; PlanError if one of its adapters changes
    nothing there, unless what is missing may be.

    What is merged with the weight 0 is asked for, and told alone.
    """
    if not merged.accounts:
        return merged
    accounts = tuple(reaching(merged.accounts, _what_may_be_changed(merged)))
    if recipe.on_missing == "error" and _leaves_out(recipe):
        _refuse_lost([account for account in accounts if account.is_lost])
    told = tuple(dict.fromkeys(remark for account in accounts for remark in account.remarks()))

    def with_accounts(made: Merged) -> Merged:
        settle = made.settle
        settled = None if settle is None else lambda spectra: with_accounts(settle(spectra))
        return replace(made, accounts=accounts, remarks=(*told, *made.remarks), settle=settled)

    return with_accounts(merged)


def _what_may_be_changed(merged: Merged) -> Iterator[Node]:
    """The output's tensors, but for those of which it is known that no adapter changes them."""
    is_nested = isinstance(beneath(merged.layout), Merged) if merged.layout is not None else True
    for name, fate in merged.decisions.told():
        if fate.action != "dropped" and (is_nested or UNCHANGED not in fate.why):
            yield merged.node(name)


def _leaves_out(recipe: Recipe) -> bool:
    """Whether tensors of the models are left out of the output, or taken from others, by this recipe or one in it."""
    inner = (entry.source for entry in recipe.named.values() if isinstance(entry.source, Recipe))
    is_part = bool(recipe.rules or recipe.only or recipe.prune or recipe.is_composed or recipe.mixture)
    return is_part or recipe.ema != "keep" or any(map(_leaves_out, inner))


def _refuse_lost(lost: list[Account]) -> None:
    if lost:
        raise PlanError(
            f"{counted(lost, 'adapter', 'changes', 'change')} nothing that is in the output",
            found=[f"{account.adapter} in {account.model}   {listed(_tensors(account))}" for account in lost],
            advice="Leave the adapter out, or less of the model: see --only, --drop, --take, --ema and the recipe's "
            "rules. --on-missing keep writes what is asked for, without the adapter.",
        )


def _tensors(account: Account) -> list[str]:
    return list(dict.fromkeys(name for tensors in account.nothing.values() for name in tensors))
