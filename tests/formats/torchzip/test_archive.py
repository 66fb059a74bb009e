"""Checkpoints of `torch.save` are found to be tensors in place, as `torch.load` would make them, and nothing is run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import struct
import sys
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.errors import CheckpointError
from streammerge.formats.torchzip import state_dicts
from streammerge.formats.torchzip.archive import StoredView, TorchZip, is_torch_zip, legacy_torch_reason, read_torch_zip
from streammerge.formats.torchzip.directory import MAX_MEMBERS
from streammerge.formats.torchzip.state_dicts import NONE_LEFT
from streammerge.tensors import DTYPES, TensorInfo
from tests.formats.torchzip.bombs import BOMBS, cost, count_steps
from tests.formats.torchzip.harmful_pickles import HARMFUL, harmful
from tests.formats.torchzip.opcodes import call, dict_, named, number, numbers, storage, tensor, text, tuple_

SAVABLE = [dtype for dtype in DTYPES.values() if dtype.torch_name]


def save(path: Path, contents: object, **options: Any) -> Path:
    """A checkpoint as torch writes it."""
    torch.save(contents, path, **options)
    return path


def write_zip(path: Path, members: Mapping[str, bytes], *, method: int = zipfile.ZIP_STORED) -> Path:
    """A zip of these members, under the folder `archive`."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data, method)
    return path


def craft(path: Path, program: bytes, **storages: bytes) -> Path:
    """A checkpoint with this pickle and a storage of 24 bytes."""
    data = {f"data/{key}": value for key, value in ({"0": bytes(range(24))} | storages).items()}
    return write_zip(path, {"data.pkl": b"\x80\2" + program + b".", **data, "version": b"3\n"})


def load(path: Path, view: StoredView) -> torch.Tensor:
    """The tensor that a view describes, from the bytes of the file."""
    dtype = getattr(torch, view.info.dtype.torch_name)
    with path.open("rb") as file:
        file.seek(view.storage_start)
        data = bytearray(file.read(view.storage_nbytes))
    assert len(data) == view.storage_nbytes
    elements = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return torch.as_strided(elements, view.info.shape, view.stride, view.offset)


def load_range(path: Path, view: StoredView) -> torch.Tensor:
    """The same of a contiguous view, from its range of bytes."""
    start, stop = view.byte_range
    assert stop - start == view.info.nbytes
    dtype = getattr(torch, view.info.dtype.torch_name)
    data = bytearray(path.read_bytes()[start:stop])
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(view.info.shape)


def bits(values: torch.Tensor) -> bytes:
    """The tensor's elements, byte for byte."""
    flat = values.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def check_same(path: Path, expected: Mapping[str, torch.Tensor]) -> TorchZip:
    """What is found in the file is what is expected, in the same order."""
    found = read_torch_zip(path)
    assert list(found.tensors) == list(expected)
    for name, view in found.tensors.items():
        value = expected[name]
        assert view.info == TensorInfo(view.info.dtype, tuple(value.shape)), name
        assert getattr(torch, view.info.dtype.torch_name) == value.dtype, name
        assert bits(load(path, view)) == bits(value), name
        assert view.contiguous == value.is_contiguous(), name
        if view.contiguous:
            assert bits(load_range(path, view)) == bits(value), name
    return found


def refused(path: Path, match: str) -> str:
    """The whole message with which a file is refused."""
    with pytest.raises(CheckpointError, match=match) as caught:
        read_torch_zip(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


def random(dtype: str, *shape: int) -> torch.Tensor:
    """A tensor of this type with random bits."""
    size = DTYPES[dtype].bits // 8
    count = int(torch.Size(shape).numel())
    generator = torch.Generator().manual_seed(count)
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (count * size,), dtype=torch.uint8, generator=generator)
    return raw.view(getattr(torch, DTYPES[dtype].torch_name)).reshape(shape)


# --- What torch writes --------------------------------------------------------------------------------------------


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


# --- How the tensors are wrapped ----------------------------------------------------------------------------------


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
    refused(save(tmp_path / "m.pt", {"state_dict": {"sparse": torch.eye(3).to_sparse()}}), "1 tensors are of a kind")


