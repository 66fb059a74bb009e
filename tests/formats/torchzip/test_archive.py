"""Checkpoints of `torch.save` are found to be tensors in place, as `torch.load` would make them."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.formats.torchzip.state_dicts import NONE_LEFT
from streammerge.tensors import DTYPES
from tests.formats.torchzip.checkpoints import check_same, random, save

SAVABLE = [dtype for dtype in DTYPES.values() if dtype.torch_name]


@pytest.mark.parametrize("dtype", SAVABLE, ids=str)
def test_every_type(tmp_path: Path, dtype: Any) -> None:
    tensors = {
        "matrix": random(dtype.name, 3, 5),
        "scalar": random(dtype.name, 1).reshape(()),
        "empty": random(dtype.name, 0),
        "empty matrix": random(dtype.name, 4, 0, 2),
        "vector": random(dtype.name, 63),
    }
    found = check_same(save(tmp_path / "model.ckpt", tensors), tensors)
    assert {view.info.dtype for view in found.tensors.values()} == {dtype}


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3", "U16", "BOOL"])
def test_every_view(tmp_path: Path, dtype: str) -> None:
    whole = random(dtype, 6, 8)
    tensors = {
        "whole": whole,
        "transposed": whole.T,
        "rows": whole[2:5],
        "columns": whole[:, 1:4],
        "every other": whole[::2, 1::3],
        "one row": whole[3],
        "one column": whole[:, 3:4],
        "one element": whole[5, 7],
        "flat": whole.reshape(-1)[5:],
        "none": whole[6:],
        "none of a row": whole[2, 8:],
        "expanded": whole[0, :1].expand(4, 3),
        "expanded row": whole[:1].expand(3, 8),
        "windows": whole.reshape(-1).unfold(0, 4, 2),
        "channels last": random(dtype, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "permuted": random(dtype, 2, 3, 4).permute(2, 0, 1),
        "with ones": random(dtype, 1, 4, 1).transpose(0, 2),
    }
    path = save(tmp_path / "model.pt", tensors)
    found = check_same(path, tensors)
    loaded = torch.load(path, weights_only=True)
    check_same(path, loaded)
    assert len({view.storage_start for view in found.tensors.values()}) == 4


def test_parameters_and_subclasses(tmp_path: Path) -> None:
    class Special(torch.Tensor):
        pass

    parameter = torch.nn.Parameter(torch.randn(3, 2))
    with_state = torch.nn.Parameter(torch.randn(4))
    with_state.__dict__["note"] = "a parameter with a state"
    subclass = torch.randn(2, 2).T.as_subclass(Special)
    buffer = torch.nn.Buffer(torch.randn(5))
    module = sys.modules[__name__]
    Special.__qualname__ = "Special"
    module.__dict__["Special"] = Special
    tensors = {
        "parameter": parameter,
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "with state": with_state,
        "subclass": subclass,
        "buffer": buffer,
        "integers": torch.nn.Parameter(torch.arange(3), requires_grad=False),
        "bf16": torch.nn.Parameter(torch.randn(3).to(torch.bfloat16)),
    }
    path = save(tmp_path / "model.pt", tensors)
    del module.__dict__["Special"]
    check_same(path, tensors)


def test_a_model_s_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.LSTM(4, 2))
    state = model.state_dict()
    assert hasattr(state, "_metadata")
    found = check_same(save(tmp_path / "model.pt", state), state)
    assert found.left == NONE_LEFT


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_can_use(tmp_path: Path, protocol: int) -> None:
    tensors = {f"layer.{i}.weight": torch.randn(2, 3) for i in range(300)}
    check_same(save(tmp_path / "model.pt", {"state_dict": tensors}, pickle_protocol=protocol), tensors)


def test_a_name_of_any_kind(tmp_path: Path) -> None:
    tensors = {name: torch.ones(1) for name in ("", "a b", "ünïcode", "日本", "😀", "../up", "a\nb", "x" * 4000, "0")}
    check_same(save(tmp_path / "имя.модели.pt", tensors), tensors)


def test_a_storage_of_no_whole_number_of_elements(tmp_path: Path) -> None:
    """Torch counts whole elements and writes all bytes."""
    odd = torch.arange(11, dtype=torch.uint8)
    tensors = {"odd": odd[:8].view(torch.float32)}
    assert tensors["odd"].untyped_storage().nbytes() == 11
    check_same(save(tmp_path / "model.pt", tensors), tensors)


def test_without_checksums(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3)}
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "model.pt", tensors)
    finally:
        torch.serialization.set_crc32_options(True)
    check_same(path, tensors)


def test_rewritten_by_zipfile(tmp_path: Path) -> None:
    """Without torch's padding, tensors may start at any byte."""
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2).half(), "c": torch.arange(5)}
    source = save(tmp_path / "source.pt", tensors)
    path = tmp_path / "copy.pt"
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as copy:
        copy.writestr(zipfile.ZipInfo("source/"), b"")
        for info in reversed(archive.infolist()):
            copy.writestr(zipfile.ZipInfo(info.filename), archive.read(info))
    check_same(path, tensors)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_views(tmp_path: Path, data: st.DataObject) -> None:
    whole = random(data.draw(st.sampled_from(["F32", "F16", "U8", "I64", "C64", "F8_E5M2"])), 3, 4, 5)
    for _ in range(data.draw(st.integers(0, 4))):
        if whole.dim() and data.draw(st.booleans()):
            dim = data.draw(st.integers(0, whole.dim() - 1))
            start = data.draw(st.integers(0, whole.shape[dim]))
            whole = whole.movedim(dim, 0)[start :: data.draw(st.integers(1, 3))]
        else:
            dim = data.draw(st.integers(0, whole.dim()))
            whole = whole.unsqueeze(dim)
            whole = whole.expand(*[2 if place == dim else size for place, size in enumerate(whole.shape)])
    check_same(save(tmp_path / "model.pt", {"x": whole}), {"x": whole})
