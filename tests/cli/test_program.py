"""The program as a process: signals, tracebacks, pipes and terminals, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.cli import main as cli
from tests.cli.small_models import VALUES, value

SLOW = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from streammerge.storage.writer import OutputWriter
whole = OutputWriter.write
def write(writer, job, position, data):
    pathlib.Path("started").touch()
    time.sleep(0.3)
    whole(writer, job, position, data)
OutputWriter.write = write
from streammerge.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def start_slow(*words: str) -> subprocess.Popen[str]:
    """A merge that takes its time, under way when this returns."""
    command = [sys.executable, "-c", SLOW, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path("started").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    Path("started").unlink(missing_ok=True)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_merge_leaves_nothing(folder, number, code, there):
    large = {f"layer.{n}": torch.ones(100) for n in range(8)}
    save_file(large, "large.safetensors")
    save_file(large, "large2.safetensors")
    if there:
        Path("out.safetensors").write_text("precious")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    process = start_slow("large.safetensors", "large2.safetensors", "-o", "out.safetensors", "--force", "-q")
    assert any(path.name.endswith(".partial") for path in folder.iterdir())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err == "interrupted: the unfinished output was removed\n"
    Path("started").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def program(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streammerge", *words], capture_output=True, text=True, check=False, **options
    )


def test_the_module_is_the_program(folder):
    done = program("a.safetensors", "b.safetensors", "-o", "out.safetensors")
    told = [line for line in done.stderr.splitlines() if not line.startswith("merge: ")]  # how far it is, after a while
    assert (done.returncode, told) == (0, [])
    assert value() == 2.0
    assert program("a.safetensors", "missing", "-o", "x").returncode == 1
    assert program("a.safetensors", "--nonsense").returncode == 2


def test_a_bug_keeps_its_traceback(folder):
    code = SLOW.replace("time.sleep(0.3)", "1 / 0")
    words = ("a.safetensors", "b.safetensors", "-o", "out.safetensors")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert {path.name for path in folder.iterdir()} == {*(f"{name}.safetensors" for name in VALUES), "started"}


def test_names_that_the_terminal_has_no_letters_for_do_not_stop_it(folder):
    save_file({"模型": torch.ones(1)}, "x.safetensors")
    done = program("inspect", "x.safetensors", "--tensors", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "??" in done.stdout


IN_ASCII = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
"""An environment in which Python takes names for ASCII, if the system has such locales."""


@pytest.mark.skipif(sys.platform != "linux", reason="names are in UTF-8 whatever the locale")
def test_names_are_right_where_python_takes_them_for_ascii(folder):
    save_file({"模型": torch.ones(1)}, "модель.safetensors", {"format": "pt"})
    Path("рецепт.yaml").write_text("merge_method: linear\nmodels: [модель.safetensors]\n", encoding="utf-8")
    made = {}
    for name, environment in (("вых", IN_ASCII), ("usual", None)):
        done = program("рецепт.yaml", "-o", f"{name}.safetensors", env=environment, encoding="utf-8")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{name}.safetensors\n" in done.stdout
        made[name] = Path(f"{name}.safetensors").read_bytes()
    assert made["вых"] == made["usual"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are in UTF-8 whatever the locale")
def test_names_that_a_process_has_no_bytes_for_are_errors(folder):
    script = """
import streammerge
for name in ("a", "\\u6a21"):
    for given in (f"{name}.safetensors", {"merge_method": "linear", "models": [f"{name}.safetensors"]}):
        try:
            streammerge.make_plan(given, output="x") if isinstance(given, dict) else streammerge.open_model(given)
        except streammerge.MergeError as error:
            print(error)
    """
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=IN_ASCII)
    told = [line for line in done.stdout.splitlines() if line.endswith("where names are in ascii")]
    assert [line.startswith("recipe: model 1: ") for line in told] == [False, True]
    assert done.stdout.count("Set PYTHONUTF8=1, or a locale in UTF-8.") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pipe that breaks")
def test_a_reader_that_stops_reading_is_no_error(folder):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "streammerge", "recipes"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
def test_a_terminal_gets_a_bar_and_a_table(folder):
    import pty

    ours, theirs = pty.openpty()
    words = ("a.safetensors", "b.safetensors", "-o", "out.safetensors")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", SLOW, *words], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    printed = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        printed += piece
    os.close(ours)
    assert process.wait() == 0
    text = printed.decode()
    assert "\x1b[" in text
    assert "2 merged, 1 copied, 0 dropped" in text
    assert "RAM" in text


def test_that_there_is_no_numpy_is_nobody_s_business(monkeypatch):
    """It is none of our dependencies, and torch tells every process that it is missing."""

    def told(words: object) -> int:
        warnings.warn("Failed to initialize NumPy: No module named 'numpy' (…)", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "command", told)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    for name in ("stdout", "stderr"):  # put back what `run` puts others in the place of
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        cli.run()
    assert not found
