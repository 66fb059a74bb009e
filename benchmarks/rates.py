"""What a card and its host allow: copies, reading and writing alone, and the barest loop that merges by a card.

Nothing here checks a number or keeps a promise: it is what a merge's own loop is held against, in the same run. It is a
process of its own, `python -m benchmarks.rates REQUEST.json`, and prints each figure as soon as it has it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Final, Literal

import torch

from benchmarks.card import Rate
from streammerge.compute.cuda import bytes_of
from streammerge.compute.machine import MIB
from streammerge.tools.bench.floor import timed

WEIGHTS: Final = (0.1, 0.5, 0.4)
UNDER_WAY: Final = 2
"""Ranges that each worker of the loop has under way: one is read and sent while the other is computed and fetched."""

COPIES: Final = 8


@dataclass(frozen=True)
class Request:
    """What is to be measured: three float16 files of one layout, a folder for the output, the device, how much at once,
    by how many threads."""

    files: Sequence[str]
    folder: str
    device: str
    copied: int = 256 * MIB
    moved: int = 8 * MIB
    threads: Sequence[int] = (1, 2, 4, 8)
    loop_threads: Sequence[int] = (1, 2, 4)
    loop_elements: Sequence[int] = tuple(2**power for power in range(18, 23))


@dataclass(frozen=True)
class Device:
    """A card, or the CPU in its place, to try things out: pinned memory, streams, and marks in them."""

    name: str

    @property
    def is_card(self) -> bool:
        """Whether there is anything to wait for."""
        return self.name != "cpu"

    def pinned(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Main memory that the card copies from and to by itself."""
        return torch.empty(elements, dtype=dtype, pin_memory=self.is_card)

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """A stream of this thread's own."""
        if not self.is_card:
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            yield

    def mark(self) -> Callable[[], None]:
        """Waits, when called, for all that the thread's stream has been given by now."""
        if not self.is_card:
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize

    def settle(self) -> None:
        """Wait for everything."""
        if self.is_card:
            torch.cuda.synchronize()

    def forget_vram(self) -> None:
        """Give back what is kept, and begin a new peak."""
        if self.is_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_vram(self) -> int:
        """The most that tensors took on the card."""
        return torch.cuda.max_memory_allocated() if self.is_card else 0


@dataclass(frozen=True)
class Files:
    """The inputs, whose tensors lie in bytes [start, stop), and where outputs go."""

    inputs: Sequence[Path]
    output: Path
    start: int
    stop: int

    @classmethod
    def of(cls, request: Request) -> Files:
        """The request's files."""
        paths = [Path(file) for file in request.files]
        size = paths[0].stat().st_size
        if any(path.stat().st_size != size for path in paths):
            raise ValueError("the files have not one layout")
        with paths[0].open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        return cls(paths, Path(request.folder) / "rates.tmp", start, size - (size - start) % 2)

    @property
    def nbytes(self) -> int:
        """The tensors' bytes in one file."""
        return self.stop - self.start

    def make_output(self) -> None:
        """A new file of the inputs' size, its room taken ahead where the system can."""
        with self.output.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.stop)
            file.truncate(self.stop)


@dataclass
class Ranges:
    """Hands out the ranges of bytes of a file, each once, to whoever asks."""

    files: Files
    step: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.starts = iter(range(self.files.start, self.files.stop, self.step))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while True:
            with self.lock:
                start = next(self.starts, None)
            if start is None:
                return
            yield start, min(self.step, self.files.stop - start)


