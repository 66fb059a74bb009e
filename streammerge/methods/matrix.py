"""The part of a task vector that a matrix of low rank can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from streammerge.methods.contract import Between, Share
from streammerge.methods.decomposition import decompose, decompose_at_random
from streammerge.methods.registry import WholeMethod, method
from streammerge.methods.tasks import Tasks, workspace

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place


@method(WholeMethod, base="required", models=(1, 1), temporaries=0, held=workspace(squares=8))
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
        found = decompose(tasks.total).largest(kept)
    return tasks.merged(tasks.total @ (found.right @ found.right.T), alpha)
