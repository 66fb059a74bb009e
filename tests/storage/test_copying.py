"""Copies: the stored bytes, piece by piece, from any thread, begun ahead of torch, and by the system where it can."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge
from streammerge.compute.combining import combine
from streammerge.compute.expressions import Stored, Term
from streammerge.compute.job import Job
from streammerge.errors import CheckpointError, OutputError
from streammerge.formats import descriptors as positional
from streammerge.formats.descriptors import copy_at
from streammerge.storage import copying
from streammerge.storage.copying import Copying, CopyRange, Piece, adjoining, pieces, ranges_of
from streammerge.storage.ledger import Ledger
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import load_model, store_tensors

CONTENT = bytes(range(256)) * 9 + b"end"


class MemorySink:
    """Notes the pieces that it is given."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, int, int]] = []
        self.threads: set[int] = set()

    def copy(self, ranges: Sequence[CopyRange]) -> None:
        self.threads.add(threading.get_ident())
        self.taken += [(part.job.name, part.position, part.nbytes) for part in ranges]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(copying, "PIECE", 100)


@pytest.fixture
def leaf(tmp_path) -> Stored:
    (at,) = store_tensors(tmp_path / "leaf", [torch.zeros(250, dtype=torch.uint8)])
    return at


def job_of(name: str, leaf: Stored, compute: str | None = None) -> Job:
    return Job(name, leaf.info, leaf, DTYPES[compute] if compute else None, 0, 0)


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def cut(jobs: Sequence[Job]) -> list[list[tuple[str, int, int]]]:
    """The pieces of these jobs: name, position and size of each range."""
    return [
        [(part.job.name, part.position, part.nbytes) for part in piece.ranges]
        for piece in pieces(jobs, MemorySink(), Ledger())
    ]


@pytest.mark.usefixtures("small_pieces")
def test_a_large_tensor_is_copied_in_pieces(leaf):
    assert cut([job_of("w", leaf)]) == [[("w", 0, 100)], [("w", 100, 100)], [("w", 200, 50)]]


@pytest.mark.usefixtures("small_pieces")
def test_small_tensors_are_copied_together(leaf):
    small = Stored(TensorInfo(DTYPES["U8"], (40,)), leaf.file, leaf.start)
    jobs = [job_of(name, small) for name in "abcde"]
    assert cut(jobs) == [[("a", 0, 40), ("b", 0, 40)], [("c", 0, 40), ("d", 0, 40)], [("e", 0, 40)]]
    assert cut([]) == []


def test_an_empty_tensor_has_no_piece(leaf):
    empty = Stored(TensorInfo(DTYPES["F32"], (0, 3)), leaf.file, leaf.start)
    assert cut([job_of("w", empty)]) == []


def test_a_merge_of_one_model_copies_what_that_model_stores(leaf):
    same = combine(leaf.info, (Term(1.0, combine(leaf.info, (Term(1.0, leaf),))),))
    (part,) = ranges_of(Job("w", leaf.info, same, None, 0, 0))
    assert part.source is leaf


def test_what_adjoins_in_both_files_is_one_range(leaf):
    def part(start: int, offset: int, nbytes: int, file: int = 0) -> CopyRange:
        source = Stored(leaf.info, leaf.file, start)
        return CopyRange(Job("w", leaf.info, source, None, file, offset), source, 0, nbytes)

    ranges = [part(0, 100, 10), part(10, 110, 5), part(20, 115, 5), part(25, 130, 5), part(30, 135, 5, file=1)]
    found = [(one.start, one.offset, one.nbytes, one.job.file) for one in adjoining(ranges)]
    assert found == [(0, 100, 15, 0), (20, 115, 5, 0), (25, 130, 5, 0), (30, 135, 5, 1)]