def test_names_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    message = refused(save(tmp_path / "m.pt", {"a\ud800": torch.ones(1)}), "1 tensors are of a kind")
    assert "not text" in message
    message = refused(save(tmp_path / "m.pt", {"a" * 5000: torch.ones(1), "b": torch.ones(1)}), "1 tensor lies deeper")
    assert "long str" in message


# --- Tensors that don't fit their storages ------------------------------------------------------------------------


def one(program: bytes) -> bytes:
    return dict_(x=program)


def test_the_crafted_checkpoint_is_read(tmp_path: Path) -> None:
    view = read_torch_zip(craft(tmp_path / "m.pt", one(tensor()))).tensors["x"]
    assert bits(load(tmp_path / "m.pt", view)) == bytes(range(24))


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (tensor(offset=number(1)), "needs 28 bytes of a storage of 24"),
        (tensor(shape=numbers(2, 4)), "needs 28 bytes of a storage of 24"),
        (tensor(stride=numbers(4, 1)), "needs 28 bytes of a storage of 24"),
        (tensor(stride=numbers(1, 3)), "needs 32 bytes of a storage of 24"),
        (tensor(stride=numbers(2**62, 1)), "bytes of a storage of 24"),
        (tensor(offset=number(2**62)), "bytes of a storage of 24"),
        (tensor(shape=numbers(2**62, 2**62)), "it would have"),
        (tensor(shape=numbers(2**62, 2), stride=numbers(0, 0)), "it would have"),
        (tensor(shape=numbers(*[2] * 64), stride=numbers(*[0] * 64)), "it would have"),
        (tensor(of=storage(elements=5)), "has 24 bytes, expected 20"),
        (tensor(of=storage(elements=7)), "has 24 bytes, expected 28"),
        (tensor(of=storage(elements=2**62)), "has 24 bytes, expected"),
        (tensor(of=storage("torch.HalfStorage")), "has 24 bytes, expected 12"),
        (tensor(of=storage("torch.DoubleStorage")), "has 24 bytes, expected 48"),
        (tensor(of=storage(key="1")), "archive/data/1 is not in the file"),
        (tensor(of=storage(key="../version")), "is not in the file"),
        (tensor(of=storage(key="../data.pkl")), "is not in the file"),
        (tensor(of=storage(key="/etc/passwd")), "is not in the file"),
        (tensor(shape=numbers(0, 3), of=storage(key="1")), "is not in the file"),
        (
            tensor(
                named("torch.float64"), of=storage("torch.UntypedStorage", elements=24), function="_rebuild_tensor_v3"
            ),
            "needs 48 bytes of a storage of 24",
        ),
    ],
)
def test_tensors_that_reach_beyond_are_refused(tmp_path: Path, program: bytes, match: str) -> None:
    message = refused(craft(tmp_path / "m.pt", one(program)), match)
    assert "x   F" in message
    assert "Nothing in it was executed" in message


def test_empty_tensors_touch_nothing(tmp_path: Path) -> None:
    program = one(tensor(shape=numbers(0, 2**61), offset=number(2**62), stride=numbers(2**62, 2**62)))
    view = read_torch_zip(craft(tmp_path / "m.pt", program)).tensors["x"]
    assert view.contiguous
    assert view.byte_range == (view.storage_start, view.storage_start)


@pytest.mark.parametrize(
    ("shape", "stride", "contiguous"),
    [
        ((), (), True),
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), False),
        ((2, 3), (4, 1), False),
        ((1, 3), (99, 1), True),
        ((3, 1), (1, 99), True),
        ((2, 0, 3), (7, 7, 7), True),
        ((2, 3), (0, 0), False),
        ((4,), (2,), False),
        ((1, 1), (0, 0), True),
    ],
)
def test_contiguity(shape: tuple[int, ...], stride: tuple[int, ...], contiguous: bool) -> None:
    view = StoredView(TensorInfo(DTYPES["F16"], shape), 100, 64, 5, stride)
    assert view.contiguous == contiguous
    if contiguous:
        assert view.byte_range == (110, 110 + view.info.nbytes)
    else:
        with pytest.raises(ValueError, match="not one range"):
            _ = view.byte_range


