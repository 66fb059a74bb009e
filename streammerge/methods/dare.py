"""Methods that drop elements of task vectors at random, all with the same probability, and make up for what is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from streammerge.methods.contract import Parameters, PerModel, Share
from streammerge.methods.dropping import GTA, Factors, add_deltas
from streammerge.methods.place import Place, Target
from streammerge.methods.registry import BlockMethod, Needs, Statistics, method
from streammerge.methods.sparse import l1_pass, merge_step
from streammerge.methods.steps import Kernel, Step

if TYPE_CHECKING:
    from torch import Tensor


def drop_at_random(delta: Tensor, model: int, place: Place, density: float) -> Tensor:
    """The task vector of which each element is kept with the probability `density`."""
    return delta if density >= 1 else delta * place.drawn(model, delta, density)


def dare_factors(target: Target, parameters: Parameters) -> Any:  # noqa: ANN401
    """What makes up for the dropped elements: 1/density at once, or the L1 norms' ratio after a pass."""
    density: Any = parameters["density"]
    if not parameters["rescale"]:
        return [1.0] * len(density)
    if parameters["rescale_by"] == "density" or all(share >= 1 for share in density):
        return [1.0 / share if share else 1.0 for share in density]

    def kept(delta: Tensor, model: int, place: Place) -> Tensor:
        return drop_at_random(delta, model, place, density[model])

    return l1_pass(target, kept, steps=list(whole_and_dropped(target, density)))


def drop_step(
    target: Target, model: int, density: float, factors: tuple[float, float] = (1.0, 1.0), of: int | None = None
) -> Step:
    """The step DROP: what is kept of a task vector at random, times two factors."""
    return Step("DROP", model + 1 if of is None else of, (*factors, density, *target.stream(model).numbers))


def whole_and_dropped(target: Target, density: Sequence[float]) -> Iterator[Step]:
    """Each task vector, and what is kept of it, one after the other behind the inputs."""
    for i, share in enumerate(density):
        place = target.inputs + 2 * i
        yield Step("MINUS", place, (i + 1, 0))
        yield Step("COPY", place + 1, (i + 1,))
        yield drop_step(target, i, share, of=place + 1)


def dare_kernel(vote: str) -> Kernel:
    """How compiled loops do it: every task vector becomes sparse in its model's place, then all are merged."""

    def steps(target: Target, parameters: Parameters, statistics: Factors) -> list[Step]:
        weight: Any = parameters["weight"]
        density: Any = parameters["density"]
        each = enumerate(zip(density, statistics, weight, strict=True))
        dropped = [drop_step(target, i, share, (factor, part)) for i, (share, factor, part) in each]
        return [*dropped, merge_step(weight, parameters, vote)]

    return steps


DARE: Any = {
    **GTA,
    "statistics": Statistics(dare_factors, passes=1),
    "needs": Needs(temporaries=7, temporaries_each=2),
}


def dropped_at_random(
    base: Tensor, models: Sequence[Tensor], density: Sequence[float], place: Place, factors: Factors
) -> list[Tensor]:
    """The task vectors after DARE."""
    return [
        drop_at_random(model - base, i, place, density[i]) * factor
        for i, (model, factor) in enumerate(zip(models, factors, strict=True))
    ]


@method(BlockMethod, **DARE, kernel=dare_kernel("none"))
def dare_linear(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    density: Sequence[Share] = (1.0,),
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = True,
    rescale_by: Literal["density", "l1"] = "density",
    place: Place,
    statistics: Factors,
) -> Tensor:
    """θ = θ₀ + λ Σᵢ wᵢ drop(θᵢ − θ₀) / density, divided by Σᵢ wᵢ if `normalize`; drop keeps elements at random

    DARE, Yu et al. 2023, arXiv:2311.03099. Each element is kept with the probability `density`, from the seed. What is
    kept is divided by the density as in the paper; mergekit scales it to the L1 norm of the whole task vector instead,
    which `rescale_by: l1` does.
    """
    deltas = dropped_at_random(base, models, density, place, statistics)
    return add_deltas(base, deltas, weight, normalize=normalize, scale=lambda_, elect=False)


@method(BlockMethod, **DARE, kernel=dare_kernel("sum"))
def dare_ties(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    density: Sequence[Share] = (1.0,),
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = True,
    rescale_by: Literal["density", "l1"] = "density",
    place: Place,
    statistics: Factors,
) -> Tensor:
    """θ = θ₀ + λ Σᵢ mᵢ wᵢ drop(θᵢ − θ₀) / density, divided by Σᵢ mᵢ wᵢ if `normalize`; mᵢ: agrees with the elected sign

    DARE (arXiv:2311.03099) as in `dare_linear`, with TIES' election of signs (arXiv:2306.01708).
    """
    deltas = dropped_at_random(base, models, density, place, statistics)
    return add_deltas(base, deltas, weight, normalize=normalize, scale=lambda_, elect=True)


@method(BlockMethod, base="required", needs=Needs(temporaries=6), elementwise=True)
def dropout(
    base: Tensor,
    *models: Tensor,
    density: Sequence[Share] = (0.1,),
    lambda_: float = 1.0,
    rescale: Share = 1.0,
    place: Place,
) -> Tensor:
    """θ = θ₀ + λ Σᵢ mᵢ densityᵢ⁻ʳ (θᵢ − θ₀) / max(Σᵢ mᵢ, 1),   mᵢ: 1 with the probability densityᵢ, else 0

    sd-mecha's dropout (its probability is 1 − density): elements that several task vectors keep are averaged. r is
    `rescale`. Task vectors are dropped independently; sd-mecha's other overlaps raise errors, but for odd ones.
    """
    total, kept = base * 0.0, base * 0.0
    for i, (model, share) in enumerate(zip(models, density, strict=True)):
        mask = place.drawn(i, model, share).to(base.dtype)
        kept += mask
        total.add_((model - base).mul_(mask), alpha=share**-rescale if share else 0.0)
    return total.div_(kept.clamp_(min=1.0)).mul_(lambda_).add_(base)
