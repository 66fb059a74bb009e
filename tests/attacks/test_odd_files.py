"""Files that are no plain files, names that are no plain names, inputs that change, and inputs that stay the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import CheckpointError
from streammerge.formats.files import ByteFile
from streammerge.storage.target import is_reserved
from tests.make.models import SMALL, load_model, make_tensors, save_models, with_integers

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC


@pytest.fixture
def paths(tmp_path):
    models = {name: with_integers(make_tensors(seed, shapes=SMALL)) for seed, name in enumerate(("a", "b", "base"))}
    return save_models(tmp_path, **models)


@pytest.fixture
def told(paths, capsys):
    """Merges to an output from these inputs (or the usual two); the one error that is told, or "" if there is none."""

    def merge(output: Path, *inputs: Path, options: tuple[str, ...] = ()) -> str:
        words = [str(path) for path in (inputs or (paths["a"], paths["b"]))]
        code = main([*words, "-o", str(output), "-q", "--no-sync", *options])
        said = str(capsys.readouterr().err)
        assert code == (1 if said else 0), said
        assert "Traceback" not in said
        return said

    return merge


# ── no plain files ───────────────────────────────────────────────────────────────────────────────────────────────────


def make(kind: str, path: Path) -> Path:
    """Something that is no regular file."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            before = Path.cwd()
            os.chdir(path.parent)  # a socket's path must be short
            try:
                bound.bind(path.name)
            finally:
                os.chdir(before)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        return Path("/dev/null")
    return path


KINDS = {
    "fifo": "a named pipe",
    "socket": "a socket",
    "device": "a device",
    "folder": "holds no model",
    "dangling": "can't be read: No such file",
    "loop": "can't be read: Too many levels of symbolic links",
}

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX's kinds of files")


@posix
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_is_no_file_is_one_error(tmp_path, paths, told, kind):
    odd = make(kind, tmp_path / "odd.safetensors")
    said = told(tmp_path / "out.safetensors", paths["a"], odd)
    assert str(odd) in said
    assert KINDS[kind] in said
    assert "Nothing was written." in said
    assert not (tmp_path / "out.safetensors").exists()


@posix
@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "dangling", "loop"])
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_is_no_file_is_one_error(tmp_path, told, kind, force):
    odd = make(kind, tmp_path / "odd.safetensors")
    said = told(odd, options=("--force",) if force else ())
    assert "odd.safetensors" in said
    assert "Nothing was written." in said
    assert os.path.lexists(odd)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@posix
def test_a_device_is_never_replaced(told):
    assert "Nothing was written." in told(Path("/dev/null"), options=("--force",))
    assert Path("/dev/null").is_char_device()


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["модель", "模型 😀", "a b'c\"d", "x" * 200, "e\u0301", "-rf", "out.v1.5", "~"])
def test_a_name_is_only_a_name(tmp_path, told, paths, name):
    output = tmp_path / f"{name}.safetensors"
    assert told(output) == ""
    assert set(load_model(output)) == set(load_model(paths["a"]))
    assert told(tmp_path / "again.safetensors", output, paths["b"]) == ""


@posix
def test_control_characters_in_a_name_are_shown_safely(tmp_path, told):
    output = tmp_path / "x\x1b[31m\r.safetensors"
    assert told(output) == ""
    said = told(output)
    assert "\x1b" not in said
    assert "\r" not in said
    assert r"x\x1b[31m\r.safetensors" in said


@posix
def test_a_name_that_is_no_unicode_is_refused_before_the_merge(tmp_path, told):
    output = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors"))
    said = told(output)
    assert r"/\udcff.safetensors: the name is not valid Unicode" in said
    assert "Nothing was written." in said


def test_an_output_by_another_spelling_of_an_input_is_refused(tmp_path, told, paths):
    """On a file system that knows no case, `A.safetensors` is `a.safetensors`; elsewhere it is another file."""
    other = paths["a"].with_name("A.safetensors")
    same = other.exists()
    said = told(other, options=("--force",))
    assert ("the output is the same file as the input" in said) == same


# ── inputs that change ───────────────────────────────────────────────────────────────────────────────────────────────


