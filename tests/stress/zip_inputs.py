"""Torch zips and pickles made up by chance: valid ones, programs that would do harm, and lies in every place."""

from __future__ import annotations

import collections
import itertools
import pickle
import pickletools
import random
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, Final

EDGES: Final = (0, 1, 2, 4, 255, 256, 4095, 4096, 4097, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
WIDE_EDGES: Final = (*EDGES, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
KEYS: Final = ("w", "state_dict", "model.0.weight", "\x1b[31m", "a\nb", "\u202e", "", "\ud800", "é", "😀", "x" * 5000)
STORAGES: Final = ("torch.FloatStorage", "torch.HalfStorage", "torch.storage.UntypedStorage", "a.Storage", "\x1b.S")
GLOBALS: Final = (
    *("os.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "posix.system", "builtins.__import__"),
    *("torch.load", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch.Size"),
    *("torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_qtensor"),
    *("collections.OrderedDict", "collections.defaultdict", "numpy.core.multiarray._reconstruct", "a.b", "é.\x1b"),
    *("torch.float16", "torch.serialization._get_layout", "copyreg._reconstructor", "_codecs.encode"),
)


def text(value: str) -> bytes:
    """A string."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """A whole number."""
    return pickle.dumps(value, 2)[2:-1]


def tuple_of(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def named(name: str) -> bytes:
    """A global."""
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def call(name: str, *arguments: bytes) -> bytes:
    """A call of a global."""
    return named(name) + tuple_of(*arguments) + b"R"


def tensor(
    key: str, shape: tuple[int, ...], *, storage: str = STORAGES[0], elements: int = 6, offset: int = 0
) -> bytes:
    """A call that makes a contiguous tensor."""
    place = tuple_of(text("storage"), named(storage), text(key), text("cpu"), number(elements)) + b"Q"
    steps = [1]
    for size in reversed(shape[1:]):
        steps.insert(0, steps[0] * max(size, 1))
    sizes, strides = tuple_of(*map(number, shape)), tuple_of(*map(number, steps[: len(shape)]))
    rest = (b"\x89", call("collections.OrderedDict"))
    return call("torch._utils._rebuild_tensor_v2", place, number(offset), sizes, strides, *rest)


def dict_of(entries: dict[str, bytes]) -> bytes:
    """A dict."""
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


class Harm:
    """What runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("exit 3",)


def _seeds() -> list[list[bytes]]:
    """Programs, cut into steps, to begin with."""
    entries = {"w": tensor("0", (2, 3)), "b": tensor("0", (3,), offset=3), "s": tensor("0", ())}
    plain = [{"a": [1, 2.5, "x", None, True, b"y", {1, 2}, (1, (2,))], "n": 2**80}, collections.OrderedDict(a=1)]
    programs = [
        dict_of(entries),
        dict_of({"state_dict": dict_of(entries), "epoch": number(3), "lr": b"G" + bytes(8)}),
        dict_of({"w": call("torch._utils._rebuild_parameter", entries["w"], b"\x89", b"N")}),
        dict_of({"w": tensor("0", (24,), storage=STORAGES[2], elements=24), "x": call("a.B") + b"}b"}),
        dict_of({name: tensor("0", (number % 6,)) for number, name in enumerate(KEYS)}),
        *(pickle.dumps(value, protocol)[:-1] for value in [*plain, [Harm()]] for protocol in range(6)),
    ]
    return [_steps(program) for program in programs]


def _steps(program: bytes) -> list[bytes]:
    places = [place for _, _, place in pickletools.genops(program + b".") if place is not None]
    return [program[start:stop] for start, stop in itertools.pairwise(places)]


def _nasty(chance: random.Random) -> bytes:
    """A step, or a few, that a bomb is made of."""
    edge, wide = chance.choice(EDGES), chance.choice(WIDE_EDGES)
    few = bytes(chance.getrandbits(8) for _ in range(chance.choice((0, 1, 8, 9))))
    times = chance.choice((1, 2, 60, 500, 2500))
    return chance.choice(
        (
            named(chance.choice(GLOBALS)),
            named(chance.choice(GLOBALS)) + tuple_of(text("exit 3")) + b"R",
            named(chance.choice(GLOBALS)) + b")\x81}b",
            named(chance.choice(GLOBALS)) + b")}\x92",
            text("os") + text("system") + b"\x93" + tuple_of(text("exit 3")) + b"R",
            b"\x8b" + struct.pack("<i", chance.choice((-1, -(2**31), 2**31 - 1, len(few)))) + few,  # LONG4
            b"\x8a" + bytes([len(few)]) + few,
            b"L" + b"9" * times + b"L\n",
            b"I" + chance.choice((b"00", b"01", b"-1", b"1e9", b"9" * 30, b"0x10", b"1_0")) + b"\n",
            b"r" + struct.pack("<I", edge),  # LONG_BINPUT
            b"j" + struct.pack("<I", edge),
            b"q" + bytes([edge % 256]),
            b"h" + bytes([edge % 256]),
            b"p" + str(chance.choice((-1, edge, wide))).encode() + b"\n",
            b"g" + str(chance.choice((-1, edge, wide))).encode() + b"\n",
            b"\x95" + struct.pack("<Q", wide),  # FRAME
            b"\x8d" + struct.pack("<Q", wide) + few,
            b"\x8e" + struct.pack("<Q", wide) + few,
            b"\x96" + struct.pack("<Q", wide) + few,
            b"X" + struct.pack("<I", edge) + few,
            b"B" + struct.pack("<I", edge) + few,
            b"T" + struct.pack("<I", edge) + few,
            chance.choice((b"2", b"(", b"\x94", b")\x85", b"}", b"]", b"(t", b"0", b"1", b"N")) * times,
            b"N" + b"2" * times + b"\x86" * (times // 2),
            b"]q\0h\0a",
            b"}q\0" + text("self") + b"h\0s",
            b"]" + b"(e" * times,
            chance.choice((b"\x82\1", b"\x83\1\1", b"\x84\1\1\1\1", b"\x97", b"\x98", b"Px\n", b"Q", b"\x80\xff")),
            tensor("0", (chance.choice(WIDE_EDGES), chance.choice(EDGES)), offset=wide),
            tensor(chance.choice(("0", "1", "../0", "0\0")), (6,), elements=chance.choice((6, 7, edge, wide))),
            tensor("0", (1,) * chance.choice((5, 64, 65, 300))),
        )
    )


_SEEDS: Final = _seeds()


def programs(chance: random.Random) -> bytes:
    """A pickle: a seed with a few steps changed, and now and then a few bytes."""
    steps = list(chance.choice(_SEEDS))
    for _ in range(chance.choice((0, 0, 1, 1, 2, 3, 6))):
        at = chance.randrange(len(steps) + 1)
        match chance.randrange(7):
            case 0:
                del steps[at : at + 1]
            case 1:
                steps[at:at] = steps[at : at + chance.choice((1, 2, 10))] * chance.choice((1, 1, 2, 40))
            case 2:
                other = chance.choice(_SEEDS)
                start = chance.randrange(len(other))
                steps[at:at] = other[start : start + chance.randrange(1, 12)]
            case 3:
                steps[at : at + 2] = reversed(steps[at : at + 2])
            case _:
                steps.insert(at, _nasty(chance))
    program = bytearray(b"\x80\2" + b"".join(steps) + b".")
    for _ in range(chance.choice((0, 0, 0, 1, 3))):
        at = chance.randrange(len(program))
        program[at : at + chance.randrange(3)] = bytes(chance.getrandbits(8) for _ in range(chance.randrange(3)))
    return bytes(program)


def pickles(seed: int) -> Iterator[bytes]:
    """Pickles without end, the same for the same seed."""
    chance = random.Random(seed)
    while True:
        yield programs(chance)


def torch_zips(seed: int) -> Iterator[bytes]:
    """Zips without end, the same for the same seed."""
    chance = random.Random(seed)
    while True:
        data = bytearray(_zip(chance))
        for _ in range(chance.choice((0, 0, 0, 1, 2, 4))):
            _damage(data, chance)
        yield bytes(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.02 else data)


def _zip(chance: random.Random) -> bytes:
    """A zip as torch writes it, with lies in the fields of a member or of the end now and then."""
    program = programs(chance) if chance.random() < 0.4 else b"\x80\2" + b"".join(chance.choice(_SEEDS[:5])) + b"."
    members = [(b"archive/data.pkl", program), (b"archive/data/0", bytes(range(24))), (b"archive/version", b"3\n")]
    if chance.random() < 0.3:
        members.append((b"archive/byteorder", chance.choice((b"little", b"little", b"big", b""))))
    for _ in range(chance.choice((0, 0, 0, 1))):
        names = (
            b"archive/data/0",
            b"archive/data/1",
            b"../x",
            b"/x",
            b"archive/code/x",
            b"b/data.pkl",
            b"\xff\x1b",
            b"",
        )
        members.insert(chance.randrange(len(members) + 1), (chance.choice(names), b"x" * chance.choice((0, 1, 24))))
    liar = chance.randrange(len(members)) if chance.random() < 0.25 else -1
    body, directory = b"", b""
    for number, (name, data) in enumerate(members):
        crc = chance.choice((0, zlib.crc32(data)))
        extra = _extra(chance, len(body), len(data))
        fields = [20, 0, 0, 0, 0, crc, len(data), len(data), len(name), len(extra)]
        place = [len(body)]
        listed = [20, *fields[:9], 0, 0, 0, 0, 0]
        if number == liar:
            _lie(chance.choice((fields, listed, place)), chance)
        directory += b"PK\1\2" + _packed("6H3L5H2L", [*listed, place[0]]) + name
        body += b"PK\3\4" + _packed("5H3L2H", fields) + name + extra + data
    end = [0, 0, len(members), len(members), len(directory), len(body), 0]
    wide = b""
    if chance.random() < 0.2:
        big = [44, 45, 45, 0, 0, len(members), len(members), len(directory), len(body)]
        if chance.random() < 0.4:
            _lie(big, chance)
        wide = b"PK\6\6" + _packed("Q2H2L4Q", big) + b"PK\6\7" + _packed("LQL", [0, len(body) + len(directory), 1])
        end = [0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0] if chance.random() < 0.7 else end
    if chance.random() < 0.1:
        _lie(end, chance)
    return body + directory + wide + b"PK\5\6" + _packed("4H2LH", end)


def _extra(chance: random.Random, start: int, length: int) -> bytes:
    """A local header's extra field: padding as torch writes it, zip64 numbers, or noise."""
    match chance.randrange(8):
        case 0:
            return struct.pack("<2H", 0x4246, 30) + b"Z" * 30
        case 1:
            return struct.pack("<2H2Q", 1, 16, length, length)
        case 2:
            return bytes(chance.getrandbits(8) for _ in range(chance.randrange(9)))
    return b""


def _lie(fields: list[int], chance: random.Random) -> None:
    place = chance.randrange(len(fields))
    if chance.random() < 0.5:
        fields[place] += chance.choice((-24, -1, 1, 2, 8, 24))
    else:
        fields[place] = chance.choice(WIDE_EDGES)


def _packed(layout: str, fields: list[int]) -> bytes:
    """The fields, each cut to its size."""
    kinds = "".join(letter * int(times or 1) for times, letter in re.findall(r"(\d?)([HLQ])", layout))
    bits = {"H": 16, "L": 32, "Q": 64}
    return b"".join(struct.pack(f"<{kind}", field % 2 ** bits[kind]) for kind, field in zip(kinds, fields, strict=True))


def _damage(data: bytearray, chance: random.Random) -> None:
    """Change a few bytes, in the headers rather than in between."""
    marks = [place for mark in (b"PK\1\2", b"PK\3\4", b"PK\5\6") if (place := data.rfind(mark)) >= 0]
    near = (
        chance.choice(marks) + chance.randrange(46) if marks and chance.random() < 0.6 else chance.randrange(len(data))
    )
    at = min(near, len(data) - 1)
    match chance.randrange(5):
        case 0:
            data[at] = chance.getrandbits(8)
        case 1:
            del data[at : at + chance.choice((1, 2, 46))]
        case 2:
            data[at:at] = data[at : at + chance.choice((1, 30, 46, 120))]
        case _:
            piece = struct.pack("<Q", chance.choice(WIDE_EDGES))[: chance.choice((2, 4, 8))]
            data[at : at + len(piece)] = piece
    if not data:
        data += b"PK"
