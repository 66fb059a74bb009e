"""Tensors that are rows of others, or others one after the other."""

from __future__ import annotations

import pytest
import torch

from streammerge.compute.costs import bytes_read, compute_dtype, is_copy, slots
from streammerge.compute.expressions import BLOCK, Combined, Joined, Node, Stored, Term, Viewed, combine
from streammerge.compute.identity import Describer, kind_of
from streammerge.compute.parts import in_shape, joined, rows_of, transposed
from streammerge.compute.reading import read_stored
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import normal, raw_bytes, store_tensors


def whole(node: Node, start: int = 0, stop: int | None = None) -> torch.Tensor:
    return read_stored(node, start, node.info.elements if stop is None else stop)


@pytest.fixture
def stored(tmp_path):
    """Three matrices that together are somewhat more than two blocks, and what they hold."""
    tensors = [normal((rows, 1000), rows, torch.float16) for rows in (200, 1, 330)]
    return tensors, store_tensors(tmp_path / "bytes", tensors)


def test_rows_of_what_is_stored_are_stored(stored):
    (first, *_), (node, *_) = stored
    rows = rows_of(node, 3, 7)
    assert isinstance(rows, Stored)
    assert (rows.start, rows.info.shape) == (node.start + 3 * 2000, (4, 1000))
    assert raw_bytes(whole(rows)) == raw_bytes(first[3:7])
    assert rows_of(node, 0, 200) is node


def test_what_is_stored_is_stored_in_another_shape(stored):
    (first, *_), (node, *_) = stored
    assert in_shape(node, (200, 1000)) is node
    other = in_shape(node, (100, 2000, 1))
    assert is_copy(other, TensorInfo(DTYPES["F16"], (100, 2000, 1)))
    assert raw_bytes(whole(other)) == raw_bytes(first)


def test_rows_of_what_is_computed_are_seen_through_a_view(stored):
    (first, *_), (node, *_) = stored
    doubled = combine(node.info, (Term(2.0, node),))
    assert isinstance(rows_of(doubled, 5, 8), Viewed)
    assert torch.equal(whole(rows_of(doubled, 5, 8)), 2 * first[5:8].flatten())


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, None), (0, 0), (199_999, 200_001), (200_000, 201_000), (150_000, 290_000), (BLOCK - 1, BLOCK + 1), (7, 8)],
)
def test_any_range_of_what_is_joined(stored, start, stop):
    tensors, nodes = stored
    node = joined(nodes, TensorInfo(DTYPES["F16"], (531, 1000)))
    expected = torch.cat(tensors).flatten()[start:stop]
    assert raw_bytes(whole(node, start, stop)) == raw_bytes(expected)
    assert bytes_read(node) == node.info.nbytes
    assert slots(node) == 2


def test_what_is_joined_may_be_computed_of_and_in(stored):
    tensors, nodes = stored
    info = TensorInfo(DTYPES["F32"], (531, 1000))
    inner: list[Node] = [combine(node.info, (Term(0.5, node),)) for node in nodes]
    node = combine(info, (Term(2.0, joined(inner, info)), Term(1.0, joined(nodes, info))))
    assert torch.equal(whole(node).float(), 2 * torch.cat(tensors).flatten().float())
    assert compute_dtype(joined(inner, info), info.dtype) == DTYPES["F64"]
    assert compute_dtype(joined(nodes, nodes[0].info), nodes[0].info.dtype) == DTYPES["F16"]


def test_a_single_part_is_no_join(stored):
    _, (node, *_) = stored
    assert joined([node], node.info) is node


def test_a_transpose(stored):
    (first, *_), (node, *_) = stored
    assert raw_bytes(whole(transposed(node))) == raw_bytes(first.T.contiguous())
    assert raw_bytes(whole(transposed(transposed(node)))) == raw_bytes(first)


def test_joins_are_told_apart(stored):
    _, (a, b, c) = stored
    info = TensorInfo(DTYPES["F16"], (531, 1000))
    one, other = Joined(info, (a, b, c)), Joined(info, (c, b, a))
    assert kind_of(one) != kind_of(other)
    assert kind_of(one) == kind_of(Joined(info, (a, b, c)))
    describe = Describer([a.file]).node
    assert describe(one) != describe(other)
    assert describe(one)[0] == "joined"
    assert not isinstance(one, Combined)
