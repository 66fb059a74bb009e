"""Methods on sparse task vectors: some elements of each θᵢ − θ₀ are dropped before they are added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from streammerge.methods.contract import Parameters, PerModel, Share
from streammerge.methods.linear import check_weights
from streammerge.methods.registry import BlockMethod, Statistics, method
from streammerge.methods.results import net
from streammerge.methods.statistics.ranking import begin_ranking, held_by_ranks
from streammerge.methods.statistics.ranks import Cut, Ranking
from streammerge.methods.statistics.sums import L1Pass, SumPass, VectorPass
from streammerge.methods.steps import Kernel, Step

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place, Target


Trim = tuple[Cut, float]
"""Which elements of a task vector stay, and the factor that makes up for the others."""


def trim_to_density(target: Target, parameters: Parameters) -> Any:  # noqa: ANN401
    """Find the `density` largest elements of every task vector, one at the least; with `rescale` its L1 norms too."""
    density: Any = parameters["density"]
    ranks = [[max(int(share * target.elements), 1) if share > 0 else 0] for share in density]

    def trims(cuts: Sequence[Sequence[Cut]]) -> Any:  # noqa: ANN401
        first = [cut for (cut,) in cuts]

        def kept(delta: Tensor, model: int, place: Place) -> Tensor:
            return first[model].keep(delta, place.counted)

        if not parameters["rescale"]:
            return [(cut, 1.0) for cut in first]
        cuts = [(cut,) for cut in first]
        return l1_pass(target, kept, lambda factors: list(zip(first, factors, strict=True)), cuts)

    return begin_ranking(Ranking(target.elements, ranks, wide=target.wide, then=trims), len(ranks))


def ties_steps(target: Target, parameters: Parameters, statistics: Sequence[Trim]) -> list[Step]:
    """How compiled loops do it: every task vector is trimmed and weighted in its model's place, then all are merged."""
    weight: Any = parameters["weight"]
    trims = [
        keep_step(i, (cut,), (share * factor, 1.0), target)
        for i, ((cut, factor), share) in enumerate(zip(statistics, weight, strict=True))
    ]
    return [*trims, merge_step(weight, parameters, str(parameters["vote"]))]


def banded_kernel(vote: str) -> Kernel:
    """The steps of methods that keep of each task vector what lies between two cuts."""

    def steps(target: Target, parameters: Parameters, statistics: Sequence[tuple[Sequence[Cut], float]]) -> list[Step]:
        weight: Any = parameters["weight"]
        kept = [
            keep_step(i, (both, outliers), (factor, share), target)
            for i, (((outliers, both), factor), share) in enumerate(zip(statistics, weight, strict=True))
        ]
        return [*kept, merge_step(weight, parameters, vote)]

    return steps


def keep_step(model: int, cuts: Sequence[Cut], factors: tuple[float, float], target: Target) -> Step:
    """The step KEEP: what the first cut keeps of a task vector, without what a second one does, times two factors."""
    return Step("KEEP", model + 1, (*factors, len(cuts), *(number for cut in cuts for number in cut.numbers(target))))


def merge_step(weight: Sequence[float], parameters: Parameters, vote: str) -> Step:
    """The step MERGE: the task vectors' sum, of those that agree with the elected sign if there is a vote."""
    election, division, divisor = ("none", "sum", "count").index(vote), 0, 1.0
    scale: Any = parameters["lambda"]
    if parameters["normalize"]:
        positive = all(share > 0 for share in weight)
        division, divisor = (3 if positive else 2, min(weight)) if election else (1, net(*weight))
    return Step("MERGE", 0, (len(weight), election, division, divisor, scale, *weight))


