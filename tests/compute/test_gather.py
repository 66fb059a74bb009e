"""Flat ranges of what doesn't lie flat, against torch's own strides, padding and slices of whole tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streammerge.compute import gather as gathering
from streammerge.compute.expressions import Stored, Viewed
from streammerge.compute.gather import boxes, gather
from streammerge.formats.files import ByteFile
from streammerge.models.shapes import placed, reshaped
from streammerge.tensors import DTYPES, TensorInfo, contiguous_strides

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@dataclass
class Source:
    """A flat tensor that notes which of its ranges are fetched."""

    values: torch.Tensor

    def __post_init__(self) -> None:
        self.fetched: list[tuple[int, int]] = []

    def fetch(self, start: int, stop: int) -> torch.Tensor:
        assert 0 <= start < stop <= self.values.numel()
        self.fetched.append((start, stop))
        return self.values[start:stop]


@pytest.fixture(scope="module")
def leaf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gathering") / "anything"
    path.write_bytes(b"\0")
    return ByteFile(path)


def view(file: ByteFile, shape, inner, strides, offset, elements) -> Viewed:
    source = Stored(TensorInfo(DTYPES["F32"], (elements,)), file, 0)
    return Viewed(TensorInfo(DTYPES["F32"], shape), source, offset, strides, inner)


def gathered(node: Viewed, source: Source, start: int, stop: int) -> list[float]:
    out = torch.full((stop - start,), math.nan)
    assert gather(node, start, stop, out, source.fetch) is out
    return out.tolist()


@st.composite
def ranges(draw, elements: int) -> tuple[int, int]:
    start = draw(st.integers(0, elements))
    return start, draw(st.integers(start, elements))


# ── boxes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=300)
@given(shapes, st.data())
def test_boxes_cover_the_range_once_and_in_order(shape, data):
    start, stop = data.draw(ranges(math.prod(shape)))
    places = np.arange(math.prod(shape)).reshape(shape)
    covered: list[int] = []
    for box in boxes(shape, start, stop):
        assert box.volume > 0
        part = places[tuple(slice(first, first + size) for first, size in zip(box.first, box.size, strict=True))]
        assert part.shape == box.size
        covered += part.reshape(-1).tolist()
    assert covered == list(range(start, stop))


@given(shapes, st.data())
def test_there_are_few_boxes(shape, data):
    start, stop = data.draw(ranges(math.prod(shape)))
    assert len(list(boxes(shape, start, stop))) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_a_whole_tensor_is_one_box(shape):
    (box,) = boxes(shape, 0, math.prod(shape))
    assert (box.first, box.size) == (tuple(0 for _ in shape), shape)


# ── gather ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=300)
@given(shapes, st.data())
@example((5, 4), None)
def test_strided_storages_are_read_as_torch_reads_them(leaf_file, shape, data):
    if data is None:
        strides, offset, start, stop = (1, 5), 3, 2, 19  # a transposed matrix
    else:
        strides = tuple(data.draw(st.lists(st.integers(0, 40), min_size=len(shape), max_size=len(shape))))
        offset = data.draw(st.integers(0, 9))
        start, stop = data.draw(ranges(math.prod(shape)))
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size) if all(shape) else 0
    source = Source(torch.arange(1.0, offset + reach + 2))
    expected = source.values.as_strided(shape, strides, offset).reshape(-1)[start:stop]
    node = view(leaf_file, shape, shape, strides, offset, source.values.numel())
    assert gathered(node, source, start, stop) == expected.tolist()


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4), st.data())
def test_padding_and_slicing_are_what_torch_makes_of_whole_tensors(leaf_file, sizes, data):
    own, wanted = tuple(has for has, _ in sizes), tuple(wants for _, wants in sizes)
    inner = tuple(map(min, own, wanted))
    source = Source(torch.arange(1.0, math.prod(own) + 1))
    corner = tuple(slice(0, size) for size in inner)
    whole = torch.zeros(wanted)
    whole[corner] = source.values.reshape(own)[corner]
    start, stop = data.draw(ranges(math.prod(wanted)))
    node = view(leaf_file, wanted, inner, contiguous_strides(own), 0, math.prod(own))
    assert gathered(node, source, start, stop) == whole.reshape(-1)[start:stop].tolist()


@pytest.mark.parametrize("shape", [(3, 5, 2), (2, 1, 2), (1, 4, 1), (1, 5, 2)])
def test_reshaping_makes_such_a_view(leaf_file, shape):
    values = torch.arange(1.0, 17.0).reshape(2, 4, 2)
    node = reshaped(Stored(TensorInfo(DTYPES["F32"], (2, 4, 2)), leaf_file, 0), shape)
    assert isinstance(node, Viewed)
    expected = torch.zeros(shape)
    corner = tuple(slice(0, min(has, wants)) for has, wants in zip((2, 4, 2), shape, strict=True))
    expected[corner] = values[corner]
    assert gathered(node, Source(values.reshape(-1)), 0, math.prod(shape)) == expected.reshape(-1).tolist()


def test_what_is_around_the_source_stays(leaf_file):
    around = Stored(TensorInfo(DTYPES["F32"], (3, 5)), leaf_file, 0)
    node = placed(Stored(TensorInfo(DTYPES["F32"], (2, 4)), leaf_file, 0), around, DTYPES["F32"])
    assert isinstance(node, Viewed)
    source, out = Source(torch.arange(1.0, 9.0)), torch.full((11,), -1.0)
    gather(node, 3, 14, out, source.fetch)
    assert out.tolist() == [4.0, -1.0, 5.0, 6.0, 7.0, 8.0, -1.0, -1.0, -1.0, -1.0, -1.0]


# ── how much is fetched ──────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_fetched_for_zeros(leaf_file):
    source = Source(torch.ones(4))
    node = view(leaf_file, (8,), (4,), (1,), 0, 4)
    assert gathered(node, source, 4, 8) == [0.0] * 4
    assert source.fetched == []
    assert gathered(node, source, 3, 5) == [1.0, 0.0]
    assert source.fetched == [(3, 4)]


def test_no_piece_is_longer_than_the_limit(leaf_file, monkeypatch):
    monkeypatch.setattr(gathering, "SPAN_LIMIT", 100)
    source = Source(torch.arange(5000.0))
    node = view(leaf_file, (50, 100), (50, 100), (1, 50), 0, 5000)
    expected = source.values.reshape(100, 50).T.reshape(-1)
    assert gathered(node, source, 0, 5000) == expected.tolist()
    assert max(stop - start for start, stop in source.fetched) <= 100


def test_a_few_elements_far_apart_are_fetched_one_by_one(leaf_file):
    source = Source(torch.arange(100_000.0))
    node = view(leaf_file, (10,), (10,), (10_000,), 7, 100_000)
    assert gathered(node, source, 0, 10) == [10_000.0 * step + 7 for step in range(10)]
    assert sum(stop - start for start, stop in source.fetched) < 1000


def test_elements_that_lie_near_are_fetched_together(leaf_file):
    """What lies between them is read sooner than each of them is asked for."""
    source = Source(torch.arange(500_000.0))
    node = view(leaf_file, (1500, 2), (1500, 2), (256, 128), 5, 500_000)
    expected = source.values[5 : 5 + 1500 * 256].view(1500, 2, 128)[..., 0].reshape(-1)
    assert gathered(node, source, 0, 3000) == expected.tolist()
    assert len(source.fetched) <= 4


def test_a_repeated_element_is_fetched_once(leaf_file):
    source = Source(torch.arange(10.0))
    node = view(leaf_file, (1000,), (1000,), (0,), 4, 10)
    assert gathered(node, source, 100, 900) == [4.0] * 800
    assert source.fetched == [(4, 5)]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3), st.data())
def test_what_is_put_into_the_midst_of_a_tensor_is_there_alone(leaf_file, sides, data):
    inner = tuple(size for size, _, _ in sides)
    first = tuple(before for _, before, _ in sides)
    shape = tuple(size + before + after for size, before, after in sides)
    values = torch.arange(1.0, math.prod(inner) + 1)
    source = Stored(TensorInfo(DTYPES["F32"], (len(values),)), leaf_file, 0)
    node = Viewed(TensorInfo(DTYPES["F32"], shape), source, 0, contiguous_strides(inner), inner, None, first)
    whole = torch.zeros(shape)
    whole[tuple(slice(i, i + size) for i, size in zip(first, inner, strict=True))] = values.view(inner)
    start, stop = data.draw(ranges(whole.numel()))
    assert gathered(node, Source(values), start, stop) == whole.flatten()[start:stop].tolist()
