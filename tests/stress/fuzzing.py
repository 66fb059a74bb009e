"""Fuzzing: inputs by the thousand, each read under watch in a process of its own kind.

`fuzz` is the campaigns' side: it starts workers and adds up what they bring home. `python -m tests.stress.fuzzing` is
a worker. What is watched in it, for every input: that only a MergeError comes out, the CPU time, the process's peak
memory, that no code is compiled, imported, run or called on the system, that no file but the input is opened, and
that the input is as it was.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any, Final

from streammerge.compute.machine import peak_resident_bytes, resident_bytes, usable_cores
from streammerge.errors import MergeError
from tests.stress.campaign import Effort, Figure

MAX_SECONDS: Final = 1.0
"""The most CPU time that an input may take."""

MAX_BYTES: Final = 64 * 2**20
"""The most memory that an input may take."""

ADDRESS_SPACE: Final = 2**30
"""What a worker may take beyond what it has at the start, so that a bomb takes a worker down and not the machine."""

LEAST_TRIALS: Final = 5000
"""Fewer trials are not worth another worker."""

_HARMLESS: Final = frozenset({"builtins.id", "array.__new__"})
"""What Python tells its audit hooks of, and does nothing."""

_KEPT: Final = 20  # failures that a worker reports in full


class WrongAnswerError(Exception):
    """An answer that is no crash, and wrong all the same."""


@dataclass(frozen=True)
class Fuzzer:
    """What is fuzzed: a stream of inputs made from a seed, and what reads one of them.

    `read` gets the path of the input and the input, and answers with a word for the count of outcomes. It raises
    MergeError where the input is refused; WrongAnswerError where the answer is wrong. `prepare` is run before any
    watching: it loads what is loaded at the first use.
    """

    file_name: str
    inputs: Callable[[int], Iterator[bytes]]
    read: Callable[[Path, bytes], str]
    prepare: Callable[[], None] = lambda: None


@dataclass
class Tally:
    """What came of a worker's inputs, or of those of several."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)
    failed: int = 0
    most_seconds: float = 0.0
    most_bytes: int = 0

    def fail(self, why: str, data: bytes) -> None:
        """This input was not dealt with as it should be."""
        self.failed += 1
        if len(self.failures) < _KEPT:
            self.failures.append((why, base64.b64encode(data).decode()))

    def add(self, other: Tally) -> None:
        """Add what another worker found."""
        self.outcomes.update(other.outcomes)
        self.failures += other.failures
        self.failed += other.failed
        self.most_seconds = max(self.most_seconds, other.most_seconds)
        self.most_bytes = max(self.most_bytes, other.most_bytes)


class Watch:
    """An audit hook: while it is on, whatever is done is kept as a violation, but for opening the input for reading and
    looking at which files lie beside it."""

    def __init__(self, allowed: Path) -> None:
        self.allowed = str(allowed)
        self.folder = str(allowed.parent)
        self.on = False
        self.violations: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event in _HARMLESS:
            return
        if event == "open" and len(arguments) == 3:
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (mode is not None and set("wax+") & set(mode))
            if not isinstance(path, int) and os.fspath(path) == self.allowed and not writes:
                return
        if event in ("os.listdir", "os.scandir") and os.fspath(arguments[0]) == self.folder:
            return  # the sizes of shards bound their index
        self.violations.append(f"{event}{arguments!r:.200}")

    def during(self, read: Callable[[], str]) -> str:
        """What this returns or raises, being watched."""
        self.violations.clear()
        self.on = True
        try:
            return read()
        finally:
            self.on = False


def work(fuzzer: Fuzzer, trials: int, seed: int, folder: Path) -> Tally:
    """Read so many inputs."""
    path = folder / fuzzer.file_name
    with path.open("w+b", buffering=0) as file:
        return _work(fuzzer, trials, seed, path, file)


def _work(fuzzer: Fuzzer, trials: int, seed: int, path: Path, file: RawIOBase) -> Tally:
    fuzzer.prepare()
    tally, watch = Tally(), Watch(path)
    stream = fuzzer.inputs(seed)
    for data in [next(stream) for _ in range(min(trials, 200))]:  # what grows at first is no input's fault
        _read_one(fuzzer, path, file, data, watch, Tally())
    stream = fuzzer.inputs(seed)
    _limit_address_space()
    before = resident_bytes()  # not the peak so far, which the first inputs may have made
    for _ in range(trials):
        _read_one(fuzzer, path, file, next(stream), watch, tally)
        grown = peak_resident_bytes() - before if tally.outcomes.total() % 64 == 0 else 0
        tally.most_bytes = max(tally.most_bytes, grown)
    tally.most_bytes = max(tally.most_bytes, peak_resident_bytes() - before)
    if tally.most_bytes > MAX_BYTES:
        tally.fail(f"{tally.most_bytes} bytes of memory are taken", b"")
    return tally


