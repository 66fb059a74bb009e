"""Pickles that make a folder if they are run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.formats.torchzip.opcodes import PROTOCOLS, named, text


def harmful(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Programs, each of which would make a folder called `marker` if it were run as a pickle."""
    path = text(str(marker))
    make = f"c{os.mkdir.__module__}\nmkdir\n".encode()
    yield "REDUCE", make + path + b"\x85R."
    yield "STACK_GLOBAL", b"\x80\4" + text(os.mkdir.__module__) + text("mkdir") + b"\x93" + path + b"\x85R."
    yield "INST", b"(" + path + f"i{os.mkdir.__module__}\nmkdir\n.".encode()
    yield "OBJ", b"(" + make + path + b"o."
    yield "eval", named("builtins.eval") + text(f"__import__('os').mkdir({str(marker)!r})") + b"\x85R."
    yield "getattr", (
        named("builtins.getattr") + named("importlib.import_module") + text("os") + b"\x85R" + text("mkdir")
        + b"\x86R" + path + b"\x85R."
    )  # fmt: skip
    yield "memo", make + b"q\0" + b"0" + b"h\0" + path + b"\x85R."
    yield "in a dict", b"}" + text("a") + make + path + b"\x85Rs."
    yield "before the tensors", make + path + b"\x85R0" + b"}."
    yield "by an object's state", (
        named("builtins.type") + text("T") + b"))" + b"0" + b"}" + text("__setstate__") + make + b"s\x87R"
        + b")\x81" + path + b"b."
    )  # fmt: skip
    for protocol in PROTOCOLS:

        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(marker),)

        yield f"protocol {protocol}", pickle.dumps({"state_dict": Evil()}, protocol)


HARMFUL = [name for name, _ in harmful(Path("x"))]
