"""What a tool is to the benchmarks: how it is installed, and how a case is put in its words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cases import Case

PEERS_FOLDER = Path(__file__).parent / "peers"


class CannotRun(Exception):  # noqa: N818  (it is no error: the report shows its reason)
    """Why a tool does not run a case, in words for the report."""


@dataclass(frozen=True)
class Job:
    """A case as one tool is to run it, once.

    `models` has a file for every role, or a folder of shards where the case's container says so. `output` is an empty
    folder: whatever model stands in it afterwards is the result. `scratch` is an empty folder for configurations; what
    is written there before the process starts isn't timed. Both are removed after the run.
    """

    case: Case
    models: Mapping[str, Path]
    output: Path
    scratch: Path
    python: Path

    def program(self, name: str) -> Path:
        """A console script of the tool's environment."""
        return self.python.parent / (f"{name}.exe" if sys.platform == "win32" else name)

    @property
    def timing(self) -> Path:
        """Where the tool may write `{"loop": seconds}`, if it can tell its merge loop from the rest.

        streammerge writes its report there.
        """
        return self.scratch / "timing.json"


@dataclass(frozen=True)
class Command:
    """A process to start: its words, what it needs in its environment, and what readers of its figures must know."""

    words: tuple[str, ...]
    note: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tool:
    """A merger. `command` gives the process for a job, or raises CannotRun with the reason.

    `requirements` is a file of pinned requirements in `benchmarks/peers`; tools that name the same file share one
    virtual environment, and "" is the environment that the benchmarks run in. `packages` are those whose versions
    the report shows.
    """

    name: str
    title: str
    command: Callable[[Job], Command]
    requirements: str = ""
    packages: tuple[str, ...] = ("torch", "safetensors")
