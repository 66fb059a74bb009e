"""Tensors are found however they are wrapped; what is there instead of them is named."""

from __future__ import annotations

import pickle
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.errors import CheckpointError
from streammerge.formats.torchzip.archive import read_torch_zip
from streammerge.formats.torchzip.state_dicts import NONE_LEFT
from tests.formats.torchzip.checkpoints import check_same, refused, save


class Callback:
    """Stands for a class of Lightning's, which is not installed."""

    def __init__(self) -> None:
        self.best = torch.ones(3)
        self.paths = {"a": Path("x")}


def lightning(state: Mapping[str, torch.Tensor]) -> dict[Any, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {Callback: {"monitor": "val/loss", "object": Callback()}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"lambdas": [None, {}], "rate": 1e-4}],
        "hyper_parameters": OrderedDict(path=Path("x"), seen={1, 2}, deep=[[[[]]]]),
        7: "a key that is no string",
    }


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    for name in names:
        module = types.ModuleType(name)
        module.Callback = Callback  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Callback, "__module__", names[-1])
    state = OrderedDict((f"model.{i}", torch.randn(3, 2)) for i in range(20))
    path = save(tmp_path / "model.ckpt", lightning(state))
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    left = check_same(path, state).left
    assert left.count == 7
    assert left.first[0] == "callbacks.(a key).best" or "best" in "".join(left.first)
    assert "optimizer_states.0.state.0.step" in left.first


def test_what_is_no_tensor_is_passed_over(tmp_path: Path) -> None:
    contents = {"a": torch.ones(1), "version": 2, "nested": {"b": [1, ()]}, 3: None, "list": [1], "n": None}
    path = save(tmp_path / "m.pt", contents)
    assert check_same(path, {"a": torch.ones(1)}).left == NONE_LEFT


@pytest.mark.parametrize(
    ("contents", "found"),
    [
        ({}, "an empty dict"),
        ({"epoch": 1, "args": {"lr": 0.1}}, "args   dict"),
        ({"state_dict": {}}, "state_dict   dict"),
        ([torch.ones(1)], "list"),
        (torch.ones(2, 3), "a tensor F32 [2, 3]"),
        ((torch.ones(1),), "tuple"),
        (torch.ones(1).untyped_storage(), "a storage (torch.storage.UntypedStorage)"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ("text", "str"),
        (5, "int"),
        (None, "NoneType"),
        ({5: torch.ones(1)}, "5   a tensor F32 [1]"),
    ],
)
def test_what_holds_no_tensors_says_what_it_holds(tmp_path: Path, contents: object, found: str) -> None:
    message = refused(save(tmp_path / "m.pt", contents), "no dict of tensors")
    assert found in message
    assert "state_dict()" in message


def test_tensors_of_other_kinds_are_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    contents = {
        "plain": torch.ones(1),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": quantized,
        "meta": torch.ones(2, device="meta"),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "double": torch.ones(2, dtype=torch.complex128),
    }
    path = save(tmp_path / "m.pt", {"state_dict": contents})
    with pytest.raises(CheckpointError, match="5 tensors are of a kind that can't be read") as caught:
        read_torch_zip(path)
    assert [line.split()[0] for line in caught.value.found] == list(contents)[1:]
    for word in ("_rebuild_sparse_tensor", "_rebuild_qtensor", "_rebuild_meta_tensor", "conj", "ComplexDouble"):
        assert any(word in line for line in caught.value.found)


def test_an_array_or_a_storage_among_the_tensors_is_named(tmp_path: Path) -> None:
    contents = {"a": torch.ones(1), "array": torch.ones(2).numpy(), "storage": torch.ones(2).untyped_storage()}
    message = refused(save(tmp_path / "m.pt", contents), "2 tensors are of a kind")
    assert "array   numpy" in message
    assert "storage   a storage (torch.storage.UntypedStorage)" in message


def test_only_unreadable_tensors_are_an_error_too(tmp_path: Path) -> None:
    refused(save(tmp_path / "m.pt", {"state_dict": {"sparse": torch.eye(3).to_sparse()}}), "1 tensor is of a kind")


def test_names_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    message = refused(save(tmp_path / "m.pt", {"a\ud800": torch.ones(1)}), "1 tensor is of a kind")
    assert "not text" in message
    message = refused(save(tmp_path / "m.pt", {"a" * 5000: torch.ones(1), "b": torch.ones(1)}), "1 tensor lies deeper")
    assert "long str" in message
