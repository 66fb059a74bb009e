"""Merging by singular vectors: what tasks share of directions is set right before they are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from streammerge.methods.contract import Between, PerModel, Share
from streammerge.methods.decompositions import Decomposition, decompose, decompose_at_random
from streammerge.methods.matrices import Tall, Tasks, beside, total, workspace
from streammerge.methods.registry import WholeMethod, method

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix and some of its singular vectors."""

    matrix: Tall
    found: Decomposition


def orthogonalized(parts: Sequence[Part], *, isotropic: bool) -> Tall:
    """U⊥ S V⊥ᵀ of all the parts' singular vectors, each made the nearest matrix with orthonormal columns.

    Isotropic: without S.
    """
    import torch

    left = beside([part.matrix @ part.found.left for part in parts])
    right = torch.cat([part.found.right for part in parts], dim=1)
    values = torch.cat([part.found.values for part in parts])
    scale = torch.ones_like(values) if isotropic else values
    nearest_left, nearest_right = decompose(left).nearest, decompose(Tall.held(right)).nearest
    return left @ ((nearest_left * scale) @ (right @ nearest_right).T)


@method(WholeMethod, base="required", temporaries=0, anywhere=True, held=workspace(squares=14, each=1))
def tsv_m(
    base: Tensor,
    *models: Tensor,
    place: Place,
    weight: PerModel = (1.0,),
    lambda_: float = 1.0,
    svd: Literal["exact", "randomized"] = "exact",
) -> Tensor:
    """θ = θ₀ + λ U⊥ S V⊥ᵀ,   U, S, V: of each wᵢ (θᵢ − θ₀) as a matrix the largest singular values and vectors, 1/n

    Task singular vectors: Gargiulo et al. 2025, arXiv:2412.00081. Of n tasks each keeps ⌊r / n⌋ of its r singular
    triplets; ⊥ is the nearest matrix with orthonormal columns (Procrustes), which takes away the tasks' interference.
    A convolution is a matrix with a row per filter. Vectors of singular values that are 0 count as 0. Tensors of fewer
    than two dimensions, and matrices of fewer singular values than there are tasks, take the mean task vector.
    `svd: randomized` finds the triplets as `truncate_rank` does, with that error, which is small only where the
    singular values fall off.
    """
    tasks = Tasks(base, models, weight)
    kept = tasks.rank // tasks.count
    if not tasks.are_matrices or not kept:
        return tasks.mean(lambda_)
    parts = []
    for number, delta in enumerate(tasks.deltas):
        if svd == "randomized":
            found = decompose_at_random(delta, kept, place.generator(number))
        else:
            found = decompose(delta, kept)
        parts.append(Part(delta, found))
    return tasks.merged(orthogonalized(parts, isotropic=False), lambda_)


@method(WholeMethod, base="required", temporaries=0, anywhere=True, held=workspace(squares=10, pieces=18))
def svc(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    lambda_: float = 1.0,
    alpha: Annotated[float, Between(0, exclusive=True)] = 0.1,
) -> Tensor:
    """θ = θ₀ + λ Σᵣ γᵣ σᵣ uᵣ vᵣᵀ,   γᵣ = n / Σᵢ max(α, ⟨uᵣᵀ T, uᵣᵀ τᵢ⟩ / ‖uᵣᵀ τᵢ‖²),   U S Vᵀ = T = Σᵢ wᵢ τᵢ

    Singular value calibration: Li et al. 2026, arXiv:2602.05536, of task arithmetic. τᵢ = θᵢ − θ₀ as a matrix with a
    row per filter; a direction uᵣ in which the sum is more than each of the n tasks alone is scaled down. The lower α,
    the more may directions be scaled up in which the tasks cancel. ‖uᵣᵀ τᵢ‖² counts as 1e-12 σᵣ² at the least, where
    the paper's program has 1e-12. Other tensors are left as task arithmetic makes them.
    """
    import torch

    tasks = Tasks(base, models)
    merged = Tasks(base, models, weight).total
    if not tasks.are_matrices:
        return tasks.merged(merged, lambda_)
    found = decompose(merged)
    responses = torch.zeros_like(found.values)
    for delta in tasks.deltas:
        if tasks.turned:  # the filters' side is the short one, and uᵣ among the right vectors
            response = delta @ found.right
            shared, length = response.products(merged @ found.right), response.products(response)
        else:
            own = (merged @ found.left).inner(delta)
            shared, length = found.values * (own * found.right.T).sum(1), own.square().sum(1)
        least = (1e-12 * found.values.square()).clamp(min=1e-300)
        responses += (shared / torch.maximum(length, least)).clamp(min=alpha)
    gains = len(models) / responses
    return tasks.merged(merged @ ((found.right * gains) @ found.right.T), lambda_)


