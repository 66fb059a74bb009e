"""Checkpoints as models: opened by what is in them, in one file or many, and read no further than asked."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from streammerge import open_model
from streammerge.compute.expressions import Stored, Viewed
from streammerge.errors import CheckpointError
from streammerge.models.checkpoints import Checkpoint
from streammerge.tensors import DTYPES, Model
from tests.make.models import assert_same_bytes, make_tensors, raw_bytes, save_model, with_integers

SHAPES = {"b.weight": (7, 13), "a.bias": (63,), "scalar": (), "empty": (0,), "one": (1,)}


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return with_integers(make_tensors(seed, dtype, SHAPES))


def read_all(model: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: model.read(name, 0, info.elements).reshape(info.shape) for name, info in model.tensors.items()}


def save_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, str] | None = None):
    """Shards (`.bin` ones by torch.save) and their index; where each tensor is, unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        if name.endswith(".bin"):
            torch.save(tensors, folder / name)
        else:
            save_model(folder / name, tensors)
    known = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": known if weight_map is None else weight_map}))
    return index


def split_small() -> dict[str, dict[str, torch.Tensor]]:
    tensors = small()
    names = list(tensors)
    return {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[:3]},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[3:]},
    }


# ── one file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x", "x.txt"])
def test_safetensors_are_known_by_their_content(tmp_path, name):
    with open_model(save_model(tmp_path / name, small(), {"format": "pt", "by": "me"})) as model:
        assert model.container == "safetensors"
        assert model.metadata == {"format": "pt", "by": "me"}
        assert model.path == tmp_path / name
        assert model.nbytes == (tmp_path / name).stat().st_size
        assert_same_bytes(read_all(model), small())


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "x.pt", "x.bin", "x"])
def test_torch_zips_are_known_by_their_content(tmp_path, name):
    torch.save({"state_dict": small(), "epoch": 3}, tmp_path / name)
    with open_model(tmp_path / name) as model:
        assert model.container == "torch zip"
        assert model.metadata == {}
        assert list(model.tensors) == list(small())
        assert_same_bytes(read_all(model), small())


def test_a_checkpoint_is_a_model(tmp_path):
    path = save_model(tmp_path / "x.safetensors", small())
    for argument in (path, str(path)):
        with open_model(argument) as model:
            assert isinstance(model, Model)


def test_tensors_are_in_the_order_of_the_file(tmp_path):
    path = save_model(tmp_path / "x.safetensors", small())
    with safetensors.safe_open(path, framework="pt") as theirs, open_model(path) as model:
        assert list(model.tensors) == list(theirs.offset_keys())


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.torch_name], ids=str)
def test_every_dtype_is_read(tmp_path, dtype):
    torch_dtype = getattr(torch, dtype.torch_name)
    pattern = (torch.arange(24 * torch_dtype.itemsize) * 37 % 251).to(torch.uint8)
    values = pattern.bool() if torch_dtype == torch.bool else pattern.view(torch_dtype)
    path = save_model(tmp_path / "x.safetensors", {"x": values.reshape(4, 6)})
    with open_model(path) as model:
        assert str(model.tensors["x"]) == f"{dtype} [4, 6]"
        assert_same_bytes({"x": model.read("x", 0, 24)}, {"x": values})
        assert_same_bytes({"x": model.read("x", 5, 17)}, {"x": values[5:17].clone()})


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (5, 60), (90, 91), (91, 91)])
@pytest.mark.parametrize("container", ["safetensors", "ckpt"])
def test_any_flat_range_is_read(tmp_path, container, start, stop):
    path = tmp_path / f"x.{container}"
    if container == "ckpt":
        torch.save(small(), path)
    else:
        save_model(path, small())
    with open_model(path) as model:
        part = model.read("b.weight", start, stop)
    assert part.dtype == torch.float32
    assert raw_bytes(part) == raw_bytes(small()["b.weight"].flatten()[start:stop])


def test_what_is_read_is_the_callers_own(tmp_path):
    with open_model(save_model(tmp_path / "x.safetensors", small())) as model:
        first = model.read("b.weight", 0, 91)
        first.zero_()
        assert raw_bytes(model.read("b.weight", 0, 91)) == raw_bytes(small()["b.weight"])


def test_strided_tensors_of_a_zip_are_read_as_they_look(tmp_path):
    whole = torch.arange(120, dtype=torch.float16).reshape(2, 3, 4, 5)
    tensors = {
        "whole": whole,
        "turned": whole.permute(3, 1, 0, 2),
        "part": whole[:, 1:, ::2, 3],
        "spread": torch.arange(4.0)[:, None].expand(4, 3),
        "tail": torch.arange(10)[6:],
    }
    torch.save(tensors, tmp_path / "x.ckpt")
    with open_model(tmp_path / "x.ckpt") as model:
        assert isinstance(model.node("whole"), Stored)
        assert isinstance(model.node("tail"), Stored)
        assert isinstance(model.node("turned"), Viewed)
        assert_same_bytes(read_all(model), {name: tensor.contiguous() for name, tensor in tensors.items()})
        flat = tensors["turned"].contiguous().flatten()
        assert raw_bytes(model.read("turned", 17, 59)) == raw_bytes(flat[17:59])


