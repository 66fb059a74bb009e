"""What every merge method has to give: one float64 reference over whole tensors per method.

A new method needs an entry in `REFERENCES` and at least one in `CASES` of `cases.py`; `tests/methods/test_registry.py`
fails without. References are written from the papers' formulas, with none of streammerge's code.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from streammerge.models.merged import Merged
from streammerge.plan.functions import merge_function
from streammerge.tensors import Model
from tests.make.models import Tensors
from tests.references.diffusion import DIFFUSION
from tests.references.matrix import MATRIX
from tests.references.sparse import SPARSE
from tests.references.spherical import SPHERICAL

Array = np.ndarray[Any, np.dtype[np.float64]]
Inputs = Sequence[Array]
"""Whole tensors in float64, the base first if the method is given one."""

Reference = Callable[..., Array]


@dataclass(frozen=True)
class Case:
    """One way to call a method: with so many models, with or without a base, with these parameters."""

    method: str
    models: int
    base: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = ",".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.method}({self.models}{'+base' if self.base else ''}{',' if values else ''}{values})"

    def merge(self, paths: Sequence[Model | Path], **settings: Any) -> Merged:
        """The merge by the public function: the base is the first of the paths, the models are the next ones."""
        base, models = (paths[0], paths[1 : self.models + 1])
        given = {"base": base} if self.base else {}
        return merge_function(self.method)(*models, **given, **self.parameters, **settings)

    def expected(self, tensors: Sequence[Tensors]) -> dict[str, Array]:
        """The reference's result for every floating-point tensor of the models, the base being the first."""
        used = tensors[0 if self.base else 1 : self.models + 1]
        everything = {
            name: [model[name].double().numpy() for model in used]
            for name in sorted(tensors[1])  # the order of safetensors files
            if tensors[1][name].is_floating_point()
        }
        reference = REFERENCES[self.method]
        wide = any(model[name].dtype == torch.float64 for model in used for name in everything)
        asks = "context" in inspect.signature(reference).parameters
        return {
            name: reference(
                inputs, **self.parameters, **({"context": Context(name, everything, self.base, wide)} if asks else {})
            )
            for name, inputs in everything.items()
        }


@dataclass(frozen=True)
class Context:
    """What a reference may ask to know: its tensor's name, every tensor's inputs, whether the first is a base, and
    whether the models are in float64."""

    name: str
    everything: Mapping[str, Inputs]
    has_base: bool
    wide: bool = False

    def joined(self, number: int) -> Array:
        """The task vector of one of the models (0: the first), of all tensors one after the other."""
        deltas = [(inputs[number + 1] - inputs[0]).reshape(-1) for inputs in self.everything.values()]
        return np.concatenate(deltas)

    def own_part(self, joined: Array) -> Array:
        """What belongs to the own tensor of values for all."""
        start = 0
        for name, inputs in self.everything.items():
            if name == self.name:
                return joined[start : start + inputs[0].size].reshape(inputs[0].shape)
            start += inputs[0].size
        raise KeyError(self.name)


def weighted(inputs: Inputs, coefficients: Sequence[float]) -> Array:
    """Σ cᵢ xᵢ"""
    total = np.zeros(inputs[0].shape)
    for coefficient, values in zip(coefficients, inputs, strict=True):
        total = total + coefficient * values
    return total


def per_model(value: float | Sequence[float], count: int) -> list[float]:
    """One value for each model, from one for all or one for each."""
    return [value] * count if isinstance(value, int | float) else list(value)


def linear(inputs: Inputs, *, weight: float | Sequence[float] = 1.0, normalize: bool = True) -> Array:
    weights = per_model(weight, len(inputs))
    return weighted(inputs, weights) / (sum(weights) if normalize else 1.0)


def weighted_sum(inputs: Inputs, *, alpha: float = 0.5) -> Array:
    first, second = inputs
    return first * (1 - alpha) + second * alpha


def add_difference(inputs: Inputs, *, alpha: float = 1.0) -> Array:
    base, first, second = inputs
    return first + alpha * (second - base)


def task_arithmetic(
    inputs: Inputs, *, weight: float | Sequence[float] = 1.0, normalize: bool = False, **lambda_: float
) -> Array:
    base, *models = inputs
    weights = per_model(weight, len(models))
    scale = lambda_.get("lambda", 1.0) / (sum(weights) if normalize else 1.0)
    return base + scale * weighted([model - base for model in models], weights)


def passthrough(inputs: Inputs, *, scale: float = 1.0) -> Array:
    return scale * inputs[0]


def scale(inputs: Inputs, *, alpha: float) -> Array:
    return alpha * inputs[0]


