"""A merge of adapters alone: their weighted sum, as one adapter."""

from __future__ import annotations

from collections.abc import Mapping

from streammerge.errors import PlanError, count, listed
from streammerge.formats.companions import Companion
from streammerge.models.adapters.dialects import DIALECTS, Dialect
from streammerge.models.adapters.files import read_adapter
from streammerge.models.adapters.peft_config import config_of_ranks
from streammerge.models.adapters.recognition import find_adapter
from streammerge.models.adapters.sums import Sum
from streammerge.models.adapters.together import Together
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.decisions import Decision, Decisions
from streammerge.models.dialects import Naming
from streammerge.models.dtypes import Scaled
from streammerge.models.merged import Merged
from streammerge.plan.extracting import RESTATED
from streammerge.plan.strengths import Strengths
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


def sum_of_adapters(recipe: Recipe, models: Mapping[str, Model], naming: Naming | Dialect | None = None) -> Merged:
    """The adapters' weighted sum, in a dialect; PlanError for what has no meaning there, or can't be added up.

    Strengths add up: the weights are not divided by their sum, unless `normalize` is said to be true.
    """
    check_asked(recipe, "added up")
    adapters = {}
    for entry in recipe.models:
        model = models[entry.name]
        assert isinstance(model, Checkpoint)
        adapters[entry.name] = read_adapter(model, str(model.path))
    together = Together(adapters, dialect_asked(naming))
    strengths = Strengths(recipe, together)
    made = Sum(together, strengths.of, _dtype(recipe))

    def decide(name: str) -> Decision:
        return Decision(name, "merged", "sum of adapters", made.tensors[name], made.node(name))

    remarks = list(dict.fromkeys([*strengths.remarks(), _remark(made), *together.remarks()]))
    return Merged(
        Decisions(made.tensors, decide),
        remarks=tuple(remarks),
        restated=_restated(made),
        companions=_companions(made),
    )


def _companions(made: Sum) -> tuple[Companion, ...] | None:
    """PEFT's config; None for adapters that are files."""
    together = made.together
    if not together.is_pefts:
        return None
    return (config_of_ranks(made.ranks, together.configs, parameters=together.parameters),)


def dialect_asked(naming: Naming | Dialect | None) -> Dialect | None:
    """The dialect that is asked for; PlanError for a naming that adapters don't have."""
    found = next((dialect for dialect in DIALECTS if dialect == naming), None)
    if naming is not None and found is None:
        raise PlanError(f"adapters have no {naming} names", advice=f"Those that they have are {', '.join(DIALECTS)}.")
    return found


def check_asked(recipe: Recipe, done: str, **more: bool) -> None:
    """PlanError for what has no meaning where adapters are `done` to one another: this, and `more` that is asked."""
    asked = {
        "a base": recipe.base is not None,
        "rules or a conversion": bool(recipe.rules),
        "only one component": bool(recipe.only),
        "what training left": recipe.prune or recipe.ema != "keep",
        "a layout": recipe.layout_name != recipe.inputs[0].name,
        "adapters inside of adapters": any(entry.adapters for entry in recipe.inputs),
        **more,
    }
    if meaningless := [what for what, is_asked in asked.items() if is_asked]:
        raise PlanError(
            f"adapters are {done}, where {listed(meaningless)} has no meaning",
            advice="Leave that out of the merge. Another dtype, and other names, they get without convert: streammerge "
            "ADAPTER --dtype bf16 --names kohya -o OUT.",
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
    adapters, found = made.together.adapters, made.together.matched
    names = f"; modules are named as in {found.dialect}'s files" if found.is_renamed else ""
    done = "are added up, their factors side by side" if len(adapters) > 1 else "is written anew"
    return f"{count(adapters, 'adapter')} {done}{ranks}{names}"


def _restated(made: Sum) -> Mapping[str, str]:
    """What metadata say of the rank and the scale, which are others now; alpha is the rank where nothing says it."""
    if not made.ranks:
        return {}
    ranks = set(made.ranks.values())
    rank = str(max(ranks)) if len(ranks) == 1 else "Dynamic"
    return {**RESTATED, "ss_network_dim": rank, "ss_network_alpha": rank}
