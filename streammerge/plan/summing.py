"""A merge of adapters alone: their weighted sum, as one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from streammerge.errors import PlanError, count, listed
from streammerge.formats.companions import Companion
from streammerge.models.adapters.dialects import DIALECTS, Dialect
from streammerge.models.adapters.files import Adapter, read_adapter
from streammerge.models.adapters.peft_config import config_of_ranks
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

KEPT: Final = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")
"""What a PEFT adapter's config says that is true of a sum with others."""


def are_adapters(models: Mapping[str, Model]) -> bool:
    """Whether all of the models are adapters and no more."""
    found = (find_adapter(model.tensors) for model in models.values())
    return all(adapter is not None and not adapter.is_inside for adapter in found)


def is_sum(recipe: Recipe, models: Mapping[str, Model]) -> bool:
    """Whether adapters, all of them files, are to be added up."""
    return (
        recipe.method == "linear" and are_adapters(models) and all(isinstance(m, Checkpoint) for m in models.values())
    )


def sum_of_adapters(recipe: Recipe, models: Mapping[str, Model], naming: Naming | Dialect | None = None) -> Merged:
    """The adapters' weighted sum, in a dialect; PlanError for what has no meaning there, or can't be added up.

    Strengths add up: the weights are not divided by their sum, unless `normalize` is said to be true.
    """
    _check(recipe)
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

    made = Sum(adapters, weights, _dtype(recipe), _dialect(naming))

    def decide(name: str) -> Decision:
        return Decision(name, "merged", "sum of adapters", made.tensors[name], made.node(name))

    remarks = list(dict.fromkeys([*tuning.remarks(), _remark(made)]))
    return Merged(
        Decisions(made.tensors, decide),
        remarks=tuple(remarks),
        restated=_restated(made),
        companions=(_config(made, adapters),) if made.matched.dialect == "peft" else None,
    )


def _dialect(naming: Naming | Dialect | None) -> Dialect | None:
    """The dialect that is asked for; PlanError for a naming that adapters don't have."""
    found = next((dialect for dialect in DIALECTS if dialect == naming), None)
    if naming is not None and found is None:
        raise PlanError(f"adapters have no {naming} names", advice=f"Those that they have are {', '.join(DIALECTS)}.")
    return found


def _config(made: Sum, adapters: Mapping[str, Adapter]) -> Companion:
    """PEFT's config of the sum, that of the first adapter which has one in what doesn't change."""
    configs = [config for adapter in adapters.values() for config in adapter.configs.values()]
    said = next((config.said for config in configs if config.said), {})
    turned = any(config.fan_in_fan_out for config in configs)
    return config_of_ranks(made.ranks, {key: said[key] for key in KEPT if key in said}, fan_in_fan_out=turned)


def _check(recipe: Recipe) -> None:
    """PlanError for what can't be asked for where adapters are added up."""
    asked = {
        "a base": recipe.base is not None,
        "rules or a conversion": bool(recipe.rules),
        "only one component": bool(recipe.only),
        "what training left": recipe.prune or recipe.ema != "keep",
        "a layout": recipe.layout_name != recipe.inputs[0].name,
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
    low, high = min(made.ranks.values(), default=0), max(made.ranks.values(), default=0)
    ranks = f"; the rank is {low}" + (f" to {high}" if high != low else "") if high else ""
    names = f"; modules are named as in {made.matched.dialect}'s files" if made.matched.is_renamed else ""
    return f"{count(made.adapters, 'adapter')} are added up, their factors side by side{ranks}{names}"


def _restated(made: Sum) -> Mapping[str, str]:
    """What kohya's metadata say of the rank, which is another now; alpha is the rank where no tensor says it."""
    if not made.ranks:
        return {}
    ranks = set(made.ranks.values())
    rank = str(max(ranks)) if len(ranks) == 1 else "Dynamic"
    return {"ss_network_dim": rank, "ss_network_alpha": rank, "ss_network_args": ""}
