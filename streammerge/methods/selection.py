"""Methods that take one model's change where it matters, or where it is small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from streammerge.methods.contract import Between, ParameterValue, Share
from streammerge.methods.place import Target
from streammerge.methods.registry import BlockMethod, Needs, Statistics, method
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.ranking import begin_ranking, held_by_ranks
from streammerge.methods.statistics.ranks import Cut, Ranking
from streammerge.methods.statistics.sending import sent
from streammerge.methods.statistics.slices import Slicing
from streammerge.methods.statistics.stretches import Pending, Stretch, pending_shares
from streammerge.methods.statistics.sums import PIECE, pieces, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place, Target


@method(BlockMethod, base="required", models=(1, 1), elementwise=True, needs=Needs(temporaries=2))
def nearswap(base: Tensor, model: Tensor, *, t: Annotated[float, Between(0)]) -> Tensor:
    """θ = θ₀ + g (θ₁ − θ₀),   g = min(t / |θ₁ − θ₀|, 1)

    NearSwap, alchemonaut 2024: changes of up to t are taken, larger ones are cut to t. As in mergekit, which divides by
    1e-6 at the least.
    """
    delta = model - base
    share = delta.abs().clamp_(min=1e-6).reciprocal_().mul_(t).clamp_(max=1.0)
    return delta.mul_(share).add_(base)


SOFTMAX_ELEMENTS: Final = 2**14
"""Elements of whole rows whose softmax is taken at once: in float64, several times over."""


def divergences(base: Tensor, model: Tensor) -> Tensor:
    """KL(softmax θ₁ ‖ softmax θ₀) of every row of two matrices, in float64."""
    import torch

    step = max(SOFTMAX_ELEMENTS // base.shape[1], 1)
    parts = [slice(first, first + step) for first in range(0, len(base), step)]
    return torch.cat([_divergences(base[rows], model[rows]) for rows in parts])


def _divergences(base: Tensor, model: Tensor) -> Tensor:
    p = model.double().softmax(1).add_(1e-8)
    q = base.double().softmax(1).add_(1e-8)
    return p.div(q).log_().mul_(p).sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class RowScores:
    """|θ₁ − θ₀| times the divergence of the row, rounded to float32, of all rows of a tensor; `threshold` is the least
    that is taken."""

    target: Target
    divergences: Tensor
    threshold: float = math.inf

    def of_block(self, block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The scores of the block's elements."""
        base, model = inputs
        rows = sent(self.divergences, base.device, self.rows(block, len(base)))
        return [(model - base).abs_().double().mul_(rows[:, None]).float()]

    def rows(self, block: int, count: int) -> slice:
        """Which rows those of a block are that has so many."""
        first = block * self.target.step // Slicing.of(self.target.shape, "rows").width
        return slice(first, first + count)

    def ranking(self) -> Ranking:
        """Take what is above the median by one and a half times the quartiles' distance."""
        elements = self.target.elements
        ranks = [elements - int(share * (elements - 1)) for share in (0.25, 0.5, 0.75)]

        def chosen(cuts: Sequence[Sequence[Cut]]) -> RowScores:
            low, median, high = (cut.value for cut in cuts[0])
            return replace(self, threshold=median + 1.5 * (high - low))

        return Ranking(elements, [ranks], self.of_block, signed=True, exact=False, gather=False, then=chosen)


class DivergencePass(Pass[Any]):
    """The pass that measures the divergence of every row; then the scores are ranked."""

    def __init__(self, target: Target) -> None:
        import torch

        count = Slicing.of(target.shape, "rows").count
        self.scores = RowScores(target, torch.zeros(count, dtype=torch.float64))

    def measure(self, block: int, inputs: Sequence[Tensor]) -> Tensor:
        """The divergences of the block's rows."""
        return divergences(*inputs).cpu()

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """Those of many blocks' rows."""
        return pending_shares(
            stretch, inputs, lambda _, parts: [(0, divergences(*parts))], lambda _, shares: shares[0][1]
        )

    def add(self, block: int, measured: Tensor) -> None:
        """Keep them."""
        self.scores.divergences[self.scores.rows(block, len(measured))] = measured

    def finish(self) -> Any:  # noqa: ANN401  (another pass)
        """The passes that find the scores' quartiles."""
        return begin_ranking(self.scores.ranking(), 1)


def begin_fusion(target: Target, parameters: Mapping[str, ParameterValue]) -> Any:  # noqa: ANN401
    """Measure the rows' divergences, then the scores; nothing of an empty tensor."""
    return DivergencePass(target) if target.elements else None


def held_by_rows(target: Target, parameters: Mapping[str, ParameterValue]) -> int:
    """One divergence for each row, in float64, and what the search for the scores' quartiles takes."""
    return 8 * Slicing.of(target.shape, "rows").count + held_by_ranks(3, vectors=1, gather=False)(target, parameters)


@method(
    BlockMethod,
    base="required",
    models=(1, 1),
    statistics=Statistics(begin_fusion, passes=3, held=held_by_rows),
    # measured, as those of breadcrumbs are: two workers have no room
    needs=Needs(rows="rows", temporaries=20, float64=True),
)
def arcee_fusion(base: Tensor, model: Tensor, *, place: Place, statistics: RowScores) -> Tensor:
    """θ = θ₀ + [s ≥ Q₂ + 1.5 (Q₃ − Q₁)] (θ₁ − θ₀),   s = |θ₁ − θ₀| · KL(softmax θ₁ ‖ softmax θ₀) of the row

    Arcee Fusion, as in mergekit, but with the exact quartiles Q of s over the tensor: mergekit takes those of a random
    sample where there are more than a million elements. Of convolutions a row is a filter, and vectors are one row.
    """
    (score,) = statistics.of_block(place.block, (base, model))
    return (model - base).mul_(score.double() >= statistics.threshold).add_(base)


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
        return begin_ranking(ranking, models)

    ranking = Ranking(elements, [tails] * models, exact=False, gather=False, wide=target.wide, then=rank_scores)
    return begin_ranking(ranking, models)


def interval(low: Cut, high: Cut) -> Interval:
    """The interval between two order statistics."""
    return Interval(low.value, max(low.value, high.value))


@method(
    BlockMethod,
    base="required",
    statistics=Statistics(pcb_contest, passes=4, held=held_by_ranks(2, gather=False), scope="scope", of=("ratio",)),
    needs=Needs(temporaries=12, temporaries_each=6, float64=True),
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
