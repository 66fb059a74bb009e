"""The hashes of a file, whole and of its tensors alone, against hashlib; and what they are called where models are."""

from __future__ import annotations

import hashlib

import pytest
import torch

from streammerge.report import short_hashes
from streammerge.storage import hashing
from streammerge.storage.hashing import hashes_of
from tests.make.models import make_tensors, save_model


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_of_safetensors(tmp_path, monkeypatch, block):
    monkeypatch.setattr(hashing, "BLOCK", block)
    path = save_model(tmp_path / "a.safetensors", make_tensors(1, shapes={"x": (9, 5), "y": (3,)}), {"k": "v" * 300})
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    found = hashes_of(path)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.tensors == hashlib.sha256(data[header:]).hexdigest()
    expected = f"AutoV2 {found.sha256[:10]}, AutoV3 {found.tensors[:12]}"
    assert short_hashes(found.sha256, found.tensors) == expected


def test_of_a_model_without_tensors(tmp_path):
    path = save_model(tmp_path / "a.safetensors", {})
    assert hashes_of(path).tensors == hashlib.sha256(b"").hexdigest()


def test_of_a_torch_file(tmp_path):
    torch.save(make_tensors(1, shapes={"x": (3,)}), tmp_path / "a.ckpt")
    found = hashes_of(tmp_path / "a.ckpt")
    assert found.sha256 == hashlib.sha256((tmp_path / "a.ckpt").read_bytes()).hexdigest()
    assert found.tensors == ""
    assert short_hashes(found.sha256, found.tensors) == f"AutoV2 {found.sha256[:10]}"
