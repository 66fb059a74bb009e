"""Which files a folder or an index stands for, and which it must not point to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.errors import CheckpointError
from streammerge.formats import shards
from streammerge.formats.shards import PREFERRED, find_weights, is_index, read_index, single_of
from streammerge.models.checkpoints import open_model


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}), encoding="utf-8")
    return path


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", range(len(PREFERRED)))
def test_the_usual_names_are_found_the_better_first(tmp_path, place):
    for name in PREFERRED[place:]:
        (tmp_path / name).touch()
    (tmp_path / "other.safetensors").touch()
    if is_index(Path(PREFERRED[place])):
        (tmp_path / single_of(PREFERRED[place])).unlink()
    assert find_weights(tmp_path) == tmp_path / PREFERRED[place]


@pytest.mark.parametrize("name", ["unet.safetensors", "sd.ckpt", "x.pt", "x.pth", "x.bin", "unet.fp16.index.json"])
def test_the_only_model_in_a_folder_is_meant(tmp_path, name):
    (tmp_path / "README.md").touch()
    (tmp_path / "config.json").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / name).touch()
    assert find_weights(tmp_path) == tmp_path / name


def test_an_index_is_meant_before_its_shards(tmp_path):
    for name in ("x.index.json", "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"):
        (tmp_path / name).touch()
    assert find_weights(tmp_path) == tmp_path / "x.index.json"


@pytest.mark.parametrize("names", [("b.safetensors", "a.ckpt"), ("b.index.json", "a.index.json")])
def test_several_models_are_an_error_that_lists_them(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="the folder holds 2 files that could be the model") as error:
        find_weights(tmp_path)
    assert error.value.found == tuple(sorted(names))
    assert error.value.advice == "Name the file itself, or call it model.safetensors."


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards_and_a_single_file_are_two_models(tmp_path, name):
    """transformers loads the single file, diffusers the shards."""
    (tmp_path / name).touch()
    write_index(tmp_path, {"x": "other.safetensors"}, f"{name}.index.json")
    with pytest.raises(CheckpointError, match="the folder holds two models") as error:
        find_weights(tmp_path)
    assert error.value.found == (f"{name}.index.json", name)


def test_an_index_may_name_a_single_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    index = write_index(tmp_path, {"x": "model.safetensors"})
    assert find_weights(tmp_path) == index


def test_a_folder_of_gguf_says_what_it_is(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").touch()
    with pytest.raises(CheckpointError, match=r"holds GGUF files, .*\n.*the safetensors that they were made from"):
        find_weights(tmp_path)


@pytest.mark.parametrize("numbers", [[1], [2], [1, 2, 3]])
@pytest.mark.parametrize("name", ["model-{:05d}-of-00003.safetensors", "pytorch_model-{}-of-12.bin"])
def test_shards_without_their_index_do_not_pass_for_a_model(tmp_path, name, numbers):
    names = [name.format(number) for number in numbers]
    for each in names:
        (tmp_path / each).touch()
    with pytest.raises(CheckpointError, match="the folder holds shards of a model, and no index of them") as error:
        find_weights(tmp_path)
    assert error.value.found == tuple(names)
    assert error.value.advice.startswith("Fetch the index, such as model.safetensors.index.json, and all the shards;")


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "one-of-2.ckpt", "x-1-of-0.pt"])
def test_the_only_shard_is_the_model(tmp_path, name):
    (tmp_path / name).touch()
    assert find_weights(tmp_path) == tmp_path / name


def test_a_folder_without_a_model_is_an_error(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="the folder holds no model"):
        find_weights(tmp_path)


def test_a_folder_of_checkpoints_names_them(tmp_path):
    for name in ("checkpoint-500", "checkpoint-1000", "logs"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="holds no model, but checkpoints of a training") as error:
        find_weights(tmp_path)
    assert error.value.found == ("checkpoint-1000", "checkpoint-500")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("model.safetensors.index.json", True), ("x.index.json", True), ("index.json", False), ("x.json", False)],
)
def test_an_index_is_told_by_its_name(tmp_path, name, meant):
    assert is_index(tmp_path / name) is meant


# ── indexes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_index_names_the_shard_of_every_tensor(tmp_path):
    index = read_index(write_index(tmp_path, {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}))
    assert index.weight_map == {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    assert index.shards == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.safetensors", "..", ".", "", "/etc/passwd", "sub/x.safetensors", "./x.safetensors"),
        *("..\\secret.safetensors", "sub\\x.safetensors", "C:\\x.safetensors", "C:x.safetensors", "\\\\host\\share\\x"),
        *("x.safetensors\0", "\0", "//host/share/x", 7, None, ["x.safetensors"], {"a": "b"}, True),
    ],
    ids=repr,
)
def test_a_shard_outside_the_folder_is_refused(tmp_path, name):
    (tmp_path / "good.safetensors").touch()
    path = write_index(tmp_path, {"a": "good.safetensors", "b": name})
    with pytest.raises(CheckpointError, match="the index points outside its folder") as error:
        read_index(path)
    assert error.value.found == (str(name),)
    assert error.value.advice == "A shard must be a file beside its index. Do not trust this download."


def test_a_strange_but_plain_name_is_allowed(tmp_path):
    index = read_index(write_index(tmp_path, {"a": "..model é.safetensors"}))
    assert index.shards == [tmp_path / "..model é.safetensors"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "can't be read as an index of shards"),
        ("{", "can't be read as an index of shards"),
        ("[" * 100_000, "can't be read as an index of shards"),
        ("\udcff", "can't be read as an index of shards"),
        ("[]", "it is no map"),
        ("7", "it is no map"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": null}', "has no weight_map"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, text, problem):
    path = tmp_path / "x.index.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=f"x.index.json: .*{problem}"):
        read_index(path)


def test_a_byte_order_mark_before_an_index_is_passed_over_and_utf_16_refused(tmp_path):
    path = write_index(tmp_path, {"a": "x.safetensors"})
    plain = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + plain)
    assert list(read_index(path).weight_map) == ["a"]
    path.write_bytes(plain.decode().encode("utf-16-le"))
    with pytest.raises(CheckpointError, match=r"can't be read as an index of shards|is no index"):
        read_index(path)


def test_a_missing_index_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"can't be read as an index of shards: .*No such file"):
        read_index(tmp_path / "x.index.json")


def test_a_huge_index_is_not_read(tmp_path, monkeypatch):
    path = write_index(tmp_path, {"a": "x.safetensors"})
    most = path.stat().st_size - 1
    monkeypatch.setattr(shards, "MAX_INDEX", most)
    with pytest.raises(CheckpointError, match=f"the index is longer than {most} bytes, the most beside these shards"):
        read_index(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".bin"])
@pytest.mark.parametrize("names", [100, 3000])
def test_an_index_may_be_as_long_as_its_shards_give_reason_for(tmp_path, monkeypatch, suffix, names):
    """500,000 names take 54 MB, and as much in the headers of the shards."""
    monkeypatch.setattr(shards, "MAX_INDEX", 1000)
    monkeypatch.setattr(shards, "MAX_INDEXED", 10)
    weight_map = {
        f"model.layers.{n}.experts.{n}.w1.weight": f"model-{n % 2 + 1:05}-of-00002{suffix}" for n in range(names)
    }
    path = write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="beside these shards"):
        read_index(path)
    for shard in set(weight_map.values()):
        tensors = {name: torch.zeros(256) for name, own in weight_map.items() if own == shard}
        (torch.save if suffix == ".bin" else save_file)(tensors, tmp_path / shard)
    assert read_index(path).weight_map == weight_map
    assert len(open_model(path).tensors) == names


def test_a_header_that_claims_more_than_there_is_gives_an_index_no_room(tmp_path, monkeypatch):
    path = write_index(tmp_path, {"a": "x.safetensors"})
    monkeypatch.setattr(shards, "MAX_INDEX", 10)
    (tmp_path / "x.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="longer than 20 bytes"):
        read_index(path)
