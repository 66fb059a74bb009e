"""The output: the library's bytes, whole or not there at all, and nobody else's file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

import streammerge
from streammerge.compute.expressions import Job
from streammerge.engine import run_merge
from streammerge.errors import CheckpointError, MergeError, OutputError
from streammerge.formats.layout import lay_out
from streammerge.recipe.options import Options
from streammerge.recipe.parse import parse_recipe
from streammerge.storage import writer as writing
from streammerge.storage.placing import temporary_name
from streammerge.storage.writer import OutputWriter, preallocate
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import assert_same_bytes, load_model, make_tensors, raw_bytes, save_models, with_integers

TENSORS = with_integers(make_tensors(3, torch.float16, {"weight": (7, 13), "bias": (63,), "scalar": (), "empty": (0,)}))


@pytest.fixture
def paths(tmp_path):
    return save_models(tmp_path, a=with_integers(make_tensors(1)), b=with_integers(make_tensors(2)))


def recipe_of(paths, **keys):
    return {"merge_method": "linear", "models": [str(paths["a"]), str(paths["b"])], **keys}


def merge(paths, output, *, keys=None, **options):
    return streammerge.merge(recipe_of(paths, **(keys or {})), output=output, sync=False, **options)


def digests(folder: Path) -> dict[str, str]:
    """Everything in a folder, hidden files too, with what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ── the library's bytes ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["keep", "fp16"])
def test_a_whole_merge_writes_what_save_file_writes(tmp_path, paths, dtype):
    """safetensors writes the same file for the same tensors; without the recipe there is only its format mark."""
    out = tmp_path / "out.safetensors"
    merge(paths, out, keys={"dtype": dtype}, metadata=False)
    safetensors.torch.save_file(load_model(out), tmp_path / "theirs.safetensors", {"format": "pt"})
    assert out.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_copied_model_is_the_same_file(tmp_path):
    path = save_models(tmp_path, a=TENSORS)["a"]
    streammerge.merge(streammerge.passthrough(path), output=tmp_path / "out.safetensors", metadata=False, sync=False)
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()


def test_the_recipe_is_in_the_metadata_unless_it_is_not_wanted(tmp_path, paths):
    out = tmp_path / "out.safetensors"
    merge(paths, out)
    with streammerge.open_model(out) as model:
        assert model.metadata["format"] == "pt"
        described = json.loads(model.metadata["streammerge.recipe"])
    assert described["merge_method"] == "linear"
    assert str(tmp_path) not in json.dumps(described)
    merge(paths, out, metadata=False, force=True)
    with streammerge.open_model(out) as model:
        assert model.metadata == {"format": "pt"}


def test_shards_hold_the_same_tensors(tmp_path, paths):
    merge(paths, tmp_path / "whole.safetensors")
    merge(paths, tmp_path / "shards", shard_size="1MB")
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    count = len(names) - 1
    assert count >= 2
    assert names == [
        *(f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)),
        "model.safetensors.index.json",
    ]
    assert_same_bytes(load_model(tmp_path / "shards"), load_model(tmp_path / "whole.safetensors"))
    with streammerge.open_model(tmp_path / "shards") as model:
        assert set(model.tensors) == set(load_model(tmp_path / "whole.safetensors"))


def test_files_have_the_usual_permissions(tmp_path, paths):
    before = os.umask(0o027)
    try:
        merge(paths, tmp_path / "out.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.safetensors").stat().st_mode) == 0o640


def test_folders_are_made(tmp_path, paths):
    merge(paths, tmp_path / "new" / "deep" / "out.safetensors")
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize("name", ["x" * 243 + ".safetensors", "模" * 80 + ".safetensors"])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path, paths, name):
    assert len(name.encode()) <= 255
    merge(paths, tmp_path / name)
    assert (tmp_path / name).is_file()


