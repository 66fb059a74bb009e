"""The steps of a pickle, taken by a machine that has no power.

Opcodes: as Python's `pickletools` documents them, protocols 0 to 5; those that torch never writes are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Final

from streammerge.formats.torchzip.machine import Inert, Machine, MalformedPickleError, PickledDict

_MAX_MARKS: Final = 2000  # how deep a pickle may nest: Python's own pickler gives up at about 1000
_MAX_INT: Final = 8  # bytes of a number that is kept: no size or offset takes more
_BYTES, _FLOAT, _INT = Inert("bytes"), Inert("float"), Inert("int")


def run(machine: Machine) -> object:
    """Take steps until the pickle says stop; the answer is on the stack. Otherwise: MalformedPickleError.

    The answer is a str, int, bool, None, tuple, PickledDict, Inert, or what the machine's functions have answered.
    Bytes, floats, long strings and huge numbers are Inert, as no tensor's description needs them; lists and sets are
    so too, as PickledObjects.
    """
    if machine.held > machine.bounds.nbytes:
        raise MalformedPickleError(f"it has {machine.held} bytes; {machine.bounds.nbytes} are allowed")
    try:
        _take_steps(machine)
        return machine.stack.pop()
    except (IndexError, struct.error):
        raise MalformedPickleError("it is cut short, or takes more from its stack than it has put there") from None
    except KeyError:
        raise MalformedPickleError("it ends before it says stop, or takes a step that no protocol has") from None
    except UnicodeError:
        raise MalformedPickleError("a string that isn't text") from None


def _take_steps(machine: Machine) -> None:
    """The steps until the pickle says stop, within the bounds of time and memory."""
    opcodes = iter(partial(machine.read, 1), _STOP)
    most_steps, most_held = machine.bounds.steps, machine.bounds.held
    for opcode in islice(opcodes, most_steps):
        _STEPS[opcode](machine)
        if machine.held > most_held:
            raise MalformedPickleError(f"its values take more than the {most_held} bytes that are allowed")
    if next(opcodes, None) is not None:
        raise MalformedPickleError(f"it takes more than the {most_steps} steps that are allowed")


Step = Callable[[Machine], None]


def _reader(layout: str) -> Callable[[Machine], int]:
    """A function that reads the next number."""
    size, unpack = struct.calcsize(layout), struct.Struct(layout).unpack

    def read(machine: Machine) -> int:
        (value,) = unpack(machine.read(size))
        return int(value)

    return read


def _byte(machine: Machine) -> int:
    return machine.read(1)[0]


_uint16, _uint32, _int32, _uint64 = map(_reader, ("<H", "<I", "<i", "<Q"))


def _exactly(machine: Machine, length: int) -> bytes:
    """The next bytes, which are all there."""
    raw = machine.read(min(length, machine.bounds.nbytes + 1))
    if len(raw) < length:
        raise MalformedPickleError(f"it claims {length} bytes, but {len(raw)} are left")
    return raw


def _push(value: object) -> Step:
    def step(machine: Machine) -> None:
        machine.stack.append(value)

    return step


def _push_number(number: Callable[[Machine], int]) -> Step:
    def step(machine: Machine) -> None:
        machine.held += 32
        machine.stack.append(number(machine))

    return step


def _push_long(length: Callable[[Machine], int]) -> Step:
    """A number of any length: kept if it isn't huge."""

    def step(machine: Machine) -> None:
        raw = _exactly(machine, length(machine))
        machine.held += 32
        machine.stack.append(int.from_bytes(raw, "little", signed=True) if len(raw) <= _MAX_INT else _INT)

    return step


def _push_text(length: Callable[[Machine], int]) -> Step:
    def step(machine: Machine) -> None:
        machine.stack.append(machine.text(_exactly(machine, length(machine))))

    return step


def _push_bytes(length: Callable[[Machine], int]) -> Step:
    def step(machine: Machine) -> None:
        _exactly(machine, length(machine))
        machine.stack.append(_BYTES)

    return step


def _push_line(placeholder: Inert) -> Step:
    def step(machine: Machine) -> None:
        machine.line()
        machine.stack.append(placeholder)

    return step


def _push_empty(name: str) -> Step:
    """A list or a set without items."""
    return lambda machine: machine.push_object(name, [])


def _push_collection(name: str) -> Step:
    """A list or a set of all above the mark."""
    return lambda machine: machine.push_object(name, machine.above_mark())


def _push_tuple_of(count: int) -> Step:
    """A tuple of the last few items."""

    def step(machine: Machine) -> None:
        stack = machine.stack
        machine.push_tuple([stack.pop(at) for at in range(-count, 0)])

    return step


def _skip(length: int) -> Step:
    """Bytes of no consequence here: the protocol's number, a frame's length."""

    def step(machine: Machine) -> None:
        _exactly(machine, length)

    return step


def _refuse(what: str) -> Step:
    def step(machine: Machine) -> None:
        raise MalformedPickleError(f"{what}, which torch.save does not write")

    return step


def _float(machine: Machine) -> None:
    _exactly(machine, 8)
    machine.stack.append(_FLOAT)


def _number_line(machine: Machine) -> None:
    """A number in decimal digits; `00` and `01` are false and true."""
    digits = machine.line()
    machine.held += 32
    machine.stack.append(digits == b"01" if digits in (b"00", b"01") else _decimal(digits.removesuffix(b"L")))


def _decimal(digits: bytes) -> int | Inert:
    if not digits.removeprefix(b"-").isdigit():
        raise MalformedPickleError("a number without digits")
    return int(digits) if len(digits.removeprefix(b"-")) < 20 else _INT


