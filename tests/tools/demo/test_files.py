"""The example's models: values that don't depend on how they are asked for, and files that the real loaders read."""

from __future__ import annotations

import itertools
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.errors import MergeError, OutputError
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.demo import files
from streammerge.tools.demo.files import (
    CALLBACK_LEFTOVERS,
    CHUNK,
    LEFTOVERS,
    STORAGES,
    make_models,
    write_safetensors,
    write_torch_zip,
)
from streammerge.tools.demo.layouts import MINIATURE, checkpoint
from streammerge.tools.demo.noise import BLOCK, SMALLEST, FineTune, Noise

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


def info(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(DTYPES[dtype], shape)


ODD = {
    "first.weight": info("F32", 3, 21),
    "nothing": info("F16", 0, 4),
    "scale": info("F16"),
    "embeddings.position_ids": info("I64", 1, 77),
    "one": info("BF16", 1),
    "several.chunks": info("F16", 3, CHUNK - 5),
    "exactly.a.chunk": info("F32", CHUNK),
    "norm.weight": info("F64", 63),
}
ODD_NOISE = Noise(ODD, seed=7)


# Values


@st.composite
def cuts(draw: st.DrawFn, elements: int) -> list[int]:
    inner = draw(st.lists(st.integers(0, elements), max_size=6))
    return sorted({0, elements, *inner})


@settings(max_examples=25, deadline=None)
@given(at=cuts(3 * (CHUNK - 5)), tuned=st.booleans())
def test_values_do_not_depend_on_the_cuts(at, tuned):
    model = FineTune("task", ODD, ODD_NOISE) if tuned else ODD_NOISE
    whole = model.values("several.chunks", at[0], at[-1])
    pieces = [model.values("several.chunks", start, stop) for start, stop in itertools.pairwise(at)]
    assert torch.equal(torch.cat(pieces), whole)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_widened_convolution_does_not_depend_on_the_cuts(data):
    model, tensors = miniature_depth()
    elements = tensors[FIRST_CONVOLUTION].elements
    at = data.draw(cuts(elements))
    pieces = [model.values(FIRST_CONVOLUTION, start, stop) for start, stop in itertools.pairwise(at)]
    assert torch.equal(torch.cat(pieces), model.values(FIRST_CONVOLUTION, 0, elements))


def test_values_follow_from_the_seed():
    assert torch.equal(read(Noise(ODD, 7), "first.weight"), read(ODD_NOISE, "first.weight"))
    assert not torch.equal(read(Noise(ODD, 8), "first.weight"), read(ODD_NOISE, "first.weight"))


@pytest.mark.parametrize("layout", ["sd2-depth", "sd1"])
def test_values_are_as_large_as_real_ones(layout):
    tensors = checkpoint(layout, scale=MINIATURE)
    noise = Noise(tensors)
    for name, described in tensors.items():
        values = read(noise, name)
        if name.endswith("position_ids"):
            assert values.tolist() == list(range(77))
        elif name.endswith("bias"):
            assert values.abs().max() < 0.05, name
        elif len(described.shape) == 1:
            assert (values - 1).abs().max() < 0.5, name
        elif described.elements > 1000:
            assert 0.015 < values.std() < 0.025, name
            assert values.mean().abs() < 0.005, name


def test_no_two_tensors_are_alike_and_no_weight_is_zero():
    tensors = checkpoint("sd2-depth", scale=MINIATURE)
    noise = Noise(tensors)
    contents = {name: read(noise, name).half() for name in tensors}
    assert len({values.numpy().tobytes() for values in contents.values()}) == len(tensors)
    assert all(values.count_nonzero() == values.numel() for values in contents.values())


def test_blocks_of_a_tensor_differ():
    tensors = {"w": info("F32", 4, BLOCK)}
    blocks = read(Noise(tensors), "w").view(4, BLOCK)
    correlation = torch.corrcoef(blocks) - torch.eye(4)
    assert correlation.abs().max() < 0.02
    assert blocks.abs().min() > SMALLEST * 0.01


def test_a_fine_tune_is_its_base_and_a_small_task_vector():
    base, tuned = checkpoint("sd2-base", scale=MINIATURE), checkpoint("sd2-waifu", scale=MINIATURE)
    noise = Noise(base)
    waifu, other = FineTune("waifu", tuned, noise), FineTune("other", tuned, noise)
    for name, described in tuned.items():
        task, another = (read(model, name) - read(noise, name) for model in (waifu, other))
        assert task.count_nonzero() > 0.9 * task.numel(), name
        assert not torch.equal(task, another), name
        if len(described.shape) > 1 and described.elements > 1000:
            assert 5e-4 < task.std() < 1.5e-2, name


def test_a_fine_tune_of_more_channels_starts_with_zeros_there():
    model, tensors = miniature_depth()
    base = checkpoint("sd2-base", scale=MINIATURE)
    wide = read(model, FIRST_CONVOLUTION).view(tensors[FIRST_CONVOLUTION].shape)
    narrow = read(Noise(base), FIRST_CONVOLUTION).view(base[FIRST_CONVOLUTION].shape)
    assert wide.shape == (10, 5, 3, 3)
    assert 0 < (wide[:, :4] - narrow).std() < 1.5e-2
    assert 0 < wide[:, 4].std() < 1.5e-2


def test_a_fine_tune_leaves_positions_alone():
    tuned = FineTune("task", ODD, ODD_NOISE)
    assert read(tuned, "embeddings.position_ids").tolist() == list(range(77))


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


# The three models


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("container", ["safetensors", "ckpt"])
def test_the_example_in_miniature(tmp_path, dtype, container):
    models = make_models(tmp_path / "new" / "folder", dtype=dtype, container=container)
    paths = [models.base, models.depth, models.waifu]
    stems = ["512-base-ema", "512-depth-ema", "wd-1-4-anime_e2"]
    assert [path.name for path in paths] == [f"{stem}.{container}" for stem in stems]
    assert sorted(models.base.parent.iterdir()) == sorted(paths)
    for path, layout in zip(paths, ["sd2-base", "sd2-depth", "sd2-waifu"], strict=True):
        loaded = load(path)
        described = checkpoint(layout, dtype=dtype, scale=MINIATURE)
        assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
            name: entry.shape for name, entry in described.items()
        }
        assert {tensor.dtype for tensor in loaded.values()} == {torch.float16 if dtype == "F16" else torch.float32}
        assert 1_000_000 < path.stat().st_size < 8_000_000


