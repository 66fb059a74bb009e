"""Tensors that are rows of others, or others one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import streammerge
from streammerge.compute.combining import combine
from streammerge.compute.costs import bytes_read, compute_dtype, is_copy, slots
from streammerge.compute.expressions import BLOCK, Combined, Joined, Node, Stored, Term, Viewed
from streammerge.compute.identity import Describer, kind_of
from streammerge.compute.inputs import inputs_of, is_input
from streammerge.compute.kernels.library import kernels
from streammerge.compute.kernels.program import can_be_compiled
from streammerge.compute.parts import in_shape, joined, rows_of, transposed
from streammerge.compute.reading import read_stored
from streammerge.models.dialects import Piece, Source
from streammerge.models.dialects.translation import Translated
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import assert_same_bytes, merge_to, normal, raw_bytes, save_model, store_tensors


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


SETTINGS: dict[str, dict[str, Any]] = {"linear": {"weight": [0.3, 0.7]}, "slerp": {"t": 0.3}}


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_loops_read_what_is_joined(tmp_path, monkeypatch, method, io):
    """Joined tensors of somewhat more than a block, merged with whole ones: the same bytes by loops and by torch."""
    whole_one, other = normal((603, 1000), 1, torch.float16), normal((603, 1000), 2, torch.float16)
    other[200, 5], other[-1, -1] = torch.inf, torch.nan
    rows = {"a": (0, 200), "b": (200, 201), "c": (201, 201), "d": (201, 603)}
    save_model(tmp_path / "whole.safetensors", {"x": whole_one})
    save_model(tmp_path / "same.safetensors", {"x": other})
    save_model(tmp_path / "parts.safetensors", {name: other[a:b].clone() for name, (a, b) in rows.items()})
    info = TensorInfo(DTYPES["F16"], (603, 1000))
    source = Source(info, tuple(Piece(name, 0, b - a) for name, (a, b) in rows.items()))
    parts = Translated(streammerge.open_model(tmp_path / "parts.safetensors"), {"x": source})
    made = []
    for second in (parts, tmp_path / "same.safetensors"):
        for loops in ("auto", "off"):
            monkeypatch.setenv("STREAMMERGE_KERNELS", loops)
            if method == "ties":
                merged = streammerge.ties(second, base=tmp_path / "whole.safetensors", density=0.5, layout=0)
            else:
                merged = getattr(streammerge, method)(tmp_path / "whole.safetensors", second, **SETTINGS[method])
            made.append(merge_to(tmp_path / "out", merged, io=io, on_nonfinite="warn"))
    for found in made[1:]:
        assert_same_bytes(found, made[0])


def test_a_merge_of_what_is_joined_needs_no_torch(tmp_path):
    values = normal((30, 10), 1)
    save_model(tmp_path / "parts.safetensors", {"a": values[:9].clone(), "b": values[9:].clone()})
    source = Source(TensorInfo(DTYPES["F32"], (30, 10)), (Piece("a", 0, 9), Piece("b", 0, 21)))
    parts = Translated(streammerge.open_model(tmp_path / "parts.safetensors"), {"x": source})
    plan = streammerge.make_plan(streammerge.linear(parts, parts), output=tmp_path / "out.safetensors")
    assert plan.needs_torch == (kernels() is None)
    assert torch.equal(merge_to(tmp_path / "out.safetensors", parts)["x"], values)


def test_joined_of_what_is_computed_has_no_loops(stored):
    _, nodes = stored
    info = TensorInfo(DTYPES["F16"], (531, 1000))
    doubled: list[Node] = [combine(node.info, (Term(2.0, node),)) for node in nodes]
    assert is_input(joined(nodes, info))
    assert not is_input(joined(doubled, info))
    assert not can_be_compiled(joined(doubled, info))
    assert list(inputs_of(combine(info, (Term(2.0, one := joined(nodes, info)),)))) == [one]
