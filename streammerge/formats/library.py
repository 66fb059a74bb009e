"""The format's own library, whose parser is audited, as a second judge of a file.

It takes a kilobyte for every tensor while it has a file open, and the process keeps that; and it imports torch or
NumPy. So files with long headers, and all as long as torch is not there, are shown to it in a process of their own,
which is this module, run as a script by its path:

    python -I -S library.py FOLDER_OF_PACKAGES FILE …
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    # where it refuses elsewhere, or can't be had there, it is asked here: memory is no matter then
    return digests_elsewhere([path]).get(path) or _ask(path)


def digests_elsewhere(paths: Sequence[Path], processes: int = 1) -> dict[Path, str]:
    """The same of all files that must not be opened in this process and can be read in others, so many at a time."""
    apart = [path for path in paths if _is_apart(path)] if sys.executable else []
    if not apart:
        return {}
    with ThreadPoolExecutor(processes) as pool:
        shares = [apart[number::processes] for number in range(min(processes, len(apart)))]
        answers = zip(shares, pool.map(_asked_elsewhere, shares), strict=True)
        return {path: digest for share, found in answers for path, digest in zip(share, found, strict=False) if digest}


def _is_apart(path: Path) -> bool:
    if "torch" not in sys.modules:
        return True
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little") > LONG_HEADER


def _ask(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return names_digest(opened.keys())
    except SafetensorError as error:
        raise RefusedError(str(error)) from error


def _asked_elsewhere(paths: Sequence[Path]) -> list[str]:
    """What the library finds in a process of its own; "" where it finds nothing, or fewer where the process fails."""
    spec = importlib.util.find_spec("safetensors")
    if spec is None or spec.origin is None:
        return []
    command = [sys.executable, "-I", "-S", __file__, str(Path(spec.origin).parents[1]), *map(str, paths)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def main() -> None:
    """Show files to the library, and print the digest of what it finds in each, on a line of its own.

    It asks for torch, of which it needs no more than the version to read a header.
    """
    packages, *paths = sys.argv[1:]
    sys.path.append(packages)
    torch = types.ModuleType("torch")
    torch.__version__ = "1.0.0"  # type: ignore[attr-defined]
    sys.modules["torch"] = torch
    for path in paths:
        try:
            print(_ask(Path(path)))  # noqa: T201
        except (OSError, RefusedError):
            print()  # noqa: T201


if __name__ == "__main__":
    main()
