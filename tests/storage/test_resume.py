"""A merge that was stopped goes on from what is on the disk, to the same bytes, or says why it can't."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.cli.main import main
from streammerge.engine import run_merge
from streammerge.errors import OutputError
from streammerge.methods import METHODS
from streammerge.recipe.options import Options
from streammerge.recipe.parse import parse_recipe
from streammerge.storage import resume
from streammerge.storage.journal import Journal, lock_journal
from streammerge.storage.records import JOURNAL_SUFFIX
from streammerge.storage.writer import OutputWriter
from streammerge.workers import machine
from streammerge.workers.windows import MergeWork, Window
from tests.make.models import MemoryModel, load_model, make_tensors, near, save_models, with_integers
from tests.storage.test_writer import digests

SHAPES = {**{f"layers.{number}.w": (512, 300) for number in range(12)}, "bias": (63,), "scalar": (), "empty": (0, 2)}


@pytest.fixture
def paths(tmp_path):
    base = with_integers(make_tensors(1, shapes=SHAPES))
    return save_models(tmp_path / "models", a=near(base, 2), b=near(base, 3), base=base)


def recipe_of(paths, name="linear", **keys) -> dict[str, Any]:
    base = {"base_model": str(paths["base"])} if METHODS[name].base == "required" else {}
    return {"merge_method": name, "models": [str(paths["a"]), str(paths["b"])], **base, **keys}


class Stopping:
    """Records after every window, and stops the merge after so many of them."""

    def __init__(self, monkeypatch, after: int, error: BaseException | None = None) -> None:
        self.left = after
        self.error = error or KeyboardInterrupt()
        self.windows: list[str] = []
        self.lock = threading.Lock()
        whole = MergeWork.write
        keepers: list[resume.Bookkeeper] = []
        every = resume.Bookkeeper.every

        def noted(keeper, seconds):
            keepers[:] = [keeper]
            return every(keeper, 1000.0 if seconds else 0.0)

        def write(work: MergeWork, window: Window, *arguments: Any) -> None:
            whole(work, window, *arguments)
            with self.lock:
                self.windows.append(work.name)
                keepers[0].record()
                self.left -= 1
                if not self.left:
                    raise self.error

        monkeypatch.setattr(resume.Bookkeeper, "every", noted)
        monkeypatch.setattr(MergeWork, "write", write)


def noting(notes: list[str], what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a note of every call."""

    def noted(*arguments: Any) -> Any:
        notes.append(what)
        return function(*arguments)

    return noted


def slow_down(monkeypatch) -> None:
    """Have every write take some time."""
    write = OutputWriter.write

    def slow(*arguments: Any) -> None:
        time.sleep(0.03)
        write(*arguments)

    monkeypatch.setattr(OutputWriter, "write", slow)


def run(raw: dict[str, Any], output: Path, tell: Callable[[str], None] = lambda _: None, **options: Any):
    return run_merge(parse_recipe(raw, Path()), output, Options(threads=1, **options), None, tell)


def stop(monkeypatch, raw, output, *, after=4, error=None, **options) -> Stopping:
    """Run it and stop it."""
    with monkeypatch.context() as patches:
        stopping = Stopping(patches, after, error)
        with pytest.raises(type(stopping.error)):
            run(raw, output, **options)
    return stopping


def whole(raw, folder: Path, **options) -> dict[str, str]:
    """The right bytes."""
    run(raw, folder / "out.safetensors", **options)
    return digests(folder)


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


# ── or it says why it can't ──────────────────────────────────────────────────────────────────────────────────────────


def weaker(raw, paths):
    raw["models"] = [str(paths["a"]), {"model": str(paths["b"]), "parameters": {"weight": 0.25}}]


def touched(raw, paths):
    os.utime(paths["a"], ns=(0, 0))


def replaced(raw, paths):
    status = paths["a"].stat()
    shutil.copy(paths["a"], paths["a"].with_suffix(".new"))
    paths["a"].with_suffix(".new").replace(paths["a"])
    os.utime(paths["a"], ns=(status.st_atime_ns, status.st_mtime_ns))


