"""Works: their windows, their measures, and what they write."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from streammerge.compute import costs
from streammerge.compute import evaluate as compute
from streammerge.compute.combining import combine
from streammerge.compute.expressions import BLOCK, ByBlock, External, Node, Stored, Term
from streammerge.compute.job import Job
from streammerge.compute.lanes import Lane
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.formats.readers import PositionalReader
from streammerge.methods.registry import BlockMethod, Statistics
from streammerge.methods.statistics.passes import Pass
from streammerge.report import Progress
from streammerge.storage.copying import PIECE
from streammerge.storage.ledger import Ledger
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.workers.schedule import run
from streammerge.workers.windows import MergeWork, Work
from tests.make.models import MemoryModel, normal, raw_bytes, store_tensors
from tests.workers.jobs import MemorySink, job_of, run_jobs

TINY = 16


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Blocks of 16 elements, and windows of 2 blocks."""
    monkeypatch.setattr(compute, "BLOCK", TINY)
    monkeypatch.setattr(costs, "PIECE", TINY)
    monkeypatch.setattr(costs, "BLOCK", TINY)
    monkeypatch.setattr(costs, "WINDOW", 2)


class Recorder(Pass[Any]):
    """A pass that notes in which order blocks are added."""

    def __init__(self, log: list[int], *, ordered: bool) -> None:
        self.log, self.ordered = log, ordered

    def measure(self, block: int, inputs: Sequence[torch.Tensor]) -> int:
        time.sleep(0.001 * (block * 5 % 4))
        return block

    def add(self, block: int, measured: int) -> None:
        assert block == measured
        self.log.append(block)

    def finish(self) -> int:
        return len(self.log)


def recording(log: list[int], node: Node, *, ordered: bool) -> ByBlock:
    """A method that looks at a tensor and then gives it as it is, plus the number of its blocks."""

    def add_count(values: torch.Tensor, *, place: Any, statistics: int) -> torch.Tensor:
        return values + statistics

    method = BlockMethod(
        name="recorder",
        parameters=(),
        base="none",
        models=(1, 1),
        doc="",
        function=add_count,
        statistics=Statistics(lambda _, __: Recorder(log, ordered=ordered), passes=1),
    )
    return ByBlock(node.info, method, {}, (node,))


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("threads", [1, 4])
def test_measures_are_added_once_and_in_order_if_that_matters(tmp_path, ordered, threads):
    values = normal((20 * TINY - 3,), 1)
    (leaf,) = store_tensors(tmp_path / "leaf", [values])
    log: list[int] = []
    sink = run_jobs([job_of("w", recording(log, leaf, ordered=ordered))], threads)
    assert sorted(log) == list(range(20))
    if ordered or threads == 1:
        assert log == list(range(20))
    assert bytes(sink.written["w"]) == raw_bytes(values + 20)


@pytest.mark.parametrize("elements", [0, 1, BLOCK, BLOCK + 1, costs.WINDOW * BLOCK, costs.WINDOW * BLOCK + 1])
def test_windows_cover_the_blocks(elements):
    model = MemoryModel({"w": torch.zeros(1)})
    node = External(TensorInfo(DTYPES["F16"], (elements,)), model, "w")
    windows = MergeWork(job_of("w", node), MemorySink(), Ledger()).begin_pass()
    assert [window.first for window in windows][:1] == [0]
    assert [window.last for window in windows][-1] == -(-elements // BLOCK)
    assert all(one.last == other.first for one, other in itertools.pairwise(windows))
    assert all(window.last - window.first <= costs.WINDOW for window in windows)


def test_a_work_that_only_looks_is_done_with_what_it_reads(tmp_path):
    (leaf,) = store_tensors(tmp_path / "leaf", [normal((100,), 1)])
    log: list[int] = []
    progress = Progress(400)
    work = Work("w", recording(log, leaf, ordered=True), DTYPES["F32"], progress)
    run([work], [TensorMaker(Lane(PositionalReader()))], lambda: None)
    assert log == [0]
    assert (progress.done_bytes, progress.bytes_read) == (400, 400)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *itertools.product(["I64", "BOOL", "U8", "F16", "F8_E8M0", "F4"], [0, 1, 63]),
        *itertools.product(["I64", "F4"], [PIECE + 5, 2 * PIECE]),
    ],
)
def test_copies_are_the_stored_bytes(tmp_path, dtype, size):
    info = TensorInfo(DTYPES[dtype], (size * 8 // DTYPES[dtype].bits,))
    content = raw_bytes(torch.randint(0, 256, (info.nbytes,), dtype=torch.uint8))
    (at,) = store_tensors(tmp_path / "leaf", [torch.frombuffer(bytearray(b"xyz" + content), dtype=torch.uint8)])
    leaf = Stored(info, at.file, 3)
    sink = run_jobs([Job("w", info, leaf, None, 0, 0), job_of("other", leaf, dtype, None)], threads=2)
    if info.nbytes:
        assert bytes(sink.written["w"]) == bytes(sink.written["other"]) == content
    else:
        assert not any(sink.written.values())


@pytest.mark.usefixtures("tiny_blocks")
def test_a_tensor_of_several_windows_is_put_together(tmp_path):
    tensors = [normal((9, 31), seed, torch.float16) for seed in (1, 2)]
    a, b = store_tensors(tmp_path / "leaves", tensors)
    node = combine(a.info, (Term(0.5, a), Term(0.25, b)))
    sink = run_jobs([job_of("w", node, "BF16"), job_of("v", node, "F64", "F64")], threads=3)
    expected = 0.5 * tensors[0].double() + 0.25 * tensors[1].double()
    assert bytes(sink.written["w"]) == raw_bytes(expected.float().bfloat16())
    assert bytes(sink.written["v"]) == raw_bytes(expected)
