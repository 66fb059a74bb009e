"""A merge of adapters alone: their weighted sum, as one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streammerge.errors import PlanError, listed
from streammerge.models.adapters.files import read_adapter
from streammerge.models.adapters.recognition import find_adapter
from streammerge.models.adapters.sums import Sum
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.decisions import Decision, Decisions
from streammerge.models.dialects import Naming
from streammerge.models.dtypes import Scaled
from streammerge.models.merged import Merged
from streammerge.plan.tuning import Tuning
from streammerge.recipe.parameters import WEIGHT
from streammerge.recipe.recipe import Recipe
from streammerge.tensors import DType, Model


def are_adapters(models: Mapping[str, Model]) -> bool:
    """Whether all of the models are adapters and no more."""
    found = (find_adapter(model.tensors) for model in models.values())
    return all(adapter is not None and not adapter.is_inside for adapter in found)


def is_sum(recipe: Recipe, models: Mapping[str, Model]) -> bool:
    """Whether adapters, all of them files, are to be added up."""
    return (
        recipe.method == "linear" and are_adapters(models) and all(isinstance(m, Checkpoint) for m in models.values())
    )


def sum_of_adapters(recipe: Recipe, models: Mapping[str, Model], naming: Naming | None = None) -> Merged:
    """The adapters' weighted sum; PlanError for what has no meaning there, or can't be added up.

    Strengths add up: the weights are not divided by their sum, unless `normalize` is said to be true.
    """
    _check(recipe, naming)
    names = [entry.name for entry in recipe.models]
    adapters = {}
    for name in names:
        model = models[name]
        assert isinstance(model, Checkpoint)
        adapters[name] = read_adapter(model, str(model.path))
    tuning = Tuning(recipe, models[names[0]])
    is_normalised = recipe.parameters.get("normalize") is True

    def weights(module: str) -> Sequence[float]:
        found = tuning.values(module, None)[WEIGHT]
        own = [float(each) for each in found] if isinstance(found, tuple) else [float(found)] * len(names)
        return [each / sum(own) for each in own] if is_normalised else own

    made = Sum(adapters, weights, _dtype(recipe))

    def decide(name: str) -> Decision:
        return Decision(name, "merged", "sum of adapters", made.tensors[name], made.node(name))

    remarks = list(dict.fromkeys([*tuning.remarks(), _remark(made)]))
    return Merged(Decisions(made.tensors, decide), remarks=tuple(remarks), restated=_restated(made))


def _check(recipe: Recipe, naming: Naming | None) -> None:
    """PlanError for what can't be asked for where adapters are added up."""
    asked = {
        "a base": recipe.base is not None,
        "rules or a conversion": bool(recipe.rules),
        "only one component": bool(recipe.only),
        "what training left": recipe.prune or recipe.ema != "keep",
        "a layout": recipe.layout_name != recipe.inputs[0].name,
        "other names": naming is not None,
        "adapters inside of adapters": any(entry.adapters for entry in recipe.inputs),
    }
    if meaningless := [what for what, is_asked in asked.items() if is_asked]:
        raise PlanError(
            f"adapters are added up, where {listed(meaningless)} has no meaning", advice="Leave that out of the merge."
        )


def _dtype(recipe: Recipe) -> DType | None:
    """What factors are stored as; PlanError for scales, which they have none of."""
    if isinstance(recipe.dtype, Scaled):
        raise PlanError(
            f"adapters are added up, and {recipe.dtype.torch_name} is a dtype of whole models",
            advice="Use fp16, bf16 or fp32.",
        )
    return recipe.dtype


def _remark(made: Sum) -> str:
    low, high = min(made.ranks, default=0), max(made.ranks, default=0)
    ranks = f"; the rank is {low}" + (f" to {high}" if high != low else "") if high else ""
    return f"{len(made.adapters)} adapters are added up, their factors side by side{ranks}"


def _restated(made: Sum) -> Mapping[str, str]:
    """What kohya's metadata say of the rank, which is another now; alpha is the rank where no tensor says it."""
    if not made.ranks:
        return {}
    rank = str(max(made.ranks)) if len(made.ranks) == 1 else "Dynamic"
    return {"ss_network_dim": rank, "ss_network_alpha": rank, "ss_network_args": ""}
