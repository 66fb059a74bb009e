"""Cards without a card: the CPU stands in for some that are late with every copy, so that what needs one can be tried.

What is on its way into main memory is noise until it is waited for, and what is on its way to a card must not be
written to before: a lane that doesn't wait where it has to gives wrong bytes, or is told. What it takes of a card's
memory, and how often it waits for one, is counted. As a program it runs another one that finds such cards:

    python -m benchmarks.standin 2 -m streammerge a.safetensors b.safetensors --device cuda:all
"""

from __future__ import annotations

import contextlib
import functools
import runpy
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from unittest import mock

import torch

from benchmarks.card_tensors import OnCards, cards_named
from streammerge.compute import cuda, devices, machine, probing, rates
from streammerge.compute.cuda import CudaLane, bytes_of
from streammerge.compute.expressions import BLOCK
from streammerge.formats.readers import Reader

CPU: Final = torch.device("cpu")

GIB: Final = 1 << 30

copy = torch.Tensor.copy_

Copy = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Where to, where from, and what was there when it began."""


class LateCard:
    """Copies of one lane that arrive when their event is waited for, and how often anything was waited for."""

    def __init__(self) -> None:
        self.pinned: list[torch.Tensor] = []
        self.begun: list[Copy] = []
        self.under_way: dict[int, Event] = {}
        self.awaited: list[Event] = []
        self.arriving: set[int] = set()
        self.waits = 0
        self.looks: Counter[str] = Counter()

    def pin(self, nbytes: int) -> memoryview:
        """Memory from which copies are not waited for."""
        self.pinned.append(torch.zeros(max(nbytes, 1), dtype=torch.uint8))
        return bytes_of(self.pinned[-1])[:nbytes]

    def is_pinned(self, values: torch.Tensor) -> bool:
        """Whether the tensor lies in such memory."""
        return any(0 <= values.data_ptr() - memory.data_ptr() < memory.numel() for memory in self.pinned)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """A copy that is not waited for."""
        assert source.data_ptr() not in self.under_way, "the last copy from here has not been waited for"
        self.begun.append((target, source, source.clone()))
        if self.is_pinned(target):
            assert target.data_ptr() not in self.arriving, "what was to arrive here has not been waited for"
            self.arriving.add(target.data_ptr())
            return target.view(torch.uint8).random_(1, 255).view(target.dtype)
        assert self.is_pinned(source), "a copy from memory that is not pinned is waited for"
        return copy(target, source)

    @property
    def synchronisations(self) -> int:
        """How often the lane waited for the card: for copies, or by looking at what lies on it."""
        return self.waits + self.looks.total()


class Event:
    """An event of a late card."""

    def __init__(self, card: LateCard) -> None:
        self.card = card
        self.copies: list[Copy] = []
        self.is_awaited = False

    def record(self, stream: Any = None) -> None:  # noqa: ANN401
        """It happens when all copies that were begun are there."""
        self.copies, self.card.begun = self.card.begun, []
        self.card.awaited.append(self)
        self.card.under_way |= {source.data_ptr(): self for _, source, _ in self.copies if self.card.is_pinned(source)}

    def synchronize(self) -> None:
        """Wait for it."""
        assert not self.is_awaited
        self.is_awaited = True
        self.card.waits += 1
        self.arrive()

    def arrive(self) -> None:
        """All copies are there."""
        if self in self.card.awaited:
            self.card.awaited.remove(self)
        copies, self.copies = self.copies, []
        for target, source, content in copies:
            if self.card.is_pinned(target):
                copy(target, content)
                self.card.arriving.discard(target.data_ptr())
            else:
                same = torch.equal(source.view(torch.uint8), content.view(torch.uint8))
                assert same, "written to while it was being sent"
                self.card.under_way.pop(source.data_ptr(), None)


class Stream:
    """A stream: whoever waits for it has everything that was begun."""

    def __init__(self, card: LateCard) -> None:
        self.card = card
        self.waits = 0

    def synchronize(self) -> None:
        """Wait for everything."""
        self.waits += 1
        event = Event(self.card)
        event.record(self)
        event.synchronize()
        for late in list(self.card.awaited):
            late.arrive()


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A lane that was opened: on which card, and its copies. It is not kept itself: that would keep its memory."""

    card: str
    late: LateCard


