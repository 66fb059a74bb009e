"""Files that are made to take all memory or time, to be run, or to lead elsewhere. More of them: tests/stress."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.errors import CheckpointError, MergeError, OutputError, RecipeError, error_context
from streammerge.formats.header_entries import (
    COMMAS,
    MAX_DIMENSIONS,
    MAX_ENTRY,
    MAX_METADATA,
    MAX_METADATA_KEYS,
    MAX_NAME,
    MAX_TENSORS,
    MAX_TEXT,
)
from streammerge.formats.layout import lay_out
from streammerge.formats.safetensors import read_header
from streammerge.formats.shards import MAX_INDEX, MAX_INDEXED, read_index
from streammerge.models.checkpoints import open_model
from streammerge.recipe.files import MAX_NODES, MAX_RECIPE, parse_yaml, read_recipe_file
from streammerge.recipe.parse import parse_recipe
from streammerge.tensors import DTYPES, TensorInfo

# ── bounds of time and memory ────────────────────────────────────────────────────────────────────────────────────────

MEASURE = """
import sys
from pathlib import Path
from streammerge.errors import MergeError
from streammerge.formats.safetensors import read_header
from streammerge.formats.shards import read_index
from streammerge.compute.machine import peak_resident_bytes, resident_bytes
from streammerge.recipe.files import parse_yaml, read_recipe_file

path = Path(sys.argv[1])
read = {"header": lambda path: read_header(path, path.stat().st_size), "index": read_index, "recipe": read_recipe_file}
parse_yaml("a: 1", "x")
before = resident_bytes()
try:
    read[sys.argv[2]](path)
    verdict = "read"
except MergeError as error:
    verdict = "refused" if len(str(error)) < 20_000 else "refused, at length"
