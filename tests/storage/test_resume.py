"""A merge that was stopped goes on from what is on the disk, to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.cli.main import main
from streammerge.engine import run_merge
from streammerge.errors import OutputError
from streammerge.recipe.options import Options
from streammerge.recipe.parse import parse_recipe
from streammerge.storage.journal import Journal
from streammerge.storage.records import JOURNAL_SUFFIX
from streammerge.storage.writer import OutputWriter
from streammerge.workers import machine
from tests.make.models import load_model, make_tensors, near, save_models, with_integers
from tests.storage.outputs import digests
from tests.storage.stopped_merges import SHAPES, Stopping, noting, recipe_of, run, stop, whole


@pytest.fixture
def paths(tmp_path):
    base = with_integers(make_tensors(1, shapes=SHAPES))
    return save_models(tmp_path / "models", a=near(base, 2), b=near(base, 3), base=base)


def slow_down(monkeypatch) -> None:
    """Have every write take some time."""
    write = OutputWriter.write

    def slow(*arguments: Any) -> None:
        time.sleep(0.03)
        write(*arguments)

    monkeypatch.setattr(OutputWriter, "write", slow)


CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"parameters": {"t": 0.3}},
    "ties": {"parameters": {"density": 0.5}},
    "dare_linear": {"parameters": {"density": 0.5}, "seed": 5},
    "pcb": {"parameters": {"ratio": 0.3}},
    "truncate_rank": {"parameters": {"rank": 3}},
}


# ── to the same bytes ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shard_size", [None, "2MB"])
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_merge_gives_the_same_bytes(tmp_path, paths, monkeypatch, name, shard_size):
    raw = recipe_of(paths, name, **CASES[name])
    if name == "truncate_rank":
        raw["models"] = raw["models"][:1]
    options: dict[str, Any] = {"shard_size": streammerge.recipe.options.parse_size(shard_size) if shard_size else None}
    right = whole(raw, tmp_path / "right", **options)
    output = tmp_path / "new" / "out.safetensors"
    first = stop(monkeypatch, raw, output, after=4, **options)
    assert not output.exists()
    again = stop(monkeypatch, raw, output, after=3, resume=True, **options)
    with monkeypatch.context() as patches:
        last = Stopping(patches, 1000)
        report = run(raw, output, resume=True, **options)
    done = first.windows + again.windows + last.windows
    assert len(done) == len(set(done)), "a tensor was made twice"
    tensors = load_model(paths["a"])
    copied = sum(tensors[name].nbytes for name in ("positions", "mask"))
    assert report.resumed_bytes == copied + sum(tensors[name].nbytes for name in first.windows + again.windows)
    assert digests(tmp_path / "new") == right


def test_what_is_copied_is_not_copied_again(tmp_path, paths, monkeypatch):
    raw = recipe_of(paths, rules=[{"match": "layers.1*", "take": "a"}])
    right = whole(raw, tmp_path / "right")
    output = tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output)
    copied: list[str] = []
    copy = OutputWriter.copy
    monkeypatch.setattr(OutputWriter, "copy", noting(copied, "copy", copy))
    run(raw, output, resume=True)
    assert not copied
    assert digests(tmp_path / "new") == right


def test_windows_of_one_tensor_are_told_apart(tmp_path, monkeypatch):
    tensors = make_tensors(1, shapes={"w": (16 << 18, 2)})
    found = save_models(tmp_path / "models", a=tensors, b=near(tensors, 2))
    raw = {"merge_method": "linear", "models": [str(found["a"]), str(found["b"])]}
    right = whole(raw, tmp_path / "right")
    output = tmp_path / "new" / "out.safetensors"
    first = stop(monkeypatch, raw, output, after=1)
    with monkeypatch.context() as patches:
        last = Stopping(patches, 1000)
        report = run(raw, output, resume=True)
    assert first.windows == ["w"]
    assert last.windows
    assert 0 < report.resumed_bytes < 16 << 21
    assert digests(tmp_path / "new") == right


def test_values_that_are_not_finite_are_counted_once(tmp_path, monkeypatch):
    tensors = make_tensors(1, shapes=SHAPES)
    for name in tensors:
        if name.startswith("layers"):
            tensors[name][0, :3] = torch.inf
    found = save_models(tmp_path / "models", a=tensors)
    raw = {"merge_method": "scale", "models": [str(found["a"])], "parameters": {"alpha": 2.0}}
    output = tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output, after=5)
    report = run(raw, output, resume=True)
    assert report.nonfinite == {f"layers.{number}.w": 3 for number in range(12)}


def test_threads_memory_and_reading_may_change(tmp_path, paths, monkeypatch):
    raw = recipe_of(paths, "slerp", parameters={"t": 0.3})
    right = whole(raw, tmp_path / "right")
    output = tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output, io="mmap")
    monkeypatch.setattr(machine, "resident_bytes", lambda: 200 << 20)  # whatever other tests have taken
    run_merge(parse_recipe(raw, Path()), output, Options(threads=2, io="pread", resume=True, max_ram=1 << 30))
    assert digests(tmp_path / "new") == right


@pytest.mark.parametrize("error", [RuntimeError("broken"), OutputError("full"), MemoryError(), KeyboardInterrupt()])
def test_whatever_stops_a_merge_it_can_be_resumed(tmp_path, paths, monkeypatch, error):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    right = whole(raw, tmp_path / "right")
    stop(monkeypatch, raw, output, error=error)
    names = sorted(digests(tmp_path / "new"))
    assert len(names) == 2
    assert names[1] == f".out.safetensors{JOURNAL_SUFFIX}"
    run(raw, output, resume=True)
    assert digests(tmp_path / "new") == right


def test_it_says_how_to_go_on(tmp_path, paths, monkeypatch):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    stopping = stop(monkeypatch, raw, output)
    text = f"with --resume goes on from there, `streammerge clean {tmp_path / 'new'}` removes them."
    assert str(stopping.error).endswith(text)
    stopping = stop(monkeypatch, raw, output, resume=True, error=OutputError("full"))
    assert str(stopping.error).endswith(text)


def test_a_merge_that_is_stopped_before_the_first_record_leaves_nothing(tmp_path, paths):
    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"The unfinished output was removed\."):
        run_merge(parse_recipe(recipe_of(paths), Path()), tmp_path / "deep" / "new" / "out", Options(), interrupt)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("options", [{"journal": 0.0}, {"sync": False, "journal": 0.001}])
def test_without_a_journal_nothing_is_kept(tmp_path, paths, monkeypatch, options):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    monkeypatch.setattr(OutputWriter, "write", lambda *_: time.sleep(0.01))

    def interrupt(progress):
        if progress.done_bytes > progress.total_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_merge(parse_recipe(raw, Path()), output, Options(**options), interrupt)
    assert not (tmp_path / "new").exists()


def test_the_thread_writes_down_what_is_done(tmp_path, paths, monkeypatch):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    right = whole(raw, tmp_path / "right")
    slow_down(monkeypatch)

    def interrupt(progress):
        if progress.done_bytes > progress.total_bytes * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_merge(parse_recipe(raw, Path()), output, Options(journal=0.01, threads=1), interrupt)
    report = run(raw, output, resume=True)
    assert report.resumed_bytes > 0
    assert digests(tmp_path / "new") == right


def test_a_disk_that_can_not_be_synced_stops_the_merge(tmp_path, paths, monkeypatch):
    def failing(writer):
        raise OutputError("the disk is gone")

    monkeypatch.setattr(OutputWriter, "sync_data", failing)
    slow_down(monkeypatch)
    with pytest.raises(OutputError, match=r"the disk is gone\n  The unfinished output was removed\."):
        run(recipe_of(paths), tmp_path / "new" / "out.safetensors", journal=0.01)
    assert not (tmp_path / "new").exists()


def test_data_are_synced_before_the_journal_says_so(tmp_path, paths, monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(Journal, "add", noting(events, "record", Journal.add))
    monkeypatch.setattr(OutputWriter, "sync_data", noting(events, "data", OutputWriter.sync_data))
    stop(monkeypatch, recipe_of(paths), tmp_path / "new" / "out.safetensors", after=6)
    assert len(events) >= 6
    assert events == ["data", "record"] * (len(events) // 2)


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_line_resumes(tmp_path, paths, monkeypatch, capsys):
    words = [str(paths["a"]), str(paths["b"]), "-o", str(tmp_path / "out.safetensors"), "--threads", "1"]
    with monkeypatch.context() as patches:
        Stopping(patches, 4)
        assert main(words) == 130
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("interrupted: ")
    assert "the same command with --resume goes on from there" in err
    assert main([*words, "--resume", "-v"]) == 0
    assert "resumed: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.safetensors"]


@pytest.mark.parametrize("word", ["-1", "nan", "x", "1e9"])
def test_seconds_are_a_number(word, capsys):
    with pytest.raises(SystemExit):
        main(["a", "b", "-o", "c", f"--journal={word}"])
    assert "expected a number of seconds" in capsys.readouterr().err


SIGNALS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored in the background
from streammerge.storage import resume
from streammerge.workers import windows as works
from streammerge.cli.main import run
whole, every, keepers, count = works.MergeWork.write, resume.Bookkeeper.every, [], [0]
def noted(keeper, seconds):
    keepers.append(keeper)
    return every(keeper, 1000.0)
def write(*words):
    whole(*words)
    count[0] += 1
    if count[0] == 4:
        keepers[0].record()
        os.kill(os.getpid(), int(os.environ["NUMBER"]))
        import time; time.sleep(1)
resume.Bookkeeper.every = noted
works.MergeWork.write = write
run()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143), (1, 129), (9, -9)])
def test_signals(tmp_path, paths, number, code):
    right = whole(recipe_of(paths), tmp_path / "right")
    words = [str(paths["a"]), str(paths["b"]), "-o", str(tmp_path / "new" / "out.safetensors"), "-q", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", SIGNALS, *words],
        env={**os.environ, "NUMBER": str(number)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == (0 if number == 9 else 1)
    assert number == 9 or "with --resume goes on" in done.stderr
    assert len(digests(tmp_path / "new")) == 2
    assert run(recipe_of(paths), tmp_path / "new" / "out.safetensors", resume=True).resumed_bytes
    assert set(load_model(tmp_path / "new" / "out.safetensors")) == set(load_model(paths["a"]))
    assert digests(tmp_path / "new").keys() == right.keys()
