"""Hashes of outputs: computed behind the writers, written beside the output, checked by others and by verify."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.compute.job import Job
from streammerge.errors import CheckpointError, OutputError
from streammerge.formats.layout import lay_out
from streammerge.storage import hashing
from streammerge.storage.hashing import HashingWriter, file_sha256, read_sidecar, sidecar_beside
from streammerge.storage.writer import OutputWriter
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.workers.checking import SAMPLES, sample
from tests.make.models import make_tensors, near, save_models, with_integers


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with two models."""
    monkeypatch.chdir(tmp_path)
    base = with_integers(make_tensors(0))
    save_models(tmp_path, a=base, b=near(base, 1))
    return tmp_path


MERGE = ["a.safetensors", "b.safetensors", "-q", "--no-sync", "--threads", "2"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensors_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_the_hash_is_that_of_the_file_and_changes_no_byte(folder):
    assert main([*MERGE, "-o", "plain.safetensors"]) == 0
    assert main([*MERGE, "-o", "out.safetensors", "--hash", "--report", "report.json"]) == 0
    out = Path("out.safetensors")
    assert out.read_bytes() == Path("plain.safetensors").read_bytes()
    text = Path("out.safetensors.sha256").read_text()
    expected, alone = sha256(out.read_bytes()), sha256(tensors_of(out))
    assert text == f"{expected}  out.safetensors\n# tensors alone: {alone}\n"
    report = streammerge.merge(
        {"merge_method": "linear", "models": ["a.safetensors", "b.safetensors"]}, output=out, hash=True, force=True
    )
    assert report.to_json()["hashes"] == {"out.safetensors": {"sha256": expected, "tensors": alone}}


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_can_check_it(folder):
    assert main([*MERGE, "-o", "out", "--hash", "--shard-size", "600KB"]) == 0
    done = subprocess.run(["sha256sum", "-c", "model.safetensors.sha256"], cwd="out", capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count(": OK") == len(list(Path("out").glob("*.safetensors"))) + 1


def test_verify_checks_the_hashes(folder, capsys):
    assert main([*MERGE, "-o", "out.safetensors", "--hash"]) == 0
    assert main(["verify", "out.safetensors", "-q"]) == 0
    assert "hashes: the sha256 of every file is as in out.safetensors.sha256\n" in capsys.readouterr().out
    content = bytearray(Path("out.safetensors").read_bytes())
    content[-1] ^= 1
    Path("out.safetensors").write_bytes(content)
    assert main(["verify", "out.safetensors", "-q"]) == 1
    assert "the files are not those whose hashes it holds\n  out.safetensors: " in capsys.readouterr().err


def test_a_file_of_hashes_that_is_there_is_not_replaced_unasked(folder, capsys):
    Path("out.safetensors.sha256").write_text("mine")
    assert main([*MERGE, "-o", "out.safetensors", "--hash"]) == 1
    assert "out.safetensors.sha256: the file of hashes exists" in capsys.readouterr().err
    assert Path("out.safetensors.sha256").read_text() == "mine"
    assert not Path("out.safetensors").exists()
    assert main([*MERGE, "-o", "out.safetensors", "--hash", "--force"]) == 0
    assert main(["verify", "out.safetensors", "-q"]) == 0


def test_hashes_of_an_output_that_was_replaced_are_told(folder, capsys):
    assert main([*MERGE, "-o", "out.safetensors", "--hash"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*MERGE, "-o", "out.safetensors", "--force"]) == 0
    assert "out.safetensors.sha256 holds the hashes of the output that was replaced" in capsys.readouterr().err


def layout_of(path: Path, sizes: list[int], shard_bytes: int | None):
    infos = {f"t{number}": TensorInfo(DTYPES["U8"], (size,)) for number, size in enumerate(sizes)}
    return lay_out(path, infos, {}, shard_bytes)


@pytest.mark.parametrize("shard_bytes", [None, 3000])
@pytest.mark.parametrize("seed", range(3))
def test_windows_may_be_written_in_any_order(tmp_path, monkeypatch, seed, shard_bytes):
    monkeypatch.setattr(hashing, "BLOCK", 512)
    order = random.Random(seed)
    layout = layout_of(tmp_path / "out", [0, 1, 700, 5000, 0, 2048], shard_bytes)
    parts = []
    for number, file in enumerate(layout.files):
        for name, offset in file.header.offsets.items():
            info = TensorInfo(DTYPES["U8"], ([0, 1, 700, 5000, 0, 2048][int(name[1:])],))
            job = Job(name, info, None, None, number, offset)
            parts += [(job, start, min(300, info.nbytes - start)) for start in range(0, info.nbytes, 300)]
    order.shuffle(parts)
    with OutputWriter(layout) as writer:
        with HashingWriter(writer) as sink:
            for job, start, nbytes in parts:
                sink.write(job, start, memoryview(order.randbytes(nbytes)))
            hashes = sink.finish()
        writer.commit(sync=False)
    for file, found in zip(layout.files, hashes, strict=True):
        assert found.sha256 == sha256(file.path.read_bytes()) == file_sha256(file.path)
        assert found.tensors == sha256(tensors_of(file.path))


def test_a_merge_that_fails_leaves_no_hash_and_no_thread(tmp_path):
    layout = layout_of(tmp_path / "out.safetensors", [5000], None)
    with pytest.raises(RuntimeError, match="stop"), OutputWriter(layout) as writer, HashingWriter(writer) as sink:
        raise RuntimeError("stop")
    assert not sink._thread.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_while_hashing_is_an_error(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OutputError("the disk fails")

    monkeypatch.setattr(OutputWriter, "read_file", fail)
    layout = layout_of(tmp_path / "out.safetensors", [5000], None)
    stopped = pytest.raises(OutputError, match="the disk fails")
    with stopped, OutputWriter(layout) as writer, HashingWriter(writer) as sink:
        sink.finish()


# ── files of hashes ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.text(
        st.characters(exclude_characters="\r\0/\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029", exclude_categories=["Cs"]),
        min_size=1,
    )
)
def test_any_name_is_read_as_it_was_written(tmp_path_factory, name):
    path = tmp_path_factory.mktemp("sidecar") / "x.sha256"
    path.write_bytes(f"{hashing._line('a' * 64, name)}\n".encode())
    assert read_sidecar(path) == {name: "a" * 64}


@pytest.mark.parametrize("text", ["x", "a" * 63 + "  x", "a" * 64 + " x", "g" * 64 + "  x", "a" * 64 + "  "])
def test_what_is_no_file_of_hashes_is_refused(tmp_path, text):
    path = tmp_path / "x.sha256"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="line 1 is no sha256"):
        read_sidecar(path)
    assert sidecar_beside(tmp_path / "x") == path


