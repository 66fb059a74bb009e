"""Checkpoints that torch writes or that are crafted, and what is read of them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.errors import CheckpointError
from streammerge.formats.torchzip.archive import StoredView, TorchZip, read_torch_zip
from streammerge.tensors import DTYPES, TensorInfo
from tests.formats.torchzip.opcodes import dict_


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


def one(program: bytes) -> bytes:
    return dict_(x=program)
