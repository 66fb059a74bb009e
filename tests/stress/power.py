"""The power fails at a random moment of a merge: what was not synced is lost, torn or out of order.

A merge is recorded: every create, write, sync, rename and removal. Then a prefix of the record is played into a fresh
folder as a disk could hold it: of what was written to a file since its last sync, each page of 4 KiB is there or not,
and the file's length is the old or the new one; of what happened to the names in a folder since its last sync, each
happened or did not. What lies under the final names afterwards must be the old output or the new one, never a mixture.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.stress.calls import (
    CLOSE,
    COPY,
    LINK,
    MKDIR,
    OPEN,
    OPEN_STREAM,
    PREALLOCATE,
    RENAME,
    REPLACE,
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

PAGE: Final = 4096

FULL: Final = 1000
"""Crash states of each scenario in the full campaign."""


@dataclass
class Disk:
    """A file's content, as far as the disk is bound to hold it, and what was done to it since it was last synced."""

    durable: bytes = b""
    since: list[Written] = field(default_factory=list)

    def written(self, writes: list[Written]) -> bytes:
        """The content with these writes."""
        content = bytearray(self.durable)
        for write in writes:
            write.to(content)
        return bytes(content)

    def sync(self) -> None:
        """Everything is on the disk."""
        self.durable, self.since = self.written(self.since), []

    def after_crash(self, chance: random.Random) -> bytes:
        """The content that may be found: of each page the synced state, or that after any later number of writes."""
        if not self.since:
            return self.durable
        whole = self.written(self.since[: chance.randint(0, len(self.since))])
        found = bytearray(chance.choice((self.durable, whole, self.written(self.since))))
        for start in range(0, len(found), PAGE):
            state = chance.choice((self.durable, whole))[start : start + PAGE]
            found[start : start + PAGE] = state.ljust(len(found[start : start + PAGE]), b"\0")[: len(found) - start]
        return bytes(found)


@dataclass(frozen=True)
class Written:
    """Bytes at an offset, or, without bytes, a new length; one that only grows if there is room already."""

    offset: int
    data: bytes | None
    only_grows: bool = False

    def to(self, content: bytearray) -> None:
        """Do it to the content."""
        end = self.offset + len(self.data or b"")
        if len(content) < end:
            content.extend(bytes(end - len(content)))
        if self.data is not None:
            content[self.offset : end] = self.data
        elif not self.only_grows:
            del content[end:]


@dataclass(frozen=True)
class Event:
    """Something that was done: to a file's content (`write`, or a sync if there is none), or to names in a folder.

    `file` is the file's number. A change of names is where the file is from now on, and where it was before, if it was.
    """

    file: int = -1
    write: Written | None = None
    names: tuple[Path | None, Path | None] | None = None
    folder_synced: Path | None = None


class Recorder:
    """Does every call, and keeps a record of it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.events: list[Event] = []
        self.first: dict[Path, int] = {}
        self.contents: list[bytes] = []
        self._names: dict[Path, int] = {}
        self._open: dict[int, int | Path] = {}
        self._lock = threading.RLock()
        for path in sorted(place.rglob("*")):
            if path.is_file():
                self._names[path] = self.first[path] = self._new_file(path.read_bytes())

    def _new_file(self, content: bytes = b"") -> int:
        self.contents.append(content)
        return len(self.contents) - 1

    def __call__(self, call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Do the call and note it, one at a time."""
        with self._lock:
            before = self._seen_before(call, args)
            written = bytes(args[0]) if call is STREAM_WRITE else b""
            stream = options.pop("file", None)
            result = real(*args, **options)
            self._note(call, args, result, before)
            if call is STREAM_WRITE:
                self._write_to_stream(stream, written[:result])
        return result

    def _seen_before(self, call: Call, args: tuple[Any, ...]) -> bool:
        return call in (OPEN, OPEN_STREAM) and Path(args[0]).exists()

    def _note(self, call: Call, args: tuple[Any, ...], result: Any, before: bool) -> None:
        match call:
            case _ if call in (OPEN, OPEN_STREAM):
                self._opened(Path(args[0]), result, before)
            case _ if call is WRITE:
                self._write(args[0], Written(args[2], bytes(args[1][:result])))
            case _ if call is COPY and result:
                target, offset = args[1], args[4]
                self._write(target, Written(offset, os.pread(target, result, offset)))
            case _ if call is PREALLOCATE:
                self._write(args[0], Written(args[1] + args[2], None, only_grows=True))
            case _ if call is TRUNCATE:
                self._write(args[0], Written(args[1], None))
            case _ if call in (SYNC, SYNC_DATA):
                self._sync(args[0])
            case _ if call in (RENAME, REPLACE):
                self._rename(Path(args[0]), Path(args[1]))
            case _ if call is LINK:
                self._names[Path(args[1])] = self._names[Path(args[0])]
                self.events.append(Event(self._names[Path(args[0])], names=(None, Path(args[1]))))
            case _ if call is UNLINK and Path(args[0]) in self._names:
                self.events.append(Event(self._names.pop(Path(args[0])), names=(Path(args[0]), None)))
            case _ if call is CLOSE:
                self._open.pop(args[0], None)
            case _ if call is MKDIR:
                pass  # folders are there in every state: what they hold is what matters

    def _opened(self, path: Path, result: Any, before: bool) -> None:
        if not path.is_relative_to(self.place):
            return
        descriptor = result if isinstance(result, int) else result.fileno()
        if path.is_dir():
            self._open[descriptor] = path
            return
        if not before:
            self._names[path] = self._new_file()
            self.events.append(Event(self._names[path], names=(None, path)))
        elif not isinstance(result, int) and result.writable() and "a" not in result.mode:
            self.events.append(Event(self._names[path], Written(0, None)))
        self._open[descriptor] = self._names[path]

    def _write(self, descriptor: int, write: Written) -> None:
        file = self._open.get(descriptor)
        if isinstance(file, int):
            self.events.append(Event(file, write))

    def _write_to_stream(self, stream: Any, data: bytes) -> None:
        self._write(stream.fileno(), Written(stream.tell() - len(data), data))

    def _sync(self, descriptor: int) -> None:
        opened = self._open.get(descriptor)
        if isinstance(opened, Path):
            self.events.append(Event(folder_synced=opened))
        elif opened is not None:
            self.events.append(Event(opened))

    def _rename(self, source: Path, target: Path) -> None:
        if source in self._names:
            self._names[target] = self._names.pop(source)
            self.events.append(Event(self._names[target], names=(source, target)))