@dataclass
class Cards:
    """So many cards of the same make, with `memory` bytes each; what was taken of each at the most, and by which lanes.

    `blocks` is how many blocks lanes take at once, if not as many as they are told. If they are `seen` by Linux, what
    they do in a second is measured and kept. If they are there `everywhere`, tensors can be made on them; else lanes
    alone know of them. Those that are not `late` copy at once.
    """

    count: int = 1
    memory: int = 80 * GIB
    blocks: int | None = None
    models: Sequence[str] = ()
    seen: bool = False
    everywhere: bool = False
    apart: bool = False
    is_late: bool = True
    share: float = 1.0
    peaks: dict[str, int] = field(default_factory=dict)
    taken: Counter[str] = field(default_factory=Counter)
    lanes: list[Opened] = field(default_factory=list)
    refused: int = 0
    own: threading.local = field(default_factory=threading.local)
    lock: Any = field(default_factory=threading.RLock)

    @property
    def late(self) -> LateCard:
        """The copies of the lane that this thread runs, or of one without a lane."""
        if not hasattr(self.own, "late"):
            self.own.late = LateCard()
        found: LateCard = self.own.late
        return found

    @property
    def synchronisations(self) -> int:
        """How often all lanes waited for their card."""
        return sum(lane.late.synchronisations for lane in self.lanes)

    def name(self, device: Any = None) -> str:  # noqa: ANN401
        """`cuda:0` for all that means it."""
        found = torch.device("cuda" if device is None else device)
        return f"cuda:{found.index or 0}"

    def model(self, card: str) -> str:
        """What its maker calls it."""
        return self.models[int(card.partition(":")[2])] if self.models else "Stand-in"

    def allow(self, share: float) -> None:
        """No more than this share of a card's memory may be taken from now on."""
        self.share = share

    def take(self, card: str, nbytes: int) -> None:
        """So much more of a card's memory is taken; torch's error where there is not so much."""
        with self.lock:
            if self.taken[card] + nbytes > self.memory * self.share:
                self.refused += 1
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB")
            self.taken[card] += nbytes
            self.peaks[card] = max(self.peaks.get(card, 0), self.taken[card])

    def give_back(self, card: str, nbytes: int) -> None:
        """So much less of it is taken."""
        with self.lock:
            self.taken[card] -= nbytes

    def look(self, name: str) -> None:
        """A lane's thread has to know what lies on its card, and so waits for it."""
        if getattr(self.own, "is_lane", False):
            self.late.looks[name] += 1

    def open_lane(self, reader: Reader, device: torch.device, blocks: int = 1) -> Any:  # noqa: ANN401
        """A lane on one of the cards."""
        if device.type != "cuda":
            return _open_lane(reader, device, blocks)
        kind = LaneApart if self.apart else StandInLane
        lane = kind(reader, self, self.name(device))
        lane.room = (self.blocks or blocks) * BLOCK
        self.lanes.append(Opened(lane.card, lane.late))
        return lane

    def calls(self) -> dict[str, Any]:
        """torch.cuda's functions, as far as anybody calls them."""
        return {
            "is_available": lambda: self.count > 0,
            "device_count": lambda: self.count,
            "is_initialized": lambda: self.count > 0,
            "get_device_name": lambda device=None: self.model(self.name(device)),
            "mem_get_info": lambda device=None: (self.memory - self.taken[self.name(device)], self.memory),
            "max_memory_allocated": lambda device=None: self.peaks.get(self.name(device), 0),
            "memory_allocated": lambda device=None: self.taken[self.name(device)],
            "reset_peak_memory_stats": lambda device=None: self.peaks.clear(),
            "empty_cache": lambda: None,
            "set_per_process_memory_fraction": self.allow,
            "synchronize": lambda device=None: None,
            "Stream": lambda device=None: Stream(self.late),
            "Event": lambda **_: Event(self.late),
            "device": lambda device: contextlib.nullcontext(),
            "stream": lambda stream: contextlib.nullcontext(),
        }

    def copying(self) -> Any:  # noqa: ANN401
        """`Tensor.copy_`."""

        def copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            return self.late.copy(target, source) if non_blocking and self.is_late else copy(target, source)

        return copied

    def looking(self, name: str) -> Any:  # noqa: ANN401
        """A method of tensors for which a card has to be waited for, counted where a lane's thread calls it."""
        plain = getattr(torch.Tensor, name)

        def look(values: torch.Tensor, *args: Any, **named: Any) -> Any:  # noqa: ANN401
            if not self.late.is_pinned(values):
                self.look(name)
            return plain(values, *args, **named)

        return look

    @contextlib.contextmanager
    def there(self) -> Iterator[Cards]:
        """As long as this lasts they are there."""
        with contextlib.ExitStack() as stack:
            for name, call in self.calls().items():
                stack.enter_context(mock.patch.object(torch.cuda, name, call))
            if self.apart:
                stack.enter_context(cards_named())
                stack.enter_context(OnCards(self))
            else:
                stack.enter_context(mock.patch.object(torch.Tensor, "copy_", self.copying()))
                for name in LOOKS:
                    stack.enter_context(mock.patch.object(torch.Tensor, name, self.looking(name)))
            stack.enter_context(mock.patch.object(cuda, "pinned_bytes", lambda nbytes: self.late.pin(nbytes)))
            stack.enter_context(mock.patch.object(devices, "open_lane", self.open_lane))
            stack.enter_context(mock.patch.object(probing, "card_device", return_value=CPU))
            if self.seen:
                for module, name in ((machine, "CARDS"), (rates, "NODES")):
                    stack.enter_context(mock.patch.object(module, name, ("null",)))  # which is there on every Linux
            if self.everywhere:
                for owner, name in [*((torch, name) for name in FACTORIES), (torch.Tensor, "to")]:
                    stack.enter_context(mock.patch.object(owner, name, without_cards(getattr(owner, name))))
            yield self


