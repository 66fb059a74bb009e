"""Methods that drop elements of task vectors, at random or by their size, and make up for what is lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from streammerge.errors import MethodError
from streammerge.methods.contract import ParameterValue, PerModel, Share
from streammerge.methods.linear import check_weights
from streammerge.methods.place import Place, Target
from streammerge.methods.registry import BlockMethod, Needs, Statistics, method
from streammerge.methods.results import net
from streammerge.methods.sparse import banded_kernel, divided, elect_and_sum, l1_pass, merge_step
from streammerge.methods.statistics.ranking import begin_ranking, held_by_ranks
from streammerge.methods.statistics.ranks import Cut, Ranking
from streammerge.methods.statistics.slices import Slicing
from streammerge.methods.steps import Kernel, Step

if TYPE_CHECKING:
    from torch import Tensor

Parameters = Mapping[str, ParameterValue]
Factors = Sequence[float]
"""What each model's task vector is scaled by to make up for what was dropped."""

GTA: Any = {"base": "required", "check": check_weights}
"""What methods that sum task vectors have in common (generalised task arithmetic, in mergekit's words)."""


def add_deltas(
    base: Tensor, deltas: Sequence[Tensor], weight: Sequence[float], *, normalize: bool, scale: float, elect: bool
) -> Tensor:
    """θ₀ + λ Σᵢ mᵢ wᵢ dᵢ, divided by Σᵢ mᵢ wᵢ if `normalize`. Where signs are elected, mᵢ says which elements agree."""
    weighted = [delta * share for delta, share in zip(deltas, weight, strict=True)]
    if elect:
        total, weights = elect_and_sum(weighted, weight)
        if normalize:
            total = divided(total, weights, weight)
    else:
        total = sum(weighted[1:], start=weighted[0])
        if normalize:
            total = total / total.new_full((), net(*weight))  # by numbers CUDA multiplies
    return total.mul_(scale).add_(base)


# Breadcrumbs: the smallest and the largest

Band = Sequence[Cut]
"""The outliers of a task vector, and these together with what is kept."""


def in_band(delta: Tensor, band: Band, block: int) -> Tensor:
    """The task vector without its outliers and without what is too small."""
    outliers, both = band
    return both.keep(delta, block) - outliers.keep(delta, block)


def banded_deltas(
    base: Tensor, models: Sequence[Tensor], place: Place, statistics: Sequence[tuple[Band, float]]
) -> list[Tensor]:
    """The task vectors within their bands, made up for what was dropped."""
    return [
        in_band(model - base, band, place.counted) * factor
        for model, (band, factor) in zip(models, statistics, strict=True)
    ]


def breadcrumbs_cuts(target: Target, parameters: Parameters) -> Any:  # noqa: ANN401
    """Find the cuts of each task vector, and if it is to be rescaled the ratio of its L1 norms."""
    density: Any = parameters["density"]
    gamma: Any = parameters["gamma"]
    elements = target.elements
    ranks = [band_ranks(elements, share, outliers) for share, outliers in zip(density, gamma, strict=True)]

    def with_factors(bands: Sequence[Band]) -> Any:  # noqa: ANN401
        def kept(delta: Tensor, model: int, place: Place) -> Tensor:
            return in_band(delta, bands[model], place.counted)

        if not parameters["rescale"]:
            return list(zip(bands, [1.0] * len(bands), strict=True))
        cuts = [(both, outliers) for outliers, both in bands]
        return l1_pass(target, kept, lambda factors: list(zip(bands, factors, strict=True)), cuts)

    return begin_ranking(Ranking(elements, ranks, wide=target.wide, then=with_factors), len(ranks))


