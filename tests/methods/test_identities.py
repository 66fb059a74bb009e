"""Identities, and examples that say more than a formula."""

from __future__ import annotations

import math

import pytest
import torch

import streammerge
from tests.make.models import MemoryModel, assert_same_bytes, merge_to, normal

# ── identities ───────────────────────────────────────────────────────────────────────────────────────────────────────

IDENTITIES = {
    "linear of one": lambda base, a, b: (streammerge.linear(a), 1),
    "linear with all weight on one": lambda base, a, b: (streammerge.linear(a, b, weight=[0.0, 2.0], layout=0), 2),
    "weighted_sum alpha 0": lambda base, a, b: (streammerge.weighted_sum(a, b, alpha=0.0), 1),
    "weighted_sum alpha 1": lambda base, a, b: (streammerge.weighted_sum(a, b, alpha=1.0), 2),
    "add_difference alpha 0": lambda base, a, b: (streammerge.add_difference(a, b, base=base, alpha=0.0), 1),
    "add_difference of the base": lambda base, a, b: (streammerge.add_difference(base, a, base=base), 1),
    "task arithmetic weight 0": lambda base, a, b: (streammerge.task_arithmetic(a, b, base=base, weight=0.0), 0),
    "task arithmetic lambda 0": lambda base, a, b: (
        streammerge.task_arithmetic(a, b, base=base, **{"lambda": 0.0}),
        0,
    ),
    "task arithmetic weight 1": lambda base, a, b: (streammerge.task_arithmetic(b, base=base), 2),
    "passthrough": lambda base, a, b: (streammerge.passthrough(b), 2),
    "scale 1": lambda base, a, b: (streammerge.scale(b, alpha=1.0), 2),
    "n_average of one": lambda base, a, b: (streammerge.n_average(b), 2),
    "n_average of twins": lambda base, a, b: (streammerge.n_average(a, a, a, a), 1),
    "sum_twice with nothing": lambda base, a, b: (streammerge.sum_twice(a, b, base, alpha=0.0, beta=0.0), 1),
    "sum_twice with the third": lambda base, a, b: (streammerge.sum_twice(a, b, base, alpha=0.3, beta=1.0), 0),
    "triple_sum with nothing": lambda base, a, b: (streammerge.triple_sum(a, b, base, alpha=0.0, beta=0.0), 1),
    "triple_sum without the first": lambda base, a, b: (streammerge.triple_sum(a, b, base, alpha=1.0, beta=0.0), 2),
    "expo alpha 0": lambda base, a, b: (streammerge.expo(a, base=base, alpha=0.0), 1),
    "expo of the base": lambda base, a, b: (streammerge.expo(base, base=base, alpha=3.0), 0),
    "weighted_subtraction alpha 0": lambda base, a, b: (streammerge.weighted_subtraction(a, b, alpha=0.0), 1),
    "add scale 0": lambda base, a, b: (streammerge.add(a, b, scale=0.0), 1),
    "slerp t 0": lambda base, a, b: (streammerge.slerp(a, b, t=0.0), 1),
    "slerp t 1": lambda base, a, b: (streammerge.slerp(a, b, t=1.0), 2),
    "slerp of twins": lambda base, a, b: (streammerge.slerp(a, a, t=0.3), 1),
    "ties lambda 0": lambda base, a, b: (streammerge.ties(a, b, base=base, density=0.5, **{"lambda": 0.0}), 0),
    "ties density 0": lambda base, a, b: (streammerge.ties(a, b, base=base, density=0.0), 0),
    "ties of base and base": lambda base, a, b: (streammerge.ties(base, base, base=base, density=0.5), 0),
}


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("distance", ["near", "far"])
@pytest.mark.parametrize("identity", IDENTITIES)
def test_identities_hold_to_the_value(families, tmp_path, identity, dtype, distance):
    family = families(dtype, distance)
    merge, number = IDENTITIES[identity](*family.paths[:3])
    merged = merge_to(tmp_path / "out.safetensors", merge)
    for name, expected in family.tensors[number].items():
        if expected.is_floating_point():
            torch.testing.assert_close(
                merged[name], expected, rtol=2**-23 if identity == "slerp of twins" else 0, atol=0
            )


@pytest.mark.parametrize("distance", ["near", "far"])
def test_ties_of_one_model_at_density_one_is_that_model(families, tmp_path, distance):
    family = families("F16", distance)
    merged = merge_to(
        tmp_path / "out.safetensors", streammerge.ties(family.paths[1], base=family.paths[0], dtype="fp32")
    )
    for name, expected in family.tensors[1].items():
        if expected.is_floating_point():
            torch.testing.assert_close(merged[name], expected.float(), rtol=3e-7, atol=3e-7)


def test_passthrough_of_everything_is_the_file_itself(families, tmp_path):
    family = families("BF16", "far")
    assert_same_bytes(
        merge_to(tmp_path / "out.safetensors", streammerge.passthrough(family.paths[2])), family.tensors[2]
    )


