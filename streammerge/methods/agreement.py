"""Methods that let task vectors decide element by element: who is alone, who agrees, who is the largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal

from streammerge.errors import MethodError
from streammerge.methods.contract import Between, ParameterValue, Share
from streammerge.methods.place import Place, Target
from streammerge.methods.registry import BlockMethod, Needs, Statistics, method
from streammerge.methods.sparse import summed
from streammerge.methods.statistics.deviations import deviation
from streammerge.methods.statistics.ranking import begin_ranking, held_by_ranks
from streammerge.methods.statistics.ranks import Cut, Ranking
from streammerge.methods.statistics.sums import SumPass, VectorPass, task_vectors
from streammerge.methods.steps import Step
from streammerge.methods.tracing import traced_vectors

if TYPE_CHECKING:
    from torch import Tensor

Parameters = Mapping[str, ParameterValue]
Positive = Annotated[float, Between(0)]
Count = Annotated[int, Between(0)]


def check_task(parameters: Parameters, inputs: int) -> None:
    """MethodError for the number of a model that is not there."""
    task = parameters["task"]
    if isinstance(task, int) and task >= inputs:
        raise MethodError(
            f"task {task} is the number of no model: there are {inputs - 1} beside the base",
            advice=f"Choose one from 1 to {inputs - 1}.",
        )


# SCE


def sce_statistics(target: Target, parameters: Parameters) -> Any:  # noqa: ANN401
    """The cut of the elements that vary most, and what each model counts."""
    topk = float(parameters["select_topk"])  # type: ignore[arg-type]
    models = target.inputs - 1

    def weigh(cut: Cut) -> SumPass:
        def vectors(block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
            return selected(cut, block, inputs)

        def shares(sums: Sequence[float]) -> tuple[Cut, list[float]]:
            total = sum(sums)
            return cut, [share / total if total else 1.0 / len(sums) for share in sums]

        edges = () if cut.last_block is None else (cut.last_block,)
        return VectorPass(select_steps(target, cut), 1, models, vectors, shares, norm="squares", alone=edges)

    def ranks(nonzero: Sequence[int]) -> list[list[int]]:
        return [[max(int(topk * count), 1) if topk and count else 0] for count in nonzero]

    if topk >= 1:
        return weigh(begin_ranking(Ranking(target.elements, [[target.elements]]), 1)[0][0])
    ranking = Ranking(
        target.elements,
        ranks,
        deviation,
        wide=target.wide,
        steps=[Step("DEVIATE", target.inputs, (models,))],
        then=lambda cuts: weigh(cuts[0][0]),
    )
    return begin_ranking(ranking, 1)


def select_steps(target: Target, cut: Cut) -> list[Step]:
    """The task vectors of what varies most, in their models' places; the mask is behind the inputs."""
    models, mask = range(1, target.inputs), target.inputs
    if cut.is_all:
        return [Step("MINUS", model, (model, 0)) for model in models]
    select = [Step("SELECT", model, (mask,)) for model in models]
    return [Step("DEVIATE", mask, (len(models),)), Step("MASK", mask, cut.numbers(target)), *select]


def sce_steps(target: Target, parameters: Parameters, statistics: tuple[Cut, Sequence[float]]) -> list[Step]:
    """How compiled loops do it: what is selected of every task vector is added where it agrees."""
    cut, shares = statistics
    return [*select_steps(target, cut), Step("AGREE", 0, (len(shares), *shares))]


