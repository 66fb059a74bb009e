"""Pickles that would take much memory or many steps, and what reading one does take."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streammerge.formats.torchzip import steps as pickle_steps
from streammerge.formats.torchzip.steps import _STEPS
from tests.formats.torchzip.opcodes import named, number, numbers, tensor, text, tuple_

BOMBS = {
    "dicts": b"}" * 10**6,
    "lists": b"]" * 10**6,
    "numbers": b"J\1\0\1\0" * 10**6,
    "duplicates": b"N" + b"2" * 1_400_000,
    "tuples": b"N" + b"\x85" * 10**6,
    "tuples of many": b"(" + b"N" * 10**6 + b"t" + b"q\0h\0" * 50,
    "texts": (b"\x8c\x04" + "😀".encode()) * 10**6,
    "long texts": (b"X" + struct.pack("<I", 4096) + b"a" * 4092 + "😀".encode()) * 4000,
    "memo": b"N" + b"".join(b"r" + struct.pack("<I", i * 4096) for i in range(1, 10_000)),
    "globals": named("a.b") * 10**6,
    "calls": named("collections.OrderedDict") + b"q\0" + b")Rh\0" * 300_000,
    "storages": tuple_(text("storage"), named("a.S"), text("0"), text("cpu"), number(1)) + b"q\1" + b"Qh\1" * 500_000,
    "entries": b"}" + b"M\1\1Ns" * 300_000,
    "named entries": b"}" + b"".join(b"\x8c\6%06dNs" % i for i in range(300_000)),
    "marks": b"(1" * 700_000,
    "all at once": (
        (b"B" + struct.pack("<I", 9 * 2**20) + bytes(9 * 2**20) + b"q\0")
        + b"h\0" * 500_000
        + (b"\x8c\x04" + "😀".encode()) * 900_000
    ),
    "tensors": b"".join(
        (tensor() if i == 0 else tensor(shape=numbers(i, 1)) for i in range(15_000)),
    ),
}

MEASURE = """
import pathlib, sys
from streammerge.errors import CheckpointError
from streammerge.formats.torchzip.pickles import describe_pickle
from streammerge.formats.torchzip.archive import read_torch_zip

def kilobytes(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

path = pathlib.Path(sys.argv[1])
program = b"" if sys.argv[2] == "file" else path.read_bytes()
before = kilobytes("VmRSS")
try:
    describe_pickle(program, "bomb") if program else read_torch_zip(path)
except CheckpointError as error:
    str(error)
print(kilobytes("VmHWM") - before)
"""


def cost(path: Path, kind: str) -> float:
    """The MiB that reading a "pickle" or a "file" takes."""
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path), kind], capture_output=True, check=True)
    return float(result.stdout) / 1024


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets a 1 for every step that is taken from here on."""
    taken: list[int] = []

    class Counted(dict[bytes, Any]):
        def __getitem__(self, opcode: bytes) -> Any:
            taken.append(1)
            return super().__getitem__(opcode)

    monkeypatch.setattr(pickle_steps, "_STEPS", Counted(_STEPS))
    return taken