print((peak_resident_bytes() - before) / 2**20, verdict)
"""


def cost(path: Path, kind: str) -> tuple[float, str]:
    """The MiB that reading a file takes, and what came of it."""
    words = [sys.executable, "-c", MEASURE, str(path), kind]
    mebibytes, verdict = subprocess.run(words, capture_output=True, check=True, text=True).stdout.split(" ", 1)
    return float(mebibytes), verdict.strip()


def entry(number: int, *, name: str = "", shape: str = "1", space: str = "") -> str:
    place = f"[{4 * number},{4 * number + 4}]" if shape == "1" else "[0,0]"
    description = f'{{"dtype":{space}"F32","shape":[{shape}],"data_offsets":{place}}}'
    return f'"{name}{number}":{space}{description}'


def entries(count: int, **options: str) -> str:
    return "{" + ",".join(entry(number, **options) for number in range(count)) + "}"


def write_header(path: Path, header: str | bytes, nbytes: int = 0) -> Path:
    encoded = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    os.truncate(path, 8 + len(encoded) + nbytes)
    return path


HEADERS = {
    "as many tensors as may be": (lambda: entries(MAX_TENSORS), "read"),
    "in another spelling": (lambda: entries(MAX_TENSORS, space="  "), "read"),
    "with names as long as may be": (lambda: entries(MAX_TENSORS, name="x" * 200), "read"),
    "a million tensors": (lambda: entries(1_000_000), "refused"),
    "100 MB": (lambda: "{" + " " * 99_999_990 + "}", "refused"),
    "a megabyte of spaces": (lambda: "{" + " " * (MAX_TEXT - 2) + "}", "read"),
    "all shapes different": (
        lambda: "{" + ",".join(entry(number, shape=f"0,{number}") for number in range(MAX_TENSORS)) + "}",
        "read",
    ),
    "many dimensions": (lambda: entries(9000, shape="0," + ",".join("9" * 63)), "read"),
    "more dimensions": (lambda: entries(20_000, shape="0," + ",".join("9" * 63)), "refused"),
    "brackets": (lambda: '{"a":' + "[" * 20_000_000, "refused"),
    "empty lists": (lambda: '{"a":[' + "[]," * 200_000, "refused"),
    "numbers": (lambda: '{"a":{"shape":[' + "0," * 600_000, "refused"),
    "a name without end": (lambda: '{"' + "a" * 20_000_000, "refused"),
    "a name of escapes": (lambda: '{"' + "\\n" * 10_000_000, "refused"),
    "emoji": (lambda: '{"' + "😀" * 1_500_000 + '":{}}', "refused"),
    "emoji beyond the bound": (lambda: '{"' + "😀" * 6_000_000 + '":{}}', "refused"),
    "metadata of escapes": (lambda: '{"__metadata__":{"k":"' + "\\ud83d\\ude00" * 340_000 + '"}}', "read"),
    "metadata that an emoji makes wide": (
        lambda: '{"__metadata__":{"k":"\\ud83d\\ude00' + "a" * 4_000_000 + '"}}',
        "read",
    ),
    "long metadata": (lambda: '{"__metadata__":{"k":"' + "a" * MAX_METADATA + '"}}', "refused"),
    "metadata of many keys": (
        lambda: '{"__metadata__":{' + ",".join(f'"{n}":""' for n in range(MAX_METADATA_KEYS + 1)) + "}}",
        "refused",
    ),
    "deep metadata": (lambda: '{"__metadata__":' + '{"a":' * 1_000_000, "refused"),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("name", HEADERS)
def test_no_header_takes_much_memory(tmp_path, name):
    make, expected = HEADERS[name]
    header = make()
    nbytes = 4 * header.count('"shape":[1]')
    mebibytes, verdict = cost(write_header(tmp_path / "x.safetensors", header, nbytes), "header")
    assert verdict == expected
    assert mebibytes < 64


INDEXES = {
    "as many tensors as may be": (
        lambda: json.dumps({"weight_map": {f"{'x' * 60}{n}": "model-00001.safetensors" for n in range(200_000)}}),
        "read",
    ),
    "more": (lambda: json.dumps({"weight_map": {f"{n}": "x" for n in range(MAX_INDEXED + 1)}}), "refused"),
    "brackets": (lambda: '{"weight_map":' + "[" * 20_000_000, "refused"),
    "empty lists": (lambda: '{"a":[' + "[]," * 5_000_000 + "0]}", "refused"),
    "deep lists": (lambda: "[" * 100_000, "refused"),
    "emoji": (lambda: '{"weight_map":{"' + "😀" * 5_000_000 + '":"x"}}', "refused"),
    "digits": (lambda: '{"weight_map":{"a":' + "9" * 20_000_000 + "}}", "refused"),
    "too long": (lambda: '{"weight_map":{"a":"' + "x" * MAX_INDEX + '"}}', "refused"),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("name", INDEXES)
def test_no_index_takes_much_memory(tmp_path, name):
    make, expected = INDEXES[name]
    path = tmp_path / "x.index.json"
    path.write_text(make(), encoding="utf-8")
    mebibytes, verdict = cost(path, "index")
    assert verdict == expected
    assert mebibytes < (128 if expected == "read" else 64)  # 200,000 names are what they are


def collisions(count: int) -> str:
    """Keys that all have one hash."""
    return "".join(f"{number * (2**61 - 1)}: \n" for number in range(1, count))


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


RECIPES = {
    "as many values as may be": (lambda: "".join(f"k{n}: \n" for n in range(MAX_NODES // 2 - 1)), "read"),
    "many values": (lambda: "[" + "a," * 120_000 + "]", "refused"),
    "a billion laughs": (lambda: laughs(30), "refused"),
    "maps merged into maps": (
        lambda: "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)),
        "refused",
    ),
    "depth": (lambda: "[" * 200_000, "refused"),
    "depth by indentation": (lambda: "- " * 100_000, "refused"),
    "keys of one hash": (lambda: collisions(9000), "refused"),
    "a number in base 60": (lambda: "a: " + "1:" * 120_000 + "1\n", "refused"),
    "digits": (lambda: "a: " + "9" * 250_000, "refused"),
    "a long text": (lambda: 'a: "' + "x" * 250_000 + '"', "read"),
    "a text of escapes": (lambda: 'a: "' + "\\n" * 120_000 + '"', "read"),
    "comments": (lambda: "#\n" * 130_000, "read"),
    "anchors": (lambda: "".join(f"- &a{n} x\n" for n in range(20_000)), "refused"),
    "too long": (lambda: "#" * (MAX_RECIPE + 1), "refused"),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_takes_much_memory(tmp_path, name):
    make, expected = RECIPES[name]
    path = tmp_path / "r.yaml"
    path.write_text(make(), encoding="utf-8")
    mebibytes, verdict = cost(path, "recipe")
    assert verdict == expected
    assert mebibytes < 64


# ── bounds of the header, in words ───────────────────────────────────────────────────────────────────────────────────

BEYOND = {
    "a long name": ("{" + entry(0, name="x" * MAX_NAME) + "}", f"name has {MAX_NAME + 1} characters"),
    "a long entry": ('{"a":{"dtype":"F32",' + " " * MAX_ENTRY + '"shape":[1]}}', f"first {MAX_ENTRY} characters"),
    "dimensions": (entries(1, shape="0," * MAX_DIMENSIONS + "1"), f"has 65 dimensions; {MAX_DIMENSIONS} are read"),
    "values": ("{" + "," * (COMMAS * MAX_TENSORS + 1), f"more than the {COMMAS * MAX_TENSORS} values"),
    "metadata": ('{"__metadata__":{"k":"' + "a" * MAX_METADATA + '"}}', f"of {MAX_METADATA} characters at most"),
    "bytes": ("{" + " " * MAX_TEXT + "}", f"{MAX_TEXT} are read at most"),
    "wide text": ('{"' + "é日" * (MAX_TEXT // 8) + '"}', f"{MAX_TEXT} are read at most"),
}


@pytest.mark.parametrize(("header", "problem"), BEYOND.values(), ids=BEYOND)
def test_a_header_beyond_a_bound_is_refused_with_the_bound(tmp_path, header, problem):
    path = write_header(tmp_path / "x.safetensors", header, 4)
    with pytest.raises(CheckpointError, match=problem):
        read_header(path, path.stat().st_size)


@pytest.mark.parametrize(("name", "shape"), [("__metadata__", "1"), ("b", "01"), ("b", "1,"), ("a", "1"), ("b", "2")])
def test_what_looks_like_an_entry_is_checked_like_the_first(tmp_path, name, shape):
    """Entries that look like one before them are read by a shortcut."""
    first = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    second = f'"{name}":{{"dtype":"F32","shape":[{shape}],"data_offsets":[4,8]}}'
    path = write_header(tmp_path / "x.safetensors", "{" + first + "," + second + "}", 8)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        read_header(path, path.stat().st_size)


@pytest.mark.parametrize(("count", "words"), [(MAX_TENSORS + 1000, 0), (1, MAX_METADATA + 1000)])
def test_what_a_large_file_needs_is_read_and_not_of_a_small_one(tmp_path, count, words):
    """Large are files with a kibibyte, at least, for each tensor; a mixture of 900 experts has 500,000."""
    metadata = f'"__metadata__":{{"k":"{"x" * words}"}},'
    nbytes = max(1024, 2**27 // count)
    parts = (
        f'"w{number}":{{"dtype":"U8","shape":[{nbytes}],"data_offsets":[{number * nbytes},{(number + 1) * nbytes}]}}'
        for number in range(count)
    )
    path = write_header(tmp_path / "large.safetensors", "{" + metadata + ",".join(parts) + "}", count * nbytes)
    assert len(read_header(path, path.stat().st_size).tensors) == count
    empty = (f'"w{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(count))
    path = write_header(tmp_path / "small.safetensors", "{" + metadata + ",".join(empty) + "}")
    with pytest.raises(CheckpointError, match=r"more than 75000 tensors, the most|4194304 characters at most"):
        read_header(path, path.stat().st_size)


def test_a_name_may_be_as_long_as_stated(tmp_path):
    path = write_header(tmp_path / "x.safetensors", "{" + entry(0, name="x" * (MAX_NAME - 1)) + "}", 4)
    assert len(next(iter(read_header(path, path.stat().st_size).tensors))) == MAX_NAME


def test_no_file_is_written_that_is_not_read_back():
    tensors = {f"t{number}": TensorInfo(DTYPES["F16"], (1,)) for number in range(MAX_TENSORS + 1)}
    with pytest.raises(OutputError, match=r"would hold 75,001 tensors; 75,000 are allowed in one of its size\n  Use"):
        lay_out(Path("x.safetensors"), tensors, {})
    assert len(lay_out(Path("x.safetensors"), tensors, {}, shard_bytes=2**17).files) == 2


# ── ways out of the folder ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_cache_of_the_hub_is_read_through_its_links(tmp_path):
    """Its folder of a revision holds nothing but links to `../../blobs`."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    for name, shard in index["weight_map"].items():
        save_file({name: torch.ones(2)}, blobs / f"hash{name}")
        (snapshot / shard).symlink_to(Path("..") / ".." / "blobs" / f"hash{name}")
    (blobs / "index").write_text(json.dumps(index))
    (snapshot / "model.safetensors.index.json").symlink_to(Path("..") / ".." / "blobs" / "index")
    for path in (snapshot, snapshot / "model.safetensors.index.json"):
        with open_model(path) as model:
            assert list(model.tensors) == ["a", "b"]


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path):
    (tmp_path / "x.index.json").write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="can't be read as an index of shards: it names 'a' twice"):
        read_index(tmp_path / "x.index.json")


