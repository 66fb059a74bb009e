"""The power cut itself: what the model of a disk loses, and that a merge that does not sync is found out."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.stress.calls import intercepted
from tests.stress.power import PAGE, Disk, Event, Recorder, Written, apply, crash, judge, lay_down, recording
from tests.stress.small_merges import Bench, Scenario


def test_what_is_synced_is_there():
    disk = Disk(b"old")
    disk.since.append(Written(0, b"new and longer"))
    disk.sync()
    assert {disk.after_crash(random.Random(seed)) for seed in range(50)} == {b"new and longer"}


def test_what_is_not_synced_is_there_or_not_page_by_page():
    disk = Disk(bytes(3 * PAGE))
    disk.since.append(Written(0, b"x" * 3 * PAGE))
    found = {disk.after_crash(random.Random(seed)) for seed in range(300)}
    assert {content[::PAGE] for content in found} == {
        bytes(ord("x") if pages & 1 << page else 0 for page in range(3)) for pages in range(8)
    }


def test_lengths_and_holes():
    disk = Disk(b"")
    assert disk.written([Written(10, None, only_grows=True), Written(2, b"ab")]) == b"\0\0ab" + bytes(6)
    assert disk.written([Written(0, b"abcdef"), Written(2, None)]) == b"ab"
    assert disk.written([Written(0, b"abcdef"), Written(2, None, only_grows=True)]) == b"abcdef"


def test_a_rename_that_is_not_synced_happened_or_did_not(tmp_path):
    (tmp_path / "final").write_bytes(b"old")
    record = Recorder(tmp_path)
    with intercepted(tmp_path, record):
        descriptor = os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT)
        os.pwrite(descriptor, b"new", 0)
        os.fsync(descriptor)
        os.close(descriptor)
        (tmp_path / "new").replace(tmp_path / "final")
    states = [crash(record, len(record.events), random.Random(seed)) for seed in range(100)]
    assert {found[tmp_path / "final"] for found in states} == {b"old", b"new"}
    with intercepted(tmp_path, record):
        folder = os.open(tmp_path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    states = [crash(record, len(record.events), random.Random(seed)) for seed in range(100)]
    assert {found[tmp_path / "final"] for found in states} == {b"new"}


def test_names_follow_their_file():
    names = {Path("/d/a"): 0}
    apply([Event(1, names=(None, Path("/d/b"))), Event(1, names=(Path("/d/b"), Path("/d/a")))], names)
    assert names == {Path("/d/a"): 1}
    apply([Event(0, names=(Path("/d/a"), None))], names)  # another file has the name now
    assert names == {Path("/d/a"): 1}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_merge_that_does_not_sync_is_found_out(tmp_path, sharded):
    """Or the campaign would find nothing whatever the writer did."""
    bench = Bench(Scenario("careless", ("--no-sync",), sharded=sharded, old=True), tmp_path / "bench")
    bench.reset()
    with recording(bench) as record:
        assert bench.merge().exit_code == 0
    found = set()
    for seed in range(60):
        lay_down(crash(record, len(record.events), random.Random(seed)), bench.place)
        found.add(judge(bench, done=False))
    assert "a mixture" in found
