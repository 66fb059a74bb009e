"""Isotropic merging: task vectors whose singular values are made equal, so that no direction outweighs another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.methods.contract import PerModel, Share
from streammerge.methods.decomposition import decompose
from streammerge.methods.matrices import Tall
from streammerge.methods.registry import WholeMethod, method
from streammerge.methods.subspaces import Part, orthogonalized
from streammerge.methods.tasks import Tasks, workspace

if TYPE_CHECKING:
    from torch import Tensor


@method(WholeMethod, base="required", temporaries=0, held=workspace(squares=8))
def iso_c(base: Tensor, *models: Tensor, weight: PerModel = (1.0,), lambda_: float = 1.0) -> Tensor:
    """θ = θ₀ + λ σ̄ U Vᵀ,   U S Vᵀ = Σᵢ wᵢ (θᵢ − θ₀) as a matrix, σ̄: the mean of its singular values

    Iso-C, isotropic merging in the common subspace: Marczak et al. 2025, arXiv:2502.04959. A convolution is a matrix
    with a row per filter. Directions whose singular value is 0 (below 1e-10 of the greatest) stay 0, where the paper
    gives them a direction by chance. Other tensors take the mean task vector. The singular value decomposition is made
    in float64 from Gram matrices of the shorter side, right to about 1e-8 for matrices of any condition.
    """
    tasks = Tasks(base, models, weight)
    if not tasks.are_matrices:
        return tasks.mean(lambda_)
    found = decompose(tasks.total)
    return tasks.merged(tasks.total @ found.nearest, lambda_ * float(found.values.mean()))


@method(WholeMethod, base="required", temporaries=0, held=workspace(squares=14, each=3))
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
    shared = decompose(total).largest(tasks.rank - own * tasks.count)
    parts = [Part(total, shared)]
    for delta in tasks.deltas:
        rest = beyond(delta, Part(total, shared), turned=tasks.turned)
        parts.append(Part(rest, decompose(rest).largest(own)))
    kept = sum(float(part.found.values.sum()) for part in parts)
    return tasks.merged(orthogonalized(parts, isotropic=True), lambda_ * kept / tasks.rank)


def beyond(delta: Tall, shared: Part, *, turned: bool) -> Tall:
    """What of a task vector is orthogonal to the shared directions of the filters' side."""
    if turned:  # that side is the short one
        return delta - delta @ (shared.found.right @ shared.found.right.T)
    common = shared.matrix @ shared.found.left
    for _ in range(2):  # because the directions are orthonormal to 1e-8 alone
        delta = delta - common @ common.gram(delta)
    return delta


def tasks_share(rank: int, count: int, fraction: float) -> int:
    """How many singular vectors each of the tasks has of its own, beside a common share of about that fraction."""
    return min(round((rank - int(rank * fraction)) / count), rank // count)
