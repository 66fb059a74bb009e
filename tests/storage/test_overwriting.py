"""The output is nobody else's file, and none is replaced unasked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

import streammerge
from streammerge.errors import CheckpointError, OutputError
from streammerge.storage.writer import OutputWriter
from tests.make.models import load_model
from tests.storage.outputs import digests, merge, recipe_of


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