# --- Files that aren't what they should be ------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARMFUL)
def test_nothing_is_executed(tmp_path: Path, name: str) -> None:
    """Neither where the tensors are, nor beside them."""
    harm = dict(harmful(tmp_path / "harm"))[name].removesuffix(b".")
    harm = harm[2:] if harm.startswith(b"\x80") else harm
    frameless = harm[9:] if harm.startswith(b"\x95") else harm
    beside = craft(
        tmp_path / "beside.ckpt", b"(" + text("x") + tensor(shape=numbers(1, 1)) + text("y") + frameless + b"d"
    )
    alone = craft(tmp_path / "alone.ckpt", frameless)
    assert read_torch_zip(beside).left == NONE_LEFT
    refused(alone, "no dict of tensors")
    assert not (tmp_path / "harm").exists()


def test_the_harmful_checkpoint_would_do_harm(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    path = save(tmp_path / "m.ckpt", {"state_dict": {"a": torch.ones(1)}, "callbacks": Evil()})
    assert read_torch_zip(path).left == NONE_LEFT
    assert not (tmp_path / "harm").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "harm").exists()


def test_a_malformed_pickle_names_the_file_and_the_member(tmp_path: Path) -> None:
    message = refused(craft(tmp_path / "m.pt", b"}h\7"), "archive/data.pkl: this pickle does not describe tensors")
    assert "recalls item 7" in message


def test_self_containing_dicts_are_refused(tmp_path: Path) -> None:
    refused(craft(tmp_path / "m.pt", b"}q\0" + text("state_dict") + b"h\0s"), "no dict of tensors")
    refused(craft(tmp_path / "m.pt", b"}q\0" + text("model") + b"h\0s"), "no dict of tensors")


def test_a_dict_referred_to_often_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = b"}q\0(" + b"".join(b"\x8c\6%06dN" % i for i in range(20_000)) + b"u0"
    program = large + b"}(" + b"".join(b"\x8c\6%06dh\0" % i for i in range(20_000)) + b"u"
    looked_at = []
    whole = state_dicts._Candidate.of

    def counted(path: Any, values: Any) -> Any:
        looked_at.append(path)
        return whole(path, values)

    monkeypatch.setattr(state_dicts._Candidate, "of", counted)
    refused(craft(tmp_path / "m.pt", program), "no dict of tensors")
    assert len(looked_at) == 2


def test_a_compressed_member_is_refused(tmp_path: Path) -> None:
    members = {"data.pkl": b"\x80\2" + one(tensor()) + b".", "data/0": bytes(24)}
    message = refused(write_zip(tmp_path / "m.pt", members, method=zipfile.ZIP_DEFLATED), "not a readable torch zip")
    assert "compressed" in message


def test_only_little_endian_is_read(tmp_path: Path) -> None:
    members = {"data.pkl": b"\x80\2" + one(tensor()) + b".", "data/0": bytes(24)}
    assert read_torch_zip(write_zip(tmp_path / "m.pt", members | {"byteorder": b"little"})).tensors
    for order in (b"big", b"", b"little\n"):
        message = refused(write_zip(tmp_path / "m.pt", members | {"byteorder": order}), "bytes are in another order")
        assert repr(order) in message
        assert "little-endian" in message
    refused(write_zip(tmp_path / "m.pt", members | {"byteorder": bytes(17)}), "17 bytes; 16 are read at most")


def test_only_known_versions_are_read(tmp_path: Path) -> None:
    members = {"data.pkl": b"\x80\2" + one(tensor()) + b".", "data/0": bytes(24)}
    for version in (b"1\n", b"3\n", b"10"):
        assert read_torch_zip(write_zip(tmp_path / "m.pt", members | {"version": version})).tensors
    for version in (b"", b"0", b"11\n", b"-1", b"3.1", b"x"):
        for name in ("version", ".data/version", "VERSION"):
            path = write_zip(tmp_path / "m.pt", members | {name: version})
            assert repr(version) in refused(path, "an unknown version of torch's format")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = save_script(tmp_path / "m.pt")
    message = refused(path, "a TorchScript program")
    assert "torch.jit.load" in message
    members = {"data.pkl": b"\x80\2" + one(tensor()) + b".", "data/0": bytes(24), "code/x.py": b""}
    refused(write_zip(tmp_path / "n.pt", members), "a TorchScript program")


def save_script(path: Path) -> Path:
    """What torch.jit.save writes, as far as it tells: torch.jit itself warns that it is old."""
    members = {"data.pkl": b"\x80\2}.", "constants.pkl": b"\x80\2).", "code/__torch__.py": b"x" * 99, "version": b"3\n"}
    write_zip(path, members)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:  # as it compresses the code, and nothing else
        archive.writestr("archive/code/__torch__.py.debug_pkl", b"x" * 999)
    return path


