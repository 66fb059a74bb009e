"""Runs streammerge in children that can be killed at any moment: a process that has torch imported, and forks.

    python -m tests.stress.mortal        a line of JSON per run on stdin, one per outcome on stdout

`after` kills a run when so many seconds have passed, `at` just before its so-manieth call of the system that changes
the disk. Every write is slowed down, so that moments in the loop are not rare beside those before and after.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

CALLS = ("pwrite", "fsync", "fdatasync", "replace", "unlink", "ftruncate", "mkdir", "copy_file_range")
"""Functions of `os` that change the disk, or make changes last."""

SLOWER = 0.002


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code, or None if it was killed; and how often it called the system, if it lived."""

    code: int | None
    calls: int
    seconds: float


class Mortals:
    """The process that forks. Use it in a `with` statement."""

    def __enter__(self) -> Mortals:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.mortal"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def run(self, words: Sequence[str], *, after: float | None = None, at: int | None = None, log: Path) -> Outcome:
        """Run streammerge with these words, which writes what it has to say to the log, and kill it or not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"words": list(words), "after": after, "at": at, "log": str(log)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return Outcome(**json.loads(answer))


def serve() -> None:
    """Fork for every line, and say how it ended."""
    import torch  # noqa: F401

    import streammerge.cli.commands.merge
    import streammerge.cli.main
    import streammerge.storage.resume
    import streammerge.workers.schedule  # noqa: F401

    for line in sys.stdin:
        sys.stdout.write(json.dumps(run_child(json.loads(line))) + "\n")
        sys.stdout.flush()


def run_child(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, kill if it is time; the outcome."""
    started = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        live(request, writing)
    os.close(writing)
    status = 0
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if request["after"] is not None and time.monotonic() - started >= request["after"]:
            os.kill(child, signal.SIGKILL)
            request["after"] = None
        time.sleep(0.001)
    status = os.waitstatus_to_exitcode(found[1])
    calls = os.read(reading, 100)
    os.close(reading)
    killed = status == -signal.SIGKILL
    return {
        "code": None if killed else status,
        "calls": int(calls or 0),
        "seconds": time.monotonic() - started,
    }


def live(request: dict[str, Any], writing: int) -> None:
    """A run of streammerge, as a child: ends the process."""
    code = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        counter = Counter(request["at"])
        for name in CALLS:
            counter.count(name)
        from streammerge.cli.main import main

        code = main(request["words"])
        os.write(writing, str(counter.calls).encode())
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Counter:
    """Counts calls of the system, slows them down, and ends the process at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.calls = 0
        self.lock = threading.Lock()

    def count(self, name: str) -> None:
        """Have these calls counted from now on."""
        if not hasattr(os, name):
            return
        whole = getattr(os, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            with self.lock:
                self.calls += 1
                if self.calls == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)
            if name == "pwrite":
                time.sleep(SLOWER)
            return whole(*arguments, **options)

        setattr(os, name, counted)


if __name__ == "__main__":
    serve()
