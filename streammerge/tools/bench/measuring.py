"""What a process costs: time, memory over time, bytes moved, its children included.

Time, peak memory and bytes come from the system's own accounts where it keeps them (see `launcher`), the curve of
memory from looking at the process every 20 ms. What processes share counts once: what a child was forked with, and the
files that they map, of which those of the process that maps most are counted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import psutil

from streammerge.tools.bench import launcher

INTERVAL: Final = 0.02
"""Seconds from one look at a process to the next."""

SEARCH_EVERY: Final = 10
"""Looks between two searches for children, where searching takes a walk over all processes."""

Ending = Literal["done", "failed", "killed", "timeout"]

HAS_ACCOUNTS: Final = hasattr(os, "fork") and hasattr(os, "wait4")
"""Whether the launcher works here; on Windows figures come from looking alone."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look: seconds since the start, resident and anonymous bytes of the process and its children."""

    seconds: float
    resident: int
    anonymous: int


@dataclass(frozen=True)
class Measured:
    """What one process cost. Seconds and bytes; 0 for what the system doesn't tell.

    `called` bytes went through read and write calls (memory mapping takes none), `disk` bytes to and from the disk.
    """

    ending: Ending
    exit_code: int
    wall: float
    cpu: float
    peak_rss: int
    peak_anonymous: int
    called_read: int = 0
    called_written: int = 0
    disk_read: int = 0
    disk_written: int = 0
    major_faults: int = 0
    curve: tuple[Sample, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the process says that it did what it was asked for."""
        return self.ending == "done"


@dataclass(frozen=True)
class Surroundings:
    """Where a process runs: its folder, what its environment has beside ours, the file that takes its output, the
    control group that it enters, and the seconds after which it is killed."""

    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    group: Path | None = None
    timeout: float | None = None


def measure(words: Sequence[str], around: Surroundings = Surroundings()) -> Measured:
    """Run a program to its end, and tell what it cost."""
    with tempfile.TemporaryDirectory(prefix="streammerge-measure-") as told:
        result = Path(told) / "costs.json"
        started = time.perf_counter()
        with _started(words, around, result) as process:
            curve, timed_out = _watch(process, started, around.timeout)
            wall = time.perf_counter() - started
        costs = json.loads(result.read_text(encoding="ascii")) if result.exists() else {}
    code: int = costs["exit_code"] if costs else process.returncode
    return _measured(costs, curve, _ending(code, timed_out), code, wall)


@contextlib.contextmanager
def _started(words: Sequence[str], around: Surroundings, result: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, in a session of its own, so that it can be ended with all its children."""
    if HAS_ACCOUNTS:
        group = str(around.group or "")
        words = [sys.executable, "-I", "-S", str(Path(launcher.__file__)), str(result), group, *words]
    with (around.log or Path(os.devnull)).open("wb") as log:
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=around.folder,
            env={**os.environ, **around.environment},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all its children, if they still run."""
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
    process.wait()


@dataclass
class _Curve:
    """What the looks at a process have shown."""

    samples: list[Sample] = field(default_factory=list)
    peak_rss: int = 0
    cpu: float = 0.0


def _watch(process: subprocess.Popen[bytes], started: float, timeout: float | None) -> tuple[_Curve, bool]:
    """Look at the process until it ends, or until its time is up."""
    look = _Proc(process.pid) if sys.platform == "linux" else _Portable(process.pid)
    curve = _Curve()
    while True:
        seconds = time.perf_counter() - started
        if timeout is not None and seconds > timeout:
            end(process)
            return curve, True
        look.into(curve, seconds)
        try:
            process.wait(INTERVAL)
        except subprocess.TimeoutExpired:
            continue
        return curve, False


class _Proc:
    """Looks at a process by /proc, which takes well under a millisecond; the launcher itself does not count."""

    def __init__(self, launched_by: int) -> None:
        self.launcher = launched_by

    def into(self, curve: _Curve, seconds: float) -> None:
        """Add what is there now to the curve."""
        pids = list(self._descendants(self.launcher))
        sizes = [_sizes(pid, forked=len(pids) > 1) for pid in pids]
        anonymous = sum(size.anonymous for size in sizes)
        resident = anonymous + max((size.of_files for size in sizes), default=0)
        if resident:
            curve.samples.append(Sample(round(seconds, 4), resident, anonymous))
            curve.peak_rss = max(curve.peak_rss, resident)

    def _descendants(self, pid: int) -> Iterator[int]:
        for child in _children(pid):
            yield child
            yield from self._descendants(child)


def _children(pid: int) -> list[int]:
    """The children of every thread of a process; none if it is gone or the kernel keeps no such list."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found


@dataclass(frozen=True)
class _Sizes:
    """The memory of one process, in bytes: what is its own, and pages of files, the same ones in all its processes."""

    anonymous: int
    of_files: int


def _sizes(pid: int, *, forked: bool) -> _Sizes:
    """The memory of a process, none if it is gone; of what it shares with others that it was forked from, its share."""
    resident = _fields(pid, "status")
    anonymous = resident.get("RssAnon", 0)
    own = _fields(pid, "smaps_rollup").get("Pss_Anon", anonymous) if forked else anonymous
    return _Sizes(own, resident.get("VmRSS", 0) - anonymous)


def _fields(pid: int, account: str) -> dict[str, int]:
    """The sizes that an account of /proc tells, in bytes by their names; {} if the process, or the account, is gone."""
    try:
        lines = Path(f"/proc/{pid}/{account}").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) * 1024 for name, size, *_ in fields}