@pytest.mark.usefixtures("small_pieces")
def test_every_piece_is_handed_out_once_and_counted(leaf):
    ledger, sink = Ledger(500), MemorySink()
    jobs = [job_of("a", leaf), job_of("computed", leaf, "F32"), job_of("b", leaf)]
    copies = Copying(jobs, sink, ledger)
    taken: list[Piece] = []

    def worker() -> None:
        while (piece := copies.take()) is not None:
            piece.run()
            taken.append(piece)

    workers = [threading.Thread(target=worker) for _ in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    expected = [(name, start, min(100, 250 - start)) for name in ("a", "b") for start in (0, 100, 200)]
    assert sorted(sink.taken) == expected
    assert (ledger.done_bytes, ledger.bytes_read) == (500, 500)


# ── ahead ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("small_pieces")
def test_copying_ahead_runs_in_a_thread_of_its_own_and_stops_with_the_block(leaf):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(MemorySink):
        def copy(self, ranges: Sequence[CopyRange]) -> None:
            super().copy(ranges)
            begun.set()
            assert go_on.wait(5)

    sink = Slow()
    copies = Copying([job_of(str(number), leaf) for number in range(100)], sink, Ledger())
    before = threading.active_count()
    with copies.ahead():
        assert begun.wait(5)
        threading.Timer(0.05, go_on.set).start()
    assert threading.active_count() <= before + 1  # the timer may be about to end
    assert threading.get_ident() not in sink.threads
    done = len(sink.taken)
    assert 1 <= done < 300
    while copies.take() is not None:
        done += 1
    assert done == 300


def test_what_goes_wrong_ahead_is_raised_at_the_end_with_the_tensor_s_name(leaf):
    class Refusing(MemorySink):
        def copy(self, ranges: Sequence[CopyRange]) -> None:
            raise CheckpointError("no more")

    reached = []
    with (
        pytest.raises(CheckpointError, match="tensor w: no more"),
        Copying([job_of("w", leaf)], Refusing(), Ledger()).ahead(),
    ):
        reached.append("the rest of the block")
    assert reached


def test_what_goes_wrong_meanwhile_comes_first(leaf):
    with pytest.raises(KeyboardInterrupt), Copying([job_of("w", leaf)], MemorySink(), Ledger()).ahead():
        raise KeyboardInterrupt


COPIES_BEFORE_TORCH = """
import os, sys
os.environ["STREAMMERGE_KERNELS"] = "off"
from streammerge.storage.writer import OutputWriter

copy, before = OutputWriter.copy, []

def noting(*given):
    before.append("torch" not in sys.modules or not hasattr(sys.modules["torch"], "inference_mode"))
    copy(*given)

OutputWriter.copy = noting
import streammerge
streammerge.merge({{"merge_method": "passthrough", "models": [{model!r}]}}, output={output!r},
                  dtype="fp16", **{options!r})
print(*before)
"""


def copied_before_torch(folder: Path, **options: object) -> list[str]:
    """For every piece of a merge in a fresh process, whether torch was not there yet."""
    model = folder / "model.safetensors"
    save_file({"a": torch.arange(5.0), "b": torch.arange(7)}, model)
    code = COPIES_BEFORE_TORCH.format(model=str(model), output=str(folder / "out.safetensors"), options=options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert load_model(folder / "out.safetensors")["b"].tolist() == list(range(7))
    return done.stdout.split()


def test_copying_begins_before_torch_is_there(tmp_path):
    assert copied_before_torch(tmp_path) == ["True"]


def test_where_torch_must_check_first_nothing_is_written_before(tmp_path):
    assert copied_before_torch(tmp_path, max_ram="4GiB") == ["False"]


@pytest.mark.parametrize("options", [{"max_ram": 1000}, {"device": "cuda:99"}, {"max_vram": 10}])
def test_what_torch_must_check_leaves_no_trace(tmp_path, options):
    save_file({"a": torch.arange(5.0)}, tmp_path / "a.safetensors")
    with pytest.raises(streammerge.MergeError, match="Nothing was written"):
        streammerge.merge(streammerge.scale(tmp_path / "a.safetensors", alpha=0.5), output=tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# ── from file to file ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def files(tmp_path):
    """Descriptors of a file with content, and of one of zeros."""
    (tmp_path / "source").write_bytes(CONTENT)
    (tmp_path / "target").write_bytes(bytes(len(CONTENT) + 20))
    source, target = os.open(tmp_path / "source", os.O_RDONLY), os.open(tmp_path / "target", os.O_RDWR)
    yield source, target, tmp_path / "target"
    os.close(source)
    os.close(target)


def refusing(number: int) -> Callable[..., int]:
    def refuse(*given: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


def partly(*given: int) -> int:
    source, target, count, start, offset = given
    return os.pwrite(target, os.pread(source, min(count, 7), start), offset)


WAYS: dict[str, Callable[..., int] | None] = {
    "as it is": None,
    "in small steps": partly,
    "other file system": refusing(errno.EXDEV),
    "unknown to the kernel": refusing(errno.ENOSYS),
    "nothing, as from /proc": lambda *given: 0,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("start", "count"), [(0, len(CONTENT)), (5, 1000), (0, 0), (len(CONTENT) - 1, 1)])
def test_bytes_are_copied_however_the_system_does_it(files, monkeypatch, way, start, count):
    source, target, path = files
    if WAYS[way] is not None:
        monkeypatch.setattr(os, "copy_file_range", WAYS[way], raising=False)
    monkeypatch.setattr(positional, "COPY_BYTES", 300)
    copy_at(source, start, target, 10, count)
    expected = bytearray(len(CONTENT) + 20)
    expected[10 : 10 + count] = CONTENT[start : start + count]
    assert path.read_bytes() == bytes(expected)


def test_a_system_without_such_a_call_reads_and_writes(files, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    source, target, path = files
    copy_at(source, 0, target, 0, len(CONTENT))
    assert path.read_bytes()[: len(CONTENT)] == CONTENT


def test_a_source_that_ends_too_early_is_an_error(files):
    source, target, _ = files
    with pytest.raises(CheckpointError, match="a file ended while it was read: 5 bytes are missing"):
        copy_at(source, 0, target, 0, len(CONTENT) + 5)


def test_a_full_disk_is_the_output_s_error(tmp_path, monkeypatch):
    save_file({"a": torch.arange(5.0)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(os, "copy_file_range", refusing(errno.ENOSPC), raising=False)
    write = os.pwrite

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) == 20:  # the tensor; the header is longer
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"out\.safetensors: can't be written: No space left[\s\S]*was removed"):
        streammerge.merge(streammerge.passthrough(tmp_path / "a.safetensors"), output=tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
