"""Distributed checkpoints of torch, against the tensors that its ranks saved."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

import streammerge
from streammerge import open_model
from streammerge.errors import CheckpointError
from tests.make.distributed import CUTS, save_ranks, tensors


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    if not hasattr(os, "fork"):
        pytest.skip("its ranks are forked")
    return save_ranks(tmp_path_factory.mktemp("ranks") / "step-5", seed=3)


@pytest.fixture
def copy(ranks, tmp_path) -> Path:
    return Path(shutil.copytree(ranks, tmp_path / "copy"))


def read(folder: Path, entry: str = "") -> dict[str, torch.Tensor]:
    with open_model(folder, entry) as model:
        infos = model.tensors
        return {name: model.read(name, 0, info.elements).view(info.shape) for name, info in infos.items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_tensors_are_put_together_of_the_chunks_of_all_ranks(ranks):
    assert len(list(ranks.glob("*.distcp"))) == 4
    same(read(ranks), tensors(3))
    with open_model(ranks) as model:
        assert model.container == "distributed checkpoint of torch (4 files)"
        assert model.left.count == len(CUTS)
        assert model.left.first[0].startswith("optim.state.")


def test_any_range_of_a_tensor_is_that_range(ranks):
    whole = tensors(3)
    with open_model(ranks) as model:
        for name in ("grid.weight", "columns.weight", "experts.gate_up_proj", "experts.down_proj", "half.weight"):
            flat = whole[name].flatten()
            for start in range(0, len(flat), 3):
                for stop in (start, start + 1, min(start + 11, len(flat)), len(flat)):
                    assert torch.equal(model.read(name, start, stop), flat[start:stop])


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_merges_of_them_are_those_of_whole_tensors(ranks, tmp_path, io):
    whole, other = tensors(3), tensors(4)
    torch.save(other, tmp_path / "other.pt")
    report = streammerge.merge(
        {"merge_method": "linear", "models": [{"model": str(ranks), "parameters": {"weight": 3}},
                                              {"model": str(tmp_path / "other.pt"), "parameters": {"weight": 1}}]},
        output=tmp_path / "out.safetensors", io=io,
    )  # fmt: skip
    found = load_file(tmp_path / "out.safetensors")
    assert report.merged == len(CUTS)
    for name in CUTS:
        expected = (0.75 * whole[name].double() + 0.25 * other[name].double()).to(whole[name].dtype)
        torch.testing.assert_close(
            found[name], expected, rtol=1e-6 if expected.dtype == torch.float32 else 8e-3, atol=0
        )
    assert torch.equal(found["count"], whole["count"])
    streammerge.merge({"merge_method": "linear", "models": [str(ranks)]}, output=tmp_path / "one", io=io)
    same(load_file(tmp_path / "one" / "model.safetensors"), whole)


def test_flat_checkpoints_and_those_of_accelerate(tmp_path):
    model = {"a.weight": torch.randn(4, 3), "b": torch.arange(5)}
    save(model, checkpoint_id=tmp_path / "flat")
    same(read(tmp_path / "flat"), model)
    save({"model": model}, checkpoint_id=tmp_path / "checkpoint-5" / "pytorch_model_fsdp_0")
    (tmp_path / "checkpoint-5" / "optimizer.pt").write_bytes(b"x")
    same(read(tmp_path / "checkpoint-5"), model)
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="weights of two kinds"):
        open_model(tmp_path / "checkpoint-5")


def test_of_two_models_one_has_to_be_named(tmp_path):
    models = {name: {"layer.weight": torch.randn(4, 3)} for name in ("generator", "ema")}
    save(models, checkpoint_id=tmp_path / "two")
    with pytest.raises(CheckpointError, match="2 dicts of tensors in it could be the model") as caught:
        open_model(tmp_path / "two")
    assert "--entry" in caught.value.advice
    same(read(tmp_path / "two", "ema"), models["ema"])


def test_a_checkpoint_without_a_model_is_refused(tmp_path):
    save({"optim": {"state": {"x.y": torch.ones(3)}}, "step": 3}, checkpoint_id=tmp_path / "none")
    with pytest.raises(CheckpointError, match="no tensors of a model"):
        open_model(tmp_path / "none")


@pytest.mark.parametrize("name", ["_flat_param", "model.layers.0._fsdp_wrapped_module._flat_param", "flat_param_0"])
def test_flattened_parameters_are_refused(tmp_path, name):
    state = {"model": {name: torch.ones(6, dtype=torch.bfloat16), "norm.weight": torch.ones(2)}}
    for step in (1, 2):
        save(state, checkpoint_id=tmp_path / f"step-{step}")
    words = [str(tmp_path / f"step-{step}") for step in (1, 2)]
    with pytest.raises(CheckpointError, match="flattened") as caught:
        streammerge.merge(
            {"merge_method": "linear", "models": words, "parameters": {"weight": 1}}, output=tmp_path / "OUT"
        )
    assert list(caught.value.found) == [name]
    assert not (tmp_path / "OUT").exists()


# ── folders that are incomplete, or lie ──────────────────────────────────────────────────────────────────────────────


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('/tmp/streammerge-was-here').touch()",))


def changed(folder: Path, change) -> Path:
    """The folder, what its metadata say changed."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))
    return folder