@method(WholeMethod, base="required", models=(1, 1), temporaries=0, anywhere=True, held=workspace(squares=8))
def truncate_rank(
    base: Tensor,
    model: Tensor,
    *,
    place: Place,
    rank: Annotated[int, Between(0)] = 8,
    fraction: Share = 0.0,
    alpha: float = 1.0,
    svd: Literal["exact", "randomized"] = "exact",
) -> Tensor:
    """θ = θ₀ + α Uᵣ Sᵣ Vᵣᵀ,   U S Vᵀ = θ₁ − θ₀ as a matrix, r the `rank`, or that `fraction` of all singular values

    What a LoRA of that rank can hold of a fine-tune: of all matrices of rank r the nearest to the task vector (Eckart,
    Young 1936). A convolution is a matrix with a row per filter; tensors of fewer than two dimensions, and those with
    infinite values or NaNs, keep their whole task vector. Computed in float64 from Gram matrices of the shorter side.
    `svd: randomized` is several times faster for small ranks and seeded per tensor: two subspace iterations with ten
    directions more than r, whose error is on average at most (1 + 4 √(2n / (r − 1)))^(1/5) times the best one in
    spectral norm, n being the shorter side (Halko, Martinsson, Tropp 2011, corollary 10.10).
    """
    tasks = Tasks(base, [model])
    kept = max(round(fraction * tasks.rank), 1) if fraction else rank
    if not tasks.are_matrices or kept >= tasks.rank:
        return tasks.mean(alpha)
    if svd == "randomized":
        found = decompose_at_random(tasks.total, kept, place.generator(0))
    else:
        found = decompose(tasks.total, kept)
    return tasks.merged(tasks.total @ found.right @ found.right.T, alpha)


@method(WholeMethod, base="required", temporaries=0, anywhere=True, held=workspace(squares=8))
def iso_c(base: Tensor, *models: Tensor, weight: PerModel = (1.0,), lambda_: float = 1.0) -> Tensor:
    """θ = θ₀ + λ σ̄ U Vᵀ,   U S Vᵀ = Σᵢ wᵢ (θᵢ − θ₀) as a matrix, σ̄: the mean of its singular values

    Iso-C, isotropic merging in the common subspace: Marczak et al. 2025, arXiv:2502.04959. A convolution is a matrix
    with a row per filter. Directions whose singular value is 0 (below 1e-10 of the greatest) stay 0, where the paper
    gives them a direction by chance. Other tensors take the mean task vector. The singular value decomposition is made
    in float64, right to 1e-7 in every element of U Vᵀ for matrices of any condition up to 1e8.
    """
    tasks = Tasks(base, models, weight)
    if not tasks.are_matrices:
        return tasks.mean(lambda_)
    found = decompose(tasks.total)
    return tasks.merged(tasks.total @ found.nearest, lambda_ * float(found.values.mean()))


@method(WholeMethod, base="required", temporaries=0, anywhere=True, held=workspace(squares=14, each=3, pieces=30))
def iso_cts(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    lambda_: float = 1.0,
    common_space_fraction: Share = 0.8,
) -> Tensor:
    """θ = θ₀ + λ σ̄ U⊥ V⊥ᵀ,   U, V: the largest singular vectors of T = Σᵢ wᵢ τᵢ and of each τᵢ − U_c U_cᵀ τᵢ

    Iso-CTS, isotropic merging in the common and task-specific subspaces: Marczak et al. 2025, arXiv:2502.04959.
    τᵢ = θᵢ − θ₀ as a matrix with a row per filter, of r singular values; U_c are T's largest left singular vectors, a
    share `common_space_fraction` of r, and the others are divided evenly among the tasks. ⊥ is the nearest matrix with
    orthonormal columns, and σ̄ the mean of all singular values that were kept. What is 0, and tensors that are no
    matrices, are treated as in `iso_c`, and so is the decomposition. Task vectors of low rank, such as LoRAs that were
    merged, have rounding errors for most of their directions, which count like the others here.
    """
    tasks = Tasks(base, models, weight)
    if not tasks.are_matrices:
        return tasks.mean(lambda_)
    own = tasks_share(tasks.rank, tasks.count, common_space_fraction)
    total = tasks.total
    shared = decompose(total, tasks.rank - own * tasks.count)
    parts = [Part(total, shared)]
    for delta in tasks.deltas:
        rest = beyond(delta, Part(total, shared), turned=tasks.turned)
        parts.append(Part(rest, decompose(rest, own)))
    kept = sum(float(part.found.values.sum()) for part in parts)
    return tasks.merged(orthogonalized(parts, isotropic=True), lambda_ * kept / tasks.rank)


