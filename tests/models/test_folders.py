"""What of a folder belongs to its model: told by names, kinds, sizes and links; the rest is left, with the reason."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import streammerge
from streammerge.errors import CheckpointError
from streammerge.models import folders
from streammerge.models.folders import read_folder, root_of, stem_of
from tests.make.folders import TOKENIZER, save_llama


def read(folder: Path):
    """The names of what is copied, and the reasons for what is not."""
    with streammerge.open_model(folder) as model:
        found = read_folder(folder, [file.path for file in model.files])
    return {companion.name for companion in found.companions}, dict(found.left)


def test_a_folder_as_transformers_saves_it(tmp_path):
    names = ("modeling_x.py", "LICENSE", "tokenizer.model.v3", "qwen.tiktoken")
    more = dict.fromkeys((*names, "additional_chat_templates/tool.jinja", "1_Pooling/config.json"), "x")
    folder = save_llama(tmp_path / "A", 1, {**TOKENIZER, **more}, shards=2)
    copied, left = read(folder)
    assert copied == {"config.json", *TOKENIZER, *more}
    assert left == {"model.safetensors.index.json": "weights"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "weights") for name in ("pytorch_model.bin", "model.gguf", "optimizer.pt", "tf_model.h5", "b.SFT")),
        *((name, "weights") for name in ("flax_model.msgpack", "pytorch_model.bin.index.json", "x.onnx")),
        *((name, "of that model alone") for name in ("README.md", "trainer_state.json", "all_results.json")),
        *((name, "no companion by its name") for name in ("logo.png", "run.sh", "x\n.json", "a|b.json", "-x.json")),
    ],
)
def test_what_is_no_companion(tmp_path, name, reason):
    copied, left = read(save_llama(tmp_path / "A", 1, {name: "x"}))
    assert copied == {"config.json"}
    assert left == {name: reason}


@pytest.mark.skipif(os.name == "nt", reason="Windows has none of these")
def test_what_is_no_file(tmp_path):
    folder = save_llama(tmp_path / "A", 1, {})
    os.mkfifo(folder / "tokenizer.json")
    (folder / "vocab.json").mkdir()
    (folder / "merges.txt").symlink_to(folder / "nowhere")
    (folder / "added_tokens.json").symlink_to("added_tokens.json")
    copied, left = read(folder)
    assert copied == {"config.json"}
    expected = {"tokenizer.json": "no regular file", "vocab.json": "a folder"}
    nowhere = "a link that leads nowhere"
    assert left == {**expected, "merges.txt": nowhere, "added_tokens.json": nowhere}


def test_what_a_failing_disk_hides_is_not_left_out(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "A", 1, {"tokenizer.json": "{}"})
    real = Path.stat

    def failing(path, **options):
        if path.name == "tokenizer.json":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", failing)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: can't be read: Input/output error"):
        read_folder(folder)


def test_links_lead_nowhere_but_within(tmp_path):
    folder = save_llama(tmp_path / "A", 1, {"chat_template.jinja": "x"})
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "tokenizer.json").symlink_to(secret)
    (folder / "special_tokens_map.json").symlink_to("/dev/zero")
    (folder / "vocab.json").symlink_to("config.json")
    (folder / "1_Pooling").symlink_to(tmp_path)
    copied, left = read(folder)
    assert copied == {"config.json", "chat_template.jinja", "vocab.json"}
    assert left["tokenizer.json"] == "a link out of the folder"
    assert left["special_tokens_map.json"] == "no regular file"
    assert left["1_Pooling"] == "a folder"


def test_links_of_the_hub_s_cache_are_followed(tmp_path):
    blobs = save_llama(tmp_path / "models--org--x" / "blobs", 1)
    snapshot = tmp_path / "models--org--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (snapshot / "vocab.json").symlink_to("../../../secret.json")
    (tmp_path / "secret.json").write_text("{}")
    copied, left = read(snapshot)
    assert copied == {"config.json", *TOKENIZER}
    assert left == {"vocab.json": "a link out of the folder"}


def test_names_that_only_capitals_tell_apart(tmp_path):
    folder = save_llama(tmp_path / "A", 1, {"Config.json": "{}", "TOKENIZER.JSON": "x", "tokenizer.json": "{}"})
    if not (folder / "config.json").samefile(folder / "Config.json"):
        copied, left = read(folder)
        assert copied == {"config.json", "tokenizer.json"}
        assert set(left.values()) == {"its name is another's but for capitals"}


def test_large_and_many(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "A", 1, {f"{number:03}.json": "" for number in range(250)})
    with (folder / "000.json").open("wb") as file:
        file.truncate(folders.MAX_COMPANION + 1)
    copied, left = read(folder)
    assert len(copied) == folders.MAX_COMPANIONS
    assert left["000.json"] == "too large"
    assert set(left.values()) == {"too large", "one of too many"}


def test_a_folder_of_all_and_everything(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "A", 1, {f"{number:03}.txt": "" for number in range(9)})
    monkeypatch.setattr(folders, "MAX_ENTRIES", 9)
    with pytest.raises(CheckpointError, match=r"(?s)there are more than 9 files.*--no-companions"):
        read(folder)


def test_hidden_files_are_nobody_s(tmp_path):
    copied, left = read(save_llama(tmp_path / "A", 1, {".gitattributes": "x", ".cache/x.json": "{}"}))
    assert copied == {"config.json"}
    assert left == {}


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("model.safetensors", "model"),
        ("pytorch_model.bin", "model"),
        ("adapter_model.bin", "adapter_model"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model"),
        ("adapter_models.safetensors", "model"),
    ],
)
def test_what_weights_are_called(name, stem):
    assert stem_of(Path("x") / name) == stem


def test_the_folder_of_a_model_is_that_of_its_layout(tmp_path):
    a, b = save_llama(tmp_path / "A", 1), save_llama(tmp_path / "B", 2, shards=2)
    with streammerge.open_model(a) as one, streammerge.open_model(b / "model.safetensors.index.json") as two:
        assert (one.folder, two.folder) == (a, b)
        inner = streammerge.linear(two, one)
        assert root_of(streammerge.Cast(streammerge.linear(streammerge.Cast(inner, "fp16"), one), "fp32")) is two
    with streammerge.open_model(a / "model.safetensors") as file:
        assert file.folder is None


def test_a_pointer_of_git_lfs_is_no_tokenizer(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    save_llama(tmp_path / "A", 1, {**TOKENIZER, "tokenizer.model": pointer})
    recipe = {"merge_method": "linear", "models": [str(tmp_path / "A")]}
    with pytest.raises(CheckpointError, match=r"tokenizer.model: is a pointer of Git LFS .*\n.*git lfs pull"):
        streammerge.make_plan(recipe, output=tmp_path / "OUT")
    streammerge.make_plan(recipe, output=tmp_path / "OUT", companions=False)
