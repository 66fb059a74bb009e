"""Every call that a merge makes to the system fails, one after the other: once, and from then on.

The n-th call of each kind fails for n = 1, 2, 3, ... until a merge goes through untouched. However it ends, the output
is the old or the new one, whole; the exit code is 0 only for the new one; what went wrong is told in words; the inputs
are what they were; nothing is left that `streammerge clean` does not know.
"""

from __future__ import annotations

import collections
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tests.stress.calls import (
    BYTES,
    CALLS,
    CLOSE,
    COPY,
    EMPTY,
    LIBRARY,
    LINK,
    MAP,
    MKDIR,
    OPEN,
    OPEN_STREAM,
    PREALLOCATE,
    READ,
    RENAME,
    REPLACE,
    STREAM_READ,
    STREAM_WRITE,
    SYNC,
    SYNC_DATA,
    TRUNCATE,
    UNLINK,
    WRITE,
    Call,
    intercepted,
)
from tests.stress.campaign import Campaign, Effort, Figure
from tests.stress.small_merges import SCENARIOS, Bench, Scenario

SHORT: Final = "short"
NO_MEMORY: Final = "no memory"

FAILURES: Final[dict[Call, tuple[str, ...]]] = {
    READ: ("EIO", "EINTR", SHORT),
    WRITE: ("EIO", "ENOSPC", "EINTR", SHORT),
    COPY: ("EIO", "ENOSPC", "EXDEV", SHORT),
    OPEN: ("EIO", "EMFILE", "EACCES"),
    OPEN_STREAM: ("EIO", "EMFILE"),
    STREAM_READ: ("EIO", SHORT),
    STREAM_WRITE: ("EIO", "ENOSPC", SHORT),
    MAP: ("ENOMEM", "ENODEV"),
    SYNC: ("EIO", "ENOSPC"),
    SYNC_DATA: ("EIO",),
    REPLACE: ("EIO", "ENOSPC"),
    RENAME: ("EIO",),
    LINK: ("EPERM",),
    MKDIR: ("ENOSPC",),
    PREALLOCATE: ("ENOSPC", "EIO", "EOPNOTSUPP"),
    TRUNCATE: ("EIO",),
    CLOSE: ("EIO",),
    UNLINK: ("EIO",),
    LIBRARY: ("ENOMEM",),
    EMPTY: (NO_MEMORY,),
    BYTES: (NO_MEMORY,),
}
"""How each kind of call may fail; those that are not named here fail with EIO."""


@dataclass(frozen=True)
class Fault:
    """The n-th call of a kind fails in this way, and all after it, if the fault is there to stay."""

    call: Call
    how: str
    number: int
    lasting: bool

    def __str__(self) -> str:
        return f"{self.call} number {self.number} {'and all after it ' * self.lasting}fails: {self.how}"


class Injector:
    """Counts the calls, and lets one fail."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.fired = False
        self.counts: collections.Counter[Call] = collections.Counter()
        self._lock = threading.Lock()

    def __call__(self, call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Do the call, or fail."""
        with self._lock:
            self.counts[call] += 1
            number, fault = self.counts[call], self.fault
            hit = fault is not None and call == fault.call and (number == fault.number or self._goes_on(number))
            self.fired = self.fired or hit
        if call is STREAM_WRITE:
            options = {}
        if hit and fault is not None:
            return fail(fault.how, call, real, args, options)
        return None if call in (SYNC, SYNC_DATA) else real(*args, **options)  # what is synced is not the matter here

    def _goes_on(self, number: int) -> bool:
        return self.fault is not None and self.fault.lasting and number > self.fault.number


def fail(how: str, call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Fail in this way; a short read or write does a part."""
    if how == NO_MEMORY:
        if call is EMPTY:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
        raise MemoryError
    if how != SHORT:
        if call is CLOSE:
            real(*args, **options)  # the system closes, and tells then that something went wrong
        number = getattr(errno, how)
        raise OSError(number, os.strerror(number))
    match call:
        case _ if call is READ:
            return real(args[0], [args[1][0][:1]], args[2])
        case _ if call is WRITE:
            return real(args[0], args[1][:1], args[2])
        case _ if call is COPY:
            return real(args[0], args[1], min(args[2], 1), *args[3:])
        case _ if args:
            return real(args[0][: max(len(args[0]) // 2, 1)])
    return real()


def faults_of(counts: collections.Counter[Call]) -> Iterator[Fault]:
    """Every fault that a merge with so many calls can meet."""
    for call in (*CALLS, STREAM_READ, STREAM_WRITE):
        for number in range(1, counts[call] + 1):
            for how in FAILURES.get(call, ("EIO",)):
                for lasting in (False, True):
                    yield Fault(call, how, number, lasting)


def try_fault(bench: Bench, fault: Fault) -> tuple[Injector, list[str]]:
    """Merge with the fault; what is wrong afterwards."""
    bench.reset()
    injector = Injector(fault)
    with intercepted(bench.inputs.parent, injector):
        ending = bench.merge()
    wrong = bench.problems(ending)
    if ending.exit_code == 0 and not injector.fired and fault.number == 1:
        wrong.append("it was never called")
    if bench.left_over():
        wrong.append(f"left over: {bench.left_over()}")
    return injector, [f"{bench.scenario.name}: {fault}: {problem}" for problem in wrong]


def run(effort: Effort) -> list[Figure]:
    """Every fault in every scenario, or a random share of them."""
    chance = random.Random(effort.seed)
    return [_run_scenario(scenario, effort, chance) for scenario in SCENARIOS]


def _run_scenario(scenario: Scenario, effort: Effort, chance: random.Random) -> Figure:
    bench = Bench(scenario, effort.folder / scenario.name)
    counter = Injector()
    bench.reset()
    with intercepted(bench.inputs.parent, counter):
        assert bench.merge().exit_code == 0
    faults = list(faults_of(counter.counts))
    if effort.scale < 1:
        faults = chance.sample(faults, effort.trials(len(faults)))
    problems: list[str] = []
    met = failed = 0
    for fault in faults:
        injector, wrong = try_fault(bench, fault)
        met += injector.fired
        failed += bool(wrong)
        problems += wrong
    for problem in problems[:20]:
        print(f"    {problem}")
    outcome = f"{met:,} faults met; the old output intact or the new one complete, an error in words, nothing left"
    return Figure(f"faults: {scenario.name}", len(faults), failed, outcome)


CAMPAIGN: Final = Campaign("faults", "Every call to the system fails, one after the other", run)
