"""Methods on matrices, which need whole tensors at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from streammerge.methods.contract import Between, Share
from streammerge.methods.registry import WholeMethod, method

if TYPE_CHECKING:
    from torch import Tensor


@method(WholeMethod, base="required", models=(1, 1), temporaries=10)
def truncate_rank(
    base: Tensor,
    model: Tensor,
    *,
    rank: Annotated[int, Between(0)] = 8,
    fraction: Share = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """θ = θ₀ + α Uᵣ Sᵣ Vᵣᵀ,   U S Vᵀ = θ₁ − θ₀ as a matrix, r the `rank`, or that `fraction` of all singular values

    What a LoRA of that rank can hold of a fine-tune: of all matrices of rank r the nearest to the task vector (Eckart,
    Young 1936). A convolution is a matrix with a row per filter; tensors of fewer than two dimensions keep their whole
    task vector. Computed in float64 from the smaller of the two matrices of inner products.
    """
    delta = (model - base).double()
    if delta.ndim >= 2:
        matrix = delta.reshape(delta.shape[0], -1)
        count = min(matrix.shape)
        kept = max(round(fraction * count), 1) if fraction else rank
        delta = largest_singular(matrix, kept).reshape(base.shape)
    return delta.mul_(alpha).add_(base).to(base.dtype)


def largest_singular(matrix: Tensor, rank: int) -> Tensor:
    """The part of the matrix that belongs to its `rank` largest singular values."""
    import torch

    if rank >= min(matrix.shape):
        return matrix
    if matrix.shape[0] > matrix.shape[1]:
        return largest_singular(matrix.T, rank).T
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)  # in ascending order
    left: Tensor = vectors[:, vectors.shape[1] - rank :]
    return left @ (left.T @ matrix)
