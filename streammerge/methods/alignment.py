"""Merging in the coordinates that tasks share: TIES of the right singular vectors of all task vectors together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from streammerge.methods.contract import Between, PerModel, Share
from streammerge.methods.decompositions import NOTHING, Decomposition, decompose, decomposed
from streammerge.methods.linear import check_weights
from streammerge.methods.matrices import Tall, Tasks, above, beside, check_squares, is_finite, workspace
from streammerge.methods.registry import WholeMethod, method

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
    anywhere=True,
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
        found = telling(above(tasks.deltas), epsilon)
        parts = [delta @ found.left for delta in tasks.deltas]
        merged = elect(parts, weights, densities, normalize=normalize)
        return tasks.merged(merged @ (found.values * found.right).T, lambda_)
    together = beside(tasks.deltas)
    found = telling(together, epsilon)
    parts = [Tall.held(part) for part in torch.split(found.right, width)]
    merged = elect(parts, weights, densities, normalize=normalize)
    return tasks.merged(together @ ((found.left * found.values) @ merged.matrix().T), lambda_)


def telling(matrix: Tall, epsilon: float) -> Decomposition:
    """The singular values of more than `epsilon` times the greatest, and their vectors."""
    found = decompose(matrix, least=max(epsilon, NOTHING))
    return found.largest(int(found.values.count_nonzero()))


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
    least = float(smallest(magnitudes, dropped)) * (1.0 - noise)  # equal ones are equal but for noise
    return max(least, noise * float(magnitudes.max()))


def smallest(values: Tensor, rank: int) -> Tensor:
    """The value of this rank, the smallest having 0: on a card by sorting, which is what it does fastest."""
    found: Tensor = values.sort().values[rank] if values.is_cuda else values.kthvalue(rank + 1).values
    return found


def neurons(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix as which a tensor is rotated: a row per kernel of a convolution, or else per filter."""
    is_kernel = len(shape) == 4 and math.prod(shape[2:]) > 1
    rows = math.prod(shape[: 2 if is_kernel else 1])
    return rows, math.prod(shape) // max(rows, 1)


def rotated_side(target: Target) -> int:
    """The number of dimensions in which it is rotated: those of a row, or of the span of both models' rows."""
    if len(target.shape) < 2:
        return 1
    rows, columns = neurons(target.shape)
    return min(columns, 2 * rows)


@method(WholeMethod, models=(2, 2), temporaries=0, anywhere=True, held=workspace(squares=16, side=rotated_side))
def rotate(a: Tensor, b: Tensor, *, alignment: float = 1.0, alpha: float = 0.0, centralization: float = 1.0) -> Tensor:
    """θ = ((1 − α) A + α B Q⁻¹) Qᵖ + (1 − p) μ₁ + p μ₂,   Q = arg min ‖A Q − B‖ over orthogonal Q, p the `alignment`

    sd-mecha's `rotate`: A and B are the models as matrices, a row per neuron (of convolutions with more than one tap
    per kernel: per kernel), less `centralization` times the mean of their rows, μ₁ and μ₂. Q is the polar factor of
    AᵀB (orthogonal Procrustes); where p is no whole number it is made a rotation, by the least of AᵀB's directions,
    and divided by angle. Directions that the models' rows don't have are turned as little as can be. For matrices of
    more columns than rows sd-mecha's map is not orthogonal, and this one differs. Tensors of fewer than two dimensions,
    and those with infinite values or NaNs, become (1 − α) θ₁ + α θ₂.
    """
    import torch

    if a.ndim < 2 or not (is_finite(a) and is_finite(b)):
        return torch.lerp(a, b, alpha)
    one, other = (Neurons.of(model, centralization) for model in (a, b))
    if a.dtype == torch.float64:
        check_squares([one.rows, other.rows])
    out = torch.empty(one.matrix.shape, dtype=a.dtype, device=a.device)
    mean = torch.lerp(one.mean, other.mean, alignment)
    if 2 * out.shape[0] < out.shape[1]:
        made, out_columns = in_their_span(one, other, alignment, alpha), out.T
        for part in made.cuts():
            out_columns[part] = (made.piece(part) + mean[part, None]).to(a.dtype)
        return out.reshape(a.shape)
    for_a, for_b = turns(one.rows.inner(other.rows), alignment, alpha)
    made = one.rows @ for_a + other.rows @ for_b
    for part in made.cuts():
        out[part] = (made.piece(part) + mean).to(a.dtype)
    return out.reshape(a.shape)