# ── whole or not at all ──────────────────────────────────────────────────────────────────────────────────────────────


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


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_rename_that_fails_leaves_nothing(tmp_path, paths, monkeypatch, at):
    count = 0
    whole = Path.replace

    def failing(path, target):
        nonlocal count
        count += 1
        if count == at + 1:
            raise OSError(1, "Operation not permitted")
        return whole(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError, match="can't be written: Operation not permitted"):
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


# ── nobody else's file ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["the same path", "a relative path", "a symbolic link", "a hard link", "a folder"])
@pytest.mark.parametrize("force", [False, True])
def test_an_input_is_never_the_output(tmp_path, paths, monkeypatch, kind, force):
    before = digests(tmp_path)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "link.safetensors"
    if kind == "the same path":
        output = paths["a"]
    elif kind == "a relative path":
        output = Path("..") / tmp_path.name / "b.safetensors"
    elif kind == "a symbolic link":
        output.symlink_to(paths["b"])
    elif kind == "a hard link":
        os.link(paths["b"], output)
    else:
        output = tmp_path / "folder"
        output.mkdir()
        (output / "model.safetensors").symlink_to(paths["a"])
    problem = "the output is the same file as the input .*[ab].safetensors\n.*another name.*Nothing was written"
    with pytest.raises(OutputError, match=problem):
        merge(paths, output, force=force)
    assert {name: digests(tmp_path)[name] for name in before} == before


def test_a_shard_of_an_input_is_never_the_output(tmp_path, paths):
    merge(paths, tmp_path / "m", shard_size="1MB")
    shard = min((tmp_path / "m").glob("*.safetensors"))
    before = digests(tmp_path)
    with pytest.raises(OutputError, match="the output is the same file as the input"):
        streammerge.merge(streammerge.passthrough(tmp_path / "m"), output=shard, force=True)
    with pytest.raises(OutputError, match="the output is the same file as the input"):
        streammerge.merge(streammerge.passthrough(tmp_path / "m"), output=tmp_path / "m", shard_size="1MB", force=True)
    assert digests(tmp_path) == before


def test_an_input_of_a_nested_recipe_is_never_the_output(tmp_path, paths):
    nested = {"merge_method": "linear", "models": [recipe_of(paths), str(paths["a"])]}
    with pytest.raises(OutputError, match="the output is the same file as the input"):
        streammerge.merge(nested, output=paths["b"], force=True)


def test_an_output_that_is_there_needs_force(tmp_path, paths):
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    with pytest.raises(
        OutputError, match=r"out.safetensors: the output exists\n  Use --force to replace it, or choose"
    ):
        merge(paths, out)
    assert out.read_text() == "precious"
    merge(paths, out, force=True)
    assert set(load_model(out)) == set(load_model(paths["a"]))


def test_any_shard_or_index_that_is_there_needs_force(tmp_path, paths):
    merge(paths, tmp_path / "elsewhere", shard_size="1MB")
    for path in (tmp_path / "elsewhere").iterdir():
        there = tmp_path / "out" / path.name
        there.parent.mkdir()
        there.write_text("precious")
        with pytest.raises(OutputError, match=f"{there.name}: the output exists"):
            merge(paths, tmp_path / "out", shard_size="1MB")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_not_replaced(tmp_path, paths, force):
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(OutputError, match=r"out.safetensors: there is something here that is no file"):
        merge(paths, tmp_path / "out.safetensors", force=force)


def test_a_file_is_no_folder(tmp_path, paths):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match=r"can't be written: (File exists|Not a directory)"):
        merge(paths, tmp_path / "file" / "out.safetensors")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_name_that_is_too_long_is_an_error(tmp_path, paths):
    with pytest.raises(OutputError, match="can't be written: File name too long"):
        merge(paths, tmp_path / f"{'x' * 300}.safetensors")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error(tmp_path, paths):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="can't be written: Permission denied"):
        merge(paths, tmp_path / "closed" / "out.safetensors")


