"""The output is whole or not there at all, whatever fails."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

import streammerge
from streammerge.engine import run_merge
from streammerge.errors import CheckpointError, OutputError
from streammerge.formats.layout import lay_out
from streammerge.recipe.options import Options
from streammerge.recipe.parse import parse_recipe
from streammerge.storage import writer as writing
from streammerge.storage.placing import temporary_name
from streammerge.storage.writer import OutputWriter, preallocate
from streammerge.tensors import DTYPES, TensorInfo
from tests.storage.outputs import digests, merge, recipe_of
from tests.storage.renaming import failing


class Failing:
    """Lets the writer write a few blocks, and then fails."""

    def __init__(self, monkeypatch, error: BaseException, after: int = 3) -> None:
        self.left = after
        whole = OutputWriter.write

        def write(writer, job, position, data):
            self.left -= 1
            if self.left < 0:
                raise error
            whole(writer, job, position, data)

        monkeypatch.setattr(OutputWriter, "write", write)


@pytest.mark.parametrize("shard_size", [None, "1MB"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError(), OutputError("full")])
def test_a_merge_that_fails_leaves_nothing(tmp_path, paths, monkeypatch, error, shard_size):
    before = digests(tmp_path)
    Failing(monkeypatch, error)
    with pytest.raises(type(error)):
        merge(paths, tmp_path / "out.safetensors", shard_size=shard_size)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("shard_size", [None, "1MB"])
def test_a_merge_that_fails_leaves_what_was_there(tmp_path, paths, monkeypatch, shard_size):
    merge(paths, tmp_path / "out.safetensors", shard_size=shard_size, keys={"dtype": "fp16"})
    before = digests(tmp_path)
    Failing(monkeypatch, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        merge(paths, tmp_path / "out.safetensors", shard_size=shard_size, force=True)
    assert digests(tmp_path) == before


def test_an_error_says_that_the_unfinished_output_is_gone(tmp_path, paths, monkeypatch):
    Failing(monkeypatch, OutputError("the disk is full"))
    with pytest.raises(OutputError, match=r"the disk is full\n  The unfinished output was removed\."):
        merge(paths, tmp_path / "out.safetensors")


def test_an_interrupt_while_workers_write_leaves_nothing(tmp_path, paths, monkeypatch):
    before = digests(tmp_path)
    whole = OutputWriter.write

    def slow(writer, job, position, data):
        time.sleep(0.05)
        whole(writer, job, position, data)

    def interrupt(progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputWriter, "write", slow)
    recipe = parse_recipe(recipe_of(paths), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_merge(recipe, tmp_path / "out.safetensors", Options(sync=False), interrupt)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("number", [5, 28])
def test_a_disk_that_fails_is_an_error_that_names_the_output(tmp_path, paths, monkeypatch, number):
    before = digests(tmp_path)
    whole = os.pwrite
    calls = []

    def failing(descriptor, data, offset):
        calls.append(offset)
        if len(calls) > 4:
            raise OSError(number, os.strerror(number))
        return whole(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OutputError, match=f"out.safetensors: can't be written: {os.strerror(number)}") as error:
        merge(paths, tmp_path / "out.safetensors")
    assert ".partial" not in str(error.value)
    assert digests(tmp_path) == before


def test_a_disk_that_fills_up_while_files_are_made_leaves_nothing(tmp_path, paths, monkeypatch):
    before = digests(tmp_path)
    calls = []

    def full(descriptor, offset, nbytes):
        calls.append(nbytes)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match="can't be written: No space left on device"):
        merge(paths, tmp_path / "out.safetensors", shard_size="1MB")
    assert len(calls) == 2
    assert digests(tmp_path) == before


@pytest.mark.parametrize("has_fallocate", [True, False])
def test_file_systems_that_promise_nothing_do_too(tmp_path, monkeypatch, has_fallocate):
    def unsupported(descriptor, offset, nbytes):
        raise OSError(95, "Operation not supported")

    if has_fallocate:
        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    descriptor = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    preallocate(descriptor, 12345)
    os.close(descriptor)
    assert (tmp_path / "x").stat().st_size == 12345


def test_a_finished_file_that_the_library_refuses_is_not_put_in_place(tmp_path, paths, monkeypatch):
    before = digests(tmp_path)
    whole = OutputWriter.write

    def over_the_header(writer, job, position, data):
        whole(writer, job, position, data)
        os.pwrite(writer._open[0].descriptor, b"\xff" * 8, 0)

    monkeypatch.setattr(OutputWriter, "write", over_the_header)
    with pytest.raises(OutputError, match=r"out.safetensors: the finished file does not pass safetensors' own check"):
        merge(paths, tmp_path / "out.safetensors")
    assert digests(tmp_path) == before


def test_a_finished_file_of_other_tensors_is_not_put_in_place(tmp_path, monkeypatch):
    layout = lay_out(tmp_path / "out.safetensors", {"x": TensorInfo(DTYPES["F32"], (2,))}, {})
    other = lay_out(tmp_path / "out.safetensors", {"y": TensorInfo(DTYPES["F32"], (2,))}, {})
    with OutputWriter(layout) as writer:
        os.pwrite(writer._open[0].descriptor, other.files[0].header.encoded, 0)
        with pytest.raises(OutputError, match="holds other tensors than were planned"):
            writer.check()
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_changes_meanwhile_is_an_error_and_leaves_nothing(tmp_path, paths, monkeypatch):
    whole = OutputWriter.write
    before = digests(tmp_path)

    def touching(writer, job, position, data):
        os.utime(paths["a"], ns=(0, 0))
        whole(writer, job, position, data)

    monkeypatch.setattr(OutputWriter, "write", touching)
    with pytest.raises(CheckpointError, match=r"a.safetensors: the file changed while it was being merged"):
        merge(paths, tmp_path / "out.safetensors")
    assert digests(tmp_path) == before


def test_the_index_comes_last(tmp_path, paths, monkeypatch):
    order = []
    whole = Path.replace

    def noting(path, target):
        order.append(Path(target).name)
        return whole(path, target)

    monkeypatch.setattr(Path, "replace", noting)
    merge(paths, tmp_path / "out", shard_size="1MB")
    assert order[-1] == "model.safetensors.index.json"
    assert len(order) == len(list((tmp_path / "out").iterdir())) >= 3


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_rename_that_fails_leaves_nothing(tmp_path, paths, monkeypatch, at):
    refused = pytest.raises(OutputError, match="can't be written: Operation not permitted")
    with failing(monkeypatch, at), refused:
        merge(paths, tmp_path / "out", shard_size="1MB")
    assert not (tmp_path / "out").exists()


def test_the_output_is_not_there_while_it_is_written(tmp_path, paths, monkeypatch):
    seen = []
    whole = OutputWriter.write

    def looking(writer, job, position, data):
        seen.append({path.name for path in tmp_path.iterdir()} - {"a.safetensors", "b.safetensors"})
        whole(writer, job, position, data)

    monkeypatch.setattr(OutputWriter, "write", looking)
    merge(paths, tmp_path / "out.safetensors")
    assert len(seen[0]) == 2
    journal, name = sorted(seen[0], key=lambda name: name.endswith(".partial"))
    assert re.fullmatch(r"\.out\.safetensors\.[0-9a-f]{16}\.partial", name)
    assert journal == ".out.safetensors.streammerge-journal"
    assert all(names == seen[0] for names in seen)


def test_temporary_names_are_hidden_and_not_guessable(tmp_path):
    names = {temporary_name(tmp_path / "out.safetensors").name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(".") and name.endswith(".partial") for name in names)
    assert temporary_name(tmp_path / "x").parent == tmp_path


def test_a_file_that_waits_under_the_temporary_name_is_not_followed(tmp_path, paths, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(writing, "temporary_name", lambda path: path.with_name("guessed"))
    (tmp_path / "guessed").symlink_to(victim)
    with pytest.raises(OutputError, match=r"out.safetensors: can't be written: File exists"):
        merge(paths, tmp_path / "out.safetensors")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("sync", [True, False])
def test_what_is_synced_is_synced_before_it_is_put_in_place(tmp_path, paths, monkeypatch, sync):
    events = []
    fsync, replace = os.fsync, Path.replace

    def noted_sync(descriptor):
        events.append("sync")
        fsync(descriptor)

    def noted_replace(path, target):
        events.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    streammerge.merge(recipe_of(paths), output=tmp_path / "out.safetensors", sync=sync)
    assert events == (["sync", "sync", "replace", "sync"] if sync else ["replace"])