def selected(cut: Cut, block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The task vectors of what varies most."""
    deltas = task_vectors(block, inputs)
    if cut.is_all:
        return deltas
    mask = cut.mask(deviation(block, inputs)[0], block)
    return [delta * mask for delta in deltas]


@method(
    BlockMethod,
    base="required",
    statistics=Statistics(sce_statistics, passes=3, held=held_by_ranks(vectors=1)),
    kernel=sce_steps,
    needs=Needs(temporaries=8, float64=True),
)
def sce(
    base: Tensor, *models: Tensor, select_topk: Share = 1.0, place: Place, statistics: tuple[Cut, Sequence[float]]
) -> Tensor:
    """θ = θ₀ + Σᵢ aᵢ mᵢ s (θᵢ − θ₀) / Σᵢ aᵢ mᵢ,   aᵢ ∝ ‖s (θᵢ − θ₀)‖²; s selects, mᵢ: agrees with the elected sign

    SCE, Wan et al. 2024, arXiv:2408.07990. s selects the share `select_topk` (of the elements that differ at all) with
    the greatest variance over the models, one at the least. The elected sign is that of Σᵢ (θᵢ − θ₀), + where it is
    zero. Models count by their energy however small it is; mergekit lets all count the same where the mean squares sum
    to less than 1e-6, which is the rule for fine-tunes.
    """
    cut, shares = statistics
    deltas = selected(cut, place.counted, (base, *models))
    elected = summed(deltas) >= 0
    total, weights = base.new_zeros(base.shape), base.new_zeros(base.shape)
    for delta, share in zip(deltas, shares, strict=True):
        agrees = ((delta > 0) & elected) | ((delta < 0) & ~elected)
        total.add_(delta * agrees, alpha=share)
        weights.add_(agrees.to(weights.dtype), alpha=share)  # of flags it would be rounded to float32
    return total.div_(weights.masked_fill_(weights == 0, 1.0)).add_(base)


# RAM


@method(BlockMethod, base="required", elementwise=True, needs=Needs(temporaries=6))
def ram(base: Tensor, *models: Tensor, epsilon: Positive = 1e-5) -> Tensor:
    """θ = θ₀ + Σᵢ nᵢ (θᵢ − θ₀) / max(Σᵢ nᵢ, 1),   nᵢ = [|θᵢ − θ₀| > ε]

    RAM, Yuan et al. 2026, arXiv:2601.13572: what only one model has changed is taken as it is, what several have
    changed is averaged.
    """
    total, count = base.new_zeros(base.shape), base.new_zeros(base.shape)
    for delta in task_vectors(0, (base, *models)):
        changed = delta.abs() > epsilon
        total += delta * changed
        count += changed
    return total.div_(count.clamp_(min=1.0)).add_(base)


def changes(inputs: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Which elements each model has changed, and how many models have changed each."""
    changed = [delta.abs() > epsilon for delta in task_vectors(0, inputs)]
    return changed, summed([mask.to(inputs[0].dtype) for mask in changed])


def ram_boosts(target: Target, parameters: Parameters) -> VectorPass:
    """A pass for how much each model's own changes are amplified: by the ratio of shared to own changes."""
    epsilon, r, alpha = (float(parameters[name]) for name in ("epsilon", "r", "alpha"))  # type: ignore[arg-type]

    def masks(inputs: Sequence[Tensor]) -> list[Tensor]:
        changed, count = changes(inputs, epsilon)
        return [mask & which for mask in changed for which in (count > 1, count == 1)]

    def boosts(found: Sequence[float]) -> list[float]:
        ratios = [
            shared / max(own, epsilon) if shared else 0.0 for shared, own in zip(found[::2], found[1::2], strict=True)
        ]
        return [1.0 + r * min(ratio, alpha) for ratio in ratios]

    traced, first = traced_vectors(masks, target.inputs)
    return VectorPass(traced, first, 2 * (target.inputs - 1), lambda _, inputs: masks(inputs), boosts, norm="counts")


@method(
    BlockMethod,
    base="required",
    statistics=Statistics(ram_boosts, passes=1),
    elementwise=True,
    needs=Needs(temporaries=6),
)
def ramplus_tl(
    base: Tensor,
    *models: Tensor,
    r: float = 0.1,
    alpha: Positive = 0.2,
    epsilon: Annotated[float, Between(0, exclusive=True)] = 1e-5,
    statistics: Sequence[float],
) -> Tensor:
    """θ = θ₀ + Σᵢ nᵢ (θᵢ − θ₀) / Σᵢ nᵢ where several models changed θ₀, (1 + r min(ρᵢ, α)) (θᵢ − θ₀) where one did

    RAM+, Yuan et al. 2026, arXiv:2601.13572: `ram`, with the changes that only one model made amplified by ρᵢ, the
    number of its changes that others share relative to those that they don't.
    """
    changed, count = changes((base, *models), epsilon)
    shared, own = base.new_zeros(base.shape), base.new_zeros(base.shape)
    for model, mask, boost in zip(models, changed, statistics, strict=True):
        delta = (model - base) * mask
        shared += delta
        own.add_(delta, alpha=boost)
    return shared.div_(count.clamp(min=1.0)).where(count > 1, own).add_(base)


# the largest


@method(BlockMethod, base="required", elementwise=True, needs=Needs(temporaries=6))
def magmax(base: Tensor, *models: Tensor, lambda_: float = 0.5) -> Tensor:
    """θ = θ₀ + λ (θⱼ − θ₀),   j = argmaxᵢ |θᵢ − θ₀|

    MagMax, Marczak et al. 2024, arXiv:2407.06322. Of equally large changes the last model's is taken.
    """
    largest, *others = task_vectors(0, (base, *models))
    for delta in others:
        largest = delta.where(delta.abs() >= largest.abs(), largest)
    return largest.mul(lambda_).add_(base)


def unified(deltas: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """EMR's unified task vector, and for each model which elements have its sign."""
    upwards = summed(deltas) > 0
    agree = [((delta > 0) & upwards) | ((delta < 0) & ~upwards) for delta in deltas]
    largest = (deltas[0] * agree[0]).abs()
    for delta, mask in zip(deltas[1:], agree[1:], strict=True):
        largest = largest.maximum((delta * mask).abs())
    return largest.where(upwards, -largest), agree


def emr_scales(target: Target, parameters: Parameters) -> Any:  # noqa: ANN401
    """Over the whole model: Σ|τᵢ| / Σ|mᵢ τ| for every model, if one of them is wanted."""
    if not parameters["task"]:
        return None

    def vectors(inputs: Sequence[Tensor]) -> list[Tensor]:
        deltas = task_vectors(0, inputs)
        union, agree = unified(deltas)
        return [made for delta, mask in zip(deltas, agree, strict=True) for made in (delta, union * mask)]

    def scales(found: Sequence[float]) -> list[float]:
        return [own / left if left else 1.0 for own, left in zip(found[::2], found[1::2], strict=True)]

    traced, first = traced_vectors(vectors, target.inputs)
    return VectorPass(traced, first, 2 * (target.inputs - 1), lambda _, inputs: vectors(inputs), scales)


@method(
    BlockMethod,
    base="required",
    check=check_task,
    statistics=Statistics(emr_scales, passes=1, scope="model", of=("task",)),
    elementwise=True,
    needs=Needs(temporaries=17),
)
def emr(base: Tensor, *models: Tensor, task: Count = 0, statistics: Sequence[float] | None) -> Tensor:
    """θ = θ₀ + τ, or for a task θ = θ₀ + sₜ mₜ τ;   τ: of those with the sign of Σᵢ τᵢ the largest, τᵢ = θᵢ − θ₀

    EMR-Merging, Huang et al. 2024, arXiv:2405.17461. With `task: t` the t-th model is rebuilt from the unified task
    vector τ by its mask mₜ = [τₜ τ > 0] and its scale sₜ = Σ|τₜ| / Σ|mₜ τ|, sums over the whole model.
    """
    union, agree = unified(task_vectors(0, (base, *models)))
    if task and statistics is not None:
        union = union.mul_(agree[task - 1]).mul_(statistics[task - 1])
    return union.add_(base)


# TALL masks


def tall_masks(deltas: Sequence[Tensor], threshold: float) -> tuple[Tensor, list[Tensor]]:
    """The sum of the task vectors, and for each model which elements of it are its own work."""
    total = summed(deltas)
    return total, [delta.abs() > (total - delta).abs().mul_(threshold) for delta in deltas]


@method(BlockMethod, base="required", check=check_task, elementwise=True, needs=Needs(temporaries=6))
def tall_mask(
    base: Tensor,
    *models: Tensor,
    task: Annotated[int, Between(1)] = 1,
    threshold: Positive = 0.6,
    lambda_: float = 1.0,
) -> Tensor:
    """θ = θ₀ + λ mₜ τ,   mₜ = [|τₜ| > threshold · |τ − τₜ|],   τ = Σᵢ τᵢ,   τᵢ = θᵢ − θ₀

    TALL-masks, Wang et al. 2024, arXiv:2405.07813: the t-th model (`task`), rebuilt from the sum of all by its mask.
    """
    total, masks = tall_masks(task_vectors(0, (base, *models)), threshold)
    return total.mul_(masks[task - 1]).mul_(lambda_).add_(base)


@method(BlockMethod, base="required", elementwise=True, needs=Needs(temporaries=6))
def consensus_ta(
    base: Tensor, *models: Tensor, k: Count = 2, threshold: Positive = 0.6, lambda_: float = 1.0
) -> Tensor:
    """θ = θ₀ + λ [Σᵢ mᵢ ≥ k] τ,   mᵢ = [|τᵢ| > threshold · |τ − τᵢ|],   τ = Σᵢ τᵢ,   τᵢ = θᵢ − θ₀

    Consensus task arithmetic, Wang et al. 2024, arXiv:2405.07813: elements that fewer than k models claim are dropped.
    """
    total, masks = tall_masks(task_vectors(0, (base, *models)), threshold)
    claims = summed([mask.to(base.dtype) for mask in masks])
    return total.mul_(claims >= k).mul_(lambda_).add_(base)


# Trust region


def conflict(block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    """√(Σᵢ Σⱼ |τᵢ τⱼ|) over all pairs, in float64: in the order of the sums themselves, and in float32's range."""
    import torch

    pairs, sizes = (torch.zeros_like(inputs[0], dtype=torch.float64) for _ in range(2))
    for delta in task_vectors(block, inputs):
        size = delta.double().abs_()
        pairs.add_(size * sizes)
        sizes.add_(size)
    return [pairs.sqrt_()]


def outside_trust_region(target: Target, parameters: Parameters) -> Any:  # noqa: ANN401
    """Find the elements of the greatest conflict."""
    outside = 1 - Decimal(str(parameters["threshold_quantile"]))  # of decimals: 1 − 0.9 is 0.1 to whoever typed it
    ranks = [[int(outside * target.elements)]]

    def cut(cuts: Sequence[Sequence[Cut]]) -> Cut:
        return cuts[0][0]

    search = Ranking(target.elements, ranks, conflict, exact=False, gather=False, wide=target.wide, then=cut)
    return begin_ranking(search, 1)


@method(
    BlockMethod,
    base="required",
    statistics=Statistics(
        outside_trust_region,
        passes=2,
        held=held_by_ranks(vectors=1, gather=False),
        scope="scope",
        of=("threshold_quantile",),
    ),
    needs=Needs(temporaries=20, float64=True),
)
def trust_region(
    base: Tensor,
    *models: Tensor,
    threshold_quantile: Share = 0.99,
    lambda_: float = 1.0,
    scope: Literal["model", "tensor"] = "model",
    place: Place,
    statistics: Cut,
) -> Tensor:
    """θ = θ₀ + λ [Ω < Q] Σᵢ τᵢ,   Ω = Σᵢ Σⱼ |τᵢ| |τⱼ| over i ≠ j, Q its `threshold_quantile`,   τᵢ = θᵢ − θ₀

    Task Arithmetic in Trust Region without data, Sun et al. 2025, arXiv:2501.15065: elements on which several task
    vectors are large are left alone. The share 1 − `threshold_quantile` with the greatest Ω is dropped, and what equals
    the last of these, over the whole model or with `scope: tensor` over each tensor; but nothing that
    one model alone changed.
    """
    inputs = (base, *models)
    (omega,) = conflict(place.block, inputs)
    outside = statistics.mask(omega, place.counted) & (omega > 0.0)
    return summed(task_vectors(place.block, inputs)).masked_fill_(outside, 0.0).mul_(lambda_).add_(base)