def chunks(metadata: Metadata, name: str = "model.grid.weight") -> list[ChunkStorageMetadata]:
    return metadata.state_dict_metadata[name].chunks  # type: ignore[union-attr]


def place(metadata: Metadata, name: str = "model.grid.weight", number: int = 0):
    return metadata.storage_data[MetadataIndex(name, chunks(metadata, name)[number].offsets)]


def test_what_is_no_metadata_is_refused_and_never_run(copy):
    marker = Path("/tmp/streammerge-was-here")
    for evil in (Evil(), {"state_dict_metadata": Evil()}, [Evil()], 5, None, "text"):
        (copy / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(CheckpointError, match="does not describe tensors"):
            open_model(copy)
    for data in (b"", b"x", b"\x80\x04", b"(" * 5000):
        (copy / ".metadata").write_bytes(data)
        with pytest.raises(CheckpointError, match="does not describe tensors"):
            open_model(copy)
    assert not marker.exists()


def lies():
    def elsewhere(metadata):
        place(metadata).relative_path = "../secret.distcp"

    def absolute(metadata):
        place(metadata).relative_path = "/etc/passwd"

    def beyond(metadata):
        place(metadata).length = 10**12

    def negative(metadata):
        place(metadata).offset = -5

    def huge(metadata):
        place(metadata).offset = 2**63

    def overlapping(metadata):
        chunks(metadata)[0].sizes = torch.Size([7, 3])

    def bare(metadata):
        del chunks(metadata)[1]

    def none(metadata):
        chunks(metadata).clear()

    def other(metadata):
        place(metadata).offset, place(metadata).length = (
            place(metadata, number=3).offset,
            place(metadata, number=3).length,
        )

    def nowhere(metadata):
        del metadata.storage_data[MetadataIndex("model.grid.weight", chunks(metadata)[0].offsets)]

    def larger(metadata):
        metadata.state_dict_metadata["model.grid.weight"].size = torch.Size([70, 6])

    def deeper(metadata):
        metadata.state_dict_metadata["model.grid.weight"].size = torch.Size([7, 6, 1])

    def another_dtype(metadata):
        metadata.state_dict_metadata["model.grid.weight"].properties.dtype = torch.int32

    def compressed(metadata):
        place(metadata).transform_descriptors = ["zstd"]

    def through_a_tensor(metadata):
        metadata.planner_data["model.scalar"] = ("model", "grid.weight", "x")

    def twice(metadata):
        metadata.planner_data["model.scalar"] = ("model", "grid.weight")

    def not_objects(metadata):
        metadata.state_dict_metadata["model.grid.weight"].chunks = ["x"]

    return {each.__name__: each for each in locals().values()}


@pytest.mark.parametrize("lie", lies().values(), ids=lies())
def test_what_contradicts_itself_is_refused(copy, lie):
    with pytest.raises(CheckpointError) as caught:
        open_model(changed(copy, lie))
    assert caught.value.advice


def test_what_is_incomplete_is_refused(copy):
    (copy / "__2_0.distcp").rename(copy / "gone")
    with pytest.raises(CheckpointError, match=r"__2_0\.distcp is missing"):
        open_model(copy)
    (copy / "gone").rename(copy / "__2_0.distcp")
    data = (copy / "__2_0.distcp").read_bytes()
    (copy / "__2_0.distcp").write_bytes(data[: len(data) // 8])
    with pytest.raises(CheckpointError, match="ends before its byte"):
        open_model(copy)
    (copy / "__2_0.distcp").write_bytes(bytes(len(data)))
    with pytest.raises(CheckpointError, match="no readable torch zip"):
        open_model(copy)
    (copy / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"without \.metadata"):
        open_model(copy)