@method(
    BlockMethod,
    base="required",
    check=check_weights,
    kernel=ties_steps,
    statistics=Statistics(trim_to_density, passes=2, held=held_by_ranks(), scope="scope", of=("density", "rescale")),
)
def ties(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    density: Sequence[Share] = (1.0,),
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool = False,
    scope: Literal["tensor", "model"] = "tensor",
    vote: Literal["sum", "count"] = "sum",
    place: Place,
    statistics: Sequence[Trim],
) -> Tensor:
    """θ = θ₀ + λ Σᵢ mᵢ wᵢ trim(θᵢ − θ₀), divided by Σᵢ mᵢ wᵢ if `normalize`; mᵢ: agrees with the elected sign.

    TIES-Merging, Yadav et al. 2023, arXiv:2306.01708. trim keeps the `density` largest elements (of equal ones the
    first) of each tensor as in mergekit, or with `scope: model` of the whole model as in the paper; the sign of the
    weighted sum is elected, + where it is zero; or with `vote: count`, as in sd-meh and sd-mecha, that of most models,
    none where there is no majority. These two keep one element more: what is no less than the max(⌊(1 − density) n⌋,
    1)-th smallest. `rescale` scales what was kept to the L1 norm of the whole task vector.
    """
    deltas = [
        scaled(cut.keep(model - base, place.counted), share * factor)
        for model, (cut, factor), share in zip(models, statistics, weight, strict=True)
    ]
    total, weights = elect_and_sum(deltas, weight, vote)
    if normalize:
        total = divided(total, weights, weight)
    return scaled(total, lambda_).add_(base)


def summed(tensors: Sequence[Tensor]) -> Tensor:
    """Σᵢ of one tensor at the least, as a new one."""
    total = tensors[0] + tensors[1] if len(tensors) > 1 else tensors[0].clone()
    for tensor in tensors[2:]:
        total += tensor
    return total


def scaled(values: Tensor, factor: float) -> Tensor:
    """The values times the factor, in place."""
    return values if factor == 1 else values.mul_(factor)


def elect_and_sum(deltas: Sequence[Tensor], weight: Sequence[float], vote: str = "sum") -> tuple[Tensor, Tensor]:
    """The sum of the weighted deltas that agree with the sign of their sum, and the sum of their weights.

    Where signs are counted, with that of most, if there is one. The deltas are used up.
    """
    if vote == "count":
        sign = summed([delta.sign() for delta in deltas]).sign_()
    else:
        sign = summed(deltas).ge_(0.0).mul_(2.0).sub_(1.0)  # numbers are faster than truth values
    agreeing = [delta.mul_(sign).clamp_(min=0.0) for delta in deltas]
    total, weights = agreeing[0].clone(), agreeing[0].sign_().mul_(weight[0])
    for delta, share in zip(agreeing[1:], weight[1:], strict=True):
        total += delta
        weights.add_(delta.sign_(), alpha=share)
    return total.mul_(sign), weights


def divided(total: Tensor, weights: Tensor, weight: Sequence[float]) -> Tensor:
    """The sum divided by the weights that went into it, 0 where there were none."""
    if all(share > 0 for share in weight):
        return total.div_(weights.clamp_(min=min(weight)))  # no sum of some of them is less
    return total.div_(weights.masked_fill_(weights == 0, 1.0))


def l1_pass(
    target: Target,
    kept: Callable[[Tensor, int, Place], Tensor],
    then: Callable[[Sequence[float]], Any] = tuple,
    cuts: Sequence[Sequence[Cut]] = (),
    steps: Sequence[Step] = (),
) -> SumPass:
    """A pass for ‖d‖₁ / ‖kept d‖₁ of each task vector, 1 where nothing is kept; `then` makes these the statistics.

    Compiled loops need the cuts that say what is kept: what the first of them keeps, but not a second one. Or the steps
    that make each d and kept d, one after the other behind the inputs.
    """

    def vectors(block: int, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        place = target.place(block)
        base, *models = inputs
        for i, model in enumerate(models):  # one after the other: a block in float64 is wide
            delta = model - base
            yield delta
            yield kept(delta, i, place)

    def factors(found: Sequence[float]) -> Any:  # noqa: ANN401
        return then([whole / left if left > 0 else 1.0 for whole, left in zip(found[::2], found[1::2], strict=True)])

    count = 2 * (target.inputs - 1)
    if steps:
        return VectorPass(steps, target.inputs, count, vectors, factors)
    numbers = [[cut.numbers(target) for cut in each] for each in cuts]
    edges = (cut.last_block for each in cuts for cut in each)
    return L1Pass(target.step, numbers, count, vectors, factors, alone=(edge for edge in edges if edge is not None))
