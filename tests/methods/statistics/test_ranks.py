"""Exactly the k largest, and of equal ones the first: the radix search against a stable sort."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streammerge.methods.place import Target
from streammerge.methods.sparse import Trim, trim_to_density
from streammerge.methods.statistics import brackets as bracketing
from streammerge.methods.statistics.brackets import BOTTOM as LEAST
from streammerge.methods.statistics.brackets import Bracket, Gathering, Sample
from streammerge.methods.statistics.counting import plain
from streammerge.methods.statistics.histograms import LowerBits, UpperBits
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.ranking import begin_ranking
from streammerge.methods.statistics.ranks import ALL, INFINITE, Cut, Ranking, keys, quotas
from tests.make.models import normal

TINY = float(np.nextafter(np.float32(0), np.float32(1)))

WAYS: dict[str, dict[str, Any]] = {
    "gathered whole": {},
    "bracketed": {"SMALL": 4, "SAMPLE": 4, "LEAST": 2},
    "bracketed wrongly": {"SMALL": 1, "SAMPLE": 8, "LEAST": 3},
    "thinned": {"SMALL": 4, "SAMPLE": 4, "LEAST": 2, "SAMPLED": 6},
    "no room": {"ROOM": 1},
    "no room, as the sample tells": {"SMALL": 4, "SAMPLE": 4, "LEAST": 2, "ROOM": 1},
}
"""Constants with which the search goes one way or the other."""


@pytest.fixture(params=WAYS, autouse=True)
def way(request):
    """Every test here is for each of the ways; hypothesis has one patch for all its examples."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in WAYS[request.param].items():
            patch.setattr(bracketing, name, value)
        if request.param == "bracketed wrongly":
            patch.setattr(Sample, "_bracket", lambda *_: Bracket(5, 13))
        yield request.param


def search(deltas: list[torch.Tensor], density: list[float], block: int, *, rescale: bool = False) -> list[Trim]:
    """Search task vectors of equal length, cut into blocks of this size."""
    elements = deltas[0].numel()
    base = torch.zeros(elements, dtype=deltas[0].dtype)
    target = Target("w", (elements,), len(deltas) + 1, step=block)
    step: Any = trim_to_density(target, {"density": tuple(density), "rescale": rescale})
    passes = 0
    while isinstance(step, Pass):
        blocks = list(range(-(-elements // block)))
        most = step.part or block
        for number in blocks if step.ordered else reversed(blocks):
            part = slice(number * block, min(number * block + most, (number + 1) * block))
            step.add(number, step.measure(number, [base[part], *(delta[part] for delta in deltas)]))
        step = step.finish()
        passes += 1
    assert passes <= 6
    trims: list[Trim] = step
    return trims


def applied(trim: Trim, delta: torch.Tensor, block: int) -> torch.Tensor:
    """What the trim keeps of the task vector, block by block."""
    cut, factor = trim
    parts = [cut.keep(part, number) * factor for number, part in enumerate(delta.split(block))]
    return torch.cat(parts) if delta.numel() else delta


def trimmed(delta: torch.Tensor, density: float, block: int, *, rescale: bool = False) -> torch.Tensor:
    (trim,) = search([delta], [density], block, rescale=rescale)
    return applied(trim, delta, block)


def kept_by_sorting(delta: torch.Tensor, density: float) -> np.ndarray:
    """Which elements a stable sort puts first: the reference."""
    values = delta.numpy()
    count = 0 if density <= 0 else min(values.size, max(int(density * values.size), 1))
    order = np.argsort(-np.abs(values).astype(np.float32), kind="stable")
    kept = np.zeros(values.size, dtype=bool)
    kept[order[:count]] = True
    return kept


def assert_keeps_the_largest(delta: torch.Tensor, density: float, block: int) -> None:
    kept = kept_by_sorting(delta, density)
    expected = np.where(kept, delta.numpy(), 0)
    np.testing.assert_array_equal(trimmed(delta, density, block).numpy(), expected)


few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, TINY, -TINY, math.inf, -math.inf, 3.4e38, 1e-30])
close_values = st.integers(-6, 6).map(lambda steps: float(np.float32(1.0) + np.float32(2.0**-23) * np.float32(steps)))
half_values = st.floats(-4, 4, width=16)
any_values = st.floats(width=32, allow_nan=False)
KEYS = st.integers(LEAST + 1, 2**31 - 1)
densities = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.999, 1.0]))