def rewritten(raw, paths):
    status = paths["a"].stat()
    with paths["a"].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(paths["a"], ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Path]], None], str]] = {
    "a weight": (weaker, r"recipe models\.1\.parameters\.weight: was not there, is 0.25"),
    "the dtype": (lambda raw, _: raw.update(dtype="fp16"), "recipe dtype: was not there, is float16"),
    "the seed": (lambda raw, _: raw.update(seed=3), "recipe seed: was not there, is 3"),
    "the order": (lambda raw, _: raw["models"].reverse(), r"recipe models\.0\.model: was a.safetensors, is b"),
    "a time": (touched, r"input .*a\.safetensors \(time of change in ns\): was \d+, is 0"),
    "a file": (replaced, r"input .*a\.safetensors \(inode\): was \d+, is \d+"),
    "a byte": (rewritten, r"content .*a\.safetensors: is another"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_said_and_nothing_is_lost(tmp_path, paths, monkeypatch, change):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output)
    before = digests(tmp_path / "new")
    changed, line = CHANGES[change]
    changed(raw, paths)
    problem = f"can't be resumed: what is merged has changed\n  (.*\n  )*{line}(.*\n)*.*is left as it is"
    with pytest.raises(OutputError, match=problem):
        run(raw, output, resume=True)
    assert digests(tmp_path / "new") == before


@pytest.mark.parametrize("options", [{"shard_size": 2_000_000}, {"metadata": False}, {"device": "auto"}])
def test_other_options_that_change_the_bytes_are_refused(tmp_path, paths, monkeypatch, options):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output)
    with pytest.raises(OutputError, match="can't be resumed"):
        run(raw, output, resume=True, **options)


def test_a_method_that_was_rewritten_is_refused(tmp_path, paths, monkeypatch):
    source = tmp_path / "own.py"
    text = '''
from streammerge.methods import BlockMethod, method

@method(BlockMethod)
def rewritten(*models):
    """θ = θ₁"""
    return models[0] * 1
'''
    try:
        source.write_text(text)
        streammerge.load_methods(source)
        raw, output = recipe_of(paths, "rewritten"), tmp_path / "new" / "out.safetensors"
        stop(monkeypatch, raw, output)
        source.write_text(text.replace("* 1", "* 2"))
        with pytest.raises(OutputError, match="method rewritten: is another"):
            run(raw, output, resume=True)
    finally:
        METHODS.pop("rewritten", None)


def test_parameters_of_python_calls_count(tmp_path, paths, monkeypatch):
    """There is no recipe to be compared."""
    output = tmp_path / "new" / "out.safetensors"
    with monkeypatch.context() as patches:
        Stopping(patches, 4)
        with pytest.raises(KeyboardInterrupt):
            streammerge.merge(streammerge.slerp(paths["a"], paths["b"], t=0.3), output=output, threads=1)
    with pytest.raises(OutputError, match=r"tensor layers\.\d+\.w: is another"):
        streammerge.merge(streammerge.slerp(paths["a"], paths["b"], t=0.4), output=output, resume=True)
    report = streammerge.merge(streammerge.slerp(paths["a"], paths["b"], t=0.3), output=output, resume=True)
    assert report.resumed_bytes


