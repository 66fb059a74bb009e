"""Rotating one model's neurons towards another's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.methods.decomposition import decompose
from streammerge.methods.matrices import Tall, beside
from streammerge.methods.registry import WholeMethod, method
from streammerge.methods.tasks import check_squares, is_finite, workspace

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Target


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


@method(WholeMethod, models=(2, 2), temporaries=0, held=workspace(squares=16, side=rotated_side))
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
    out = torch.empty(one.matrix.shape, dtype=a.dtype)
    mean = torch.lerp(one.mean, other.mean, alignment)
    if 2 * out.shape[0] < out.shape[1]:
        made, out_columns = in_their_span(one, other, alignment, alpha), out.T
        for part in made.cuts():
            out_columns[part] = (made.piece(part) + mean[part, None]).to(a.dtype)
        return out.reshape(a.shape)
    for_a, for_b = turns(one.rows.gram(other.rows), alignment, alpha)
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
        return cls(matrix, Tall.of(rows, columns, lambda part: matrix[part].double()).column_means() * centralization)

    @property
    def rows(self) -> Tall:
        """The centred neurons."""
        rows, columns = self.matrix.shape
        return Tall.of(rows, columns, lambda part: self.matrix[part].double() - self.mean)

    @property
    def columns(self) -> Tall:
        """The same, turned."""
        rows, columns = self.matrix.shape
        return Tall.of(columns, rows, lambda part: self.matrix[:, part].T.double() - self.mean[part, None])


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

    left, values, right = torch.linalg.svd(products)
    known = int((values > 1e-12 * len(values) * values[0]).sum())
    rest, _, turned = torch.linalg.svd(left[:, known:].T @ right[known:].T)
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
    sines, vectors = torch.linalg.eigh(-0.5j * (quarter - quarter.T))
    angles = 4 * power * sines.clamp(-1, 1).asin()
    turned = torch.polar(torch.ones_like(angles), angles)
    made: Tensor = ((vectors * turned) @ vectors.mH).real
    return made.contiguous()


def half(rotation: Tensor) -> Tensor:
    """The rotation by half of every angle: the polar factor of I + Q."""
    import torch

    left, _, right = torch.linalg.svd(rotation + torch.eye(len(rotation), dtype=rotation.dtype))
    polar: Tensor = left @ right
    return polar