def test_half_a_character_is_no_shard_s_name(tmp_path):
    (tmp_path / "x.index.json").write_text('{"weight_map": {"a": "\\ud800"}}')
    with pytest.raises(CheckpointError, match="the index points outside its folder"):
        read_index(tmp_path / "x.index.json")


@pytest.mark.parametrize("path", ["a\0b.safetensors", "\ud800\0"])
def test_a_path_that_no_file_can_have_is_an_error(path):
    with pytest.raises(CheckpointError, match=r"no file can (have such a name|be called so)"):
        open_model(path)


@pytest.mark.parametrize("model", ["a\0.ckpt", "\ud800.ckpt"])
def test_a_recipe_cannot_name_what_no_file_can_be_called(model):
    with pytest.raises(RecipeError, match="model 1: no file can be called"):
        parse_recipe({"merge_method": "linear", "models": [model, "b"]}, Path())


def test_a_recipe_expands_nothing_but_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    models = ["$HOME/x", "${HOME}/x", "%HOME%/x", "~root/x", "x/~/y", "~/x"]
    recipe = parse_recipe({"merge_method": "linear", "models": models}, Path("folder"))
    sources = [entry.source for entry in recipe.inputs]
    assert sources == [*(Path("folder") / name for name in models[:-1]), Path("/home/me/x")]


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("code", ["\x1b[2J", "\r", "\x9b", "\u202e", "\u2066", "\u200b", "\x7f", "\0"])
def test_no_terminal_code_gets_into_an_error(code):
    error = MergeError(f"what {code}", found=[f"name {code}"], advice=f"do {code}")
    error.state = code
    assert code not in str(error)


def test_a_tensor_s_name_adds_no_line_to_an_error():
    with pytest.raises(MergeError) as caught, error_context("w\n  Nothing was written."):
        raise MergeError("it is wrong")
    assert str(caught.value) == "tensor w\\n  Nothing was written.: it is wrong"


def test_a_long_recipe_is_read_no_further_than_its_bound(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: 1\n" + "#" * MAX_RECIPE)
    with pytest.raises(RecipeError, match=f"more than {MAX_RECIPE} bytes"):
        read_recipe_file(path)


def test_values_are_as_many_as_stated():
    with pytest.raises(RecipeError, match=f"r.yaml: a recipe of more than {MAX_NODES} values is not read"):
        parse_yaml("[" + "a," * MAX_NODES + "]", "r.yaml")
