"""Merging without interference: a task vector whose difference from each task's lies outside of what the task spans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from streammerge.methods.contract import Between
from streammerge.methods.matrices import Tall, total
from streammerge.methods.registry import WholeMethod, method
from streammerge.methods.tasks import Tasks, workspace

if TYPE_CHECKING:
    from torch import Tensor


@method(WholeMethod, base="required", temporaries=0, held=workspace(squares=4, each=1, tensors=3))
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

    return Tall(start.rows, start.columns, start.step, piece)


def descend_together(parts: list[Tall], factors: list[float], iterations: int, rate: float) -> Tall:
    """T of filters that are longer than many, turned: the gradient Σᵢ fᵢ τᵢ (τᵢᵀT − τᵢᵀτᵢ) wants all of T at once."""
    grams = [part.gram() for part in parts]
    adam = Adam(total(parts).matrix(), rate)
    merged = Tall(parts[0].rows, parts[0].columns, parts[0].step, lambda rows: adam.values[rows])
    for _ in range(iterations):
        weights = [
            factor * (part.gram(merged) - gram) for part, gram, factor in zip(parts, grams, factors, strict=True)
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
