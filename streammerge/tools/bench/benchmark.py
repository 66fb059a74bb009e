"""A merge timed as the benchmarks time it: whole processes, each between two floors, medians of several rounds."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil

from streammerge.compute.machine import MIB, usable_cores
from streammerge.errors import MergeError, OutputError, format_size
from streammerge.plan.plan import Plan
from streammerge.tools.bench.floor import DiskRate, Floor, chill, measure_floor, probe_disk, read_rate_uncached, warm
from streammerge.tools.bench.measuring import Measured, Surroundings, import_torch_rss, measure
from streammerge.version import __version__

Say = Callable[[str], None]

OUTPUT: Final = "merged.safetensors"
LAST_WORDS: Final = 2000
"""Characters of a failed merge's output that are shown."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several measurements, the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Round:
    """One merge and the mean of the floors before and after it. Seconds.

    `bytes_read` are those that it must read at least, in one pass; `rate` is the disk's, for a cold run.
    """

    floor: Floor
    process: Measured
    loop: float
    sync: float
    bytes_read: int
    rate: float = 0.0

    @property
    def over_floor(self) -> float:
        """The merge loop against reading the inputs and copying the output."""
        return self.loop / self.floor.seconds

    @property
    def of_disk(self) -> float:
        """How much of the disk's sequential rate a cold run reaches, over the bytes that it must read."""
        return self.bytes_read / self.loop / self.rate if self.rate and self.loop else 0.0


@dataclass(frozen=True)
class Benchmark:
    """A merge measured: warm rounds, cold ones if they were asked for, the disk, the base line of memory."""

    rounds: tuple[Round, ...]
    cold: tuple[Round, ...]
    disk: DiskRate
    import_torch_rss: int
    input_bytes: int
    output_bytes: int
    synced: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values, every round with all its figures."""
        return {"version": __version__, "machine": describe_machine(), **asdict(self)}

    def rows(self) -> list[tuple[str, str]]:
        """The short table."""
        rounds = self.rounds
        peak = max(one.process.peak_rss for one in rounds)
        anonymous = max(one.process.peak_anonymous for one in rounds)
        floor = Spread.of(one.floor.seconds for one in rounds)
        rows = [
            ("inputs, output", f"{format_size(self.input_bytes)}, {format_size(self.output_bytes)}"),
            ("floor", f"{floor} s: reading the inputs, copying the output"),
            ("merge loop", f"{Spread.of(one.loop for one in rounds)} s"),
            ("loop / floor", f"{Spread.of(one.over_floor for one in rounds)}"),
            ("process", f"{Spread.of(one.process.wall for one in rounds)} s{', with the final sync' * self.synced}"),
            ("CPU", f"{Spread.of(one.process.cpu for one in rounds)} s"),
            ("peak RAM", f"{format_size(peak)}, {self._above(peak)}"),
            *([("anonymous", format_size(anonymous))] if anonymous else []),
            ("disk", f"{format_size(self.disk.write)}/s written, {_rate(self.disk.read)} read, sequentially"),
        ]
        if self.cold:
            share = Spread.of(one.of_disk for one in self.cold)
            rows.append(("cold loop", f"{Spread.of(one.loop for one in self.cold)} s"))
            rows.append(("of disk's rate", f"{share} while cold"))
        return [*rows, ("rounds", f"{len(rounds)}; median (least to most); machine: {machine_line()}")]

    def _above(self, peak: int) -> str:
        """How much of the peak is the merge's own."""
        above = peak - self.import_torch_rss
        return f"{above / MIB:.0f} MiB above import torch" if above > 0 else "all of it: torch was not imported"


def _rate(rate: float) -> str:
    return f"{format_size(rate)}/s" if rate else "unknown"


@dataclass(frozen=True)
class Timing:
    """How a merge is to be timed: rounds, cold ones as well, with the final sync or without."""

    runs: int = 5
    cold: bool = False
    sync: bool = False