# ── indexes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sharded(folder, capsys):
    """An output of several shards."""
    assert main([*MERGE, "-o", "out", "--shard-size", "600KB"]) == 0
    assert main(["verify", "out", "-q", "a=a.safetensors", "b=b.safetensors"]) == 0
    assert "index: right for" in capsys.readouterr().out
    return Path("out/model.safetensors.index.json")


@pytest.mark.parametrize(
    ("find", "put", "problem"),
    [('"total_size": ', '"total_size": 1', "total_size is 1"), ('"scalar"', '"scolar"', "scolar: not in")],
)
def test_an_index_that_lies_is_found(sharded, capsys, find, put, problem):
    text = sharded.read_text()
    assert find in text
    sharded.write_text(text.replace(find, put))
    assert main(["verify", "out", "-q"]) == 1
    assert problem in capsys.readouterr().err


def test_a_tensor_that_the_index_forgot_is_found(sharded, capsys):
    import json

    index = json.loads(sharded.read_text())
    shard = index["weight_map"].pop("scalar")
    sharded.write_text(json.dumps(index))
    assert main(["verify", "out", "-q"]) == 1
    assert f"scalar: in {shard}, but not so in the weight_map" in capsys.readouterr().err


def test_shards_of_another_merge_are_found(sharded, capsys):
    shard = next(sharded.parent.glob("*.safetensors"))
    shutil.copy(shard, shard.with_name("model-00001-of-00009.safetensors"))
    assert main(["verify", "out", "-q"]) == 1
    assert "model-00001-of-00009.safetensors: a shard that the index does not name" in capsys.readouterr().err


def test_a_shard_that_is_missing_is_an_error(sharded, capsys):
    next(sharded.parent.glob("*.safetensors")).unlink()
    assert main(["verify", "out", "-q"]) == 1
    assert "can't be read: No such file" in capsys.readouterr().err


# ── samples ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def jobs_of(*elements: int) -> list[Job]:
    return [Job(f"t{n}", TensorInfo(DTYPES["F16"], (size,)), None, None, 0, 0) for n, size in enumerate(elements)]


@given(st.lists(st.integers(0, 5000), max_size=8), st.integers(1, 50))
def test_samples_are_spread_and_inside(elements, samples):
    jobs = jobs_of(*elements)
    chosen = sample(jobs, samples)
    assert chosen == sample(jobs, samples)
    for job, positions in chosen.items():
        assert all(0 <= position < job.info.nbytes for position in positions)
    total = 2 * sum(elements)
    assert sum(map(len, chosen.values())) == min(samples, total) or total < samples * 2
    largest = max(jobs, key=lambda job: job.info.nbytes, default=None)
    if largest and largest.info.nbytes * samples >= 2 * total > 0:
        assert largest in chosen


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "truncate_rank"])
def test_samples_find_what_is_wrong_in_every_kind_of_method(folder, method, capsys):
    words = {
        "slerp": ["-p", "t=0.3"],
        "ties": ["--base", "a.safetensors"],
        "truncate_rank": ["--base", "a.safetensors"],
    }
    models = ["b.safetensors"] if method in ("ties", "truncate_rank") else ["a.safetensors", "b.safetensors"]
    options = ["-m", method, *words.get(method, []), "-q", "--no-sync"]
    assert main([*models, *options, "-o", "out.safetensors"]) == 0
    assert main(["verify", "out.safetensors", "-q"]) == 0
    assert f"values: {SAMPLES}" not in capsys.readouterr().out  # there are fewer windows than that
    content = bytearray(Path("out.safetensors").read_bytes())
    place = len(content) - torch.tensor(load_file("out.safetensors")["layers.2.large"].numel()).item()
    content[int(place)] ^= 1
    Path("out.safetensors").write_bytes(content)
    assert main(["verify", "out.safetensors", "-q"]) == 1