def test_the_order_of_models_does_not_matter_where_the_formula_says_so(families, tmp_path):
    a, b = families("F32", "near").paths[1:3]
    for one, other in (
        (streammerge.linear(a, b, weight=[0.3, 0.7]), streammerge.linear(b, a, weight=[0.7, 0.3])),
        (streammerge.slerp(a, b, t=0.3), streammerge.slerp(b, a, t=0.7)),
    ):
        first, second = merge_to(tmp_path / "1.safetensors", one), merge_to(tmp_path / "2.safetensors", other)
        for name, values in first.items():
            torch.testing.assert_close(values, second[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [-900.0, -1.5, 0.0, 0.7, 900.0])
def test_sigmoid_has_a_value_for_every_alpha(alpha):
    first, second = (MemoryModel({"w": torch.tensor([value], dtype=torch.float64)}) for value in (3.0, 5.0))

    def logistic(x: float) -> float:
        return 0.5 * (1 + math.tanh(x / 2))

    found = streammerge.sigmoid(first, second, alpha=alpha).read("w", 0, 1).item()
    assert found == pytest.approx(8 * logistic(4 * alpha) - 3 * logistic(alpha), abs=1e-12)


# ── slerp ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def at_angle(cosine: float, length: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 vectors of 500 elements with this cosine; the second has this length, the first the length 1."""
    first, other = normal((500,), 1, torch.float64), normal((500,), 2, torch.float64)
    first /= first.norm()
    other -= first.dot(other) * first
    other /= other.norm()
    return first, length * (cosine * first + (1 - cosine**2) ** 0.5 * other)


@pytest.mark.parametrize("cosine", [-0.999, -0.5, 0.0, 0.3, 0.99, 0.9994])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.75])
def test_slerp_keeps_the_length_and_divides_the_angle(cosine, t):
    first, second = at_angle(cosine)
    between = streammerge.slerp(MemoryModel({"w": first}), MemoryModel({"w": second}), t=t).read("w", 0, 500)
    assert float(between.norm()) == pytest.approx(1.0, rel=1e-9)
    whole = torch.acos(first.dot(second))
    assert float(torch.acos(first.dot(between).clamp(-1, 1))) == pytest.approx(float(t * whole), rel=1e-6)


@pytest.mark.parametrize("cosine", [0.9996, 1.0, -0.9996, -1.0])
def test_slerp_of_nearly_parallel_tensors_is_the_straight_line(cosine):
    first, second = at_angle(cosine, length=3.0)
    between = streammerge.slerp(MemoryModel({"w": first}), MemoryModel({"w": second}), t=0.25).read("w", 0, 500)
    torch.testing.assert_close(between, 0.75 * first + 0.25 * second, rtol=1e-12, atol=1e-15)


def test_slerp_with_zero_is_the_straight_line():
    values = normal((10,), 1)
    between = streammerge.slerp(MemoryModel({"w": values}), MemoryModel({"w": values * 0}), t=0.25).read("w", 0, 10)
    torch.testing.assert_close(between, 0.75 * values)


# ── ties, where an example says more than a formula ──────────────────────────────────────────────────────────────────


def ties_of(*deltas: list[float], **parameters) -> list[float]:
    models = [MemoryModel({"w": torch.tensor(delta)}) for delta in deltas]
    base = MemoryModel({"w": torch.zeros(len(deltas[0]))})
    result: list[float] = streammerge.ties(*models, base=base, **parameters).read("w", 0, len(deltas[0])).tolist()
    return result


def test_ties_elects_the_sign_of_the_weighted_sum_and_averages_what_agrees():
    assert ties_of([3.0, -1.0, 2.0], [1.0, 3.0, -2.0], [-1.0, 1.0, -2.0]) == [2.0, 2.0, -2.0]
    assert ties_of([4.0, -1.0], [2.0, 2.0], weight=[1.0, 3.0]) == [(4 + 6) / 4, 2.0]


def test_ties_elects_plus_where_the_sum_is_zero():
    assert ties_of([2.0], [-2.0]) == [2.0]


def test_ties_sums_what_agrees_unless_it_normalizes():
    assert ties_of([3.0, -1.0], [1.0, 3.0], normalize=False) == [4.0, 3.0]
    assert ties_of([3.0, -1.0], [1.0, 3.0], normalize=False, weight=[0.5, 1.0], **{"lambda": 2.0}) == [5.0, 6.0]


def test_ties_trims_each_model_to_its_own_density():
    assert ties_of([4.0, -3.0, 2.0, 1.0], density=0.5) == [4.0, -3.0, 0.0, 0.0]
    assert ties_of([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], density=[0.25, 0.5], normalize=False) == [4, 0, 3, 4]


def test_ties_keeps_one_element_at_least():
    assert ties_of([1.0, -5.0, 2.0], density=0.01) == [0.0, -5.0, 0.0]


def test_ties_rescales_to_the_whole_task_vectors_sum():
    assert ties_of([4.0, -3.0, 2.0, 1.0], density=0.5, rescale=True) == pytest.approx([40 / 7, -30 / 7, 0, 0])
