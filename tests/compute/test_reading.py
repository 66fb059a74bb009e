"""Merges and other models are read as files are."""

from __future__ import annotations

import pytest
import torch

import streammerge
import streammerge.models.merged
from streammerge.compute.expressions import BLOCK
from streammerge.tensors import Model
from tests.make.models import MemoryModel, make_tensors, near, raw_bytes, save_models


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    base = make_tensors(0, torch.float16)
    paths = save_models(tmp_path_factory.mktemp("models"), base=base, a=near(base, 1), b=make_tensors(2, torch.float16))
    return {name: streammerge.open_model(path) for name, path in paths.items()}


MERGES = {
    "linear": lambda base, a, b: streammerge.linear(a, b, weight=[0.3, 0.7]),
    "slerp": lambda base, a, b: streammerge.slerp(a, b, t=0.4),
    "ties": lambda base, a, b: streammerge.ties(a, b, base=base, density=0.4),
    "nested": lambda base, a, b: streammerge.slerp(streammerge.ties(a, b, base=base, density=0.4), b, t=0.4),
}


@pytest.mark.parametrize("name", MERGES)
def test_reading_a_merge_is_reading_its_output(checkpoints, tmp_path, name):
    merge = MERGES[name](**checkpoints)
    assert isinstance(merge, Model)
    streammerge.merge(merge, output=tmp_path / "out.safetensors", sync=False)
    with streammerge.open_model(tmp_path / "out.safetensors") as written:
        assert dict(written.tensors) == dict(merge.tensors)
        for tensor, description in merge.tensors.items():
            elements = description.elements
            for start, stop in {(0, elements), (elements // 3, elements - elements // 5), (elements, elements)}:
                piece = merge.read(tensor, start, stop)
                assert (piece.dtype, piece.shape) == (torch.float16, (stop - start,))
                assert raw_bytes(piece) == raw_bytes(written.read(tensor, start, stop))


@pytest.mark.parametrize("name", MERGES)
def test_any_object_with_tensors_and_read_is_a_model(checkpoints, name):
    inputs = {
        key: MemoryModel(
            {
                tensor: opened.read(tensor, 0, description.elements).reshape(description.shape)
                for tensor, description in opened.tensors.items()
            }
        )
        for key, opened in checkpoints.items()
    }
    for tensor, description in checkpoints["a"].tensors.items():
        ours = MERGES[name](**checkpoints).read(tensor, 0, description.elements)
        theirs = MERGES[name](**inputs).read(tensor, 0, description.elements)
        assert raw_bytes(ours) == raw_bytes(theirs)
    for model in inputs.values():
        assert all(stop - start <= BLOCK for _, start, stop in model.ranges)


def test_what_has_the_weight_zero_is_never_read(checkpoints):
    tensors = make_tensors(5, torch.float16)
    base, a, b = (MemoryModel(tensors) for _ in range(3))
    merge = streammerge.task_arithmetic(a, b, base=base, weight=[0.5, 0.5])
    for name, description in merge.tensors.items():
        merge.read(name, 0, description.elements)
    assert not base.ranges
    assert a.ranges == b.ranges != []


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 92), (5, 4), (92, 92)])
@pytest.mark.parametrize("kind", ["checkpoint", "merge", "merge of others"])
def test_a_range_that_there_is_not_is_an_error(checkpoints, kind, start, stop):
    model = {
        "checkpoint": checkpoints["a"],
        "merge": MERGES["ties"](**checkpoints),
        "merge of others": streammerge.passthrough(MemoryModel({"layers.0.odd": torch.zeros(7, 13)})),
    }[kind]
    with pytest.raises(IndexError, match=rf"\[{start}, {stop}\) is no range of 91 elements"):
        model.read("layers.0.odd", start, stop)


@pytest.mark.parametrize("kind", ["checkpoint", "merge"])
def test_what_is_read_is_the_readers_own(checkpoints, kind):
    model = checkpoints["a"] if kind == "checkpoint" else MERGES["linear"](**checkpoints)
    first = model.read("layers.0.odd", 3, 50)
    copy = first.clone()
    first.zero_()
    assert torch.equal(model.read("layers.0.odd", 3, 50), copy)