# ── nothing is read before it is asked for ───────────────────────────────────────────────────────────────────────────


def make_huge(path: Path, nbytes: int) -> bytes:
    """A file that claims, and as a sparse file has, so many bytes of tensors; the last four are 1.0."""
    entry = {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}
    header = json.dumps({"huge": entry}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + nbytes)
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 1.0))
    return header


def bytes_read_so_far() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("no rchar")


@pytest.mark.skipif(sys.platform != "linux", reason="counts what the kernel reads")
def test_opening_reads_the_header_only_and_opens_no_file(tmp_path):
    path = tmp_path / "huge.safetensors"
    try:
        header = make_huge(path, 2**40)
    except OSError:
        pytest.skip("no sparse files of a terabyte here")
    before = bytes_read_so_far()
    with open_model(path) as model:
        assert bytes_read_so_far() - before < len(header) + 20_000
        assert [file._descriptor for file in model.files] == [None]
        assert model.tensors["huge"].elements == 2**38
        assert model.read("huge", 2**38 - 2, 2**38).tolist() == [0.0, 1.0]
        assert model.files[0]._descriptor is not None
    assert model.files[0]._descriptor is None


def test_a_file_that_changed_since_it_was_opened_is_not_read(tmp_path):
    path = save_model(tmp_path / "x.safetensors", small())
    with open_model(path) as model:
        save_model(tmp_path / "y.safetensors", small(1)).replace(path)
        with pytest.raises(CheckpointError, match=r"x.safetensors: the file changed"):
            model.read("one", 0, 1)


# ── what is no checkpoint ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", r"is neither safetensors nor a torch zip\n  it starts with the bytes \(none: it is empty\)"),
        (b"version 1 of something\n", "starts with the bytes 76 65 72 73 69 6f 6e 20"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"<HTML><head>", "is a web page"),
        (b"GGUF\3\0\0\0\0\0\0\0", "is GGUF, whose tensors are quantised"),
        (bytes(1000), "is neither safetensors nor a torch zip"),
        (b"PK\3\4", "not a readable torch zip"),
        (b"PK\3\4" + bytes(100), "not a readable torch zip"),
        (b"\2\0\0\0\0\0\0\0{", "not a valid safetensors file.*truncated"),
        (b"\xff" * 8 + b"{}", "not a valid safetensors file.*header claims"),
    ],
)
def test_garbage_is_refused_with_what_was_found(tmp_path, content, problem):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"(?s)x.safetensors: .*{problem}"):
        open_model(tmp_path / "x.safetensors")


def test_a_checkpoint_from_before_zips_says_how_to_convert_it(tmp_path):
    torch.save(small(), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"(?s)old.ckpt: it was saved .*before torch 1.6.*torch.save\(torch.load"):
        open_model(tmp_path / "old.ckpt")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"x.safetensors: can't be read: No such file"):
        open_model(tmp_path / "x.safetensors")