def crash(record: Recorder, moment: int, chance: random.Random) -> dict[Path, bytes]:
    """What the disk may hold, by path, when the power fails after so many events."""
    disks = [Disk(content) for content in record.contents]
    names, pending = dict(record.first), list[Event]()
    for event in record.events[:moment]:
        if event.names is not None:
            pending.append(event)
        elif event.folder_synced is not None:
            due = [change for change in pending if folder_of(change) == event.folder_synced]
            pending = [change for change in pending if folder_of(change) != event.folder_synced]
            apply(due, names)
        elif event.write is not None:
            disks[event.file].since.append(event.write)
        else:
            disks[event.file].sync()
    kept = [change for change in pending if chance.random() < 0.5]
    apply(chance.choice((kept, pending, pending[: len(pending) // 2])), names)
    return {path: disks[file].after_crash(chance) for path, file in names.items()}


def folder_of(change: Event) -> Path:
    """The folder whose names changed: files are never moved from one to another here."""
    assert change.names is not None
    named = change.names[1] or change.names[0]
    assert named is not None
    return named.parent


def apply(changes: list[Event], names: dict[Path, int]) -> None:
    """Let these changes of names have happened."""
    for change in changes:
        assert change.names is not None
        before, now = change.names
        if before is not None and names.get(before) == change.file:
            del names[before]
        if now is not None:
            names[now] = change.file


def lay_down(found: dict[Path, bytes], place: Path) -> None:
    """Make the folder what the disk holds."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for path, content in found.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextlib.contextmanager
def recording(bench: Bench) -> Iterator[Recorder]:
    """Record what happens in the bench's place."""
    recorder = Recorder(bench.place)
    with intercepted(bench.place, recorder):
        yield recorder


FINISHED: Final = "nothing loadable until `clean` put the new in place"


def judge(bench: Bench, *, done: bool) -> str:
    """What lies there after a crash; "the old", "the new" and FINISHED are well, anything else is what is wrong."""
    if bench.loadable_and_mixed():
        return "a mixture"
    if bench.is_new():
        return "the new"
    if done:
        return "a merge that was done and is gone"
    if not bench.wrong_output():
        return "the old"
    cleaned = bench.clean()
    if cleaned.exit_code != 0:
        return f"clean failed: {cleaned.said}"
    return FINISHED if bench.is_new() else "neither, and clean can't mend it"


def run(effort: Effort) -> list[Figure]:
    """Crash states of every scenario: at every moment in turn, then at random ones."""
    chance = random.Random(effort.seed)
    return [_run_scenario(scenario, effort, chance) for scenario in SCENARIOS]


def _run_scenario(scenario: Scenario, effort: Effort, chance: random.Random) -> Figure:
    bench = Bench(scenario, effort.folder / scenario.name)
    bench.reset()
    with recording(bench) as record:
        ending = bench.merge()
    assert ending.exit_code == 0, ending.said
    states = effort.trials(FULL)
    problems, ends = [], {"the old": 0, "the new": 0, FINISHED: 0}
    for state in range(states):
        moment = chance.randint(0, len(record.events)) if state else len(record.events)
        lay_down(crash(record, moment, chance), bench.place)
        end = judge(bench, done=moment == len(record.events))
        if end in ends:
            ends[end] += 1
        else:
            problems.append(f"{scenario.name}: {end} after {moment} of {len(record.events)} events (state {state})")
    for problem in problems[:20]:
        print(f"    {problem}")
    outcome = ", ".join(f"{count:,} times {end}" for end, count in ends.items())
    return Figure(f"power cut: {scenario.name}", states, len(problems), f"{outcome}; never a mixture")


CAMPAIGN: Final = Campaign("power", "The power fails, and what was not synced is lost, torn or out of order", run)
