"""Merging in the coordinates that tasks share: TIES of the right singular vectors of all task vectors together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from streammerge.methods.contract import Between, PerModel, Share
from streammerge.methods.decomposition import NOTHING, Decomposition, decompose
from streammerge.methods.linear import check_weights
from streammerge.methods.matrices import Tall, above, beside
from streammerge.methods.registry import WholeMethod, method
from streammerge.methods.tasks import Tasks, workspace

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Target


NOISE = 1e-7
"""The share of the greatest element of singular vectors below which there is nothing but what rounding left."""


def aligned_side(target: Target) -> int:
    """The shorter side of all task vectors beside each other."""
    height = target.shape[0] if len(target.shape) > 1 else 1
    return min(height, (target.inputs - 1) * (target.elements // max(height, 1)))


@method(
    WholeMethod,
    base="required",
    temporaries=0,
    held=workspace(squares=8, each=1, tensors=3, side=aligned_side),
    check=check_weights,
)
def knots(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    density: Sequence[Share] = (1.0,),
    normalize: bool = True,
    lambda_: float = 1.0,
    epsilon: Annotated[float, Between(0)] = 1e-4,
) -> Tensor:
    """θ = θ₀ + λ U S ties(V₁, …, Vₙ)ᵀ,   U S [V₁ᵀ … Vₙᵀ] = [τ₁ … τₙ],   τᵢ = θᵢ − θ₀ as a matrix

    KnOTS-TIES: Stoica et al. 2025, arXiv:2410.19735. One singular value decomposition of all task vectors beside each
    other (a row per filter) gives them common directions U S; Vᵢ, the part of each task, is trimmed to the `density`
    largest of its elements, and of these the ones that agree with the elected sign are averaged by `weight`
    (`normalize` false: summed), as in `ties`. All of equally large elements are kept. Singular values of at most
    `epsilon` times the greatest are left out, where the paper's program takes `epsilon` as it stands, whatever the
    models' scale. Where votes cancel but for rounding, nobody is elected: + would depend on the signs of the singular
    vectors, which are anybody's choice (as the vectors of equal singular values are). Tensors of fewer than two
    dimensions are merged by TIES as they are, and those with infinite values or NaNs take the mean task vector.
    """
    import torch

    flat = Tasks(base, models)
    if not flat.are_finite:
        return flat.mean(lambda_)
    weights, densities = (tuple(each) * (1 if len(each) > 1 else len(models)) for each in (weight, density))
    if not flat.are_matrices:
        return flat.merged(elect(flat.deltas, weights, densities, normalize=normalize, noise=0.0), lambda_)
    height, width = base.shape[0], flat.width
    turned = height <= len(models) * width
    tasks = Tasks(base, models, turned=turned)
    if turned:
        found = telling(decompose(above(tasks.deltas)), epsilon)
        parts = [delta @ found.left for delta in tasks.deltas]
        merged = elect(parts, weights, densities, normalize=normalize)
        return tasks.merged(merged @ (found.values * found.right).T, lambda_)
    together = beside(tasks.deltas)
    found = telling(decompose(together), epsilon)
    parts = [Tall.held(part) for part in torch.split(found.right, width)]
    merged = elect(parts, weights, densities, normalize=normalize)
    return tasks.merged(together @ ((found.left * found.values) @ merged.matrix().T), lambda_)


def telling(found: Decomposition, epsilon: float) -> Decomposition:
    """What belongs to singular values of more than `epsilon` times the greatest."""
    return found.largest(int((found.values > max(epsilon, NOTHING) * found.values[:1]).sum()))


def elect(
    parts: Sequence[Tall], weights: PerModel, densities: Sequence[float], *, normalize: bool, noise: float = NOISE
) -> Tall:
    """TIES of the parts: the largest elements of each, of these the ones with their sum's sign, averaged or summed.

    What is less than the share `noise` of the greatest is nothing. The sign of a sum that is no more than this share of
    its parts is neither + nor −; without noise that of zero is +.
    """
    import torch

    least = [least_kept(part, density, noise) for part, density in zip(parts, densities, strict=True)]

    def piece(rows: slice) -> Tensor:
        made = [part.piece(rows) for part in parts]
        votes = [w * torch.where(v.abs() >= cut, v, 0.0) for v, w, cut in zip(made, weights, least, strict=True)]
        sign = elected(votes, noise)
        agree = [vote * sign > 0 for vote in votes]
        merged, share = torch.zeros_like(made[0]), torch.zeros_like(made[0])
        for vote, weight, agrees in zip(votes, weights, agree, strict=True):
            merged += vote * agrees
            share += weight * agrees
        return merged / torch.where(share == 0, 1.0, share) if normalize else merged

    return replace(parts[0], step=min(part.step for part in parts), piece=piece)


def elected(votes: Sequence[Tensor], noise: float) -> Tensor:
    """The sign of the votes' sum; 0 where it is no more than this share of them, + where it is zero without noise."""
    import torch

    total = torch.stack(list(votes)).sum(0)
    sign = torch.where(total >= 0, 1.0, -1.0)
    if noise:
        size = torch.zeros_like(total)
        for vote in votes:
            size += vote.abs()
        sign.masked_fill_(total.abs_() <= size.mul_(noise), 0.0)
    return sign


def least_kept(part: Tall, density: float, noise: float) -> float:
    """The least magnitude among the share of the largest ones, one at the least; infinite for a share of nothing.

    What is as small as the decomposition's rounding is nothing: its sign would be anybody's guess.
    """
    elements = part.rows * part.columns
    if not elements:
        return 0.0
    if density == 0:
        return float("inf")
    magnitudes = part.matrix().abs_().reshape(-1)
    dropped = elements - min(max(int(density * elements), 1), elements)
    least = float(magnitudes.kthvalue(dropped + 1).values) * (1.0 - noise)  # equal ones are equal but for noise
    return max(least, noise * float(magnitudes.max()))