def test_a_name_that_is_too_long_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"can't be read: .*too long"):
        open_model(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("folder", [False, True])
def test_what_may_not_be_read_is_an_error_that_names_it(tmp_path, monkeypatch, folder):
    path = tmp_path if folder else save_model(tmp_path / "x.safetensors", small())

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir" if folder else "open", refuse)
    with pytest.raises(CheckpointError, match=f"{path.name}: can't be read: Permission denied"):
        open_model(path)


# ── many files ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("named", ["the index", "the folder"])
def test_shards_are_one_model(tmp_path, named):
    index = save_shards(tmp_path / "m", split_small())
    with open_model(index if named == "the index" else index.parent) as model:
        assert model.container == "sharded safetensors (2 files)"
        assert model.path == index
        assert model.metadata == {"format": "pt"}
        assert [file.path.name for file in model.files] == list(split_small())
        assert model.nbytes == sum(path.stat().st_size for path in index.parent.glob("*.safetensors"))
        assert_same_bytes(read_all(model), small())


def test_closing_closes_all_shards(tmp_path):
    with open_model(save_shards(tmp_path, split_small())) as model:
        read_all(model)
        assert all(file._descriptor is not None for file in model.files)
    assert all(file._descriptor is None for file in model.files)


def test_shards_may_be_of_both_kinds(tmp_path):
    one, two = split_small().values()
    with open_model(save_shards(tmp_path, {"a.safetensors": one, "b.bin": two})) as model:
        assert_same_bytes(read_all(model), small())


def test_a_folder_of_one_file_is_that_file(tmp_path):
    save_model(tmp_path / "m" / "model.safetensors", small())
    with open_model(tmp_path / "m") as model:
        assert model.path == tmp_path / "m" / "model.safetensors"
        assert_same_bytes(read_all(model), small())


def test_where_two_shards_hold_a_tensor_the_index_decides(tmp_path):
    shards = {"1.safetensors": {"x": torch.ones(2)}, "2.safetensors": {"x": torch.full((2,), 2.0)}}
    for shard, value in (("1.safetensors", 1.0), ("2.safetensors", 2.0)):
        weight_map = {"x": shard, "y": "1.safetensors", "z": "2.safetensors"}
        extra = {name: {**tensors, "yz"[place]: torch.zeros(1)} for place, (name, tensors) in enumerate(shards.items())}
        with open_model(save_shards(tmp_path, extra, weight_map)) as model:
            assert model.read("x", 0, 2).tolist() == [value, value]


@pytest.mark.parametrize("containers", [("1.safetensors", "2.safetensors"), ("1.bin", "2.bin")])
def test_where_two_shards_hold_a_tensor_that_the_index_forgot_it_is_an_error(tmp_path, containers):
    one, two = containers
    shards = {one: {"x": torch.ones(2), "y": torch.ones(1)}, two: {"x": torch.zeros(2), "z": torch.ones(1)}}
    with pytest.raises(CheckpointError, match="1 tensor is in several shards") as error:
        open_model(save_shards(tmp_path, shards, {"y": one, "z": two}))
    assert error.value.found == (f"x   {one}, {two}",)


def test_a_tensor_that_the_index_forgot_is_in_the_model_all_the_same(tmp_path):
    index = save_shards(tmp_path, {"1.safetensors": {"x": torch.ones(2), "y": torch.ones(3)}}, {"x": "1.safetensors"})
    with open_model(index) as model:
        assert set(model.tensors) == {"x", "y"}


@pytest.mark.parametrize("container", ["safetensors", "bin"])
@pytest.mark.parametrize("values", [(1.0, 2.0), (1.0, 1.0)], ids=["others", "the same"])
def test_a_tensor_in_two_shards_that_the_index_does_not_settle_is_refused(tmp_path, container, values):
    shards = {
        f"{n}.{container}": {"x": torch.full((2,), value), f"y{n}": torch.ones(1)} for n, value in enumerate(values)
    }
    weight_map = {"y0": f"0.{container}", "y1": f"1.{container}"}
    with pytest.raises(CheckpointError, match="1 tensor is in several shards, and not in the index") as error:
        open_model(save_shards(tmp_path, shards, weight_map))
    assert error.value.found == (f"x   0.{container}, 1.{container}",)
    for n, value in enumerate(values):  # what the error advises
        with open_model(save_shards(tmp_path, shards, {**weight_map, "x": f"{n}.{container}"})) as model:
            assert model.read("x", 0, 2).tolist() == [value] * 2


def test_a_missing_shard_is_an_error_that_names_it(tmp_path):
    index = save_shards(tmp_path, split_small())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: can't be read: No such file"):
        open_model(index)


def test_tensors_that_no_shard_holds_are_listed(tmp_path):
    one, two = split_small()
    weight_map = dict.fromkeys(split_small()[one], one) | {f"gone.{n}": two for n in range(7)}
    with pytest.raises(CheckpointError, match="7 tensors are not in the shards that the index names") as error:
        open_model(save_shards(tmp_path, split_small(), weight_map))
    assert "  gone.0: not in model-00002-of-00002.safetensors\n" in str(error.value)
    assert "… and 2 more" in str(error.value)


def test_a_tensor_in_another_shard_than_the_index_says_is_an_error(tmp_path):
    one, two = split_small()
    weight_map = dict.fromkeys(small(), one)
    with pytest.raises(CheckpointError, match=f"not in {one}"):
        open_model(save_shards(tmp_path, split_small(), {**weight_map, "one": two}))


def test_a_damaged_shard_is_an_error_that_names_it(tmp_path):
    index = save_shards(tmp_path, split_small())
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors: not a valid safetensors file"):
        open_model(index)


@pytest.mark.parametrize("kind", ["absolute", "parent", "folder"])
def test_an_index_cannot_point_to_a_file_elsewhere(tmp_path, kind):
    secret = save_model(tmp_path / "secret" / "s.safetensors", small())
    save_model(tmp_path / "m" / "sub" / "s.safetensors", small())
    name = {"absolute": str(secret), "parent": "../secret/s.safetensors", "folder": "sub/s.safetensors"}[kind]
    index = save_shards(tmp_path / "m", {}, dict.fromkeys(small(), name))
    with pytest.raises(CheckpointError, match="the index points outside its folder"):
        open_model(index)


def test_an_index_of_an_index_does_not_go_round_in_circles(tmp_path):
    index = save_shards(tmp_path, {}, {"x": "model.safetensors.index.json"})
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json: is neither safetensors"):
        open_model(index)


def test_an_index_may_not_name_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    index = save_shards(tmp_path, {}, {"x": "sub"})
    with pytest.raises(CheckpointError, match="sub: is no regular file"):
        open_model(index)


def test_closing_twice_does_no_harm(tmp_path):
    model = open_model(save_model(tmp_path / "x.safetensors", small()))
    with contextlib.closing(model):
        model.read("one", 0, 1)
    model.close()
