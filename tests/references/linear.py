"""What every merge method has to give: one float64 reference over whole tensors per method, and ways to call it.

A new method needs an entry in `REFERENCES` and at least one in `CASES`; `test_methods.py` fails without. References
are written from the papers' formulas, with none of streammerge's code.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
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
    Case("nuslerp", 2, base=True, parameters={"weight": [0.5, -0.2]}),
    Case("nuslerp", 2, parameters={"weight": [1.0, 2.0], "nuslerp_flatten": False}),
    Case("nuslerp", 2, base=True, parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    Case("multislerp", 2, parameters={"weight": [0.3, 0.7]}),
    Case("multislerp", 3, base=True, parameters={"weight": [1.0, 2.0, 4.0]}),
    Case("multislerp", 2, base=True, parameters={"weight": [0.5, 0.25], "normalize_weights": False}),
    Case("model_stock", 2, base=True),
    Case("model_stock", 3, base=True),
    Case("model_stock", 3, base=True, parameters={"pairs": "consecutive"}),
    Case("model_stock", 3, base=True, parameters={"average": "angle"}),
    Case("model_stock", 3, base=True, parameters={"filter_wise": True}),
    Case("perpendicular_component", 2),
    Case("add_perpendicular", 2, base=True),
    Case("add_perpendicular", 2, base=True, parameters={"alpha": 0.6}),
    Case("karcher", 1),
    Case("karcher", 3),
    Case("karcher", 2, base=True, parameters={"max_iter": 2}),
    Case("geometric_median", 1),
    Case("geometric_median", 3),
    Case("geometric_median", 3, parameters={"max_iter": 3, "eps": 0.01}),
    Case("train_difference", 2, base=True),
    Case("train_difference", 2, base=True, parameters={"alpha": 0.4}),
    Case("add_opposite", 2, base=True),
    Case("add_opposite", 2, base=True, parameters={"alpha": 0.4}),
    Case("add_strict_opposite", 2, base=True),
    Case("add_strict_opposite", 2, base=True, parameters={"alpha": 0.4}),
    Case("multiply_difference", 2, base=True),
    Case("multiply_difference", 2, base=True, parameters={"alpha": 0.3, "beta": 0.25}),
    Case("euclidean_add_difference", 2, base=True),
    Case("euclidean_add_difference", 2, base=True, parameters={"alpha": 0.25}),
    Case("similarity_add_difference", 2, base=True),
    Case("similarity_add_difference", 2, base=True, parameters={"alpha": 0.7, "beta": 0.4}),
    Case("geometric_sum", 2),
    Case("geometric_sum", 2, parameters={"alpha": 0.3}),
    Case("multiply_quotient", 2, base=True),
    Case("multiply_quotient", 2, base=True, parameters={"alpha": 0.6}),
    Case("max", 1),
    Case("max", 3),
    Case("clamp", 2),
    Case("clamp", 3, parameters={"stiffness": 0.5}),
    Case("tensor_sum", 2),
    Case("tensor_sum", 2, parameters={"width": 0.4, "offset": 0.3}),
    Case("tensor_sum", 2, parameters={"width": 0.6, "offset": 0.7, "axis": 1}),
    Case("plus_random", 1, parameters={"alpha": 0.1, "seed": 5}),
    Case("adjust", 1, parameters={"detail": 5.0, "brightness": 3.0}),
    Case("extract", 2, base=True),
    Case("extract", 2, base=True, parameters={"alpha": 0.3, "beta": 1.0, "gamma": 2.0}),
    Case("add_cosine_a", 2, parameters={"alpha": 0.1}),
    Case("add_cosine_b", 2, parameters={"alpha": 0.2}),
    Case("cosine_a", 2, parameters={"alpha": 0.2}),
    Case("cosine_a", 2, parameters={"alpha": -0.3, "scope": "tensor"}),
    Case("cosine_b", 2, parameters={"alpha": 0.2}),
    Case("cosine_b", 2, parameters={"alpha": -0.3, "scope": "tensor"}),
    Case("cosine_sum", 2, parameters={"alpha": 0.7}),
    Case("cosine_sum", 2, base=True, parameters={"inverse": True}),
    Case("cosine_sum", 2, base=True, parameters={"mean": True}),
    Case("crossover", 2),
    Case("crossover", 2, parameters={"alpha": 0.3, "tilt": 0.5}),
    Case("crossover", 2, parameters={"alpha": 0.4, "tilt": 1.3}),
    Case("crossover", 2, parameters={"alpha": 0.7, "tilt": 2.0}),
    Case("crossover", 2, parameters={"alpha": 0.7, "tilt": 2.6}),
    Case("crossover", 2, parameters={"alpha": 0.3, "tilt": 3.7}),
    Case("distribution_crossover", 2, base=True),
    Case("distribution_crossover", 2, base=True, parameters={"alpha": 0.3, "beta": 0.4}),
    Case("top_k_tensor_sum", 2),
    Case("top_k_tensor_sum", 2, parameters={"width": 0.4, "offset": 0.3}),
    Case("top_k_tensor_sum", 2, parameters={"width": 0.6, "offset": 0.7}),
    Case("smooth_add", 2, base=True),
    Case("smooth_add", 2, base=True, parameters={"alpha": -1.2}),
    Case("ties", 1, base=True, parameters={"density": 0.2}),
    Case("ties", 2, base=True, parameters={"density": [0.3, 0.7], "weight": [0.5, 0.75]}),
    Case("ties", 3, base=True, parameters={"density": 0.5, "weight": [1.0, 0.5, -0.25], "normalize": False}),
    Case("ties", 2, base=True, parameters={"density": 0.4, "weight": [1.0, 0.75], "lambda": 0.5, "rescale": True}),
    Case("ties", 3, base=True),
    Case("ties", 2, base=True, parameters={"density": [0.3, 0.6], "weight": [1.0, 0.5], "scope": "model"}),
    Case("ties", 2, base=True, parameters={"density": 0.1, "scope": "model", "rescale": True, "normalize": False}),
    Case("ties", 3, base=True, parameters={"density": 0.5, "vote": "count"}),
    Case("ties", 2, base=True, parameters={"density": 0.7, "vote": "count", "scope": "model"}),
    Case("dare_linear", 2, base=True, parameters={"density": [0.3, 0.8], "weight": [0.6, 0.7], "rescale_by": "l1"}),
    Case("dare_linear", 2, base=True, parameters={"density": 0.5, "lambda": 0.7, "normalize": True, "seed": 7}),
    Case("dare_linear", 1, base=True, parameters={"density": 0.25, "rescale": False}),
    Case("dare_linear", 3, base=True),
    Case("dare_ties", 3, base=True, parameters={"density": [0.3, 0.8, 0.5], "weight": [0.61, 0.73, -0.37]}),
    Case("dare_ties", 2, base=True, parameters={"density": 0.4, "normalize": True, "rescale_by": "l1"}),
    Case("dropout", 2, base=True, parameters={"density": [0.3, 0.6], "lambda": 0.8, "seed": 3}),
    Case("dropout", 3, base=True, parameters={"density": 0.4, "rescale": 0.5}),
    Case("trust_region", 3, base=True, parameters={"threshold_quantile": 0.7, "lambda": 0.6}),
    Case("trust_region", 2, base=True),
    Case("trust_region", 2, base=True, parameters={"threshold_quantile": 0.4, "scope": "tensor"}),
    Case("breadcrumbs", 2, base=True, parameters={"density": [0.3, 0.6], "gamma": [0.05, 0.3], "weight": [0.6, 0.7]}),
    Case("breadcrumbs", 2, base=True, parameters={"density": 0.5, "rescale": True, "lambda": 1.5, "normalize": True}),
    Case("breadcrumbs", 1, base=True, parameters={"density": 0.9, "gamma": 0.5}),
    Case("breadcrumbs_ties", 3, base=True, parameters={"density": 0.5, "gamma": 0.02, "weight": [1.0, 0.5, 0.8]}),
    Case("breadcrumbs_ties", 2, base=True, parameters={"density": 0.2, "rescale": True}),
    Case("della", 2, base=True, parameters={"density": [0.3, 0.7], "epsilon": 0.2, "weight": [1.0, 0.6]}),
    Case("della", 3, base=True, parameters={"density": 0.5, "rescale_by": "probability", "lambda": 0.8}),
    Case("della", 2, base=True, parameters={"density": [1.0, 0.5], "epsilon": [0.15, 0.1], "rescale": False}),
    Case("della_linear", 2, base=True, parameters={"density": 0.6, "weight": [0.3, 0.6]}),
    Case("della_linear", 2, base=True, parameters={"density": [0.0, 0.5], "rescale_by": "probability"}),
    Case("sce", 3, base=True, parameters={"select_topk": 0.4}),
    Case("sce", 2, base=True),
    Case("sce", 1, base=True, parameters={"select_topk": 0.5}),
    Case("ram", 3, base=True, parameters={"epsilon": 1e-3}),
    Case("ram", 2, base=True),
    Case("ramplus_tl", 3, base=True, parameters={"epsilon": 1.2e-3, "r": 0.5, "alpha": 3.0}),
    Case("ramplus_tl", 2, base=True),
    Case("magmax", 3, base=True, parameters={"lambda": 0.8}),
    Case("magmax", 1, base=True),
    Case("emr", 3, base=True, parameters={"task": 2}),
    Case("emr", 3, base=True),
    Case("tall_mask", 3, base=True, parameters={"task": 2, "threshold": 0.4, "lambda": 0.9}),
    Case("tall_mask", 2, base=True),
    Case("consensus_ta", 3, base=True, parameters={"k": 2, "threshold": 0.3, "lambda": 0.7}),
    Case("consensus_ta", 2, base=True),
    Case("pcb", 3, base=True, parameters={"ratio": 0.3, "lambda": 0.9}),
    Case("pcb", 2, base=True, parameters={"scope": "tensor"}),
    Case("nearswap", 1, base=True, parameters={"t": 1e-3}),
    Case("arcee_fusion", 1, base=True),
    Case("truncate_rank", 1, base=True, parameters={"rank": 2}),
    Case("truncate_rank", 1, base=True, parameters={"fraction": 0.4, "alpha": 0.8}),
    Case("truncate_rank", 1, base=True),
    Case("iso_c", 3, base=True, parameters={"weight": [1.0, 0.5, 0.75], "lambda": 1.2}),
    Case("iso_c", 2, base=True),
    Case("iso_cts", 2, base=True, parameters={"weight": [1.0, 0.5], "common_space_fraction": 0.5, "lambda": 0.9}),
    Case("iso_cts", 3, base=True),
    Case("iso_cts", 2, base=True, parameters={"common_space_fraction": 0.0}),
    Case("tsv_m", 2, base=True, parameters={"weight": [1.0, 0.5], "lambda": 0.9}),
    Case("tsv_m", 3, base=True),
    Case("svc", 2, base=True, parameters={"weight": [0.6, 0.3], "lambda": 0.9, "alpha": 0.2}),
    Case("svc", 3, base=True),
    Case("knots", 3, base=True, parameters={"density": [0.3, 0.6, 0.5], "weight": [1.0, 0.5, 0.75], "lambda": 0.9}),
    Case("knots", 2, base=True, parameters={"density": 0.4, "normalize": False}),
    Case("knots", 2, base=True),
    Case("wudi", 2, base=True, parameters={"iterations": 20, "learning_rate": 1e-4, "lambda": 0.9}),
    Case("wudi", 3, base=True, parameters={"iterations": 40}),
    Case("rotate", 2, parameters={"alignment": 0.5, "alpha": 0.3, "centralization": 0.8}),
    Case("rotate", 2),
    Case("rotate", 2, parameters={"alignment": 2.0, "alpha": 0.5}),
)

ONE_CASE_EACH: Final[Sequence[Case]] = tuple({case.method: case for case in reversed(CASES)}.values())[::-1]
"""The first case of every method that has more than default parameters is enough where numbers are not the point."""


def mostly(chosen: Iterable[Any], of: Iterable[Any]) -> list[Any]:
    """All of them as parameters of a test; those that aren't chosen are tried with the slow tests."""
    kept = list(chosen)
    return [one if one in kept else pytest.param(one, marks=pytest.mark.slow) for one in of]


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
