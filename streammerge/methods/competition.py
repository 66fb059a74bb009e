"""PCB-Merging: task vectors compete for every element, by their size and by whether the others want the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from streammerge.methods.contract import ParameterValue, Share
from streammerge.methods.place import Target
from streammerge.methods.registry import BlockMethod, method
from streammerge.methods.statistics.ranking import Ranking
from streammerge.methods.statistics.ranks import Cut
from streammerge.methods.statistics.sums import PIECE, pieces, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

TAILS = 1e-4
"""The share of the smallest magnitudes, and of the largest, that are clipped to the others."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The least and the greatest of the values that count."""

    least: float
    most: float

    def clip(self, values: Tensor) -> Tensor:
        """The values, those outside moved to the nearest end."""
        return values.clamp(self.least, self.most)

    def share(self, values: Tensor) -> Tensor:
        """Where in the interval the clipped values lie, from 0 to 1; 0 in one without length."""
        width = self.most - self.least
        return (self.clip(values) - self.least).div_(width) if width > 0 else values * 0.0


@dataclass(frozen=True, slots=True)
class Contest:
    """What is known of every model: the interval of its magnitudes, and of its scores once they are ranked."""

    magnitudes: Sequence[Interval]
    scores: Sequence[Interval] = ()

    def score(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """exp(n·a²) · tanh(τᵢ Σⱼ τⱼ) of every model, rounded to float32: a is where |τᵢ| lies in its interval."""
        total = sum(deltas[1:], start=deltas[0])
        shares = [size.share(delta.abs()) for size, delta in zip(self.magnitudes, deltas, strict=True)]
        scores = [
            share.square_().mul_(len(deltas)).exp_().mul_((delta * total).tanh_())
            for share, delta in zip(shares, deltas, strict=True)
        ]
        return [score.float() for score in scores]


def in_float64(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The task vectors in float64."""
    return [delta.double() for delta in task_vectors(0, inputs)]


def pcb_contest(target: Target, parameters: Mapping[str, ParameterValue]) -> Any:  # noqa: ANN401
    """Rank the magnitudes of every model, then its scores."""
    elements, models = target.elements, target.inputs - 1
    kept = elements - int(elements * (1.0 - float(parameters["ratio"])))  # type: ignore[arg-type]
    tails = [elements - int(elements * TAILS), elements - max(int(elements * (1.0 - TAILS) - 1.0), 0)]

    def rank_scores(cuts: Sequence[Sequence[Cut]]) -> Any:  # noqa: ANN401
        contest = Contest([interval(low, high) for low, high in cuts])

        def scores(block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
            import torch

            parts = [contest.score(in_float64(part)) for part in pieces(inputs)]
            return [torch.cat(own) for own in zip(*parts, strict=True)]

        ranking = Ranking(
            elements,
            [[max(kept, 1), 1]] * models,
            scores,
            signed=True,
            exact=False,
            gather=False,
            then=lambda found: Contest(contest.magnitudes, [interval(low, high) for low, high in found]),
        )
        return ranking.begin(models)

    ranking = Ranking(elements, [tails] * models, exact=False, gather=False, wide=target.wide, then=rank_scores)
    return ranking.begin(models)


def interval(low: Cut, high: Cut) -> Interval:
    """The interval between two order statistics."""
    return Interval(low.value, max(low.value, high.value))


@method(
    BlockMethod,
    base="required",
    statistics=pcb_contest,
    passes=4,
    scope="scope",
    statistics_of=("ratio",),
    temporaries=12,
    temporaries_each=6,
    float64=True,
)
def pcb(
    base: Tensor,
    *models: Tensor,
    ratio: Share = 0.1,
    lambda_: float = 1.0,
    scope: Literal["model", "tensor"] = "model",
    statistics: Contest,
) -> Tensor:
    """θ = θ₀ + λ Σᵢ sᵢ τᵢ / Σᵢ sᵢ,   sᵢ: where exp(n aᵢ²) tanh(τᵢ Σⱼ τⱼ) lies among the share `ratio` of the greatest

    PCB-Merging, Du et al. 2024, arXiv:2410.02396. aᵢ is where |τᵢ| lies between the least and the greatest magnitude of
    the model, their tails of 1e-4 clipped; what scores below the `ratio` greatest has no say. Ranked over the whole
    model as in the paper, or with `scope: tensor` over each tensor.
    """
    out = base.new_empty(base.shape)
    for number, part in enumerate(pieces((base, *models))):
        first = number * PIECE
        out[first : first + PIECE] = compete(statistics, in_float64(part)).mul_(lambda_).add_(part[0])
    return out


def compete(statistics: Contest, deltas: Sequence[Tensor]) -> Tensor:
    """Σᵢ sᵢ τᵢ / Σᵢ sᵢ with clipped magnitudes."""
    total, weights = deltas[0] * 0.0, deltas[0] * 0.0
    sizes = zip(deltas, statistics.magnitudes, statistics.score(deltas), statistics.scores, strict=True)
    for delta, magnitude, score, scores in sizes:
        share = scores.share(score.double())
        total += delta.sign() * magnitude.clip(delta.abs()) * share
        weights += share
    return total / weights.clamp_(min=1e-12)