class _Portable:
    """Looks at a process by psutil, where there is no /proc."""

    def __init__(self, pid: int) -> None:
        self.processes: list[psutil.Process] = []
        self.cpu: dict[int, float] = {}
        self.peak: dict[int, int] = {}
        self.looks = 0
        with contextlib.suppress(psutil.Error):
            self.root = psutil.Process(pid)

    def into(self, curve: _Curve, seconds: float) -> None:
        """Add what is there now to the curve."""
        if self.looks % SEARCH_EVERY == 0:
            with contextlib.suppress(psutil.Error, AttributeError):
                children = self.root.children(recursive=True)
                self.processes = children if HAS_ACCOUNTS else [self.root, *children]
        self.looks += 1
        resident = anonymous = 0
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                resident += memory.rss
                anonymous += getattr(memory, "private", 0)
                self.peak[process.pid] = getattr(memory, "peak_wset", memory.rss)
                times = process.cpu_times()
                self.cpu[process.pid] = times.user + times.system
        if resident:
            curve.samples.append(Sample(round(seconds, 4), resident, anonymous))
            curve.peak_rss = max(curve.peak_rss, resident, *self.peak.values())
        curve.cpu = sum(self.cpu.values())


def _ending(code: int, timed_out: bool) -> Ending:
    if timed_out:
        return "timeout"
    if code == 0:
        return "done"
    return "killed" if code in (-9, 137) else "failed"


def _measured(costs: Mapping[str, Any], curve: _Curve, ending: Ending, code: int, wall: float) -> Measured:
    """The system's accounts where there are any, and what was seen otherwise."""
    io = costs.get("io", {})
    return Measured(
        ending=ending,
        exit_code=code,
        wall=costs.get("wall", wall),
        cpu=costs["user"] + costs["system"] if costs else curve.cpu,
        peak_rss=max(costs.get("peak_rss", 0), curve.peak_rss),
        peak_anonymous=max((sample.anonymous for sample in curve.samples), default=0),
        called_read=io.get("rchar", 0),
        called_written=io.get("wchar", 0),
        disk_read=io.get("read_bytes", 0),
        disk_written=io.get("write_bytes", 0),
        major_faults=costs.get("major_faults", 0),
        curve=tuple(thinned(curve.samples)),
    )


def thinned(samples: Sequence[Sample], most: int = 200) -> list[Sample]:
    """At most so many samples: of each stretch of time the one with the most memory, so that no peak is lost."""
    if len(samples) <= most:
        return list(samples)
    edges = [round(place * len(samples) / most) for place in range(most + 1)]
    stretches = (samples[start:stop] for start, stop in itertools.pairwise(edges))
    return [max(stretch, key=lambda sample: sample.resident) for stretch in stretches]


def import_torch_rss() -> int:
    """The peak of resident memory of a process that imports torch and nothing else: the base line."""
    return measure([sys.executable, "-c", "import torch"]).peak_rss
