"""Where the output's bytes will lie: one file or shards, their names, and the index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import OutputError
from streammerge.formats.layout import lay_out, split
from streammerge.tensors import DTYPES, TensorInfo

METADATA = {"format": "pt"}


def infos(**elements: int) -> dict[str, TensorInfo]:
    """Tensors of so many float32 elements."""
    return {name: TensorInfo(DTYPES["F32"], (count,)) for name, count in elements.items()}


FOUR = infos(d=10, b=20, c=5, a=25)


# ── one file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("out.safetensors", "out.safetensors"),
        ("sub/out.v2.safetensors", "sub/out.v2.safetensors"),
        ("folder", "folder/model.safetensors"),
        ("folder.v2", "folder.v2/model.safetensors"),
        (".", "model.safetensors"),
    ],
)
def test_a_file_or_a_folder(path, file):
    layout = lay_out(Path(path), FOUR, METADATA)
    assert layout.paths == [Path(file)]
    assert layout.index is None
    assert layout.path == Path(path)
    assert layout.nbytes == layout.files[0].nbytes == layout.files[0].header.file_bytes


def test_the_header_is_the_librarys():
    content = safetensors.torch.save({name: torch.zeros(info.shape) for name, info in FOUR.items()}, METADATA)
    layout = lay_out(Path("x.safetensors"), FOUR, METADATA)
    assert content.startswith(layout.files[0].header.encoded)
    assert layout.nbytes == len(content)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".gguf"])
def test_other_formats_are_refused(suffix):
    with pytest.raises(OutputError, match=f"writes safetensors only, not {suffix}\n  Name the output out.safetensors"):
        lay_out(Path(f"x/out{suffix}"), FOUR, METADATA)


def test_the_one_name_that_the_format_does_not_allow_is_refused():
    with pytest.raises(OutputError, match="safetensors can't hold a tensor called __metadata__"):
        lay_out(Path("x.safetensors"), infos(a=1, __metadata__=1), METADATA)


def test_no_tensors_are_a_file_all_the_same():
    layout = lay_out(Path("x.safetensors"), {}, {}, 100)
    assert layout.nbytes == len(safetensors.torch.save({}))


# ── shards ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tensors_are_cut_in_their_order_where_the_next_does_not_fit():
    assert [list(shard) for shard in split(FOUR, 120)] == [["d", "b"], ["c", "a"]]
    assert [list(shard) for shard in split(FOUR, 119)] == [["d"], ["b", "c"], ["a"]]
    assert [list(shard) for shard in split(FOUR, 240)] == [["d", "b", "c", "a"]]
    assert [list(shard) for shard in split(FOUR, 1)] == [["d"], ["b"], ["c"], ["a"]]  # larger than a shard may be
    assert split({}, 1) == [{}]


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 100))
def test_every_tensor_is_in_one_shard_and_no_shard_is_larger_than_it_must(counts, limit):
    tensors = infos(**{f"t{n}": count for n, count in enumerate(counts)})
    shards = split(tensors, limit)
    assert [name for shard in shards for name in shard] == list(tensors)
    for place, shard in enumerate(shards):
        size = sum(info.nbytes for info in shard.values())
        assert size <= limit or sum(info.nbytes > 0 for info in shard.values()) == 1
        if place:
            first = next(iter(shard.values()))
            assert sum(info.nbytes for info in shards[place - 1].values()) + first.nbytes > limit


@pytest.mark.parametrize(
    ("path", "folder", "stem"), [("sub/out.safetensors", "sub", "out"), ("folder", "folder", "model")]
)
def test_shards_are_named_and_indexed_as_loaders_want(path, folder, stem):
    layout = lay_out(Path(path), FOUR, METADATA, 119)
    shards = [f"{stem}-00001-of-00003.safetensors", f"{stem}-00002-of-00003.safetensors"]
    shards += [f"{stem}-00003-of-00003.safetensors"]
    assert [file.path for file in layout.files] == [Path(folder) / name for name in shards]
    assert layout.index is not None
    index_path, text = layout.index.path, b"".join(layout.index.pieces()).decode()
    assert index_path == Path(folder) / f"{stem}.safetensors.index.json"
    assert layout.paths == [*(file.path for file in layout.files), index_path]
    assert json.loads(text) == {
        "metadata": {"total_size": 240},
        "weight_map": {"a": shards[2], "b": shards[1], "c": shards[1], "d": shards[0]},
    }
    assert text.endswith("}\n")
    assert layout.nbytes == sum(file.nbytes for file in layout.files) + len(text)


def test_every_shard_has_the_metadata_and_only_its_own_tensors():
    for file in lay_out(Path("x.safetensors"), FOUR, METADATA, 119).files:
        header = json.loads(file.header.encoded[8:])
        assert header.pop("__metadata__") == METADATA
        assert set(header) == set(file.header.offsets)


def test_what_fits_one_shard_is_one_file_without_an_index():
    layout = lay_out(Path("x.safetensors"), FOUR, METADATA, 240)
    assert layout.paths == [Path("x.safetensors")]
    assert layout.index is None


def test_names_outside_ascii_count_as_they_are_written():
    layout = lay_out(Path("x"), infos(é=1, 日本=1), METADATA, 4)
    assert layout.index is not None
    written = sum(file.nbytes for file in layout.files) + len(b"".join(layout.index.pieces()))
    assert layout.nbytes == written
    assert set(json.loads(b"".join(layout.index.pieces()))["weight_map"]) == {"é", "日本"}