def n_average(inputs: Inputs, *, weight: float | Sequence[float] = 1.0) -> Array:
    return np.asarray(np.average(np.stack(inputs), axis=0, weights=per_model(weight, len(inputs))))


def sum_twice(inputs: Inputs, *, alpha: float = 0.5, beta: float = 0.25) -> Array:
    first, second, third = inputs
    return weighted_sum([weighted_sum([first, second], alpha=alpha), third], alpha=beta)


def triple_sum(inputs: Inputs, *, alpha: float = 0.5, beta: float = 0.25) -> Array:
    first, second, third = inputs
    return (1 - alpha - beta) * first + alpha * second + beta * third


def expo(inputs: Inputs, *, alpha: float = 0.1, weight: float | Sequence[float] = 1.0) -> Array:
    base, *models = inputs
    mean = n_average(models, weight=weight)
    return mean + alpha * (mean - base)


def weighted_subtraction(inputs: Inputs, *, alpha: float = 0.5, beta: float = 0.25) -> Array:
    first, second = inputs
    return (first - alpha * beta * second) / (1 - alpha * beta)


def add(inputs: Inputs, *, scale: float = 1.0) -> Array:
    return inputs[0] + scale * inputs[1]


def subtract(inputs: Inputs, *, scale: float = 1.0) -> Array:
    return scale * (inputs[0] - inputs[1])


def sigmoid(inputs: Inputs, *, alpha: float) -> Array:
    first, second = inputs
    return (first + second) / (1 + math.exp(-4 * alpha)) - first / (1 + math.exp(-alpha))


def ties(
    inputs: Inputs,
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    scope: str = "tensor",
    vote: str = "sum",
    context: Context | None = None,
    **lambda_: float,
) -> Array:
    base, *models = inputs
    weights = per_model(weight, len(models))
    wide = context is not None and context.wide
    trimmed = [
        keep_largest(model - base, share, rescale=rescale, wide=wide)
        if scope == "tensor" or context is None
        else context.own_part(keep_largest(context.joined(number), share, rescale=rescale, wide=wide))
        for number, (model, share) in enumerate(zip(models, per_model(density, len(models)), strict=True))
    ]
    votes = np.stack([share * delta for share, delta in zip(weights, trimmed, strict=True)])
    sign = np.where(votes.sum(axis=0) >= 0, 1.0, -1.0)
    if vote == "count":
        sign = np.sign(np.sign(votes).sum(axis=0))
    agree = (np.sign(votes) == sign) & (votes != 0)
    merged = (votes * agree).sum(axis=0)
    if normalize:
        divisor = np.tensordot(np.array(weights), agree.astype(float), axes=1)
        merged = merged / np.where(divisor == 0, 1.0, divisor)
    return np.asarray(base + lambda_.get("lambda", 1.0) * merged)


def keep_largest(delta: Array, density: float, *, rescale: bool = False, wide: bool = False) -> Array:
    """The ⌊density · n⌋ largest magnitudes as float32 (if `wide` float64) tells them, of equal ones the first; one at
    the least."""
    flat = delta.reshape(-1)
    count = max(int(density * flat.size), 1) if density > 0 else 0
    magnitude = np.abs(flat) if wide else np.abs(flat).astype(np.float32).astype(np.float64)
    order = np.argsort(-magnitude, kind="stable")[:count]
    kept = np.zeros_like(flat)
    kept[order] = flat[order]
    if rescale and np.abs(kept).sum() > 0:
        kept = kept * (np.abs(flat).sum() / np.abs(kept).sum())
    return np.asarray(kept.reshape(delta.shape))


def truncate_rank(
    inputs: Inputs, *, rank: int = 8, fraction: float = 0.0, alpha: float = 1.0, svd: str = "exact"
) -> Array:
    base, model = inputs
    delta = model - base
    if delta.ndim >= 2 and delta.size:
        left, values, right = np.linalg.svd(delta.reshape(delta.shape[0], -1), full_matrices=False)
        values[max(round(fraction * values.size), 1) if fraction else rank :] = 0
        delta = ((left * values) @ right).reshape(delta.shape)
    return np.asarray(base + alpha * delta)


REFERENCES: Final[Mapping[str, Reference]] = {
    "linear": linear,
    "weighted_sum": weighted_sum,
    "add_difference": add_difference,
    "task_arithmetic": task_arithmetic,
    "passthrough": passthrough,
    "scale": scale,
    "n_average": n_average,
    "sum_twice": sum_twice,
    "triple_sum": triple_sum,
    "expo": expo,
    "weighted_subtraction": weighted_subtraction,
    "add": add,
    "subtract": subtract,
    "sigmoid": sigmoid,
    "ties": ties,
    "truncate_rank": truncate_rank,
    **SPHERICAL,
    **DIFFUSION,
    **SPARSE,
    **MATRIX,
}
