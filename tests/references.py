"""What every merge method has to give: one float64 reference over whole tensors per method, and ways to call it.

A new method needs an entry in `REFERENCES` and at least one in `CASES`; `test_methods.py` fails without. References
are written from the papers' formulas, with none of streammerge's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from streammerge.functions import merge_function
from streammerge.merged import Merged
from streammerge.tensors import Model
from tests.models import Tensors

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
        parameters = {**self.parameters, **({"based": self.base} if self.method == "multislerp" else {})}
        return {
            name: REFERENCES[self.method]([model[name].double().numpy() for model in used], **parameters)
            for name, tensor in tensors[1].items()
            if tensor.is_floating_point()
        }


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


def length(values: Array) -> float:
    return math.sqrt(float((values**2).sum()))


def angle(first: Array, second: Array) -> float | None:
    """By the sine and cosine of its half, which is exact for every angle; None where there is none."""
    lengths = length(first), length(second)
    if 0 in lengths:
        return None
    unit, other = first / lengths[0], second / lengths[1]
    return 2 * math.atan2(length(unit - other), length(unit + other))


def along_arc(first: Array, second: Array, t: float) -> Array:
    between = angle(first, second)
    if between is None or math.sin(between) < 1e-6:
        return (1 - t) * first + t * second
    return np.asarray((np.sin((1 - t) * between) * first + np.sin(t * between) * second) / np.sin(between))


def slerp(inputs: Inputs, *, t: float, lerp_norm: bool = False) -> Array:
    first, second = inputs
    between = angle(first, second)
    line = (1 - t) * first + t * second
    if between is None:
        return line
    if lerp_norm:
        lengths = length(first), length(second)
        direction = along_arc(first / lengths[0], second / lengths[1], t)
        return line if math.sin(between) < 1e-6 else ((1 - t) * lengths[0] + t * lengths[1]) * direction
    return line if abs(math.cos(between)) > 0.9995 else along_arc(first, second, t)


def nuslerp(inputs: Inputs, *, weight: float | Sequence[float] = 1.0) -> Array:
    *base, first, second = inputs
    one, other = per_model(weight, 2)
    t = other / (one + other) if abs(one + other) >= 1e-6 else 0.5
    return base[0] + along_arc(first - base[0], second - base[0], t) if base else along_arc(first, second, t)


def multislerp(
    inputs: Inputs,
    *,
    based: bool = False,
    weight: float | Sequence[float] = 1.0,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    """With the step in the tangent space that is always zero left out."""
    base = inputs[0] if based else np.zeros(inputs[0].shape)
    vectors = [model - base for model in inputs[int(based) :]]
    weights = per_model(weight, len(vectors))
    if normalize_weights:
        weights = [w / sum(weights) for w in weights]
    mean = weighted([vector / (length(vector) + eps) for vector in vectors], weights)
    if length(mean) < eps:
        return base + weighted(vectors, weights)
    radius = sum(w * length(vector) for w, vector in zip(weights, vectors, strict=True))
    return np.asarray(base + radius / length(mean) * mean)


def model_stock(inputs: Inputs, *, pairs: str = "all", average: str = "cosine") -> Array:
    base, *models = inputs
    tasks = [model - base for model in models]
    chosen = [(i, j) for j in range(len(tasks)) for i in range(j) if pairs == "all" or j == i + 1]
    angles = [angle(tasks[i], tasks[j]) for i, j in chosen]
    radians = [math.pi / 2 if found is None else found for found in angles]
    cosine = float(np.cos(np.mean(radians)) if average == "angle" else np.mean(np.cos(radians)))
    divisor = 1 + (len(tasks) - 1) * cosine
    share = len(tasks) * cosine / divisor if abs(divisor) > 1e-12 else 0.0
    return share * n_average(models) + (1 - share) * base


def perpendicular_component(inputs: Inputs) -> Array:
    first, second = inputs
    square = float((first**2).sum())
    rest = second - first * (float((first * second).sum()) / square if square else 0.0)
    return (
        rest if length(rest) > 1e-12 * length(second) else np.zeros(rest.shape)
    )  # what is left of parallel ones is noise


def add_perpendicular(inputs: Inputs, *, alpha: float = 1.0) -> Array:
    base, first, second = inputs
    return first + alpha * perpendicular_component([first - base, second - base])


def karcher(inputs: Inputs, *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    units = [values / length(values) for values in inputs if length(values) > tol]
    if not units:
        return n_average(inputs)
    centre = n_average(units)
    centre = units[0] if length(centre) < tol else centre / length(centre)
    for _ in range(max_iter):
        step = np.zeros(centre.shape)
        for unit in units:
            between = angle(centre, unit)
            assert between is not None
            if between >= tol and math.sin(between) >= tol:
                step = step + between / math.sin(between) * (unit - math.cos(between) * centre) / len(units)
        if length(step) < tol:
            break
        centre = math.cos(length(step)) * centre + math.sin(length(step)) * step / length(step)
        centre = centre / length(centre)
    return np.asarray(np.mean([length(values) for values in inputs]) * centre)


def geometric_median(inputs: Inputs, *, max_iter: int = 100, eps: float = 1e-6, ftol: float = 1e-20) -> Array:
    median = n_average(inputs)
    distance = sum(length(values - median) for values in inputs)
    for _ in range(max_iter):
        median = n_average(inputs, weight=[1 / max(length(values - median), eps) for values in inputs])
        before, distance = distance, sum(length(values - median) for values in inputs)
        if abs(before - distance) <= ftol * distance:
            break
    return median


def ties(
    inputs: Inputs,
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    **lambda_: float,
) -> Array:
    base, *models = inputs
    weights = per_model(weight, len(models))
    trimmed = [
        keep_largest(model - base, share, rescale=rescale)
        for model, share in zip(models, per_model(density, len(models)), strict=True)
    ]
    votes = np.stack([share * delta for share, delta in zip(weights, trimmed, strict=True)])
    sign = np.where(votes.sum(axis=0) >= 0, 1.0, -1.0)
    agree = (np.sign(votes) == sign) & (votes != 0)
    merged = (votes * agree).sum(axis=0)
    if normalize:
        divisor = np.tensordot(np.array(weights), agree.astype(float), axes=1)
        merged = merged / np.where(divisor == 0, 1.0, divisor)
    return np.asarray(base + lambda_.get("lambda", 1.0) * merged)


def keep_largest(delta: Array, density: float, *, rescale: bool = False) -> Array:
    """The ⌊density · n⌋ largest magnitudes as float32 tells them, of equal ones the first; one at the least."""
    flat = delta.reshape(-1)
    count = max(int(density * flat.size), 1) if density > 0 else 0
    magnitude = np.abs(flat).astype(np.float32)
    order = np.argsort(-magnitude, kind="stable")[:count]
    kept = np.zeros_like(flat)
    kept[order] = flat[order]
    if rescale and np.abs(kept).sum() > 0:
        kept = kept * (np.abs(flat).sum() / np.abs(kept).sum())
    return np.asarray(kept.reshape(delta.shape))


def truncate_rank(inputs: Inputs, *, rank: int = 8, fraction: float = 0.0, alpha: float = 1.0) -> Array:
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
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "model_stock": model_stock,
    "perpendicular_component": perpendicular_component,
    "add_perpendicular": add_perpendicular,
    "karcher": karcher,
    "geometric_median": geometric_median,
    "ties": ties,
    "truncate_rank": truncate_rank,
}

CASES: Final[Sequence[Case]] = (
    Case("linear", 1),
    Case("linear", 3, parameters={"weight": [0.2, 0.3, 0.5]}),
    Case("linear", 3, parameters={"weight": [2.0, -0.5, 3.0]}),
    Case("linear", 3, parameters={"weight": [0.7, -0.4, 0.9], "normalize": False}),
    Case("weighted_sum", 2),
    Case("weighted_sum", 2, parameters={"alpha": 0.3}),
    Case("add_difference", 2, base=True),
    Case("add_difference", 2, base=True, parameters={"alpha": -0.75}),
    Case("task_arithmetic", 2, base=True, parameters={"weight": 0.5}),
    Case("task_arithmetic", 3, base=True, parameters={"weight": [0.6, 0.3, -0.2], "lambda": 1.2}),
    Case("task_arithmetic", 2, base=True, parameters={"weight": [3.0, 1.0], "normalize": True}),
    Case("passthrough", 1),
    Case("passthrough", 1, parameters={"scale": -0.3}),
    Case("scale", 1, parameters={"alpha": 1.7}),
    Case("n_average", 3),
    Case("n_average", 2, parameters={"weight": [1.0, 3.0]}),
    Case("sum_twice", 3),
    Case("sum_twice", 3, parameters={"alpha": 0.3, "beta": 0.6}),
    Case("triple_sum", 3),
    Case("triple_sum", 3, parameters={"alpha": 0.7, "beta": 0.3}),
    Case("expo", 1, base=True),
    Case("expo", 3, base=True, parameters={"alpha": 0.4, "weight": [1.0, 2.0, 0.5]}),
    Case("weighted_subtraction", 2),
    Case("weighted_subtraction", 2, parameters={"alpha": 0.9, "beta": 0.8}),
    Case("add", 2),
    Case("add", 2, parameters={"scale": -0.4}),
    Case("subtract", 2),
    Case("subtract", 2, parameters={"scale": 1.5}),
    Case("sigmoid", 2, parameters={"alpha": 0.7}),
    Case("slerp", 2, parameters={"t": 0.3}),
    Case("slerp", 1, base=True, parameters={"t": 0.8}),
    Case("slerp", 2, parameters={"t": 0.3, "lerp_norm": True}),
    Case("nuslerp", 2, parameters={"weight": [1.0, 2.0]}),
    Case("nuslerp", 2, base=True, parameters={"weight": [0.6, 0.4]}),
    Case("nuslerp", 2, base=True, parameters={"weight": [0.5, -0.5]}),
    Case("multislerp", 2, parameters={"weight": [0.3, 0.7]}),
    Case("multislerp", 3, base=True, parameters={"weight": [1.0, 2.0, 4.0]}),
    Case("multislerp", 2, base=True, parameters={"weight": [0.5, 0.25], "normalize_weights": False}),
    Case("model_stock", 2, base=True),
    Case("model_stock", 3, base=True),
    Case("model_stock", 3, base=True, parameters={"pairs": "consecutive"}),
    Case("model_stock", 3, base=True, parameters={"average": "angle"}),
    Case("perpendicular_component", 2),
    Case("add_perpendicular", 2, base=True),
    Case("add_perpendicular", 2, base=True, parameters={"alpha": 0.6}),
    Case("karcher", 1),
    Case("karcher", 3),
    Case("karcher", 2, base=True, parameters={"max_iter": 2}),
    Case("geometric_median", 1),
    Case("geometric_median", 3),
    Case("geometric_median", 3, parameters={"max_iter": 3, "eps": 0.01}),
    Case("ties", 1, base=True, parameters={"density": 0.2}),
    Case("ties", 2, base=True, parameters={"density": [0.3, 0.7], "weight": [0.5, 0.75]}),
    Case("ties", 3, base=True, parameters={"density": 0.5, "weight": [1.0, 0.5, -0.25], "normalize": False}),
    Case("ties", 2, base=True, parameters={"density": 0.4, "weight": [1.0, 0.75], "lambda": 0.5, "rescale": True}),
    Case("ties", 3, base=True),
    Case("truncate_rank", 1, base=True, parameters={"rank": 2}),
    Case("truncate_rank", 1, base=True, parameters={"fraction": 0.4, "alpha": 0.8}),
    Case("truncate_rank", 1, base=True),
)

ONE_CASE_EACH: Final[Sequence[Case]] = tuple({case.method: case for case in reversed(CASES)}.values())[::-1]
"""The first case of every method that has more than default parameters is enough where numbers are not the point."""


def relative_error(actual: torch.Tensor, expected: Array) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; where nothing is expected, ‖actual‖."""
    difference = float(np.linalg.norm((actual.double().numpy() - expected).reshape(-1)))
    length = float(np.linalg.norm(expected.reshape(-1)))
    return difference / length if length else difference


def ulps_apart(actual: torch.Tensor, expected: Array) -> torch.Tensor:
    """How many representable numbers each element is away from the expected value rounded to its dtype."""
    rounded = torch.from_numpy(np.ascontiguousarray(expected)).reshape(actual.shape).to(actual.dtype)
    return (places(actual) - places(rounded)).abs()


def places(values: torch.Tensor) -> torch.Tensor:
    """Each number's place among all of its dtype, by which neighbours differ by 1 and both zeros are 0."""
    bits = values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).long()
    least = -(2 ** (8 * values.element_size() - 1))
    return torch.where(bits < 0, least - bits, bits)
