"""The example's files are those that the real loaders read, or are not there at all."""

from __future__ import annotations

import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from streammerge.errors import OutputError
from streammerge.tensors import DTYPES
from streammerge.tools.demo import files
from streammerge.tools.demo.files import (
    CALLBACK_LEFTOVERS,
    CHUNK,
    LEFTOVERS,
    STORAGES,
    write_safetensors,
    write_torch_zip,
)
from streammerge.tools.demo.noise import Noise
from tests.tools.demo.miniatures import ODD, ODD_NOISE, as_bytes, assert_holds, info, read, stored

LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


# Safetensors


def test_safetensors_files_open_with_the_real_library(tmp_path):
    path = tmp_path / "odd.safetensors"
    write_safetensors(path, ODD, ODD_NOISE.values)
    assert_holds(safetensors.torch.load_file(path), ODD, ODD_NOISE)


def test_safetensors_files_are_the_librarys_byte_for_byte(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, ODD, ODD_NOISE.values)
    safetensors.torch.save_file(
        {name: stored(ODD_NOISE, name) for name in reversed(ODD)}, theirs, metadata={"format": "pt"}
    )
    assert ours.read_bytes() == theirs.read_bytes()


# Zips


@pytest.mark.parametrize("mmap", [False, True])
def test_zips_open_with_torch(tmp_path, mmap):
    path = tmp_path / "odd.ckpt"
    write_torch_zip(path, ODD, ODD_NOISE.values)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert_holds(loaded.pop("state_dict"), ODD, ODD_NOISE)
    assert loaded == LEFTOVERS


def test_zips_can_be_bare(tmp_path):
    path = tmp_path / "bare.pt"
    write_torch_zip(path, ODD, ODD_NOISE.values, wrap="")
    assert_holds(torch.load(path, weights_only=True), ODD, ODD_NOISE)


@pytest.mark.parametrize("dtype", STORAGES)
def test_zips_hold_every_type_that_has_a_storage(tmp_path, dtype):
    tensors = {"w": info(dtype, 2, 3)}
    path = tmp_path / "one.ckpt"
    write_torch_zip(path, tensors, lambda name, start, stop: torch.arange(start, stop).float())
    loaded = torch.load(path, weights_only=True)["state_dict"]["w"]
    expected = torch.arange(6).to(getattr(torch, DTYPES[dtype].torch_name)).view(2, 3)
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_zips_refuse_types_that_have_no_storage(tmp_path):
    path = tmp_path / "one.ckpt"
    with pytest.raises(OutputError, match=r"w   F8_E4M3 \[2\]"):
        write_torch_zip(path, {"w": info("F8_E4M3", 2)}, ODD_NOISE.values)
    assert list(tmp_path.iterdir()) == []


def test_a_callback_is_mentioned_but_not_needed(tmp_path):
    path = tmp_path / "lightning.ckpt"
    write_torch_zip(path, ODD, ODD_NOISE.values, leftovers=CALLBACK_LEFTOVERS)
    with pytest.raises(Exception, match=f"{LIGHTNING}.ModelCheckpoint"):
        torch.load(path, weights_only=True)
    stub = type("ModelCheckpoint", (), {"__module__": LIGHTNING})
    with torch.serialization.safe_globals([stub]):
        loaded = torch.load(path, weights_only=True)
    assert list(loaded["callbacks"]) == [stub]
    assert_holds(loaded["state_dict"], ODD, ODD_NOISE)


def test_the_pickle_names_only_what_torch_names(tmp_path):
    path = tmp_path / "odd.ckpt"
    write_torch_zip(path, ODD, ODD_NOISE.values)
    with zipfile.ZipFile(path) as archive:
        opcodes = list(pickletools.genops(archive.read("archive/data.pkl")))
    assert opcodes[0][1] == 2
    names = {argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"}
    kinds = {STORAGES[described.dtype.name] for described in ODD.values()}
    assert names == {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        *(f"torch {kind}" for kind in kinds),
    }


def test_storages_are_aligned_and_uncompressed(tmp_path):
    path = tmp_path / "odd.ckpt"
    write_torch_zip(path, ODD, ODD_NOISE.values)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        members = archive.infolist()
    assert [member.filename for member in members if "data/" in member.filename] == [
        f"archive/data/{key}" for key in range(len(ODD))
    ]
    for member, name in zip((m for m in members if "data/" in m.filename), ODD, strict=True):
        header = content[member.header_offset :][:30]
        start = member.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        assert start % 64 == 0
        assert member.compress_type == zipfile.ZIP_STORED
        assert content[start : start + member.file_size] == as_bytes(stored(ODD_NOISE, name))


@pytest.mark.slow
def test_zips_beyond_four_gigabytes(tmp_path):
    tensors = {"huge": info("F32", 2**30 + 2**10), "after": info("F32", 1000)}
    noise = Noise(tensors)
    path = tmp_path / "huge.ckpt"
    write_torch_zip(path, tensors, noise.values)
    loaded = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    for start in (0, 2**29, 2**30):
        assert torch.equal(loaded["huge"][start : start + 1000], noise.values("huge", start, start + 1000))
    assert torch.equal(loaded["after"], read(noise, "after"))
    assert loaded["huge"].data_ptr() % 64 == 0
    path.unlink()  # pytest would keep it


# Both


@pytest.mark.parametrize("write", [write_safetensors, write_torch_zip])
def test_the_same_seed_gives_the_same_bytes_for_any_chunk(tmp_path, monkeypatch, write):
    contents = []
    for chunk, workers in [(CHUNK, 2), (CHUNK, 2), (1000, 1), (3 * CHUNK + 1, 4)]:
        monkeypatch.setattr(files, "CHUNK", chunk)
        monkeypatch.setattr(files, "WORKERS", workers)
        write(tmp_path / "model", ODD, Noise(ODD, seed=3).values)
        contents.append((tmp_path / "model").read_bytes())
    assert contents.count(contents[0]) == len(contents)


@pytest.mark.parametrize("write", [write_safetensors, write_torch_zip])
def test_a_failure_leaves_what_was_there(tmp_path, write):
    path = tmp_path / "model"
    path.write_bytes(b"mine")

    def fill(name: str, start: int, stop: int) -> torch.Tensor:
        if name == "norm.weight":
            raise RuntimeError("out of noise")
        return ODD_NOISE.values(name, start, stop)

    with pytest.raises(RuntimeError, match="out of noise"):
        write(path, ODD, fill)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_safetensors, write_torch_zip])
def test_a_place_that_takes_no_file_is_an_error_for_the_user(tmp_path, write):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="can't be written"):
        write(tmp_path / "file" / "model", ODD, ODD_NOISE.values)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("write", ["write_safetensors", "write_torch_zip"])
def test_memory_stays_flat(tmp_path, write):
    program = f"""if True:
        import re, torch
        from pathlib import Path
        from streammerge.tools.demo.files import {write}
        from streammerge.tools.demo.noise import Noise
        from streammerge.tensors import DTYPES, TensorInfo

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

        def make(elements):
            tensors = {{"w": TensorInfo(DTYPES["F32"], (elements,))}}
            {write}(Path({str(tmp_path / "model")!r}), tensors, Noise(tensors).values)

        make(2**21)
        before = peak()
        make(2**26)
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    (tmp_path / "model").unlink()  # pytest would keep it
    assert int(result.stdout) < 16  # MiB, for a file of 256