class Turn:
    """One range at a time: read, sent, computed and on its way back; then waited for and written."""

    def __init__(self, device: Device, elements: int, inputs: Sequence[FileIO], output: FileIO) -> None:
        self.device, self.inputs, self.output = device, inputs, output
        self.staged = [device.pinned(elements, torch.float16) for _ in inputs]
        self.made = device.pinned(elements, torch.float16)
        self.views = [bytes_of(tensor) for tensor in (*self.staged, self.made)]
        self.finish: Callable[[], None] = lambda: None

    def begin(self, start: int, nbytes: int) -> None:
        """Have a range on its way."""
        total: torch.Tensor | None = None
        for file, staged, view, weight in zip(self.inputs, self.staged, self.views, WEIGHTS, strict=False):
            read_at(file, start, view[:nbytes])
            sent = staged[: nbytes // 2].to(self.device.name, non_blocking=True)
            total = sent.float().mul_(weight) if total is None else total.add_(sent, alpha=weight)
        if total is not None:
            self.made[: nbytes // 2].copy_(total.half(), non_blocking=True)
        arrived = self.device.mark()

        def finish() -> None:
            arrived()
            write_at(self.output, start, self.views[-1][:nbytes])

        self.finish = finish


class Limits:
    """Measures every step, and tells each figure."""

    def __init__(self, request: Request, tell: Callable[[Rate], object]) -> None:
        self.request, self.tell = request, tell
        self.device, self.files = Device(request.device), Files.of(request)

    def measure(self) -> None:
        """Copies first, then reading and writing alone, then the loop."""
        self.copies()
        try:
            for count in self.request.threads:
                self.tell(self.alone(count, "reading"))
            for count in self.request.threads:
                self.tell(self.alone(count, "writing"))
            for elements, count in itertools.product(self.request.loop_elements, self.request.loop_threads):
                self.tell(self.loop(elements, count))
        finally:
            self.files.output.unlink(missing_ok=True)

    def copies(self) -> None:
        """Pinned memory to the card and back."""
        host = self.device.pinned(self.request.copied, torch.uint8).zero_()
        card = torch.zeros(self.request.copied, dtype=torch.uint8, device=self.device.name)
        nbytes = COPIES * self.request.copied
        self.tell(Rate("to the card", self.copying(card, host), nbytes))
        self.tell(Rate("from the card", self.copying(host, card), nbytes))

    def copying(self, target: torch.Tensor, source: torch.Tensor) -> float:
        """Seconds of some copies, after one that doesn't count."""
        target.copy_(source)
        self.device.settle()

        def copy() -> None:
            for _ in range(COPIES):
                target.copy_(source, non_blocking=True)
            self.device.settle()

        return timed(copy)

    def alone(self, count: int, step: Literal["reading", "writing"]) -> Rate:
        """Reading all inputs, or writing one output, from pinned memory, by so many threads."""
        reads = step == "reading"
        if not reads:
            self.files.make_output()
        ranges = Ranges(self.files, self.request.moved)
        buffers = [self.device.pinned(self.request.moved, torch.uint8) for _ in range(count)]

        def work(buffer: torch.Tensor) -> None:
            view = bytes_of(buffer)
            with self.opened() as (inputs, output):
                for start, nbytes in ranges:
                    for file in inputs if reads else ():
                        read_at(file, start, view[:nbytes])
                    if not reads:
                        write_at(output, start, view[:nbytes])

        seconds = in_threads([functools.partial(work, buffer) for buffer in buffers])
        return Rate(step, seconds, self.files.nbytes * (len(self.files.inputs) if reads else 1), count)

    def loop(self, elements: int, count: int) -> Rate:
        """The barest merge, 0.1 a + 0.5 b + 0.4 c: so many threads, each with a stream and two ranges under way.

        Making pinned buffers counts, as it does in a merge.
        """
        self.files.make_output()
        self.device.forget_vram()
        ranges = Ranges(self.files, 2 * elements)

        def work() -> None:
            with self.device.stream(), self.opened() as (inputs, output):
                turns = [Turn(self.device, elements, inputs, output) for _ in range(UNDER_WAY)]
                for turn, (start, nbytes) in zip(itertools.cycle(turns), ranges, strict=False):
                    turn.finish()
                    turn.begin(start, nbytes)
                for turn in turns:
                    turn.finish()

        seconds = in_threads([work] * count)
        moved = self.files.nbytes * (len(self.files.inputs) + 1)
        return Rate("loop", seconds, moved, count, elements, self.device.peak_vram())

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[list[FileIO], FileIO]]:
        """The inputs and the output, open for one thread alone."""
        with contextlib.ExitStack() as stack:
            self.files.output.touch()
            inputs = [stack.enter_context(path.open("rb", buffering=0)) for path in self.files.inputs]
            yield inputs, stack.enter_context(self.files.output.open("r+b", buffering=0))


def in_threads(tasks: Sequence[Callable[[], None]]) -> float:
    """Seconds until all have ended, each in a thread of its own; what one raises is raised."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return timed(lambda: [done.result() for done in [pool.submit(task) for task in tasks]])


def read_at(file: FileIO, start: int, view: memoryview) -> None:
    """Fill the view from this place on."""
    file.seek(start)
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError("the file is shorter than it was")
        view = view[count:]


def write_at(file: FileIO, start: int, view: memoryview) -> None:
    """Write all of the view from this place on."""
    file.seek(start)
    while view:
        view = view[file.write(view) :]


def main(words: Sequence[str]) -> None:
    """Read a request, print a line of JSON for each figure."""
    request = Request(**json.loads(Path(words[0]).read_text(encoding="utf-8")))
    Limits(request, lambda rate: print(json.dumps(asdict(rate)), flush=True)).measure()


if __name__ == "__main__":
    main(sys.argv[1:])
