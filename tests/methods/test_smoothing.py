"""Smooth add: its filters against plain ones, its blocks and tiles; and the halo that any block method may have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.compute.costs import piece_elements, row_elements
from streammerge.compute.expressions import BLOCK, ByBlock
from streammerge.methods import METHODS, BlockMethod, Place, filters, method
from streammerge.methods.filters import blurred, finding_median, median_of_neighbours, merging
from streammerge.methods.registry import Needs
from tests.make.models import MemoryModel, assert_same_bytes, load_model, merge_to, near, normal, save_models
from tests.references.closeness import relative_error
from tests.references.diffusion import gaussian_filtered, median_filtered
from tests.references.diffusion import smooth_add as reference

ODD = ((1,), (2,), (63,), (1, 1), (1, 9), (7, 13), (2, 2), (3, 1, 5), (4, 3, 3, 3), (5, 6, 1, 1), (2, 3, 2, 2, 2))


# ── the filters ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_the_median_is_that_of_the_box(shape):
    values = normal(shape, 1, torch.float64)
    assert np.array_equal(median_of_neighbours(values).numpy(), median_filtered(values.numpy()))


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_the_gaussian_filter_is_the_kernels_sum(shape):
    values = normal(shape, 1, torch.float64)
    np.testing.assert_allclose(blurred(values).numpy(), gaussian_filtered(values.numpy()), rtol=1e-13, atol=1e-15)


def test_the_filters_are_those_of_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    for shape in ODD:
        values = normal(shape, 1, torch.float64)
        assert np.array_equal(median_of_neighbours(values).numpy(), ndimage.median_filter(values.numpy(), size=3))
        np.testing.assert_allclose(
            blurred(values).numpy(), ndimage.gaussian_filter(values.numpy(), sigma=1), rtol=1e-13, atol=1e-15
        )


@pytest.mark.parametrize("piece", [1, 100])
def test_the_median_does_not_depend_on_its_pieces(monkeypatch, piece):
    values = normal((6, 40), 1)
    whole = median_of_neighbours(values)
    monkeypatch.setattr(filters, "PIECE", piece)
    assert torch.equal(median_of_neighbours(values), whole)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9, 27])
def test_sorted_lists_are_merged_whatever_is_in_them(length):
    # a network that sorts all lists of zeros and ones sorts everything (Knuth)
    ones = torch.from_numpy(np.indices((length + 1,) * 3).reshape(3, -1))
    numbers = (torch.arange(length).reshape(1, -1, 1) >= length - ones.unsqueeze(1)).int().reshape(3 * length, -1)
    expected = numbers.sort(0).values
    assert torch.equal(torch.stack(merging(length).run(list(numbers))), expected)
    (median,) = finding_median(length).run(list(numbers))
    assert torch.equal(median, expected[3 * length // 2])


def test_what_does_not_lead_to_the_median_is_left_out():
    counts = [len(network(27).exchanges) for network in (merging, finding_median)]
    assert counts[1] < 0.6 * counts[0] < 250


@given(st.lists(st.integers(-50, 50), min_size=27, max_size=27))
@settings(max_examples=50, deadline=None)
def test_the_median_of_three_lists_is_the_median_of_all(numbers):
    lists = [sorted(numbers[start : start + 9]) for start in (0, 9, 18)]
    (median,) = finding_median(9).run([torch.tensor(number) for part in lists for number in part])
    assert median.item() == sorted(numbers)[13]


# ── the method ───────────────────────────────────────────────────────────────────────────────────────────────────────

LARGE = ((600, 700), (64, 128, 3, 3), (3, 200_000), (500_000,), (100_000, 4))


@pytest.mark.parametrize("distance", [1e-3, 1.0])
@pytest.mark.parametrize("shape", [*ODD, (), (0,), (0, 3), *LARGE[:3]], ids=str)
def test_tensors_of_many_blocks_and_tiles(shape, distance):
    base = {"w": normal(shape, 1)}
    tensors = [base, near(base, 2, distance), near(base, 3, distance)]
    models = [MemoryModel(tensor) for tensor in tensors]
    merged = streammerge.smooth_add(*models[1:], base=models[0], alpha=0.8)
    expected = reference([tensor["w"].double().numpy() for tensor in tensors], alpha=0.8)
    found = merged.read("w", 0, expected.size).reshape(shape)
    assert relative_error(found, expected) <= 2e-6
    assert (
        relative_error(found - tensors[1]["w"], expected - tensors[1]["w"].double().numpy()) <= 1e-6 + 5e-7 / distance
    )


@pytest.mark.parametrize("tile", [1, 1000])
def test_tiles_do_not_matter(monkeypatch, tile):
    models = [MemoryModel({"w": normal((30, 40), seed)}) for seed in range(3)]
    merged = streammerge.smooth_add(*models[1:], base=models[0])
    whole = merged.read("w", 0, 1200)
    monkeypatch.setattr(filters, "TILE", tile)
    torch.testing.assert_close(merged.read("w", 0, 1200), whole, rtol=1e-6, atol=1e-7)


def test_a_single_spike_is_smoothed_away_and_a_plateau_is_not():
    zeros = torch.zeros(40, 40)
    spike, plateau = zeros.clone(), zeros.clone()
    spike[20, 20], plateau[10:30, 10:30] = 100.0, 1.0
    base = MemoryModel({"w": zeros})
    for change, kept in ((spike, 0.0), (plateau, 1.0)):
        found = streammerge.smooth_add(base, MemoryModel({"w": change}), base=base).read("w", 0, 1600)
        assert found.reshape(40, 40)[20, 20].item() == pytest.approx(kept, abs=1e-6)


def test_what_is_no_number_spoils_its_neighbourhood_alone():
    change = torch.zeros(60, 60)
    change[30, 30] = float("nan")
    base = MemoryModel({"w": torch.zeros(60, 60)})
    found = streammerge.smooth_add(base, MemoryModel({"w": change}), base=base).read("w", 0, 3600).reshape(60, 60)
    bad = found.isnan().nonzero()
    assert bad.amin(0).tolist() == [25, 25]
    assert bad.amax(0).tolist() == [35, 35]


# ── halos ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SEEN: list[tuple[int, int]] = []


@pytest.fixture
def neighbours() -> Iterator[None]:
    SEEN.clear()

    @method(BlockMethod, needs=Needs(rows="filters", halo=2))
    def neighbours(model: torch.Tensor, *, place: Place) -> torch.Tensor:
        """θ = the sum of the rows up to two away"""
        SEEN.append((place.block, model.shape[0]))
        wide = torch.nn.functional.pad(model, (0, 0, 2, 2))
        return sum((wide[shift : shift + model.shape[0]] for shift in range(1, 5)), start=wide[: model.shape[0]])

    yield
    del METHODS["neighbours"]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("neighbours")
def test_rows_beside_a_block_are_given_and_left_out(tmp_path, threads):
    path = save_models(tmp_path, a={"w": normal((700, 1000), 1), "one": normal((1, 8), 2), "empty": torch.zeros(0, 3)})
    merged = merge_to(tmp_path / "out.safetensors", streammerge.neighbours(path["a"]), threads=threads)
    for name, values in load_model(path["a"]).items():
        wide = torch.nn.functional.pad(values, (0, 0, 2, 2))
        expected = sum((wide[shift : shift + values.shape[0]] for shift in range(1, 5)), start=wide[: values.shape[0]])
        assert torch.equal(merged[name], expected)
    rows = BLOCK // 1000
    assert sorted(SEEN) == [(0, 1), (0, rows + 2), (1, rows + 4), (2, 700 - 2 * rows + 2)]


@pytest.mark.usefixtures("neighbours")
def test_ranges_begin_and_end_anywhere():
    merged = streammerge.neighbours(MemoryModel({"w": normal((700, 1000), 1)}))
    whole = merged.read("w", 0, 700_000)
    for start, stop in ((0, 1), (261_999, 262_001), (300_500, 699_999)):
        assert torch.equal(merged.read("w", start, stop), whole[start:stop])


def node_of(shape: tuple[int, ...]) -> ByBlock:
    models = [MemoryModel({"w": torch.zeros(shape)}) for _ in range(3)]
    node = streammerge.smooth_add(*models[1:], base=models[0]).node("w")
    assert isinstance(node, ByBlock)
    return node


@pytest.mark.parametrize("shape", [*LARGE, (1,), (9, 11)], ids=str)
def test_the_plan_counts_the_halo(shape):
    node = node_of(shape)
    width = 1 if not shape else int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
    height = int(np.prod(shape)) // width
    given = min(piece_elements(node) // width + 2 * filters.HALO, height) * width
    assert given <= row_elements(node) <= max(given, BLOCK) + (2 * filters.HALO + 1) * width


def test_nested_merges_are_smoothed_too(tmp_path):
    base = {"w": normal((600, 700), 1)}
    paths = save_models(tmp_path, base=base, a=near(base, 2), b=near(base, 3))
    inner = streammerge.linear(paths["a"], paths["b"])
    merge_to(tmp_path / "inner.safetensors", inner)
    nested = merge_to(tmp_path / "1.safetensors", streammerge.smooth_add(paths["a"], inner, base=paths["base"]))
    plain = streammerge.smooth_add(paths["a"], tmp_path / "inner.safetensors", base=paths["base"])
    torch.testing.assert_close(nested["w"], merge_to(tmp_path / "2.safetensors", plain)["w"], rtol=1e-6, atol=1e-7)
    again = merge_to(tmp_path / "3.safetensors", plain, threads=3, io="mmap")
    assert_same_bytes(again, load_model(tmp_path / "2.safetensors"))
