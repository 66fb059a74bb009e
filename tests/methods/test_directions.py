"""Gram methods by their geometry: identities, tensors without direction, values that are no numbers."""

from __future__ import annotations

import math

import pytest
import torch

import streammerge
from streammerge.errors import MethodError, RecipeError
from streammerge.methods import METHODS
from streammerge.methods.registry import GramMethod
from streammerge.methods.statistics.gram import Gram, GramPass, Products
from streammerge.tensors import Model
from tests.make.models import SMALL, MemoryModel, Tensors, make_tensors, near, normal
from tests.references.cases import CASES, ONE_CASE_EACH
from tests.references.linear import Case

GRAM_CASES = [case for case in CASES if isinstance(METHODS[case.method], GramMethod)]


def model(*values: float) -> MemoryModel:
    return MemoryModel({"w": torch.tensor(values, dtype=torch.float64)})


def read(merged: Model) -> list[float]:
    found: list[float] = merged.read("w", 0, merged.tensors["w"].elements).tolist()
    return found


def assert_equal(merged: Model, tensors: Tensors, tolerance: float = 1e-6) -> None:
    for name, expected in tensors.items():
        actual = merged.read(name, 0, expected.numel()).reshape(expected.shape)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 0.1)


BASE = make_tensors(0, shapes=SMALL)
FAR = [make_tensors(seed, shapes=SMALL) for seed in (1, 2, 3)]
NEAR = [near(BASE, seed) for seed in (1, 2, 3)]

IDENTITIES = {
    "slerp with lerped length, t 0": lambda x, a, b: (streammerge.slerp(a, b, t=0.0, lerp_norm=True), 1),
    "slerp with lerped length, t 1": lambda x, a, b: (streammerge.slerp(a, b, t=1.0, lerp_norm=True), 2),
    "slerp with lerped length of twins": lambda x, a, b: (streammerge.slerp(a, a, t=0.4, lerp_norm=True), 1),
    "slerp from the base": lambda x, a, b: (streammerge.slerp(a, base=x, t=0.0), 0),
    "nuslerp of all weight on one": lambda x, a, b: (streammerge.nuslerp(a, b, weight=[1.0, 0.0]), 1),
    "nuslerp of all weight on the other": lambda x, a, b: (streammerge.nuslerp(a, b, base=x, weight=[0.0, 3.0]), 2),
    "nuslerp of twins": lambda x, a, b: (streammerge.nuslerp(a, a, weight=[1.0, 2.0]), 1),
    "nuslerp of twins around a base": lambda x, a, b: (streammerge.nuslerp(a, a, base=x), 1),
    "nuslerp of twins by columns": lambda x, a, b: (
        streammerge.nuslerp(a, a, base=x, nuslerp_flatten=False, nuslerp_row_wise=True),
        1,
    ),
    "stock of twins by filters": lambda x, a, b: (streammerge.model_stock(a, a, base=x, filter_wise=True), 1),
    "nuslerp of the base with itself": lambda x, a, b: (streammerge.nuslerp(x, x, base=x), 0),
    "multislerp of twins": lambda x, a, b: (streammerge.multislerp(a, a, weight=[0.2, 0.3]), 1),
    "multislerp of triplets around a base": lambda x, a, b: (streammerge.multislerp(a, a, a, base=x), 1),
    "multislerp of all weight on one": lambda x, a, b: (streammerge.multislerp(a, b, base=x, weight=[0.0, 1.0]), 2),
    "multislerp of the base with itself": lambda x, a, b: (streammerge.multislerp(x, x, x, base=x), 0),
    "stock of twins": lambda x, a, b: (streammerge.model_stock(a, a, base=x), 1),
    "stock of the base with itself": lambda x, a, b: (streammerge.model_stock(x, x, x, base=x), 0),
    "stock of triplets, consecutive": lambda x, a, b: (
        streammerge.model_stock(b, b, b, base=x, pairs="consecutive", average="angle"),
        2,
    ),
    "karcher of one": lambda x, a, b: (streammerge.karcher(a), 1),
    "karcher of triplets": lambda x, a, b: (streammerge.karcher(a, a, base=a), 1),
    "median of one": lambda x, a, b: (streammerge.geometric_median(a), 1),
    "median of twins": lambda x, a, b: (streammerge.geometric_median(b, b), 2),
    "median of two and one": lambda x, a, b: (streammerge.geometric_median(a, a, b, max_iter=500, eps=1e-9), 1),
    "nothing perpendicular": lambda x, a, b: (streammerge.add_perpendicular(a, a, base=x, alpha=2.0), 1),
    "alpha 0": lambda x, a, b: (streammerge.add_perpendicular(a, b, base=x, alpha=0.0), 1),
    "all of it perpendicular to nothing": lambda x, a, b: (streammerge.add_perpendicular(x, b, base=x), 2),
}


