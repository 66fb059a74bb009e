"""A machine for pickles that has no power: it imports nothing and calls nothing, and its time and memory are bounded.

A pickle is a program for a small stack machine that can import any name and call it. This machine takes the same
steps (see `pickle_steps`), but has no name for anything outside this package: what a call or a persistent id stands
for is the answer of two functions that are given to it, and what describes no tensor is an inert placeholder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from streammerge.formats.bounds import PICKLE_BYTES, bound

MAX_PICKLE: Final = 16 * 2**20
"""The longest pickle that is read of a small file, in bytes. A tensor takes about 170."""

MAX_STEPS: Final = 1_500_000
"""The most steps that are taken for a small file. A tensor takes about 40."""

MAX_HELD: Final = 30 * 2**20
"""The most memory that the pickle of a small file and its values may take, in bytes as estimated below. A tensor takes
about 1250."""

_MAX_TEXT: Final = 4096  # bytes of a string that is kept: a longer one is data, not a name
_TO_LOOK_INTO: Final = 160  # bytes that it takes to look for tensors in an object
_MAX_GAP: Final = 4096  # how many items of the memo may be left out at once: picklers leave out none

Arguments = tuple[object, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Inert:
    """What stands for a class, a function or an object that isn't ours to make: it takes everything and does nothing.

    `name` says what it stands for, as in `pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint`.
    """

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class PickledObject(Inert):
    """What stands for an object, a list or a set: as inert, but it keeps what went into it, for tensors may be there.

    `parts` are a call's arguments, what was appended, and the states and items that it was given, these in dicts.
    """

    parts: list[object]


class PickledDict(dict["str | Inert", object]):
    """A dict; each key that is no string, or no short one, is an Inert of its own that says what it was.

    `attributes` is the state that a dict of a class of its own was given, if it was.
    """

    __slots__ = ("attributes",)
    attributes: object


@dataclass(frozen=True, slots=True)
class Bounds:
    """What reading a pickle may take: its bytes, its steps, and the bytes of memory of it and its values."""

    nbytes: int = MAX_PICKLE
    steps: int = MAX_STEPS
    held: int = MAX_HELD

    @classmethod
    def of(cls, file_bytes: int) -> Bounds:
        """The bounds in a file of so many bytes."""
        return cls(
            bound(MAX_PICKLE, file_bytes, PICKLE_BYTES),
            bound(MAX_STEPS, file_bytes, 60),
            bound(MAX_HELD, file_bytes, 1500),
        )


class MalformedPickleError(Exception):
    """What is wrong with a pickle."""


LONG_STRING: Final = Inert("long str")
_HOLE: Final = Inert("a hole in the memo")


def kind(value: object) -> str:
    """A word for what a value is."""
    if isinstance(value, Inert):
        return value.name
    return "dict" if isinstance(value, PickledDict) else type(value).__name__


class Machine:
    """A pickle under way: where it is read, its stack, the stacks below the marks, and what it memorized.

    `call(function, arguments)` says what stands for a call's result, `persist(id)` what for a persistent object.
    """

    __slots__ = ("below", "bounds", "call", "file", "held", "memo", "persist", "read", "stack")

    def __init__(
        self,
        data: bytes,
        call: Callable[[Inert, Arguments], object],
        persist: Callable[[object], object],
        bounds: Bounds,
    ) -> None:
        self.bounds = bounds
        self.file = BytesIO(data)
        self.read = self.file.read
        self.call = call
        self.persist = persist
        self.stack: list[object] = []
        self.below: list[list[object]] = []
        self.memo: list[object] = []
        self.held = len(data)  # bytes, about

    def line(self) -> bytes:
        """The bytes before the next newline."""
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise MalformedPickleError("a line that never ends")
        return line[:-1]

    def text(self, raw: bytes, encoding: str = "utf-8", errors: str = "surrogatepass") -> object:
        """The string that these bytes encode, if it is short enough to be a name."""
        if len(raw) > _MAX_TEXT:
            return LONG_STRING
        text = raw.decode(encoding, errors)
        self.held += 64 + (len(text) if text.isascii() else 4 * len(text))
        return text

    def inert(self, module: object, name: object) -> Inert:
        """What stands for the global of this name."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise MalformedPickleError("a global without a name")
        self.held += 128 + 4 * (len(module) + len(name))
        return Inert(f"{module}.{name}")

    def above_mark(self) -> list[object]:
        """What was pushed since the last mark, taken off together with the mark."""
        items = self.stack
        self.stack = self.below.pop()
        return items

    def push_tuple(self, items: list[object]) -> None:
        """Push these items as a tuple."""
        self.held += 56 + 8 * len(items)
        self.stack.append(tuple(items))

    def memorize(self, index: int) -> None:
        """Keep the top of the stack under this index."""
        missing = index - len(self.memo)
        if missing == 0:
            self.held += 8
            self.memo.append(self.stack[-1])
            return
        if index < 0 or missing > _MAX_GAP:
            raise MalformedPickleError(f"it memorizes item {index} after {len(self.memo)} items")
        if missing > 0:
            self.held += 8 * missing + 8
            self.memo += [_HOLE] * (missing + 1)
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        """Push what was kept under this index."""
        if not 0 <= index < len(self.memo) or (value := self.memo[index]) is _HOLE:
            raise MalformedPickleError(f"it recalls item {index}, which it has not memorized")
        self.stack.append(value)

    def push_answer(self, function: object, arguments: object) -> None:
        """Push what stands for the result of a call; arguments that are no tuple are a placeholder's."""
        if not isinstance(function, Inert):
            raise MalformedPickleError(f"it calls {kind(function)}, which is no function")
        given = arguments if isinstance(arguments, tuple) else (arguments,) if isinstance(arguments, Inert) else ()
        self.held += 128 + 8 * len(given)
        answer = self.call(function, given)
        if isinstance(answer, PickledObject):
            self.held += _TO_LOOK_INTO
        self.stack.append(answer)

    def push_object(self, name: str, parts: list[object]) -> None:
        """Push what stands for an object made of these parts."""
        self.held += 128 + 8 * len(parts) + _TO_LOOK_INTO
        self.stack.append(PickledObject(name, parts))

    def to_change(self) -> PickledDict | Inert:
        """What is on top of the stack, to be changed: a dict, or a placeholder that won't be."""
        target = self.stack[-1]
        if not isinstance(target, PickledDict | Inert):
            raise MalformedPickleError(f"it changes {kind(target)}, which can't be changed")
        return target

    def append(self, items: list[object]) -> None:
        """Add these items to the list, set or object on top of the stack; other placeholders ignore them."""
        target = self.to_change()
        if isinstance(target, PickledObject):
            self.held += 8 * len(items)
            target.parts.extend(items)

    def give_state(self, state: object) -> None:
        """Give the object on top of the stack its state; placeholders that are no objects ignore it."""
        target = self.to_change()
        if isinstance(target, PickledDict):
            self.held += 8
            target.attributes = state
        elif isinstance(target, PickledObject):
            self.append([state])

    def store(self, items: list[object]) -> None:
        """Put keys and values, by turns, into the dict or object on top of the stack; a placeholder ignores them."""
        target = self.to_change()
        if len(items) % 2:
            raise MalformedPickleError("a key without a value")
        if isinstance(target, PickledObject):
            self.held += 128
            target.parts.append(target := PickledDict())
        if isinstance(target, PickledDict):
            self.held += 80 * len(items)
            keys = (key if isinstance(key, str) else _other_key(key) for key in items[::2])
            target.update(zip(keys, items[1::2], strict=True))


def _other_key(key: object) -> Inert:
    """A key that is no string. As it is hashed by identity, no choice of keys makes a dict slow."""
    if isinstance(key, int | None):
        return Inert(str(key))
    return PickledObject(kind(key), [key])