def without_cards(make: Any) -> Any:  # noqa: ANN401
    """The function, which makes on the CPU what is wanted on a card, and pins nothing."""

    def on_cpu(given: Any) -> Any:  # noqa: ANN401
        is_card = isinstance(given, str | torch.device) and str(given).startswith("cuda")
        return CPU if is_card else given

    @functools.wraps(make)
    def made(*args: Any, **named: Any) -> Any:  # noqa: ANN401
        named.pop("pin_memory", None)
        return make(*map(on_cpu, args), **{name: on_cpu(given) for name, given in named.items()})

    return made


FACTORIES: Final = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn")
"""What makes tensors on a device."""

LOOKS: Final = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__float__", "__int__", "bincount")
"""What needs to know what lies on a card; the last one how large the greatest number is."""

_open_lane = devices.open_lane


class LaneApart(CudaLane):
    """A card's lane, whose tensors say that they lie on it."""

    def __init__(self, reader: Reader, cards: Cards, card: str) -> None:
        super().__init__(reader, torch.device(card))
        self.cards, self.card, self.late = cards, card, LateCard()
        self.stream = Stream(self.late)  # type: ignore[assignment]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """In a thread of its own, which has the lane's copies as long as it runs."""
        own, before = self.cards.own, self.cards.late
        with super().running(), OnCards(self.cards) if self.cards.apart else contextlib.nullcontext():
            own.late, own.is_lane = self.late, True
            try:
                yield
            finally:
                own.late, own.is_lane = before, False


class StandInLane(LaneApart):
    """A card's lane that computes on the CPU, and accounts for its slots."""

    def __init__(self, reader: Reader, cards: Cards, card: str) -> None:
        super().__init__(reader, cards, card)
        self.device = CPU

    def allocate(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer on the card, which is given back with its last user."""
        nbytes = elements * dtype.itemsize
        self.cards.take(self.card, nbytes)
        made = super().allocate(elements, dtype)
        weakref.finalize(made, self.cards.give_back, self.card, nbytes)
        return made


def main(words: Sequence[str]) -> None:
    """Run `-m MODULE` or `-c CODE` with so many cards, for which what is not our own program needn't wait."""
    count, kind, what, *rest = words
    sys.argv = [what if kind == "-m" else kind, *rest]
    with Cards(int(count), everywhere=True, is_late=what in ("streammerge", "pytest")).there():
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<code>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(sys.argv[1:])