def _read_one(fuzzer: Fuzzer, path: Path, file: RawIOBase, data: bytes, watch: Watch, tally: Tally) -> None:
    file.seek(0)  # written over: making the file anew would take longer than all else
    file.write(data)
    file.truncate()
    started = time.thread_time()
    outcome = "refused"
    try:
        outcome = watch.during(lambda: fuzzer.read(path, data))
    except MergeError as error:
        _check_printable(str(error), data, tally)
    except Exception as error:
        tally.fail(f"{type(error).__name__}: {error}"[:500], data)
    seconds = time.thread_time() - started
    tally.outcomes[outcome] += 1
    tally.most_seconds = max(tally.most_seconds, seconds)
    if seconds > MAX_SECONDS:
        tally.fail(f"it takes {seconds:.1f} s", data)
    if watch.violations:
        tally.fail(f"it does what it may not: {watch.violations[0]}", data)
    file.seek(0)
    if file.read() != data:
        tally.fail("the input is not as it was", data)


def _check_printable(text: str, data: bytes, tally: Tally) -> None:
    if not is_printable(text):
        tally.fail("what is shown holds terminal codes", data)


def is_printable(text: str) -> bool:
    """Whether a terminal shows this as it is: no control characters but newlines, nothing that reorders text."""
    return all(line.isprintable() for line in text.split("\n"))


def _limit_address_space() -> None:
    if sys.platform != "linux":
        return  # macOS does not keep the limit, Windows has none: there the peak is what tells
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE,) * 2)


# ── the campaigns' side ──────────────────────────────────────────────────────────────────────────────────────────────


def fuzz(module: str, name: str, what: str, full: int, effort: Effort) -> Figure:
    """Share the trials out among workers, and what came of them; `module` has the Fuzzer under this name."""
    trials = effort.trials(full)
    workers = max(1, min(usable_cores(), trials // LEAST_TRIALS))
    shares = [trials // workers + (number < trials % workers) for number in range(workers)]
    started = time.perf_counter()
    running = [
        _start(module, name, share, effort.seed * 1000 + number, effort.folder / f"{name}-{number}")
        for number, share in enumerate(shares)
    ]
    total = Tally()
    for process, share in zip(running, shares, strict=True):
        total.add(_finish(process, timeout=120 + share / 20))
    return _figure(what, trials, total, time.perf_counter() - started)


def _start(module: str, name: str, trials: int, seed: int, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    words = [sys.executable, "-m", "tests.stress.fuzzing", module, name, str(trials), str(seed), str(folder)]
    root = Path(__file__).parent.parent.parent
    with (folder / "result").open("wb") as result, (folder / "errors").open("wb") as errors:
        return subprocess.Popen(words, stdout=result, stderr=errors, cwd=root)


def _finish(process: subprocess.Popen[bytes], timeout: float) -> Tally:
    """What the worker brings home; if it crashed or hangs, that is a failure, and its input is still there."""
    folder = Path(str(process.args[-1]))  # type: ignore[index]
    why = ""
    try:
        if code := process.wait(timeout):
            why = f"the worker ended with {code}: {(folder / 'errors').read_text(errors='replace')[-500:]}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        why = f"the worker hangs: not done in {timeout:.0f} s"
    if not why:
        found = json.loads((folder / "result").read_bytes().splitlines()[-1])
        return Tally(Counter(found.pop("outcomes")), **found)
    tally = Tally()
    inputs = [path for path in folder.iterdir() if path.name not in ("result", "errors")]
    tally.fail(why, inputs[0].read_bytes() if inputs else b"")
    return tally


def _figure(what: str, trials: int, total: Tally, seconds: float) -> Figure:
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in total.outcomes.most_common())
    outcome = f"{counts}; at most {total.most_seconds:.2f} s and {total.most_bytes / 2**20:.0f} MiB"
    for why, encoded in total.failures[:3]:
        outcome += f"; FAILED: {why}, input kept as {_keep(base64.b64decode(encoded))}"
    return Figure(what, trials, total.failed, f"{outcome}; {trials / seconds:,.0f} a second")


def _keep(data: bytes) -> Path:
    """Where an input that failed is kept for who wants to see."""
    with tempfile.NamedTemporaryFile(prefix="streammerge-failed-", delete=False) as file:
        file.write(data)
    return Path(file.name)


def main(words: Sequence[str] | None = None) -> int:
    """A worker's work: the fuzzer, the number of inputs, the seed, the folder; the tally is printed as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.fuzzing", description=__doc__)
    parser.add_argument("module")
    parser.add_argument("name")
    parser.add_argument("trials", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(words)
    fuzzer: Fuzzer = getattr(importlib.import_module(arguments.module), arguments.name)
    # a folder of one's own, also where the fuzzer looks for files beside the input
    tally = work(fuzzer, arguments.trials, arguments.seed, arguments.folder.absolute())
    print(json.dumps(vars(tally)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
