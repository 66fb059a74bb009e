"""Rows, filters and columns: how tensors are cut, their Gram matrices, and combinations that differ from row to row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.compute import costs
from streammerge.compute import evaluate as compute
from streammerge.compute.expressions import BLOCK
from streammerge.compute.machine import MIB
from streammerge.errors import MethodError, PlanError
from streammerge.methods.registry import METHODS, GramMethod, method
from streammerge.methods.statistics.gram import Gram
from streammerge.methods.statistics.slices import SliceGramPass, Slices, Slicing
from streammerge.plan.plan import Plan
from tests.make.models import assert_same_bytes, load_model, make_tensors, merge_to, near, normal, save_models

KINDS: tuple[Slices, ...] = ("rows", "filters", "columns")


def matrix(values: np.ndarray, slices: str) -> np.ndarray:
    """The tensor as a matrix with a slice per row, by numpy's own means."""
    if values.ndim < 2 or values.size == 0:
        return values.reshape(1, -1)
    if slices == "rows" and values.ndim < 4:
        return values.reshape(-1, values.shape[-1])
    return values.reshape(values.shape[0], -1) if slices != "columns" else values.reshape(values.shape[0], -1).T


SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


@settings(deadline=None)
@given(shape=SHAPES, slices=st.sampled_from(KINDS), data=st.data())
def test_rectangles_cover_a_range_once_and_spread_what_belongs_to_each_slice(shape, slices, data):
    slicing = Slicing.of(shape, slices)
    elements = math.prod(shape)
    start = data.draw(st.integers(0, elements))
    stop = data.draw(st.integers(start, elements))
    parts = list(slicing.rectangles(start, stop))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]
    assert sum(part.rows * part.columns for part in parts) == stop - start
    assert len(parts) <= 3
    numbers = np.arange(elements).reshape(shape)
    rows = matrix(numbers, slices)
    assert slicing.count == len(rows)
    slice_of = np.empty(elements, dtype=np.int64)
    for number, row in enumerate(rows):
        slice_of[row] = number
    spread = slicing.spread(torch.arange(slicing.count), start, stop)
    assert spread.tolist() == slice_of[start:stop].tolist()


@pytest.mark.parametrize("slices", KINDS)
def test_an_empty_tensor_has_no_slices(slices):
    for shape in ((0,), (3, 0, 2)):
        slicing = Slicing.of(shape, slices)
        assert slicing.count == 0
        assert list(slicing.rectangles(0, 0)) == []