def test_other_zips_are_refused(tmp_path: Path) -> None:
    message = refused(write_zip(tmp_path / "m.zip", {"model.safetensors": b"1", "README.md": b""}), "0 descriptions")
    assert "archive/model.safetensors" in message
    refused(write_zip(tmp_path / "e.zip", {}), "0 descriptions")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for name in ("a/data.pkl", "b/data.pkl"):
            archive.writestr(name, b"\x80\2}.")
    refused(tmp_path / "two.zip", "2 descriptions")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "missing.ckpt", "can't be read: No such file")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_in_a_full_zip_stays_small(tmp_path: Path, name: str) -> None:
    program = BOMBS[name] + b"0" + one(tensor())
    path = craft(tmp_path / "bomb.pt", program, **{f"{i:065}": b"" for i in range(MAX_MEMBERS - 3)})
    assert 0 < cost(path, "file") < 64


def test_a_changed_description_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"name": torch.ones(2)})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"name", b"nome", 1))
    refused(path, "checksum")


def test_a_long_description_is_refused(tmp_path: Path) -> None:
    program = b"B" + struct.pack("<I", 17 * 2**20) + bytes(17 * 2**20) + b"0" + one(tensor())
    refused(craft(tmp_path / "m.pt", program), "16777216 are read at most")


def test_a_cut_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    data = save(tmp_path / "m.pt", {"state_dict": {"a": torch.randn(40), "b": torch.ones(3)}}).read_bytes()
    for length in [*range(0, len(data), 37), *range(len(data) - 120, len(data))]:
        cut = tmp_path / "cut.pt"
        cut.write_bytes(data[:length])
        assert "cut short" in refused(cut, "not a readable torch zip") or length < 22