def _index_line(machine: Machine) -> int:
    index = _decimal(machine.line())
    return index if isinstance(index, int) else -1


def _global_of_lines(machine: Machine) -> Inert:
    return machine.inert(machine.text(machine.line()), machine.text(machine.line()))


def _global_of_stack(machine: Machine) -> None:
    name = machine.stack.pop()
    machine.stack.append(machine.inert(machine.stack.pop(), name))


def _mark(machine: Machine) -> None:
    if len(machine.below) >= _MAX_MARKS:
        raise MalformedPickleError(f"it nests deeper than {_MAX_MARKS} levels")
    machine.below.append(machine.stack)
    machine.stack = []


def _pop(machine: Machine) -> None:
    """Take off the last item, or else the mark."""
    if machine.stack:
        machine.stack.pop()
    else:
        machine.above_mark()


def _pop_mark(machine: Machine) -> None:
    machine.above_mark()


def _empty_dict(machine: Machine) -> None:
    machine.held += 128
    machine.stack.append(PickledDict())


def _dict(machine: Machine) -> None:
    items = machine.above_mark()
    _empty_dict(machine)
    machine.store(items)


def _set_item(machine: Machine) -> None:
    value = machine.stack.pop()
    machine.store([machine.stack.pop(), value])


def _append(machine: Machine) -> None:
    item = machine.stack.pop()
    machine.append([item])


def _build(machine: Machine) -> None:
    """Give an object its state, or a dict its attributes."""
    state = machine.stack.pop()
    machine.give_state(state)


def _call(machine: Machine) -> None:
    """`function(*arguments)`, or an object of a class: the two last items."""
    arguments = machine.stack.pop()
    machine.push_answer(machine.stack.pop(), arguments)


def _call_with_keywords(machine: Machine) -> None:
    keywords = machine.stack.pop()
    arguments = machine.stack.pop()
    if keywords and isinstance(arguments, tuple):
        arguments = (*arguments, keywords)
    machine.push_answer(machine.stack.pop(), arguments)


def _call_of_mark(machine: Machine) -> None:
    """An object of the class that is first above the mark, its arguments following."""
    function, *arguments = machine.above_mark() or [None]
    machine.push_answer(function, tuple(arguments))


def _persistent(machine: Machine) -> None:
    machine.held += 80
    machine.stack.append(machine.persist(machine.stack.pop()))


_STOP: Final = b"."
_STEPS: Final[dict[bytes, Step]] = {
    b"(": _mark,
    b"0": _pop,
    b"1": _pop_mark,
    b"2": lambda machine: machine.stack.append(machine.stack[-1]),
    b"N": _push(None),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b"I": _number_line,
    b"L": _number_line,
    b"K": lambda machine: machine.stack.append(machine.read(1)[0]),
    b"M": _push_number(_uint16),
    b"J": _push_number(_int32),
    b"\x8a": _push_long(_byte),
    b"\x8b": _push_long(_uint32),
    b"F": _push_line(_FLOAT),
    b"G": _float,
    b"V": lambda machine: machine.stack.append(machine.text(machine.line(), "raw-unicode-escape", "strict")),
    b"\x8c": _push_text(_byte),
    b"X": _push_text(_uint32),
    b"\x8d": _push_text(_uint64),
    b"S": _push_line(_BYTES),
    b"U": _push_bytes(_byte),
    b"T": _push_bytes(_uint32),
    b"C": _push_bytes(_byte),
    b"B": _push_bytes(_uint32),
    b"\x8e": _push_bytes(_uint64),
    b"\x96": _push_bytes(_uint64),
    b")": _push(()),
    b"t": lambda machine: machine.push_tuple(machine.above_mark()),
    b"\x85": _push_tuple_of(1),
    b"\x86": _push_tuple_of(2),
    b"\x87": _push_tuple_of(3),
    b"]": _push_empty("list"),
    b"l": _push_collection("list"),
    b"a": _append,
    b"e": lambda machine: machine.append(machine.above_mark()),
    b"\x8f": _push_empty("set"),
    b"\x91": _push_collection("set"),
    b"\x90": lambda machine: machine.append(machine.above_mark()),
    b"}": _empty_dict,
    b"d": _dict,
    b"s": _set_item,
    b"u": lambda machine: machine.store(machine.above_mark()),
    b"p": lambda machine: machine.memorize(_index_line(machine)),
    b"q": lambda machine: machine.memorize(_byte(machine)),
    b"r": lambda machine: machine.memorize(_uint32(machine)),
    b"\x94": lambda machine: machine.memorize(len(machine.memo)),
    b"g": lambda machine: machine.recall(_index_line(machine)),
    b"h": lambda machine: machine.recall(_byte(machine)),
    b"j": lambda machine: machine.recall(_uint32(machine)),
    b"c": lambda machine: machine.stack.append(_global_of_lines(machine)),
    b"\x93": _global_of_stack,
    b"i": lambda machine: machine.push_answer(_global_of_lines(machine), tuple(machine.above_mark())),
    b"o": _call_of_mark,
    b"R": _call,
    b"\x81": _call,
    b"\x92": _call_with_keywords,
    b"b": _build,
    b"Q": _persistent,
    b"P": _refuse("a persistent id of plain text"),
    b"\x82": _refuse("an extension code"),
    b"\x83": _refuse("an extension code"),
    b"\x84": _refuse("an extension code"),
    b"\x97": _refuse("a buffer outside of the pickle"),
    b"\x98": _refuse("a buffer outside of the pickle"),
    b"\x80": _skip(1),
    b"\x95": _skip(8),
}