def shorten(path: Path) -> None:
    os.truncate(path, 500)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(100))


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"changed!")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody change what is open")
@pytest.mark.parametrize("change", [shorten, lengthen, overwrite, replace, remove])
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_an_input_that_changes_meanwhile_is_one_error(tmp_path, paths, told, monkeypatch, change, io):
    from streammerge.storage.writer import OutputWriter

    whole, once = OutputWriter.write, threading.Lock()
    done: list[object] = []

    def changing(writer, job, position, data):
        with once:
            if not done:
                change(paths["b"])
                done.append(job)
        whole(writer, job, position, data)

    monkeypatch.setattr(OutputWriter, "write", changing)
    said = told(tmp_path / "out.safetensors", options=("--io", io))
    assert done
    assert "b.safetensors" in said or "a file ended while it was read" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_what_changed_is_said(paths):
    file = ByteFile(paths["a"])
    lengthen(paths["a"])
    with pytest.raises(CheckpointError, match=r"it had [\d,]+ bytes, and has [\d,]+ now"):
        file.check_unchanged()
    replace(paths["a"])
    with pytest.raises(CheckpointError, match="another file is there now: it was replaced"):
        file.check_unchanged()


def test_a_file_that_is_replaced_just_before_it_is_opened_is_found_out(paths, monkeypatch):
    file = ByteFile(paths["a"])
    whole = os.open

    def replacing(path, *args, **options):
        if Path(path) == paths["a"]:
            replace(paths["a"])
        return whole(path, *args, **options)

    monkeypatch.setattr(os, "open", replacing)
    with pytest.raises(CheckpointError, match="it was replaced"):
        _ = file.descriptor


# ── inputs that stay what they are ───────────────────────────────────────────────────────────────────────────────────

OPENED: list[tuple[str, int]] = []
_hooked: list[bool] = []


def _note(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and _hooked and _hooked[-1] and isinstance(args[0], (str, bytes)):
        flags = args[2] if isinstance(args[2], int) else 0
        OPENED.append((os.fsdecode(args[0]), flags))


@pytest.fixture
def opened():
    """Everything that this process opens, and with what flags: Python tells whoever listens."""
    if not _hooked:
        sys.addaudithook(_note)  # there is no way to take it back, so it is told whether to listen
    _hooked.append(True)
    OPENED.clear()
    yield OPENED
    _hooked.append(False)


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize(
    "words",
    [
        ["{a}", "{b}"],
        ["{a}", "{b}", "-m", "slerp", "-p", "t=0.5"],
        ["{a}", "{b}", "--base", "{base}", "-m", "ties", "-p", "density=0.5"],
        ["{a}", "--base", "{base}", "-m", "truncate_rank", "-p", "rank=1"],
        ["{ckpt}", "{b}", "--verify"],
        ["{a}", "-m", "passthrough", "--shard-size", "1kB"],
    ],
    ids=["linear", "gram", "block", "whole", "torch zip", "copied to shards"],
)
def test_inputs_are_only_read_and_stay_the_same_to_the_bit(tmp_path, paths, opened, words, io):
    torch.save(make_tensors(1, shapes=SMALL), tmp_path / "c.ckpt")
    inputs = {**paths, "ckpt": tmp_path / "c.ckpt"}
    before = {path: (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) for path in inputs.values()}
    opened.clear()
    given = [word.format(**inputs) for word in words]
    assert main([*given, "-o", str(tmp_path / "new" / "out.safetensors"), "--io", io, "-q", "--no-sync"]) == 0
    named = {str(path) for path in inputs.values()}
    of_inputs = [(path, flags) for path, flags in opened if path in named]
    assert of_inputs
    assert [(path, flags) for path, flags in of_inputs if flags & WRITE_FLAGS] == []
    assert any(flags & os.O_CREAT for _, flags in opened), "the hook heard nothing of the output"
    after = {path: (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) for path in inputs.values()}
    assert after == before


def test_inputs_that_may_only_be_read_are_enough(tmp_path, paths):
    for path in paths.values():
        path.chmod(0o444)
    streammerge.merge(streammerge.linear(paths["a"], paths["b"]), output=tmp_path / "out.safetensors", sync=False)
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["CON", "nul.safetensors", "aux .x", "com1.safetensors", "LPT9", "x.", "x ", "CONIN$"])
def test_names_that_windows_keeps_are_known(name):
    assert is_reserved(name)


