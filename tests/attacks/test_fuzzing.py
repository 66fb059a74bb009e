"""The watch that is kept over fuzzed inputs sees whatever a reader may do wrong."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streammerge.errors import CheckpointError
from tests.stress import header_inputs, text_inputs, zip_inputs
from tests.stress.campaign import Effort, Figure
from tests.stress.fuzzing import MAX_BYTES, Fuzzer, fuzz, is_printable


def ten(seed: int) -> Iterator[bytes]:
    while True:
        yield b"input"


def burn(path: Path, data: bytes) -> str:
    started = time.thread_time()
    while time.thread_time() - started < 1.1:
        pass
    return "burnt"


def hold(path: Path, data: bytes) -> str:
    return f"held {len(b'x' * (MAX_BYTES + 2**24)) > 0}"


def hold_all(path: Path, data: bytes) -> str:
    return f"held {len(bytes(2**31))}"


def look_elsewhere(path: Path, data: bytes) -> str:
    with Path(__file__).open("rb"):
        return "read"


def write(path: Path, data: bytes) -> str:
    with path.open("r+b"):
        return "not even written"


def change(path: Path, data: bytes) -> str:
    descriptor = os.open(path, os.O_RDWR)
    os.write(descriptor, b"I")
    os.close(descriptor)
    return "written"


def evaluate(path: Path, data: bytes) -> str:
    return str(eval("1 + 1"))


def call_system(path: Path, data: bytes) -> str:
    return str(os.system("true"))


def import_module(path: Path, data: bytes) -> str:
    sys.modules.pop("colorsys", None)
    import colorsys

    return str(colorsys)


def crash(path: Path, data: bytes) -> str:
    os._exit(9)


def raise_other(path: Path, data: bytes) -> str:
    raise KeyError("w")


def show_codes(path: Path, data: bytes) -> str:
    error = CheckpointError("x")
    error.__class__ = type("Raw", (CheckpointError,), {"__str__": lambda self: "\x1b[31m"})  # not escaped
    raise error


def refuse(path: Path, data: bytes) -> str:
    raise CheckpointError("\x1b[31m\u202e")


WRONG: dict[str, tuple[Callable[[Path, bytes], str], str]] = {
    "BURN": (burn, "it takes 1.1 s"),
    "HOLD": (hold, "bytes of memory are taken"),
    "HOLD_ALL": (hold_all, "MemoryError"),
    "LOOK": (look_elsewhere, "it does what it may not: open"),
    "WRITE": (write, "it does what it may not: open"),
    "CHANGE": (change, "it does what it may not: open"),
    "EVALUATE": (evaluate, "it does what it may not: compile"),
    "SYSTEM": (call_system, "it does what it may not: os.system"),
    "IMPORT": (import_module, "it does what it may not: "),
    "CRASH": (crash, "the worker ended with 9"),
    "RAISE": (raise_other, "KeyError: 'w'"),
    "CODES": (show_codes, "what is shown holds terminal codes"),
}
globals().update({name: Fuzzer("x", ten, read) for name, (read, _) in WRONG.items()})
REFUSE = Fuzzer("x", ten, refuse)


def tried(name: str, folder: Path) -> Figure:
    return fuzz(__name__, name, "inputs", 1, Effort(1, 0, folder))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_seen(tmp_path, name):
    if name == "HOLD_ALL" and not Path("/proc/self/statm").exists():
        pytest.skip("the address space is limited on Linux only")
    figure = tried(name, tmp_path)
    assert figure.failures > 0
    assert WRONG[name][1] in figure.outcome
    kept = Path(figure.outcome.partition("input kept as ")[2].partition(";")[0])
    kept.unlink()


def test_what_is_refused_in_plain_words_is_no_failure(tmp_path):
    figure = tried("REFUSE", tmp_path)
    assert (figure.trials, figure.failures) == (1, 0)
    assert figure.outcome.startswith("1 refused; at most 0.0")


@pytest.mark.parametrize(
    "inputs",
    [
        *(header_inputs.header_files, zip_inputs.torch_zips, zip_inputs.pickles),
        *(text_inputs.recipes, text_inputs.indexes),
    ],
)
def test_the_same_seed_makes_the_same_inputs_and_another_others(inputs):
    first, second, other = ([data for data, _ in zip(inputs(seed), range(30), strict=False)] for seed in (1, 1, 2))
    assert first == second
    assert first != other
    assert len(set(first)) > 15


@pytest.mark.parametrize(
    ("text", "printable"),
    [("a\nb", True), ("é日", True), ("\x1b", False), ("\u202e", False)],
)
def test_what_a_terminal_may_be_shown(text, printable):
    assert is_printable(text) is printable