def band_ranks(elements: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of the largest elements are outliers, and how many are not among the smallest."""
    kept = min(max(int(density * elements), 1), elements) if density > 0 else 0
    outliers = min(int(gamma * elements), elements - kept)
    return outliers, outliers + kept


BANDED: Any = {
    **GTA,
    "statistics": Statistics(breadcrumbs_cuts, passes=2, held=held_by_ranks(2)),
    # measured: the heap keeps as much again as is held at once, which two workers have no room for
    "needs": Needs(temporaries=10, temporaries_each=8),
}


@method(BlockMethod, **BANDED, kernel=banded_kernel("none"))
def breadcrumbs(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    density: Sequence[Share] = (1.0,),
    gamma: Sequence[Share] = (0.01,),
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = False,
    place: Place,
    statistics: Sequence[tuple[Band, float]],
) -> Tensor:
    """θ = θ₀ + λ Σᵢ wᵢ band(θᵢ − θ₀), divided by Σᵢ wᵢ if `normalize`; band drops the largest and smallest elements

    Model Breadcrumbs, Davari and Belilovsky 2023, arXiv:2312.06795. Of each tensor the share `gamma` of the largest
    elements is dropped, and the share `density` of what follows is kept; of equal ones the first count as larger. Where
    gamma comes to less than one element none is dropped (mergekit drops the whole tensor then), and as in `ties` one
    element at the least is kept.
    """
    deltas = banded_deltas(base, models, place, statistics)
    return add_deltas(base, deltas, weight, normalize=normalize, scale=lambda_, elect=False)


@method(BlockMethod, **BANDED, kernel=banded_kernel("sum"))
def breadcrumbs_ties(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    density: Sequence[Share] = (1.0,),
    gamma: Sequence[Share] = (0.01,),
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = False,
    place: Place,
    statistics: Sequence[tuple[Band, float]],
) -> Tensor:
    """θ = θ₀ + λ Σᵢ mᵢ wᵢ band(θᵢ − θ₀), divided by Σᵢ mᵢ wᵢ if `normalize`; mᵢ: agrees with the elected sign

    Model Breadcrumbs (arXiv:2312.06795) as in `breadcrumbs`, with TIES' election of signs (arXiv:2306.01708).
    """
    deltas = banded_deltas(base, models, place, statistics)
    return add_deltas(base, deltas, weight, normalize=normalize, scale=lambda_, elect=True)


# DELLA: at random, the smaller the likelier


def keep_probability(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """From density − ε for the smallest element of a row to density + ε for its largest, by rank."""
    import torch

    width = delta.shape[1]
    whole_numbers = torch.int64 if delta.dtype == torch.float64 else torch.int32
    bits = delta.abs().view(whole_numbers)  # which sort as the magnitudes do, in less time
    order = bits.argsort(dim=1, stable=True)
    least, step = chances(width, density, epsilon)
    by_rank = torch.arange(width, dtype=torch.float64, device=delta.device).mul_(step).add_(least)
    return by_rank.new_empty(delta.shape).scatter_(1, order, by_rank.expand(delta.shape))


def chances(width: int, density: float, epsilon: float) -> tuple[float, float]:
    """The probability of the smallest element of a row, and by how much more likely the next one is."""
    return (density - epsilon, 2 * epsilon / (width - 1)) if width > 1 else (density, 0.0)


def drop_smaller(delta: Tensor, model: int, place: Place, density: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """What is kept of the rows of a task vector, and the probabilities with which that was decided."""
    import torch

    if density >= 1 or density <= 0:
        return delta * density, torch.ones_like(delta)
    probability = keep_probability(delta, density, epsilon)
    return delta * (place.uniform(model, delta) < probability), probability.to(delta.dtype)


def check_epsilon(parameters: Parameters, inputs: int) -> None:
    """MethodError where density ± epsilon is no probability, or the weights sum to zero."""
    check_weights(parameters, inputs)
    density: Any = parameters["density"]
    epsilon: Any = parameters["epsilon"]
    for share, spread in zip(density, epsilon, strict=True):
        if 0 < share < 1 and not 0 < share - spread <= share + spread < 1:
            raise MethodError(
                f"density {share:g} and epsilon {spread:g}: density − epsilon and density + epsilon must lie between "
                "0 and 1",
                advice="Choose a smaller epsilon.",
            )


def della_factors(target: Target, parameters: Parameters) -> Any:  # noqa: ANN401
    """What makes up for the dropped elements: the L1 norms' ratio after a pass, or None for every probability."""
    density: Any = parameters["density"]
    epsilon: Any = parameters["epsilon"]
    if not parameters["rescale"]:
        return [1.0] * len(density)
    if parameters["rescale_by"] == "probability":
        return [None] * len(density)

    def kept(delta: Tensor, model: int, place: Place) -> Tensor:
        return drop_smaller(delta, model, place, density[model], epsilon[model])[0]

    return l1_pass(target, kept, steps=list(whole_and_sifted(target, density, epsilon)))


def sift_step(
    target: Target,
    model: int,
    chance: tuple[float, float],
    factors: tuple[float | None, float] = (1.0, 1.0),
    of: int | None = None,
) -> Step:
    """The step SIFT: what is kept of a task vector by its rank, times two factors; DROP if ranks don't count."""
    (density, epsilon), (factor, share) = chance, factors
    place, numbers = model + 1 if of is None else of, target.stream(model).numbers
    if density >= 1 or density <= 0:
        return Step("DROP", place, (1.0 if factor is None else factor, share, density, *numbers))
    width = Slicing.of(target.shape, "rows").width
    return Step("SIFT", place, (factor or 0.0, share, *chances(width, density, epsilon), width, *numbers))


def whole_and_sifted(target: Target, density: Sequence[float], epsilon: Sequence[float]) -> Iterator[Step]:
    """Each task vector, and what is kept of it, one after the other behind the inputs."""
    for i, chance in enumerate(zip(density, epsilon, strict=True)):
        place = target.inputs + 2 * i
        yield Step("MINUS", place, (i + 1, 0))
        yield Step("COPY", place + 1, (i + 1,))
        yield sift_step(target, i, chance, of=place + 1)


def della_kernel(vote: str) -> Kernel:
    """How compiled loops do it: every task vector becomes sparse in its model's place, then all are merged."""

    def steps(target: Target, parameters: Parameters, statistics: Sequence[float | None]) -> list[Step]:
        weight: Any = parameters["weight"]
        density: Any = parameters["density"]
        epsilon: Any = parameters["epsilon"]
        each = enumerate(zip(density, epsilon, statistics, weight, strict=True))
        sifted = [sift_step(target, i, (share, spread), (factor, part)) for i, (share, spread, factor, part) in each]
        return [*sifted, merge_step(weight, parameters, vote)]

    return steps


def della_deltas(
    base: Tensor,
    models: Sequence[Tensor],
    place: Place,
    density: Sequence[float],
    epsilon: Sequence[float],
    factors: Sequence[float | None],
) -> list[Tensor]:
    """The task vectors after DELLA's drop."""
    deltas = []
    for i, (model, factor) in enumerate(zip(models, factors, strict=True)):
        kept, probability = drop_smaller(model - base, i, place, density[i], epsilon[i])
        deltas.append(kept / probability if factor is None else kept * factor)
    return deltas


DELLA: Any = {
    **GTA,
    "statistics": Statistics(della_factors, passes=1),
    "needs": Needs(rows="rows", temporaries=4, temporaries_each=2, float64=True),
    "check": check_epsilon,
}


@method(BlockMethod, **DELLA, kernel=della_kernel("sum"))
def della(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    density: Sequence[Share] = (1.0,),
    epsilon: Sequence[Share] = (0.15,),
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool = True,
    rescale_by: Literal["l1", "probability"] = "l1",
    place: Place,
    statistics: Sequence[float | None],
) -> Tensor:
    """θ = θ₀ + λ Σᵢ mᵢ wᵢ drop(θᵢ − θ₀), divided by Σᵢ mᵢ wᵢ if `normalize`; drop likes the smaller elements of a row

    DELLA-Merging, Deep et al. 2024, arXiv:2406.11617. An element is kept with a probability from density − ε to
    density + ε, by its rank in its row; of convolutions a row is a filter, and vectors are one row. What is kept is
    scaled to the L1 norm of the whole task vector as in mergekit, or divided by its probability as in the paper. Ranks
    are exact for rows of any length and dtype (mergekit's are rounded to bfloat16 where the tensor is).
    """
    deltas = della_deltas(base, models, place, density, epsilon, statistics)
    return add_deltas(base, deltas, weight, normalize=normalize, scale=lambda_, elect=True)


@method(BlockMethod, **DELLA, kernel=della_kernel("none"))
def della_linear(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    density: Sequence[Share] = (1.0,),
    epsilon: Sequence[Share] = (0.15,),
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = True,
    rescale_by: Literal["l1", "probability"] = "l1",
    place: Place,
    statistics: Sequence[float | None],
) -> Tensor:
    """θ = θ₀ + λ Σᵢ wᵢ drop(θᵢ − θ₀), divided by Σᵢ wᵢ if `normalize`; drop likes the smaller elements of a row

    DELLA-Merging (arXiv:2406.11617) as in `della`, without the election of signs.
    """
    deltas = della_deltas(base, models, place, density, epsilon, statistics)
    return add_deltas(base, deltas, weight, normalize=normalize, scale=lambda_, elect=False)
