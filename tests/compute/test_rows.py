"""Tensors made of rows of others: kept as runs, gathered range by range."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from streammerge.compute.costs import bytes_read, compute_dtype, lane_bytes, slots
from streammerge.compute.expressions import Combined, Gathered, Term
from streammerge.compute.identity import Describer, kind_of
from streammerge.compute.reading import read_merged
from streammerge.compute.rows import ZERO, Rows
from streammerge.models.checkpoints import open_model
from streammerge.tensors import DTYPES, described

F32 = DTYPES["F32"]


def test_rows_that_follow_each_other_are_one_run():
    rows = Rows.of([(0, 5), (0, 6), (0, 7), (1, 8), (ZERO, 3), (ZERO, 3), (0, 8), (0, 8)])
    assert list(rows.runs(0, 8)) == [(0, 5, 3), (1, 8, 1), (ZERO, 0, 2), (0, 8, 1), (0, 8, 1)]
    assert list(rows.runs(1, 5)) == [(0, 6, 2), (1, 8, 1), (ZERO, 0, 1)]
    assert list(rows.runs(2, 2)) == []
    assert rows.used() == {0: 5, 1: 1, ZERO: 2}
    assert Rows.of((0, row) for row in range(100_000)).nbytes < 100


def test_other_rows_have_another_digest():
    cases = [[(0, 1)], [(0, 2)], [(1, 1)], [(0, 1), (0, 2)], [(0, 1), (0, 1)], [(ZERO, 0)], []]
    assert len({Rows.of(case).digest() for case in cases}) == len(cases)
    assert Rows.of(cases[3]).digest() == Rows.of(list(cases[3])).digest()


def test_a_digest_is_of_every_row_and_takes_no_memory():
    count = 100_000
    rows = Rows.of((row % 2, 2 * row) for row in range(count))
    other = Rows.of((row % 2, 2 * row + (row == count - 1)) for row in range(count))
    assert rows.digest() != other.digest()
    tracemalloc.start()
    rows.digest()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < count


@pytest.mark.parametrize("width", [(), (1,), (7,), (3, 5), (300,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_range_is_gathered(tmp_path, width, dtype):
    made = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn((count, *width), generator=made).to(dtype) for name, count in (("a", 90), ("b", 40))}
    save_file(tensors, tmp_path / "x.safetensors")
    draw = random.Random(1)
    places = [(draw.choice([0, 0, 1, ZERO]), draw.randrange(40)) for _ in range(900)] + [(0, row) for row in range(90)]
    zeros = torch.zeros(width, dtype=dtype)
    expected = torch.stack([zeros if s == ZERO else tensors["ab"[s]][row] for s, row in places]).reshape(-1)
    with open_model(tmp_path / "x.safetensors") as model:
        nodes = tuple(model.nodes[name] for name in "ab")
        info = described(nodes[0].info.dtype, (len(places), *width))
        node = Gathered(info, nodes, Rows.of(places))
        for _ in range(40):
            start = draw.randrange(info.elements)
            stop = draw.randrange(start, info.elements + 1)
            assert torch.equal(read_merged(node, info.dtype, start, stop, {}), expected[start:stop])
        assert compute_dtype(node, info.dtype) == info.dtype
        assert slots(node) == 2
        assert lane_bytes(node, info, F32) > 0
        used = sum(source != ZERO for source, _ in places)
        assert bytes_read(node) <= used * info.nbytes // len(places) + 8
        half = Combined(info, (Term(0.5, node), Term(0.25, node)))
        found = read_merged(half, F32, 0, info.elements, {})
        torch.testing.assert_close(found, expected.float() * 0.75)
        others = Gathered(info, nodes, Rows.of(places[::-1]))
        describer = Describer(model.files)
        assert describer.node(node) != describer.node(others)
        assert kind_of(node) == kind_of(Gathered(info, nodes, node.rows))


def test_no_rows_are_no_elements(tmp_path):
    save_file({"a": torch.ones(3, 2)}, tmp_path / "x.safetensors")
    with open_model(tmp_path / "x.safetensors") as model:
        node = Gathered(described(F32, (0, 2)), (model.nodes["a"],), Rows.of([]))
        assert read_merged(node, F32, 0, 0, {}).numel() == 0