def in_their_span(one: Neurons, other: Neurons, alignment: float, alpha: float) -> Tall:
    """What is made of two models of many columns, turned: in an orthonormal basis of all that their rows span."""
    together = beside([one.columns, other.columns])
    basis = decompose(together)
    coordinates = basis.values * basis.right
    first, second = coordinates[: len(one.matrix)], coordinates[len(one.matrix) :]
    for_a, for_b = turns(first.T @ second, alignment, alpha)
    return together @ (basis.left @ (first @ for_a + second @ for_b).T)


@dataclass(frozen=True, slots=True)
class Neurons:
    """A model's tensor as a matrix with a row per neuron, and what is taken from every row, in float64."""

    matrix: Tensor
    mean: Tensor

    @classmethod
    def of(cls, tensor: Tensor, centralization: float) -> Neurons:
        """The tensor's neurons, from which this much of their mean is taken."""
        rows, columns = neurons(tuple(tensor.shape))
        matrix = tensor.reshape(rows, columns)
        doubles = Tall.of(rows, columns, tensor.device, lambda part: matrix[part].double())
        return cls(matrix, doubles.column_means() * centralization)

    @property
    def rows(self) -> Tall:
        """The centred neurons."""
        rows, columns = self.matrix.shape
        return Tall.of(rows, columns, self.mean.device, lambda part: self.matrix[part].double() - self.mean)

    @property
    def columns(self) -> Tall:
        """The same, turned."""
        rows, columns = self.matrix.shape

        def piece(part: slice) -> Tensor:
            return self.matrix[:, part].T.double() - self.mean[part, None]

        return Tall.of(columns, rows, self.mean.device, piece)


def turns(products: Tensor, alignment: float, alpha: float) -> tuple[Tensor, Tensor]:
    """What A and B are multiplied with, from AᵀB: (1 − α) Qᵖ and α Q⁻¹ Qᵖ."""
    rotation = procrustes(products, proper=alignment != round(alignment))
    power = rotation_power(rotation, alignment)
    return (1 - alpha) * power, alpha * (rotation.T @ power)


def procrustes(products: Tensor, *, proper: bool) -> Tensor:
    """The orthogonal Q that turns A nearest to B, by AᵀB: its polar factor, completed by the nearest to the identity.

    `proper`: without reflection, for which the direction that matters least is given up.
    """
    import torch

    left, values, right = decomposed(torch.linalg.svd, products)
    known = int((values > 1e-12 * len(values) * values[0]).sum())
    rest, _, turned = decomposed(torch.linalg.svd, left[:, known:].T @ right[known:].T)
    left = torch.cat([left[:, :known], left[:, known:] @ rest], dim=1)
    right = torch.cat([right[:known], turned @ right[known:]])
    if proper and float(torch.linalg.slogdet(left @ right)[0]) < 0:
        left[:, -1] *= -1
    rotation: Tensor = left @ right
    return rotation


def rotation_power(rotation: Tensor, power: float) -> Tensor:
    """Qᵖ: a whole number of times, or else through a quarter of every angle, where sines tell angles apart."""
    import torch

    if power == round(power):
        whole: Tensor = torch.linalg.matrix_power(rotation, round(power))
        return whole
    quarter = half(half(rotation))
    sines, vectors = decomposed(torch.linalg.eigh, -0.5j * (quarter - quarter.T))
    angles = 4 * power * sines.clamp(-1, 1).asin()
    turned = torch.polar(torch.ones_like(angles), angles)
    made: Tensor = ((vectors * turned) @ vectors.mH).real
    return made.contiguous()


def half(rotation: Tensor) -> Tensor:
    """The rotation by half of every angle: the polar factor of I + Q."""
    import torch

    identity = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    left, _, right = decomposed(torch.linalg.svd, rotation + identity)
    polar: Tensor = left @ right
    return polar