def vectors(values: st.SearchStrategy[float], most: int = 60) -> st.SearchStrategy[torch.Tensor]:
    return hnp.arrays(np.float32, st.integers(1, most), elements=values).map(torch.from_numpy)


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(vectors(few_values), vectors(close_values), vectors(half_values), vectors(any_values)),
    densities,
    st.integers(1, 64),
)
@example(torch.tensor([math.inf, -math.inf, math.inf, 1.0]), 0.5, 2)
@example(torch.tensor([math.inf, 1.0, -math.inf]), 0.0, 2)
@example(torch.tensor([0.0, -0.0, 0.0]), 0.4, 1)
@example(torch.tensor([1.0] * 10), 0.35, 3)
@example(torch.tensor([1.0, 1.0 + 2**-23, 1.0, 1.0 + 2**-23]), 0.5, 3)
def test_exactly_the_k_largest_are_kept_and_of_equal_ones_the_first(delta, density, block):
    assert_keeps_the_largest(delta, density, block)


@settings(deadline=None, max_examples=60)
@given(st.lists(half_values, min_size=1, max_size=80), densities, st.integers(1, 40), st.integers(0, 9))
def test_quantised_deltas_of_a_real_base_have_many_ties(values, density, block, seed):
    base = normal((len(values),), seed, torch.float16)
    model = (base.float() + 1e-3 * torch.tensor(values)).half()
    assert_keeps_the_largest(model.float() - base.float(), density, block)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_large_vector_in_several_blocks(density, dtype):
    delta = normal((200_003,), 4, dtype).float()
    assert_keeps_the_largest(delta, density, 30_000)