@pytest.mark.parametrize("distance", ["near", "far"])
@pytest.mark.parametrize("identity", IDENTITIES)
def test_identities(identity, distance):
    tensors = [BASE, *(NEAR if distance == "near" else FAR)]
    merged, number = IDENTITIES[identity](*(MemoryModel(each) for each in tensors[:3]))
    assert_equal(merged, tensors[number])


# ── tensors without direction ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", GRAM_CASES, ids=str)
@pytest.mark.parametrize("zeros", [(0,), (1,), (2,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_zero_tensors_have_a_result(case, zeros):
    tensors = [dict(each) for each in (BASE, *NEAR)]
    for number in zeros:
        tensors[number] = {name: torch.zeros_like(values) for name, values in tensors[number].items()}
    merged = case.merge([MemoryModel(each) for each in tensors])
    expected = case.expected(tensors)
    for name, info in merged.tensors.items():
        values = merged.read(name, 0, info.elements)
        assert torch.isfinite(values).all(), name
        torch.testing.assert_close(
            values.double(), torch.from_numpy(expected[name].reshape(-1).copy()), rtol=2e-5, atol=2e-6
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("case", GRAM_CASES, ids=str)
def test_what_is_no_number_stays_visible_and_spoils_nothing_else(case, bad):
    spoilt = normal((20,), 9)
    spoilt[3] = bad
    models = [MemoryModel({"w": normal((20,), seed)}) for seed in (0, 1, 2, 3)]
    models[case.models] = MemoryModel({"w": spoilt})
    finite = torch.isfinite(case.merge(models).read("w", 0, 20))
    assert not finite[3]
    assert finite.sum() == 19


# ── what each method is about ────────────────────────────────────────────────────────────────────────────────────────


def test_slerp_with_lerped_length_turns_evenly_and_grows_evenly():
    found = read(streammerge.slerp(model(2.0, 0.0), model(0.0, 4.0), t=0.25, lerp_norm=True))
    angle = math.pi / 8
    assert found == pytest.approx([2.5 * math.cos(angle), 2.5 * math.sin(angle)])


def test_slerp_with_lerped_length_knows_small_angles():
    one, other = model(1.0, 0.0), model(math.cos(1e-4), math.sin(1e-4))
    found = read(streammerge.slerp(one, other, t=0.5, lerp_norm=True))
    assert math.hypot(*found) == pytest.approx(1.0, abs=1e-13)  # the straight line is shorter by 1e-9
    assert math.hypot(*read(streammerge.slerp(one, other, t=0.5))) == pytest.approx(1 - 1.25e-9, abs=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_opposite_directions_have_no_plane_to_turn_in(t):
    values = normal((30,), 1)
    first, second = MemoryModel({"w": values}), MemoryModel({"w": -values})
    for merged in (
        streammerge.slerp(first, second, t=t, lerp_norm=True),
        streammerge.nuslerp(first, second, weight=[1 - t, t]),
    ):
        torch.testing.assert_close(merged.read("w", 0, 30), (1 - 2 * t) * values)


def test_nuslerp_turns_task_vectors_around_the_base():
    found = read(streammerge.nuslerp(model(6.0, 5.0), model(5.0, 6.0), base=model(5.0, 5.0), weight=[2.0, 1.0]))
    assert found == pytest.approx([5 + math.cos(math.pi / 6), 5 + math.sin(math.pi / 6)])


def test_multislerp_has_the_mean_direction_and_the_mean_length():
    found = read(streammerge.multislerp(model(1.0, 0.0), model(0.0, 3.0), eps=0.0))
    assert found == pytest.approx([2 * math.sqrt(0.5)] * 2)


@pytest.mark.parametrize("count", [2, 4])
def test_multislerp_of_directions_that_cancel_is_the_weighted_sum(count):
    pairs = [model(1.0, 2.0), model(-2.0, -4.0)] * (count // 2)
    assert read(streammerge.multislerp(*pairs)) == pytest.approx([-0.5, -1.0])


def test_stock_goes_as_far_as_the_task_vectors_agree():
    base, a, b = model(1.0, 1.0, 0.0), model(2.0, 1.0, 0.0), model(1.5, 1.0 + math.sqrt(0.75), 0.0)
    share = 2 * 0.5 / (1 + 0.5)
    mean = [1.75, 1 + math.sqrt(0.75) / 2, 0.0]
    assert read(streammerge.model_stock(a, b, base=base)) == pytest.approx(
        [share * m + (1 - share) * o for m, o in zip(mean, [1.0, 1.0, 0.0], strict=True)]
    )
    assert read(streammerge.model_stock(model(2.0, 1.0, 0.0), model(1.0, 2.0, 0.0), base=base)) == [1.0, 1.0, 0.0]


def test_stock_of_opposite_task_vectors_is_the_base():
    assert read(streammerge.model_stock(model(3.0, 1.0), model(0.0, 1.0), base=model(1.0, 1.0))) == [1.0, 1.0]


def test_stocks_pairs_and_averages_differ():
    base, vectors = model(0.0, 0.0), [model(1.0, 0.0), model(math.cos(0.4), math.sin(0.4)), model(0.6, 0.8)]

    def share(cosine: float) -> float:
        return 3 * cosine / (1 + 2 * cosine)

    mean = (1 + math.cos(0.4) + 0.6) / 3
    last = math.acos(0.6)
    angles = [0.4, last, last - 0.4]
    for options, cosine in (
        ({}, sum(map(math.cos, angles)) / 3),
        ({"pairs": "consecutive"}, (math.cos(angles[0]) + math.cos(angles[2])) / 2),
        ({"average": "angle"}, math.cos(sum(angles) / 3)),
    ):
        found = read(streammerge.model_stock(*vectors, base=base, **options))
        assert found[0] == pytest.approx(share(cosine) * mean)


def test_stock_by_filters_agrees_row_by_row():
    base = MemoryModel({"w": torch.zeros(2, 2, dtype=torch.float64)})
    a = MemoryModel({"w": torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)})
    b = MemoryModel({"w": torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)})
    assert read(streammerge.model_stock(a, b, base=base, filter_wise=True)) == [1.0, 0.0, 0.0, 0.0]
    assert read(streammerge.model_stock(a, b, base=base))[0] == pytest.approx(2 / 3)


def test_stock_does_not_take_short_tensors_for_orthogonal():
    base, a = model(1.0, 1.0), model(1.0 + 1e-4, 1.0)
    assert read(streammerge.model_stock(a, a, base=base)) == pytest.approx([1.0 + 1e-4, 1.0], abs=1e-12)


def test_karcher_is_where_the_logarithms_cancel():
    angles = [0.0, 0.5, 1.3]
    found = read(streammerge.karcher(*(model(2 * math.cos(x), 2 * math.sin(x)) for x in angles), tol=1e-12))
    mean = sum(angles) / 3  # on a circle the centre of mass is that of the angles
    assert found == pytest.approx([2 * math.cos(mean), 2 * math.sin(mean)], abs=1e-6)


def test_karcher_of_directions_that_cancel_starts_from_the_first():
    found = read(streammerge.karcher(model(1.0, 0.0), model(-3.0, 0.0)))
    assert found == pytest.approx([2.0, 0.0])


def test_karcher_takes_what_is_shorter_than_the_tolerance_for_nothing():
    assert read(streammerge.karcher(model(1e-7, 0.0), model(0.0, 2.0))) == pytest.approx([0.0, 1.0])
    assert read(streammerge.karcher(model(1e-7, 0.0), model(0.0, 3e-7))) == pytest.approx([5e-8, 1.5e-7], rel=1e-9)


def test_the_median_is_not_moved_by_an_outlier():
    crowd = [model(0.0, 0.0), model(1.0, 0.0), model(0.0, 1.0), model(1.0, 1.0)]
    near_by = read(streammerge.geometric_median(*crowd, model(2.0, 2.0), max_iter=2000))
    far_off = read(streammerge.geometric_median(*crowd, model(2e6, 2e6), max_iter=2000))
    assert near_by == pytest.approx(far_off, abs=1e-4)


def test_the_median_of_an_equilateral_triangle_is_its_centre():
    corners = [model(5 + math.cos(x), 3 + math.sin(x)) for x in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    assert read(streammerge.geometric_median(*corners)) == pytest.approx([5.0, 3.0])


def test_what_is_added_is_perpendicular_to_the_first_task_vector():
    base, a, b = (normal((40,), seed, torch.float64) for seed in (1, 2, 3))
    merged = streammerge.add_perpendicular(
        *(MemoryModel({"w": each}) for each in (a, b)), base=MemoryModel({"w": base})
    )
    added = merged.read("w", 0, 40) - a
    assert float(added.dot(a - base)) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(
        added - (b - base), (added - (b - base)).dot(a - base) / (a - base).square().sum() * (a - base)
    )
    part = streammerge.perpendicular_component(MemoryModel({"w": a - base}), MemoryModel({"w": b - base}))
    torch.testing.assert_close(part.read("w", 0, 40), added)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x, a, b: streammerge.nuslerp(a, base=x), RecipeError, "takes 2 models, found 1"),
        (lambda x, a, b: streammerge.nuslerp(a, b, x), RecipeError, "takes 2 models, found 3"),
        (lambda x, a, b: streammerge.multislerp(a, base=x), RecipeError, "takes at least 2 models, found 1"),
        (lambda x, a, b: streammerge.model_stock(a, base=x), RecipeError, "at least 2 models beside the base, found 1"),
        (lambda x, a, b: streammerge.model_stock(a, b, base=x, pairs="some"), RecipeError, "one of all, consecutive"),
        (lambda x, a, b: streammerge.karcher(a, b, max_iter=2.5), RecipeError, "whole number at least 0"),
        (lambda x, a, b: streammerge.geometric_median(a, b, max_iter=-1), RecipeError, "whole number at least 0"),
    ],
)
def test_mistakes_are_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call(*(MemoryModel(each) for each in (BASE, *NEAR[:2])))


def test_weights_that_cancel_are_refused():
    with pytest.raises(MethodError, match="sum to zero"):
        read(streammerge.multislerp(model(1.0), model(2.0), weight=[1.0, -1.0]))


# ── products ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_products_of_combinations():
    vectors = [normal((9,), seed, torch.float64) for seed in (1, 2, 3)]
    products = Products(tuple(tuple(float(a.dot(b)) for b in vectors) for a in vectors))
    shares = [0.3, -1.2, 0.5]
    total = sum(share * vector for share, vector in zip(shares, vectors, strict=True))
    assert isinstance(total, torch.Tensor)
    assert products.length(shares) == pytest.approx(float(total.norm()))
    assert products.dot(shares, 1) == pytest.approx(float(total.dot(vectors[1])))
    units = products.units([0, 2])
    assert units.count == 2
    assert units.values[0][0] == pytest.approx(1.0)
    assert units.values[0][1] == products.cosine(0, 2)


def test_a_gram_matrix_knows_models_and_task_vectors():
    gram = Gram.of(3, (5.0, 7.0, 13.0, 11.0, 13.0, 26.0, 4.0, 0.0, 9.0))
    assert gram.task_vectors() == Products(((4.0, 0.0), (0.0, 9.0)))
    assert gram.from_first() == Products(((0.0, 0.0, 0.0), (0.0, 4.0, 0.0), (0.0, 0.0, 9.0)))
    assert gram.models() == Products(((5.0, 7.0, 11.0), (7.0, 13.0, 13.0), (11.0, 13.0, 26.0)))
    assert gram.defined() == gram
    assert Gram.of(2, (math.inf, 0.0, 0.0, 1.0)).defined() == Gram.of(2, (0.0,) * 4)
    assert GramPass(2).finish().count == 2


def test_every_gram_method_is_tested_here():
    assert {case.method for case in GRAM_CASES} == {n for n, m in METHODS.items() if isinstance(m, GramMethod)}
    assert all(isinstance(case, Case) for case in ONE_CASE_EACH)