def test_models_without_identity_can_not_be_resumed(tmp_path):
    model = MemoryModel({"x": torch.ones(3)})
    with pytest.raises(OutputError, match="models that are Python objects can't be resumed"):
        streammerge.merge(streammerge.scale(model, alpha=2.0), output=tmp_path / "out.safetensors", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_with_nothing_to_resume_it_begins_and_says_so(tmp_path, paths):
    told: list[str] = []
    run(recipe_of(paths), tmp_path / "out.safetensors", told.append, resume=True)
    assert told == ["nothing to resume: merging from the beginning"]
    with pytest.raises(OutputError, match="the output exists"):
        run(recipe_of(paths, dtype="fp16"), tmp_path / "out.safetensors", resume=True)


@pytest.mark.parametrize("damage", ["removed", "cut", "another header"])
def test_files_that_are_not_what_was_left_are_not_gone_on_with(tmp_path, paths, monkeypatch, damage):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    right = whole(raw, tmp_path / "right")
    stop(monkeypatch, raw, output)
    (partial,) = (tmp_path / "new").glob(".*.partial")
    if damage == "removed":
        partial.unlink()
        run(raw, output, resume=True)
    else:
        with partial.open("r+b") as file:
            if damage == "cut":
                file.truncate(1000)
            else:
                file.write(b"\x01")
        with pytest.raises(OutputError, match="is not what the interrupted merge left"):
            run(raw, output, resume=True)
        run(raw, output)
    assert digests(tmp_path / "new").items() >= right.items()


@pytest.mark.parametrize("topics", [(), ("recipe",), ("program", "recipe", "output"), ("output", "tensor")])
def test_what_does_not_tell_of_the_inputs_is_not_gone_on_with(tmp_path, paths, monkeypatch, topics):
    """Or a journal from elsewhere could have anything put into the output."""
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output)
    journal = lock_journal(output.with_name(f".out.safetensors{JOURNAL_SUFFIX}"), create=False)
    assert journal is not None
    contents = journal.contents
    journal.begin(contents.output, contents.files)
    journal.identify({topic: contents.fingerprint[topic] for topic in topics if contents.fingerprint})
    journal.add(contents.entry)
    journal.close()
    with pytest.raises(OutputError, match="can't be resumed: what is merged has changed"):
        run(raw, output, resume=True)


# ── beside others ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_runs_on_one_output(tmp_path, paths):
    output = tmp_path / "new" / "out.safetensors"
    second: list[BaseException] = []

    def look(progress):
        if not second:
            with pytest.raises(OutputError) as error:
                run(recipe_of(paths), output, shard_size=2_000_000)
            second.append(error.value)

    run_merge(parse_recipe(recipe_of(paths), Path()), output, Options(), look)
    assert "another run of streammerge is writing this output" in str(second[0])
    assert str(second[0]).endswith("Nothing was written.")
    assert list(digests(tmp_path / "new")) == ["out.safetensors"]


def test_a_new_merge_keeps_what_can_be_resumed_and_says_so(tmp_path, paths, monkeypatch):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    right = whole(raw, tmp_path / "right")
    stop(monkeypatch, raw, output)
    told: list[str] = []
    run(recipe_of(paths, dtype="fp16"), output, told.append)
    assert len(told) == 1
    assert "--resume goes on with it, `streammerge clean" in told[0]
    assert len(digests(tmp_path / "new")) == 3
    report = run(raw, output, resume=True, force=True)
    assert report.resumed_bytes
    assert digests(tmp_path / "new") == right


def test_the_one_that_matches_is_resumed(tmp_path, paths, monkeypatch):
    output = tmp_path / "new" / "out.safetensors"
    raws = [recipe_of(paths, dtype=dtype) for dtype in ("fp16", "bf16", "fp32")]
    for raw in raws:
        stop(monkeypatch, raw, output)
    for raw in raws:
        assert run(raw, output, resume=True, force=True).resumed_bytes
    assert list(digests(tmp_path / "new")) == ["out.safetensors"]


def test_unfinished_files_that_can_not_be_resumed_are_removed(tmp_path, paths):
    folder = tmp_path / "new"
    folder.mkdir()
    journal = lock_journal(folder / f".out.safetensors{JOURNAL_SUFFIX}", create=True)
    assert journal is not None
    left = folder / f".out.safetensors.{'0' * 16}.partial"
    journal.begin("out.safetensors", {left.name: "out.safetensors"})
    left.write_text("unfinished")
    journal.close()
    run(recipe_of(paths), folder / "out.safetensors")
    assert list(digests(folder)) == ["out.safetensors"]


def test_a_finished_merge_leaves_no_journal_whatever_it_finds(tmp_path, paths):
    (tmp_path / f".out.safetensors{JOURNAL_SUFFIX}").write_bytes(b"\xff" * 100)
    run(recipe_of(paths), tmp_path / "out.safetensors", resume=True)
    assert not list(tmp_path.glob(f"*{JOURNAL_SUFFIX}"))


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
        import time; time.sleep(5)
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
