"""One virtual environment for every file of pinned requirements, made once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.tools import PEERS_FOLDER, CannotRun, Tool
from streammerge.tools.bench.floor import read_through

PATIENCE: Final = 1800.0
"""Seconds that an installation may take."""

VERSIONS: Final = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def python_of(tool: Tool, folder: Path, *, install: bool = True) -> Path:
    """The interpreter of the tool's environment, made if need be; CannotRun, with the reason, if it can't be made."""
    if not tool.requirements:
        return Path(sys.executable)
    requirements = PEERS_FOLDER / tool.requirements
    if not requirements.exists():
        raise CannotRun(f"its requirements, {tool.requirements}, are missing")
    place = folder / "environments" / f"{requirements.stem}-{fingerprint(requirements)}"
    python = place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (place / "complete").exists():
        if not install:
            raise CannotRun("its environment is not installed")
        make_environment(place, python, requirements)
    return python


def fingerprint(requirements: Path) -> str:
    """What changes when the requirements or the Python do."""
    return hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:10]


def make_environment(place: Path, python: Path, requirements: Path) -> None:
    """Make the environment; its log stays where it is, so that a failure can be understood."""
    place.parent.mkdir(parents=True, exist_ok=True)
    failed, log = place.with_name(f"{place.name}.failed"), place.with_name(f"{place.name}.log")
    if failed.exists():
        raise CannotRun(failed.read_text(encoding="utf-8"))
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-r", str(requirements)]
    try:
        with log.open("wb") as out:
            for words in ([sys.executable, "-m", "venv", "--clear", str(place)], pip):
                subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, check=True, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"its environment could not be made ({last_line(log) or error}); log: {log}"
        failed.write_text(reason, encoding="utf-8")  # not again in every case; --reinstall tries again
        raise CannotRun(reason) from error
    (place / "complete").touch()


def forget_failures(folder: Path) -> None:
    """Let environments that failed be tried again."""
    for failed in (folder / "environments").glob("*.failed"):
        failed.unlink()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    if not log.exists():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def warm_libraries(python: Path) -> None:
    """Bring an environment's code into the page cache, lest the first run pay for all the others."""
    for folder in ("lib", "Lib"):
        for path in (python.parent.parent / folder).rglob("*"):
            if (path.suffix in (".py", ".pyc", ".so", ".pyd", ".dll") or ".so." in path.name) and path.is_file():
                read_through(path)


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """The installed versions of packages in an environment."""
    words = [str(python), "-c", VERSIONS, *packages]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found
