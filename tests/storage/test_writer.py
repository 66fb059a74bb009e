"""The output has the library's bytes, whoever writes them first."""

from __future__ import annotations

import json
import os
import stat

import pytest
import safetensors.torch
import torch

import streammerge
from streammerge.compute.job import Job
from streammerge.errors import MergeError
from streammerge.formats.layout import lay_out
from streammerge.storage.writer import OutputWriter
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import assert_same_bytes, load_model, make_tensors, raw_bytes, save_models, with_integers
from tests.storage.outputs import merge, recipe_of

TENSORS = with_integers(make_tensors(3, torch.float16, {"weight": (7, 13), "bias": (63,), "scalar": (), "empty": (0,)}))


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