@settings(deadline=None)
@given(shape=SHAPES, slices=st.sampled_from(KINDS), step=st.integers(1, 30), inputs=st.integers(1, 3))
def test_gram_matrices_are_those_of_each_slice_alone(shape, slices, step, inputs):
    tensors = [normal(shape, seed).double() for seed in range(inputs)]
    flat = [tensor.reshape(-1) for tensor in tensors]
    survey = SliceGramPass(Slicing.of(shape, slices), inputs, step)
    for block in range(-(-flat[0].numel() // step)):
        survey.add(block, survey.measure(block, [values[block * step : (block + 1) * step] for values in flat]))
    grams = survey.finish()
    rows = [matrix(tensor.numpy(), slices) for tensor in tensors]
    for number, gram in enumerate(grams):
        for i in range(inputs):
            assert gram.norm(i) == pytest.approx(np.linalg.norm(rows[i][number]), rel=1e-9, abs=1e-12)
            for j in range(inputs):
                expected = rows[i][number] @ rows[j][number]
                assert gram.dot(i, j) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("slices", KINDS)
def test_a_slice_that_is_short_beside_the_first_is_not_lost(slices):
    first, second = normal((6, 8), 1).double(), normal((6, 8), 2).double() * 1e-9
    second[2] *= 1e9
    survey = SliceGramPass(Slicing.of((6, 8), slices), 2, 48)
    survey.add(0, survey.measure(0, [first.reshape(-1), second.reshape(-1)]))
    for number, gram in enumerate(survey.finish()):
        one, other = (matrix(tensor.numpy(), slices)[number] for tensor in (first, second))
        expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert gram.cosine(0, 1) == pytest.approx(expected, rel=0, abs=1e-12)


def test_slices_that_float64_cannot_square_are_refused():
    values = normal((4, 5), 1).double()
    values[2] *= 1e-200
    survey = SliceGramPass(Slicing.of((4, 5), "rows"), 2, 20)
    with pytest.raises(MethodError, match="too large or too small for their squares"):
        survey.measure(0, [values.reshape(-1), values.flip(1).reshape(-1)])
    values[2] = 0.0
    survey.measure(0, [values.reshape(-1), values.flip(1).reshape(-1)])


# ── a method of slices ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def by_length() -> Iterator[None]:
    """A method whose weights are the norms of the inputs' slices, so that no two slices have the same ones."""

    def slices_of(parameters: Mapping[str, Any]) -> Slices | None:
        return None if parameters["along"] == "tensor" else parameters["along"]

    @method(GramMethod, slices=slices_of)
    def by_length(gram: Gram, *, along: Literal["tensor", "rows", "filters", "columns"] = "tensor") -> Sequence[float]:
        """Σᵢ ‖θᵢ‖ θᵢ / Σᵢ ‖θᵢ‖"""
        norms = [gram.norm(i) for i in range(gram.count)]
        return [norm / (sum(norms) or 1.0) for norm in norms]

    yield
    del METHODS["by_length"]


def reference(tensors: Sequence[torch.Tensor], slices: str) -> Any:
    arrays = [tensor.double().numpy() for tensor in tensors]
    if slices == "tensor":
        norms = [np.linalg.norm(values) for values in arrays]
        return sum(norm * values for norm, values in zip(norms, arrays, strict=True)) / (sum(norms) or 1.0)
    numbers = np.arange(arrays[0].size).reshape(arrays[0].shape)
    merged = np.zeros(arrays[0].size)
    for row in matrix(numbers, slices):
        parts = [values.reshape(-1)[row] for values in arrays]
        norms = [np.linalg.norm(part) for part in parts]
        merged[row] = sum(norm * part for norm, part in zip(norms, parts, strict=True)) / (sum(norms) or 1.0)
    return merged.reshape(arrays[0].shape)


WIDE = {"layers.0.long.rows": (3, BLOCK + BLOCK // 2), "layers.1.experts": (3, 50, 70), "layers.2.tall": (9000, 60)}


@pytest.fixture
def models(tmp_path):
    a = make_tensors(0, shapes={**WIDE, **load_shapes()})
    return save_models(tmp_path, a=a, b=near(a, 1, noise=0.3))


def load_shapes() -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in make_tensors(0).items()}


@pytest.mark.parametrize("along", ["tensor", *KINDS])
def test_every_slice_is_a_combination_of_its_own(models, tmp_path, along):
    merged = merge_to(
        tmp_path / "out.safetensors", streammerge.by_length(models["a"], models["b"], along=along), threads=2
    )
    a, b = load_model(models["a"]), load_model(models["b"])
    for name, tensor in merged.items():
        expected = reference([a[name], b[name]], along)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=3e-7, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("along", KINDS)
def test_the_bytes_do_not_depend_on_threads_or_windows(models, tmp_path, monkeypatch, along):
    merge = streammerge.by_length(models["a"], models["b"], along=along)
    plain = merge_to(tmp_path / "plain.safetensors", merge, threads=1, io="pread")
    monkeypatch.setattr(costs, "WINDOW", 1)
    assert_same_bytes(merge_to(tmp_path / "out.safetensors", merge, threads=4, io="mmap"), plain)
    for name, tensor in plain.items():
        start, stop = tensor.numel() // 3, tensor.numel() - tensor.numel() // 5
        assert torch.equal(merge.read(name, start, stop), tensor.reshape(-1)[start:stop])


@pytest.mark.parametrize("along", KINDS)
def test_blocks_may_end_anywhere_in_a_slice(models, tmp_path, monkeypatch, along):
    """With tiny blocks every kind of cut occurs; sums are rounded otherwise, no more."""
    merge = streammerge.by_length(models["a"], models["b"], along=along)
    names = ("layers.0.odd", "layers.1.conv", "layers.0.bias", "scalar", "layers.1.experts")
    expected = {name: merge.read(name, 0, merge.tensors[name].elements) for name in names}
    monkeypatch.setattr(compute, "BLOCK", 50)
    for name, values in expected.items():
        torch.testing.assert_close(merge.read(name, 0, values.numel()), values, rtol=1e-6, atol=1e-7)


def test_the_plan_counts_what_is_known_of_the_slices(models, tmp_path):
    def planned(along: str) -> Plan:
        merge = streammerge.by_length(models["a"], models["b"], along=along)
        return streammerge.make_plan(merge, output=tmp_path / "out.safetensors")

    assert planned("tensor").memory.held_bytes == 0
    assert planned("rows").memory.held_bytes >= 9000 * 3 * 8
    assert planned("columns").memory.held_bytes >= (BLOCK + BLOCK // 2) * 3 * 8
    assert planned("rows").passes == planned("tensor").passes == 2
    with pytest.raises(PlanError, match="The least that works is"):
        streammerge.merge(
            streammerge.by_length(models["a"], models["b"], along="columns"),
            output=tmp_path / "out.safetensors",
            max_ram=10 * MIB,
        )