def test_terminal_codes_are_not_printed(tmp_path: Path) -> None:
    message = refused(craft(tmp_path / "m.pt", dict_(**{"\x1b[31mred": tensor(offset=number(9))})), "does not fit")
    assert "\x1b" not in message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutations_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    original = tmp_path / "original.pt"
    if not original.exists():
        save(
            original, {"epoch": 1, "state_dict": {"a": torch.randn(2, 3).T, "b": torch.arange(5), "c": torch.ones(())}}
        )
    mutated = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        mutated[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check_survives(tmp_path / "mutated.pt", bytes(mutated))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_descriptions_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    program = bytearray(one(tensor()) + b"0" + dict_(state_dict=dict_(a=tensor(), b=call("a.B")), epoch=number(3)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(program) - 1))
        program[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = craft(tmp_path / "crafted.pt", bytes(program))
    check_survives(tmp_path / "mutated.pt", path.read_bytes())


def check_survives(path: Path, data: bytes) -> None:
    """The file is refused properly, or its tensors lie in it."""
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        for view in read_torch_zip(path).tensors.values():
            load(path, view)
            assert 0 <= view.storage_start <= view.storage_start + view.storage_nbytes <= len(data)


# --- Formats of before --------------------------------------------------------------------------------------------


def test_a_zip_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    head = save(tmp_path / "m.pt", {"a": torch.ones(1)}).read_bytes()[:512]
    assert is_torch_zip(head)
    assert legacy_torch_reason(head) is None
    for other in (b"", b"PK", b"PK\5\6" + bytes(18), b"\x10\0\0\0\0\0\0\0{}"):
        assert not is_torch_zip(other)
        assert legacy_torch_reason(other) is None


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_wrote_before_1_6_is_told(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "old.pt"
    save(path, {"a": torch.ones(1)}, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    reason = legacy_torch_reason(path.read_bytes()[:512])
    assert reason is not None
    assert "before torch 1.6" in reason
    assert 'torch.save(torch.load(PATH, map_location="cpu", weights_only=True), NEW)' in reason
    assert "Nothing in it was executed" in reason


def test_the_conversion_that_is_advised_works(tmp_path: Path) -> None:
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2).T}
    save(old, tensors, _use_new_zipfile_serialization=False)
    reason = legacy_torch_reason(old.read_bytes()[:512])
    assert reason is not None
    command = next(part for part in reason.split(": ") if part.startswith("torch.save")).split(". ")[0]
    exec(command, {"torch": torch, "PATH": old, "NEW": new})
    check_same(new, tensors)


def test_what_torch_wrote_before_0_2_is_told() -> None:
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
            for name in ("sys_info", "pickle", "tensors", "storages"):
                archive.addfile(tarfile.TarInfo(name))
        assert "a tar" in (legacy_torch_reason(file.getvalue()[:512]) or "")
    assert "a tar" in (legacy_torch_reason(b"sys_info".ljust(512, b"\0")) or "")


def test_a_plain_pickle_is_no_torch_file() -> None:
    assert legacy_torch_reason(pickle.dumps({"a": 1})) is None


# --- Size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, 6000])
def test_many_tensors_take_few_steps_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    tensors = {f"model.diffusion_model.blocks.{i}.weight": torch.ones(2, 2) for i in range(count)}
    path = save(tmp_path / "m.ckpt", {"state_dict": tensors})
    opcodes = count_steps(monkeypatch)
    assert len(read_torch_zip(path).tensors) == count
    assert sum(opcodes) < 50 * count


@pytest.mark.slow
def test_more_than_four_gigabytes(tmp_path: Path) -> None:
    """The sizes and places of such files take zip64."""
    if shutil.disk_usage(tmp_path).free < 12 * 2**30:
        pytest.skip("needs 6 GB of disk, and some to spare")
    large = torch.zeros(5 * 2**30, dtype=torch.uint8)
    large[-1], large[2**32] = 7, 9
    path = save(tmp_path / "m.ckpt", {"state_dict": {"large": large, "after": torch.arange(5)}})
    del large
    views = read_torch_zip(path).tensors
    assert load(path, views["after"]).tolist() == [0, 1, 2, 3, 4]
    start, stop = views["large"].byte_range
    assert stop - start == 5 * 2**30
    with path.open("rb") as file:
        for place, value in ((2**32, 9), (5 * 2**30 - 1, 7)):
            file.seek(start + place)
            assert file.read(1) == bytes([value])


def test_places_beyond_four_gigabytes_in_a_file_with_a_hole(tmp_path: Path) -> None:
    """As above, without the bytes: zipfile's directory, moved to behind the hole."""
    source = craft(tmp_path / "small.pt", one(tensor())).read_bytes()
    path = tmp_path / "sparse.pt"
    directory = source.index(b"PK\1\2")
    hole = 5 * 2**30
    with path.open("wb") as file:
        file.seek(hole)
        file.write(source[:directory])
        start = file.tell()
        entries = moved(source[directory : source.index(b"PK\5\6")], hole)
        count = entries.count(b"PK\1\2")
        file.write(entries)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), start))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, start + len(entries), 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(entries), 2**32 - 1, 0))
    view = read_torch_zip(path).tensors["x"]
    assert view.storage_start > hole
    assert bits(load(path, view)) == bytes(range(24))


def moved(entries: bytes, distance: int) -> bytes:
    """A directory whose members are that much farther into the file."""
    result, at = b"", 0
    layout = struct.Struct("<4s6H3L5H2L")
    while at < len(entries):
        fields = list(layout.unpack_from(entries, at))
        name = entries[at + layout.size : at + layout.size + fields[10]]
        at += layout.size + fields[10] + fields[11] + fields[12]
        extra = struct.pack("<2HQ", 1, 8, fields[16] + distance)
        fields[11], fields[12], fields[16] = len(extra), 0, 2**32 - 1
        result += layout.pack(*fields) + name + extra
    return result


def test_storages_may_be_shared_by_name_only(tmp_path: Path) -> None:
    program = dict_(a=tensor(), b=tensor(offset=number(3), shape=numbers(3), stride=numbers(1)))
    views = read_torch_zip(craft(tmp_path / "m.pt", program)).tensors
    assert views["a"].storage_start == views["b"].storage_start
    assert views["b"].byte_range == (views["a"].byte_range[0] + 12, views["a"].byte_range[1])


def test_a_persistent_id_of_six_is_known(tmp_path: Path) -> None:
    six = tuple_(text("storage"), named("torch.FloatStorage"), text("0"), text("cuda:0"), number(6), b"N") + b"Q"
    assert read_torch_zip(craft(tmp_path / "m.pt", one(tensor(of=six)))).tensors["x"].info.shape == (2, 3)