def time_merge(words: Sequence[str], plan: Plan, folder: Path, timing: Timing, say: Say) -> Benchmark:
    """Run the merge that these words describe again and again, in processes of their own.

    Everything is written below `folder`, in a folder of its own that is removed, whatever happens.
    """
    inputs = [file.path for file in plan.inputs]
    _check_room(plan, folder)
    with scratch_folder(folder) as scratch:
        say("disk probe")
        disk = probe_disk(scratch)
        warm(inputs)
        runner = _Runner(words, inputs, scratch, timing)
        say("warming up")
        runner.warm_up()
        rounds = [runner.round(cold=False) for _ in _told(timing.runs, "run", say)]
        cold = [runner.round(cold=True) for _ in _told(timing.runs if timing.cold else 0, "cold run", say)]
        return Benchmark(
            tuple(rounds),
            tuple(cold),
            disk,
            import_torch_rss(),
            sum(path.stat().st_size for path in inputs),
            plan.output.nbytes,
            timing.sync,
        )


def _told(count: int, what: str, say: Say) -> Iterator[int]:
    for number in range(1, count + 1):
        say(f"{what} {number} of {count}")
        yield number


def _check_room(plan: Plan, folder: Path) -> None:
    """OutputError unless the output and a copy of it fit: one is merged while the other is what the floor copies."""
    needed, free = 2 * plan.output.nbytes, shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder}: not enough disk: an output and a copy of it take {format_size(needed)}, "
            f"{format_size(free)} are free",
            advice=f"Free {format_size(needed - free)}, or name an output on another disk with -o.",
        )


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder, removed with everything in it."""
    try:
        made = Path(tempfile.mkdtemp(prefix="streammerge-bench-", dir=parent))
    except OSError as error:
        raise OutputError(f"{parent}: can't be written: {error.strerror or error}") from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


class _Runner:
    """Runs one merge, and its floor, as often as is wanted. The first output is what the floor copies."""

    def __init__(self, words: Sequence[str], inputs: Sequence[Path], scratch: Path, timing: Timing) -> None:
        self.words, self.inputs, self.scratch = words, inputs, scratch
        self.sync = timing.sync
        self.input_bytes = sum(path.stat().st_size for path in inputs)
        self.like = scratch / "like"

    def warm_up(self) -> None:
        """A run that doesn't count, whose output is kept for the floor."""
        self._merge(self.like)

    def round(self, *, cold: bool) -> Round:
        """A floor, a merge, a floor."""
        before = self._floor()
        rate = read_rate_uncached(self.inputs) if cold else 0.0
        if cold and not chill(self.inputs):
            raise MergeError("the page cache can't be dropped on this system", advice="Leave out --cold.")
        merged = replace(self._merge(self.scratch / "out"), rate=rate)
        shutil.rmtree(self.scratch / "out")
        after = self._floor()
        return replace(merged, floor=Floor((before.read + after.read) / 2, (before.write + after.write) / 2))

    def _floor(self) -> Floor:
        return measure_floor(self.inputs, sorted(self.like.iterdir()), self.scratch)

    def _merge(self, folder: Path) -> Round:
        folder.mkdir()
        told, log = self.scratch / "report.json", self.scratch / "log.txt"
        options = ["-o", str(folder / OUTPUT), "--report", str(told), "-q", *([] if self.sync else ["--no-sync"])]
        process = measure([sys.executable, "-m", "streammerge", *self.words, *options], Surroundings(log=log))
        if not process.ok:
            said = log.read_text(encoding="utf-8", errors="replace").strip()[-LAST_WORDS:]
            raise MergeError(f"the merge that is to be timed {process.ending}: {said}")
        found = json.loads(told.read_text(encoding="utf-8"))
        seconds = found["seconds"]
        loop = seconds["merge"] + seconds["ahead"]
        return Round(Floor(0, 0), process, loop, seconds["sync"], min(found["bytes_read"], self.input_bytes))


def describe_machine() -> dict[str, str]:
    """What it runs on: hardware and the versions that matter."""
    import safetensors
    import torch

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(usable_cores()),
        "ram_bytes": str(psutil.virtual_memory().total),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def machine_line() -> str:
    """The machine in one line."""
    memory = format_size(psutil.virtual_memory().total)
    return f"{usable_cores()} cores, {memory} RAM, {_processor() or platform.machine()}, {platform.system()}"


def _processor() -> str:
    """The processor's name, as far as the system knows it."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or os.environ.get("PROCESSOR_IDENTIFIER", "")
