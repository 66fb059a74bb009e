"""The smallest memory is found, in a control group."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import groups, limits
from benchmarks.groups import memory_group
from benchmarks.limits import Limit, Search
from benchmarks.tools import CannotRun
from streammerge.compute.machine import MIB


@given(need=st.integers(20, 20_000), guess=st.integers(20, 20_000))
def test_bisection_finds_the_need(need, guess):
    tried: list[int] = []

    def works(limit: int) -> bool:
        tried.append(limit)
        return bool(limit >= need * MIB)

    found = Search(works).run(guess * MIB)
    assert found.tries == len(tried) <= limits.MOST_TRIES
    if found.finishes:
        assert found.finishes >= need * MIB
    if found.fails:
        assert found.fails < need * MIB
    if found.complete:
        assert found.finishes <= max(found.fails * limits.NEAR, limits.LEAST)
    if guess / 2 < need < guess * 2:
        assert found.complete


def test_bisection_stops_when_its_time_is_up():
    calls = []

    def works(limit: int) -> bool:
        calls.append(limit)
        time.sleep(0.05)
        return False

    assert Search(works, budget=0.01).run(100 * MIB) == Limit(0, 100 * MIB, 1, False)
    assert len(calls) == 1


def test_nothing_smaller_than_the_least_is_tried():
    found = Search(lambda limit: True).run(30 * MIB)
    assert found.finishes == limits.LEAST
    assert found.complete


@pytest.mark.parametrize(
    ("files", "limit_file", "swap"),
    [
        (("memory/cgroup.procs",), "memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", "5000")),
        (("cgroup.subtree_control",), "memory.max", ("memory.swap.max", "0")),
    ],
)
def test_groups_of_both_versions(tmp_path, monkeypatch, files, limit_file, swap):
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("cpu memory io")
    real = Path.mkdir

    def mkdir(path: Path, *rest: object, **more: object) -> None:
        real(path, *rest, **more)  # type: ignore[arg-type]
        if path.name.startswith("streammerge-bench-") and limit_file == "memory.limit_in_bytes":
            (path / limit_file).write_text("0")  # the kernel's files are there at once

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with memory_group(5000, tmp_path) as group:
        assert (group / limit_file).read_text() == "5000"
        assert (group / swap[0]).read_text() == swap[1]


def test_a_machine_without_groups_is_a_reason(tmp_path, monkeypatch):
    with pytest.raises(CannotRun, match="no memory controller"), memory_group(5000, tmp_path):
        pass
    (tmp_path / "cgroup.subtree_control").write_text("memory")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CannotRun, match=r"can't be made here \(Permission denied\)"), memory_group(5000, tmp_path):
        pass


def can_make_groups() -> bool:
    try:
        with memory_group(100 * MIB):
            return True
    except CannotRun:
        return False


@pytest.mark.skipif(not can_make_groups(), reason="memory control groups can't be made here")
def test_a_limit_is_felt():
    from streammerge.tools.bench.measuring import Surroundings, measure

    greedy = [sys.executable, "-c", "x = bytearray(200_000_000)"]
    with memory_group(100 * MIB) as small:
        assert measure(greedy, Surroundings(group=small)).ending == "killed"
    with memory_group(400 * MIB) as large:
        assert measure(greedy, Surroundings(group=large)).ok
    assert not small.exists()
    assert not large.exists()
    assert groups.folder(groups.ROOT).is_dir()