@pytest.mark.parametrize("name", ["console.safetensors", "com0", "COM10.x", "nulls", "x.con", "out.safetensors", "lpt"])
def test_names_that_it_leaves_to_others_are_known_too(name):
    assert not is_reserved(name)


# ── files and tensors beyond 32 bits ─────────────────────────────────────────────────────────────────────────────────


def sparse_model(path: Path, rows: int, seed: int) -> torch.Tensor:
    """A tensor of `rows` × 2^20 halves, all holes but the last row, and a small one behind it; the last row."""
    row, small = torch.randn(2, 1 << 20, generator=torch.Generator().manual_seed(seed)).half()
    large_bytes, small_bytes = rows << 21, 1 << 21
    entries = {
        "large": {"dtype": "F16", "shape": [rows, 1 << 20], "data_offsets": [0, large_bytes]},
        "small": {"dtype": "F16", "shape": [1 << 20], "data_offsets": [large_bytes, large_bytes + small_bytes]},
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.truncate(8 + len(text) + large_bytes + small_bytes)
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(8 + len(text) + large_bytes - (1 << 21))
        file.write(row.numpy().tobytes())
        file.write(small.numpy().tobytes())
    return torch.stack([row, small])


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_what_lies_beyond_4_gibibytes_of_a_file_is_merged(tmp_path, io):
    rows = 2100  # more than 2^31 elements, and more than 2^32 bytes
    made = [sparse_model(tmp_path / f"{name}.safetensors", rows, seed) for seed, name in enumerate("ab")]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / f"{name}.safetensors"), "parameters": {"weight": 0.5}} for name in "ab"],
        "rules": [{"match": "large", "drop": True}],
    }
    streammerge.merge(recipe, output=tmp_path / "out.safetensors", io=io)
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == {"small"}
    assert torch.equal(merged["small"], ((made[0][1].double() + made[1][1].double()) / 2).half())


def test_elements_beyond_2_to_the_31_of_a_tensor_are_read(tmp_path):
    rows = 2100
    made = [sparse_model(tmp_path / f"{name}.safetensors", rows, seed) for seed, name in enumerate("ab")]
    merged = streammerge.linear(*(tmp_path / f"{name}.safetensors" for name in "ab"))
    elements = rows << 20
    assert elements > 2**31
    last = merged.read("large", elements - (1 << 20), elements)
    assert torch.equal(last, ((made[0][0].double() + made[1][0].double()) / 2).half())
    assert not merged.read("large", 2**31 - 5, 2**31 + 5).any()


@pytest.mark.slow
def test_a_tensor_of_more_than_4_gibibytes_is_written(tmp_path):
    rows = 2100
    made = [sparse_model(tmp_path / f"{name}.safetensors", rows, seed) for seed, name in enumerate("ab")]
    streammerge.merge(
        streammerge.linear(*(tmp_path / f"{name}.safetensors" for name in "ab")),
        output=tmp_path / "out.safetensors",
        sync=False,
    )
    with safe_open(tmp_path / "out.safetensors", framework="pt") as opened:
        large = opened.get_slice("large")
        assert large.get_shape() == [rows, 1 << 20]
        assert torch.equal(large[rows - 1], ((made[0][0].double() + made[1][0].double()) / 2).half())
        assert not large[rows - 2].any()
    (tmp_path / "out.safetensors").unlink()


# ── tensors of odd names ─────────────────────────────────────────────────────────────────────────────────────────────

ODD = ["", ".", "..", ".weight", "_scale", "a\nb", "x ", "\t", "ж.weight", "weight."]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("option", ["", "--keep", "--drop"])
def test_a_tensor_of_an_odd_name_is_a_tensor_as_any_other(tmp_path, name, option):
    models = {each: make_tensors(seed, shapes={name: (30,), "other": (5,)}) for seed, each in enumerate("ab")}
    inputs = save_models(tmp_path, **models)
    out = tmp_path / "out.safetensors"
    words = [*map(str, inputs.values()), "-o", str(out), "-q", "--no-sync"]
    assert main([*words, *([option, name] if option else [])]) == 0
    a, b = models.values()
    expected = {key: (a[key] + b[key]) / 2 for key in a}
    if option == "--drop":
        del expected[name]
    elif option == "--keep":
        expected[name] = a[name]
    found = load_file(out)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values)