def test_the_example_is_the_same_in_both_containers(tmp_path):
    flat = make_models(tmp_path, container="safetensors")
    zipped = make_models(tmp_path, container="ckpt")
    for one, other in [(flat.base, zipped.base), (flat.depth, zipped.depth), (flat.waifu, zipped.waifu)]:
        left, right = load(one), load(other)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_example_follows_from_its_seed(tmp_path):
    first, again, other = (make_models(tmp_path / str(number), seed=seed) for number, seed in enumerate((5, 5, 6)))
    for name in ("base", "depth", "waifu"):
        contents = [getattr(models, name).read_bytes() for models in (first, again, other)]
        assert contents[0] == contents[1] != contents[2]


def test_the_examples_models_are_related(tmp_path):
    models = make_models(tmp_path)
    base, depth, waifu = (load(path) for path in (models.base, models.depth, models.waifu))
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    one, other = ((tuned[name].float() - base[name].float()).flatten() for tuned in (depth, waifu))
    assert 5e-4 < one.std() < 1.5e-2
    assert 5e-4 < other.std() < 1.5e-2
    assert torch.cosine_similarity(one, other, dim=0).abs() < 0.1


def test_files_that_may_be_the_real_ones_are_not_replaced(tmp_path):
    real = tmp_path / "512-depth-ema.safetensors"
    real.write_bytes(b"real")
    with pytest.raises(OutputError, match="512-depth-ema"):
        make_models(tmp_path)
    assert real.read_bytes() == b"real"
    assert list(tmp_path.iterdir()) == [real]
    make_models(tmp_path, force=True)
    assert len(load(real)) == 1596


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    folder = tmp_path / "new"
    with pytest.raises(MergeError, match=r"need 16\.08 GB, but only 1\.00 GB are free") as caught:
        make_models(folder, full=True, dtype="F32")
    assert "512-base-ema.safetensors   5.21 GB" in str(caught.value)
    assert not folder.exists()


def miniature_depth() -> tuple[FineTune, dict[str, TensorInfo]]:
    tensors = checkpoint("sd2-depth", scale=MINIATURE)
    return FineTune("depth", tensors, Noise(checkpoint("sd2-base", scale=MINIATURE))), tensors


def read(model: Noise | FineTune, name: str) -> torch.Tensor:
    return model.values(name, 0, model.tensors[name].elements)


def stored(model: Noise | FineTune, name: str) -> torch.Tensor:
    described = model.tensors[name]
    return read(model, name).to(getattr(torch, described.dtype.torch_name)).view(described.shape)


def load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    loaded = torch.load(path, weights_only=True)["state_dict"]
    assert isinstance(loaded, dict)
    return loaded


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.flatten().view(torch.uint8).tolist())


def assert_holds(loaded: dict[str, torch.Tensor], tensors: dict[str, TensorInfo], model: Noise | FineTune) -> None:
    assert loaded.keys() == tensors.keys()
    for name in tensors:
        torch.testing.assert_close(loaded[name], stored(model, name), rtol=0, atol=0)