def test_a_refusal_of_the_system_is_an_error_that_names_the_output(tmp_path, paths, monkeypatch):
    before = digests(tmp_path)
    whole = os.open

    def refuse(path, flags, *arguments, **options):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return whole(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        OutputError, match=r"out.safetensors: can't be written: Permission denied\n  Choose another folder"
    ):
        merge(paths, tmp_path / "out.safetensors")
    monkeypatch.undo()
    assert digests(tmp_path) == before


def test_too_little_disk_is_told_before_anything_is_written(tmp_path, paths, monkeypatch):
    before = digests(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, used=0, free=1000))
    with pytest.raises(
        OutputError, match=r"not enough disk: the output takes .* 1 kB are free.*\n.*Nothing was written"
    ):
        merge(paths, tmp_path / "new" / "out.safetensors")
    assert digests(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["a", "b"])
def test_an_input_that_only_we_would_read_is_refused(tmp_path, paths, monkeypatch, name):
    """The format's own library opens every input too."""
    import safetensors

    whole = safetensors.safe_open

    def strict(path, framework):
        if Path(path).name == f"{name}.safetensors":
            raise SafetensorError("no")
        return whole(path, framework=framework)

    monkeypatch.setattr(safetensors, "safe_open", strict)
    with pytest.raises(CheckpointError, match=f"{name}.safetensors: safetensors refuses it: no\n.*output was removed"):
        merge(paths, tmp_path / "out.safetensors")


def test_verification_reads_back_what_was_written(tmp_path, paths, monkeypatch):
    merge(paths, tmp_path / "good.safetensors", verify=True)
    before = digests(tmp_path)
    whole = OutputWriter.sync

    def flip(writer):
        whole(writer)
        temporary = writer._open[0]
        os.pwrite(temporary.descriptor, b"\x55", temporary.file.nbytes - 1)

    monkeypatch.setattr(OutputWriter, "sync", flip)
    with pytest.raises(OutputError, match="1 tensor is not what the recipe gives\n"):
        streammerge.merge(recipe_of(paths), output=tmp_path / "out.safetensors", verify=True)
    assert digests(tmp_path) == before


# ── the writer by itself ─────────────────────────────────────────────────────────────────────────────────────────────


def test_bytes_lie_where_the_header_says_whoever_writes_them_first(tmp_path):
    infos = {"x": TensorInfo(DTYPES["F32"], (4,)), "y": TensorInfo(DTYPES["U8"], (3,))}
    layout = lay_out(tmp_path / "out.safetensors", infos, {"format": "pt"})
    offsets = layout.files[0].header.offsets
    jobs = {name: Job(name, info, None, None, 0, offsets[name]) for name, info in infos.items()}
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    data = memoryview(raw_bytes(values))
    with OutputWriter(layout) as writer:
        writer.write(jobs["y"], 0, memoryview(b"abc"))
        writer.write(jobs["x"], 8, data[8:])
        writer.write(jobs["x"], 0, data[:8])
        back = bytearray(8)
        writer.read(jobs["x"], 4, memoryview(back))
        assert back == data[4:12]
        writer.forget()
        writer.sync()
        assert not (tmp_path / "out.safetensors").exists()
        writer.commit(sync=True)
    expected = {"x": values, "y": torch.tensor(list(b"abc"), dtype=torch.uint8)}
    assert_same_bytes(load_model(tmp_path / "out.safetensors"), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_writer_that_is_left_without_commit_leaves_nothing(tmp_path):
    layout = lay_out(tmp_path / "out.safetensors", {"x": TensorInfo(DTYPES["F32"], (4,))}, {})
    with OutputWriter(layout):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_every_error_of_a_merge_says_what_is_on_disk(tmp_path, paths):
    for raw in (recipe_of(paths, layuot="a"), recipe_of(paths, on_missing="x"), recipe_of({**paths, "a": "gone"})):
        with pytest.raises(MergeError, match=r"Nothing was written\.$"):
            streammerge.merge(raw, output=tmp_path / "out.safetensors")
