"""Headers of safetensors written by hand, and what the format's own library and we say of them."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError, deserialize

from streammerge.errors import CheckpointError
from streammerge.formats.safetensors import read_header
from streammerge.tensors import DTYPES

ENTRY = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
ONE = "{" + ENTRY + "}"
DATA = bytes(4)

TORCH_DTYPES = {dtype.name: getattr(torch, dtype.torch_name) for dtype in DTYPES.values() if dtype.torch_name}


def encode(header: str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of this header and data; `length` is what it claims to be the header's, if not the truth."""
    encoded = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(name: str, *, dtype: str = "F32", shape: str = "[1]", offsets: str = "[0,4]") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def entries(*parts: str) -> str:
    return "{" + ",".join(parts) + "}"


def library_accepts(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def read(path, content: bytes):
    path.write_bytes(content)
    return read_header(path, len(content))


def refusal(path, content: bytes) -> str:
    """Why we refuse the file; "" if we don't."""
    try:
        read(path, content)
    except CheckpointError as error:
        return error.what
    return ""


def sample(metadata: Mapping[str, str] | None = None) -> bytes:
    """A valid file with tensors of several dtypes, an empty and a 0-d one."""
    tensors = {
        "weight": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "steps": torch.tensor(7),
        "none": torch.zeros(0, 4),
        'quote"d': torch.ones(3),
        "naïve": torch.ones(2, dtype=torch.uint8),
    }
    return safetensors.torch.save(tensors, metadata=dict(metadata) if metadata else None)
