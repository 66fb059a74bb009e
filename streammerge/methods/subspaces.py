"""Merging by singular vectors: what tasks share of directions is set right before they are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from streammerge.methods.contract import Between, PerModel
from streammerge.methods.decomposition import Decomposition, decompose, decompose_at_random
from streammerge.methods.matrices import Tall, beside
from streammerge.methods.registry import WholeMethod, method
from streammerge.methods.tasks import Tasks, workspace

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


@method(WholeMethod, base="required", temporaries=0, held=workspace(squares=14, each=1))
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
            found = decompose(delta).largest(kept)
        parts.append(Part(delta, found))
    return tasks.merged(orthogonalized(parts, isotropic=False), lambda_)


@method(WholeMethod, base="required", temporaries=0, held=workspace(squares=10))
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
    responses = torch.zeros(len(found.values), dtype=torch.float64)
    for delta in tasks.deltas:
        if tasks.turned:  # the filters' side is the short one, and uᵣ among the right vectors
            response = delta @ found.right
            shared, length = response.products(merged @ found.right), response.products(response)
        else:
            own = (merged @ found.left).gram(delta)
            shared, length = found.values * (own * found.right.T).sum(1), own.square().sum(1)
        least = (1e-12 * found.values.square()).clamp(min=1e-300)
        responses += (shared / torch.maximum(length, least)).clamp(min=alpha)
    gains = len(models) / responses
    return tasks.merged(merged @ ((found.right * gains) @ found.right.T), lambda_)
