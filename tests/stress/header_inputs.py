"""Safetensors files made up by chance: valid ones in all spellings, and lies in every place."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from typing import Any, Final

from streammerge.tensors import DTYPES

NAMES: Final = (
    *("a", "b", "model.diffusion_model.out.2.weight", "model.layers.31.mlp.up_proj.weight", "", " ", "__metadata__"),
    *("\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\nb", "\r", "\0", "\x7f", "\x9b2J", "\u202egnp.exe", "\u2066x\u2069"),
    *("\u200b", "\ufeff", "é", "日本", "😀", '"', "\\", "/", "../x", "e\u0301", "\u2028", "__metadata", "a" * 300),
)
SIZES: Final = (0, 1, 2, 3, 7, 8, 63, 64, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**33, 2**53, 2**61, 2**62)
NUMBERS: Final = (*SIZES, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**19, 10**20, -1, -(2**63), 1.0, 1.5, 1e300)
VALUES: Final[tuple[Any, ...]] = (
    *NUMBERS,
    None,
    True,
    False,
    "",
    "F32",
    "1",
    [],
    {},
    [1],
    [[1]],
    {"a": 1},
    [0, 4],
    [4, 0],
    [0, 4, 4],
)
LENGTHS: Final = (0, 1, 2, 7, 8, 9, 99_999_999, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
_JSON_TOKENS: Final = (
    '{ } [ ] , : " \\ \\u \\ud800 \\udc00 \\ud83d\\ude00 \\u0000 \\" \\x NaN Infinity -Infinity -0 01 1e0 1e999 1.0'
    ' null true false "__metadata__":{} "__metadata__": "a":{ {"dtype": "shape":[ "data_offsets":[0,4] [[[[ {}{}'
    " /* // ' 99999999999999999999 18446744073709551616"
)
_LONG_TOKENS: Final = ("[" * 50, "]" * 50, '{"a":' * 30, "1" * 5000)
TOKENS: Final = (*_JSON_TOKENS.split(" "), " ", "\n", "\t", "\x0b", "\xa0", "\ufeff", "\u2028", *_LONG_TOKENS)
BYTES: Final = (
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x82",
    b"\0",
    b"\x80",
    b"\xef\xbb\xbf",
)
DTYPE_NAMES: Final = tuple(DTYPES)


def header_files(seed: int) -> Iterator[bytes]:
    """Files without end, the same for the same seed."""
    chance = random.Random(seed)
    while True:
        yield _file(chance)


def _file(chance: random.Random) -> bytes:
    entries, nbytes = _tensors(chance)
    for _ in range(chance.choice((0, 0, 0, 1, 1, 2))):
        _lie(entries, chance)
    encoded = bytearray(_spelled(entries, chance).encode("utf-8", "surrogatepass"))
    for _ in range(chance.choice((0, 0, 0, 1, 1, 2, 4))):
        _damage(encoded, chance)
    length = len(encoded)
    if chance.random() < 0.06:
        length = max(0, chance.choice((*LENGTHS, length - 1, length + 1, length + nbytes, chance.getrandbits(64))))
    if chance.random() < 0.08:
        nbytes = max(0, nbytes + chance.choice((-4, -1, 1, 4, 8)))
    data = bytes(chance.getrandbits(8) for _ in range(min(nbytes, 16))).ljust(min(nbytes, 5000), b"\0")
    whole = struct.pack("<Q", min(length, 2**64 - 1)) + bytes(encoded) + data
    return whole[: chance.randrange(len(whole) + 1)] if chance.random() < 0.03 else whole


def _tensors(chance: random.Random) -> tuple[list[tuple[str, Any]], int]:
    """The entries of a valid header, and the bytes that they describe."""
    entries: list[tuple[str, Any]] = []
    at = 0
    for number in range(chance.choice((0, 1, 1, 2, 2, 3, 5, 12))):
        name = chance.choice(NAMES) if chance.random() < 0.5 else f"layers.{number}.weight"
        if name in ("__metadata__", *(known for known, _ in entries)):
            name = f"t{number}"
        dtype = DTYPES[chance.choice(DTYPE_NAMES) if chance.random() < 0.5 else "F16"]
        shape = [chance.choice((0, 1, 1, 2, 2, 3, 4, 8)) for _ in range(chance.randrange(5))]
        elements = 1
        for size in shape:
            elements *= size
        if elements * dtype.bits % 8:
            shape.append(8)
            elements *= 8
        stop = at + elements * dtype.bits // 8
        entries.append((name, {"dtype": dtype.name, "shape": shape, "data_offsets": [at, stop]}))
        at = stop
    if chance.random() < 0.3:
        chance.shuffle(entries)
    if chance.random() < 0.4:
        pairs = {chance.choice(NAMES): chance.choice(NAMES) for _ in range(chance.randrange(4))}
        entries.insert(chance.randrange(len(entries) + 1), ("__metadata__", pairs))
    return entries, at


def _lie(entries: list[tuple[str, Any]], chance: random.Random) -> None:
    """Change one thing that the header says."""
    if not entries:
        entries.append((chance.choice(NAMES), chance.choice(VALUES)))
        return
    place = chance.randrange(len(entries))
    name, entry = entries[place]
    kind = chance.randrange(9)
    if kind == 0:
        entries.append((name, entry))
    elif kind == 1:
        entries[place] = (chance.choice(NAMES), entry)
    elif kind == 2:
        entries[place] = (name, chance.choice(VALUES))
    elif kind == 3:
        del entries[place]
    elif isinstance(entry, dict) and entry:
        key = chance.choice(list(entry))
        if kind == 4:
            entry[chance.choice(("x", "dtype", "Shape", "data_offsets\0"))] = chance.choice(VALUES)
        elif kind == 5:
            del entry[key]
        elif kind == 6:
            entry[key] = chance.choice(VALUES)
        elif isinstance(entry.get("shape"), list) and kind == 7:
            _change_number(entry["shape"], chance)
        elif isinstance(entry.get("data_offsets"), list):
            _change_number(entry["data_offsets"], chance)


def _change_number(numbers: list[Any], chance: random.Random) -> None:
    if not numbers or chance.random() < 0.2:
        numbers.insert(chance.randrange(len(numbers) + 1), chance.choice(NUMBERS))
        return
    place = chance.randrange(len(numbers))
    if isinstance(numbers[place], int) and chance.random() < 0.5:
        numbers[place] += chance.choice((-8, -4, -1, 1, 4, 8))
    else:
        numbers[place] = chance.choice(NUMBERS)


def _spelled(entries: list[tuple[str, Any]], chance: random.Random) -> str:
    """The entries as JSON, in one of many spellings."""
    separators = chance.choice(((",", ":"), (",", ":"), (", ", ": "), (" ,\n", "\t:  ")))
    ascii_only = chance.random() < 0.3
    turned = chance.random() < 0.1

    def spell(value: object) -> str:
        if turned and isinstance(value, dict):
            value = dict(reversed(value.items()))
        return json.dumps(value, ensure_ascii=ascii_only, separators=separators)

    text = separators[0].join(spell(name) + separators[1] + spell(value) for name, value in entries)
    return "{" + text + "}" + chance.choice(("", "", "", " " * 7, "\n", "\0"))


def _damage(encoded: bytearray, chance: random.Random) -> None:
    """Change a few bytes."""
    at = chance.randrange(len(encoded) + 1)
    match chance.randrange(7):
        case 0:
            encoded[at : at + 1] = bytes([chance.getrandbits(8)])
        case 1:
            del encoded[at : at + chance.choice((1, 1, 1, 2, 5, 30))]
        case 2:
            encoded[at:at] = chance.choice(BYTES)
        case 3:
            encoded[at:at] = encoded[at : at + chance.choice((1, 4, 20, 80))]
        case 4:
            digits = [place for place, byte in enumerate(encoded) if 48 <= byte <= 57]
            if digits:
                encoded[chance.choice(digits)] = chance.randrange(48, 58)
        case _:
            encoded[at:at] = chance.choice(TOKENS).encode()