def beyond(delta: Tall, shared: Part, *, turned: bool) -> Tall:
    """What of a task vector is orthogonal to the shared directions of the filters' side."""
    if turned:  # that side is the short one
        return delta - delta @ (shared.found.right @ shared.found.right.T)
    common = shared.matrix @ shared.found.left
    for _ in range(2):  # because the directions are orthonormal to 1e-8 alone
        delta = delta - common @ common.inner(delta)
    return delta


def tasks_share(rank: int, count: int, fraction: float) -> int:
    """How many singular vectors each of the tasks has of its own, beside a common share of about that fraction."""
    return min(round((rank - int(rank * fraction)) / count), rank // count)


@method(
    WholeMethod, base="required", temporaries=0, anywhere=True, held=workspace(squares=4, each=1, tensors=3, pieces=14)
)
def wudi(
    base: Tensor,
    *models: Tensor,
    iterations: Annotated[int, Between(0)] = 300,
    learning_rate: Annotated[float, Between(0)] = 1e-5,
    lambda_: float = 1.0,
) -> Tensor:
    """θ = θ₀ + λ T,   T = arg min Σᵢ ‖(T − τᵢ) τᵢᵀ‖² / ‖τᵢ‖², from Σᵢ τᵢ on,   τᵢ = θᵢ − θ₀ as a matrix

    WUDI-Merging: Cheng et al. 2025, arXiv:2503.08099. The minimum is approached by `iterations` steps of Adam (Kingma,
    Ba 2015; β 0.9 and 0.999, ε 1e-8) with that `learning_rate`, in float64: no element moves further than about their
    product. A convolution is a matrix with a row per filter; other tensors take the mean task vector.
    """
    tasks = Tasks(base, models)
    if not tasks.are_matrices:
        return tasks.mean(lambda_)
    lengths = [float(delta.products(delta).sum()) for delta in tasks.deltas]
    moved = [(delta, length) for delta, length in zip(tasks.deltas, lengths, strict=True) if length]
    if not moved:
        return tasks.mean(lambda_)
    parts, factors = [delta for delta, _ in moved], [2 / length for _, length in moved]
    descend = descend_together if tasks.turned else descend_by_rows
    return tasks.merged(descend(parts, factors, iterations, learning_rate), lambda_)


def descend_by_rows(parts: list[Tall], factors: list[float], iterations: int, rate: float) -> Tall:
    """T, row by row: the gradient Σᵢ fᵢ (T − τᵢ) τᵢᵀτᵢ of every row depends on that row alone."""
    grams = [factor * part.gram() for part, factor in zip(parts, factors, strict=True)]
    together = sum(grams[1:], start=grams[0])
    start = total(parts)

    def piece(rows: slice) -> Tensor:
        own = [part.piece(rows) @ gram for part, gram in zip(parts, grams, strict=True)]
        wanted = sum(own[1:], start=own[0])
        adam = Adam(start.piece(rows), rate)
        for _ in range(iterations):
            adam.step(slice(None), adam.values @ together - wanted)
            adam.count += 1
        return adam.values

    return replace(start, piece=piece)


def descend_together(parts: list[Tall], factors: list[float], iterations: int, rate: float) -> Tall:
    """T of filters that are longer than many, turned: the gradient Σᵢ fᵢ τᵢ (τᵢᵀT − τᵢᵀτᵢ) wants all of T at once."""
    grams = [part.gram() for part in parts]
    adam = Adam(total(parts).matrix(), rate)
    merged = replace(parts[0], piece=lambda rows: adam.values[rows])
    for _ in range(iterations):
        weights = [
            factor * (part.inner(merged) - gram) for part, gram, factor in zip(parts, grams, factors, strict=True)
        ]
        gradient = total([part @ weight for part, weight in zip(parts, weights, strict=True)])
        for rows in gradient.cuts():
            adam.step(rows, gradient.piece(rows))
        adam.count += 1
    return merged


class Adam:
    """Values on their way down a gradient, moved where they are, with its two moments; `count`: the steps, from 1."""

    def __init__(self, values: Tensor, rate: float) -> None:
        import torch

        self.values = values
        self.mean = torch.zeros_like(values)
        self.square = torch.zeros_like(values)
        self.rate = rate
        self.count = 1

    def step(self, rows: slice, gradient: Tensor) -> None:
        """Move some of the rows."""
        mean = self.mean[rows].mul_(0.9).add_(gradient, alpha=0.1)
        square = self.square[rows].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        size = (square / (1 - 0.999**self.count)).sqrt_().add_(1e-8)
        self.values[rows].addcdiv_(mean, size, value=-self.rate / (1 - 0.9**self.count))
