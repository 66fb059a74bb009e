"""The format's own library, whose parser is audited, as a second judge of a file.

It takes a kilobyte for every tensor while it has a file open, and the process keeps that; and it imports torch or
NumPy. So files with long headers, and all as long as torch is not there, are shown to it in a process of their own,
which is this module, run as a script by its path:

    python -I -S library.py FOLDER_OF_PACKAGES FILE
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Final

LONG_HEADER: Final = 1 << 20
"""How long a header is, in bytes, of which the library takes too much in our own process: some 8,000 tensors'."""


class RefusedError(Exception):
    """What the library has against a file."""


def names_digest(names: Iterable[str]) -> str:
    """A digest of these names, in whatever order they come."""
    made = hashlib.blake2b()
    for name in sorted(names):
        made.update(json.dumps(name).encode())
    return made.hexdigest()


def library_digest(path: Path) -> str:
    """The digest of the names of the tensors that the library finds in a safetensors file; RefusedError if it refuses.

    What the system refuses is an OSError.
    """
    with path.open("rb") as file:
        is_long = int.from_bytes(file.read(8), "little") > LONG_HEADER
    is_apart = sys.executable and (is_long or "torch" not in sys.modules)
    # where it refuses, or can't be had, it is asked here: memory is no matter then
    return (_asked_elsewhere(path) if is_apart else None) or _ask(path)


def _ask(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return names_digest(opened.keys())
    except SafetensorError as error:
        raise RefusedError(str(error)) from error


def _asked_elsewhere(path: Path) -> str | None:
    """What the library finds in a process of its own; None where it doesn't."""
    spec = importlib.util.find_spec("safetensors")
    if spec is None or spec.origin is None:
        return None
    command = [sys.executable, "-I", "-S", __file__, str(Path(spec.origin).parents[1]), str(path)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> None:
    """Show the file to the library, and print the digest of what it finds.

    It asks for torch, of which it needs no more than the version to read a header.
    """
    packages, path = sys.argv[1:]
    sys.path.append(packages)
    torch = types.ModuleType("torch")
    torch.__version__ = "1.0.0"  # type: ignore[attr-defined]
    sys.modules["torch"] = torch
    print(_ask(Path(path)))  # noqa: T201


if __name__ == "__main__":
    main()
