"""Standard streams that are closed, full, or read by nobody: no traceback; 0 means that what was asked for is there."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from streammerge.cli.streams import Guarded
from tests.make.models import load_model, make_tensors, save_model

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a shell and /dev/full")

MERGE = ["a.safetensors", "b.safetensors", "-o", "out.safetensors", "--threads", "1"]

CLOSED = {
    "stdin closed": "<&-",
    "stdout closed": ">&-",
    "stdout full": ">/dev/full",
    "stdout read by nobody": "| true",
    "stderr closed": "2>&-",
    "stderr full": "2>/dev/full",
    "all closed": "<&- >&- 2>&-",
}
UNTOLD = ("stdout closed", "stdout full", "all closed")
"""Where what is printed is lost."""

SHOWING = {
    "inspect": ["inspect", "a.safetensors"],
    "plan": ["plan", *MERGE],
    "dry run": [*MERGE, "--dry-run"],
    "methods": ["methods"],
    "recipes": ["recipes", "sd2-depth"],
    "verify": ["verify", "a.safetensors"],
    "clean": ["clean"],
    "version": ["--version"],
    "help": ["plan", "--help"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_model(tmp_path / f"{name}.safetensors", make_tensors(seed, shapes={"x": (40, 30)}))
    return tmp_path


def run(words: list[str], streams: str) -> tuple[int, str]:
    """The exit code, and what was still said on streams that are open."""
    program = shlex.join([sys.executable, "-m", "streammerge", *words])
    command = f"set -o pipefail; {program} {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("streams", CLOSED)
def test_a_merge_is_done_all_the_same(folder, streams):
    code, said = run([*MERGE, "-v"], CLOSED[streams])
    assert code == 0, said
    assert load_model(folder / "out.safetensors").keys() == {"x"}
    assert "Traceback" not in said
    assert ("warning: stdout can't be written: " in said) == (streams in UNTOLD[:2])
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors", "out.safetensors"]


@pytest.mark.parametrize("streams", ["stdout closed", "stdout full", "stderr closed", "stdout read by nobody"])
@pytest.mark.parametrize("command", SHOWING)
def test_what_is_only_shown_has_failed_if_it_was_not(folder, command, streams):
    code, said = run(SHOWING[command], CLOSED[streams])
    assert code == (1 if streams in UNTOLD else 0), said
    assert "Traceback" not in said
    assert "Exception" not in said
    assert ("error: stdout can't be written: " in said) == (streams in UNTOLD)


@pytest.mark.parametrize("streams", CLOSED)
def test_an_error_keeps_its_exit_code(folder, streams):
    code, said = run(["missing.safetensors", "-o", "out.safetensors"], CLOSED[streams])
    assert (code, "Traceback" in said) == (1, False)


def test_a_report_may_go_to_stdout(folder):
    code, said = run([*MERGE, "-q", "--report", "/dev/stdout"], "")
    assert code == 0
    assert said.startswith("{")


def test_no_file_takes_the_number_of_a_stream(folder):
    """What a library writes to number 2 would be written into it."""
    code = (
        "import os; from streammerge.cli import streams; streams.guard_streams(); "
        "assert os.open('new', os.O_CREAT | os.O_RDWR) > 2"
    )
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], check=False)
    assert done.returncode == 0


class Failing:
    """A stream that fails from the second write on."""

    encoding = "ascii"

    def __init__(self, error: OSError) -> None:
        self.error, self.written = error, ""

    def write(self, text: str) -> int:
        if self.written:
            raise self.error
        self.written += text
        return len(text)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError()])
def test_a_guarded_stream_keeps_its_first_error(error):
    failing = Failing(error)
    guarded = Guarded(failing)  # type: ignore[arg-type]
    assert guarded.encoding == "ascii"
    for number in range(4):
        print(number, file=guarded)
    guarded.flush()
    assert failing.written == "0"
    assert guarded.error is (None if isinstance(error, BrokenPipeError) else error)
    assert not guarded.isatty()