def test_float64_deltas_are_told_apart_as_float32_tells_them():
    delta = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12, 0.5, 1e-60], dtype=torch.float64)
    assert trimmed(delta, 0.4, 2).tolist() == [1.0, 1.0 + 1e-12, 0.0, 0.0, 0.0]
    assert trimmed(delta, 0.8, 2).tolist() == [1.0, 1.0 + 1e-12, 1.0 + 2e-12, 0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_compute_dtypes_are_searched_as_well(dtype):
    delta = torch.tensor([1.0, -4.0, 2.0, -3.0], dtype=dtype)
    kept = trimmed(delta, 0.5, 3)
    assert kept.dtype == dtype
    assert kept.tolist() == [0.0, -4.0, 0.0, -3.0]


@settings(deadline=None, max_examples=60)
@given(vectors(half_values, 40), vectors(half_values, 40), densities, densities, st.integers(1, 20))
def test_task_vectors_are_searched_side_by_side_each_for_itself(first, second, one, other, block):
    count = min(first.numel(), second.numel())
    deltas = [first[:count], second[:count]]
    for delta, density, trim in zip(deltas, [one, other], search(deltas, [one, other], block), strict=True):
        expected = np.where(kept_by_sorting(delta, density), delta.numpy(), 0)
        np.testing.assert_array_equal(applied(trim, delta, block).numpy(), expected)


@settings(deadline=None, max_examples=100)
@given(vectors(st.floats(-100, 100, width=16)), st.floats(0.01, 1), st.integers(1, 40))
def test_rescaling_restores_the_sum_of_magnitudes(delta, density, block):
    rescaled = trimmed(delta, density, block, rescale=True)
    kept = torch.from_numpy(kept_by_sorting(delta, density))
    assert not rescaled[~kept].any()
    assert float(rescaled.double().abs().sum()) == pytest.approx(float(delta.double().abs().sum()), rel=1e-5)
    torch.testing.assert_close(rescaled[kept].sign(), delta[kept].sign())


@pytest.mark.parametrize("density", [0.0, 0.5])
def test_rescaling_nothing_leaves_nothing(density):
    assert trimmed(torch.zeros(7), density, 3, rescale=True).tolist() == [0.0] * 7


def test_values_that_are_no_numbers_count_as_the_largest():
    delta = torch.tensor([math.nan, 5.0, 1.0, 2.0])
    kept = trimmed(delta, 0.5, 2)
    assert math.isnan(kept[0])
    assert kept[1:].tolist() == [5.0, 0.0, 0.0]
    kept = trimmed(torch.tensor([math.nan, 5.0, -math.inf, math.nan]), 0.25, 2)
    assert kept.isnan().tolist() == [True, False, False, False]
    assert kept[1:].tolist() == [0.0, 0.0, 0.0]


def test_nothing_is_searched_where_nothing_is_left_out():
    everything = Cut(ALL)
    assert search([torch.ones(10)] * 2, [1.0, 1.0], 4) == [(everything, 1.0)] * 2
    assert search([torch.ones(1)], [0.5], 4) == [(everything, 1.0)]
    assert search([torch.ones(10)], [0.0], 4) == [(Cut(None), 1.0)]


@pytest.mark.parametrize(
    ("elements", "density", "count"),
    [(10, 0.5, 5), (10, 0.19, 1), (10, 0.01, 1), (10, 0.0, 0), (3, 0.9, 2), (7, 1.0, 7)],
)
def test_how_many_are_kept(elements, density, count):
    delta = torch.arange(1.0, elements + 1)
    assert int((trimmed(delta, density, 4) != 0).sum()) == count


@given(st.lists(any_values, min_size=2, max_size=20))
def test_keys_sort_as_magnitudes_do(values):
    tensor = torch.tensor(values)
    np.testing.assert_array_equal(
        np.argsort(keys(tensor, signed=False).numpy(), kind="stable"), np.argsort(tensor.abs().numpy(), kind="stable")
    )


def first_steps(elements: int) -> list[type]:
    """The kinds of the passes until the result."""
    vector, steps = normal((elements,), 3), []
    step: Any = begin_ranking(Ranking(elements, [[elements // 3]], lambda _, inputs: inputs), 1)
    while isinstance(step, Pass):
        steps.append(type(step))
        for block in range(-(-elements // 1000)):
            part = vector[block * 1000 : (block + 1) * 1000][: step.part]
            step.add(block, step.measure(block, [part]))
        step = step.finish()
    return steps


def test_a_sample_is_no_larger_for_larger_tensors_nor_otherwise_for_another_order(way):
    if way != "gathered whole":
        pytest.skip("is of the real constants")
    vector, elements = normal((2**14,), 4).abs().view(torch.int32), 2**30
    kept, measured = [], 0
    for backwards in (False, True):
        ranking = Ranking(elements, [[elements // 3]] * 2)
        ranking.look_for([[elements // 3]] * 2)
        sample = bracketing.Sample(ranking)
        assert sample.part
        blocks = [block for block in range(elements // 2**18) if sample.wants(block)]
        most = 0
        for block in reversed(blocks) if backwards else blocks:
            sample.add(block, [plain(vector[: sample.part])] * 2)
            most = max(most, sum(len(keys) for found in sample.found.values() for keys in found))
        assert most <= 2 * bracketing.SAMPLED
        kept.append(sorted(sample.found))
        measured = sample.kept // 2
    assert kept[0] == kept[1]
    assert measured > bracketing.SAMPLED // 2


def test_which_passes_are_made(way):
    steps = first_steps(20_000)
    if way == "gathered whole":
        assert steps == [Gathering]
    elif way in ("bracketed", "thinned"):
        assert steps == [Sample, Gathering]
    elif way == "no room, as the sample tells":
        assert steps == [Sample, UpperBits, LowerBits]
    else:
        assert steps[-3:] == [Gathering, UpperBits, LowerBits]


@given(KEYS, st.integers(0, 2**20) | st.integers(0, 2**32), st.lists(KEYS, max_size=30))
def test_a_bracket_holds_what_it_was_made_around_and_tells_the_rest_apart(low, width, others):
    high = min(low + width, 2**31 - 1)
    bracket = Bracket.around(low, high)
    found = torch.tensor([low, high, (low + high) // 2, *others], dtype=torch.int32)
    above, inside = bracket.part(found)
    assert sorted(inside.tolist()) == sorted(key for key in found.tolist() if bracket.low < key < bracket.high)
    assert above == sum(key >= bracket.high for key in found.tolist())
    assert {low, high} <= set(inside.tolist())


def test_equals_are_shared_out_from_the_front():
    assert quotas(5, 4, {2: 3, 0: 2, 1: 0}, signed=False) == Cut(5, 2, 2)
    assert quotas(5, 2, {0: 2, 3: 9}, signed=False) == Cut(5, 0, 2)
    assert quotas(5, 0, {}, signed=True) == Cut(5, None, 0, signed=True)


@pytest.mark.parametrize("key", [0, 1, 0x3F800000, INFINITE - 1, INFINITE, INFINITE + 1])
@pytest.mark.parametrize("last_block", [None, 0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_what_is_kept_is_what_the_mask_says(key, last_block, dtype):
    cut = Cut(key, last_block, 1)
    values = torch.tensor([0.0, -0.0, TINY, 1.0, -1.0, 1.5, 0.5, math.inf, -math.inf, 3e4, -1.0], dtype=dtype)
    np.testing.assert_array_equal(cut.keep(values, 1).numpy(), torch.where(cut.mask(values, 1), values, 0.0).numpy())
