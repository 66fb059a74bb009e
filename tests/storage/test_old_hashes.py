"""The hashes that kohya's and A1111's tools know files by, against their own formulas."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
import safetensors.torch
import torch

from streammerge.storage.old_hashes import kohya_hashes, old_short_hash
from tests.make.models import Tensors, normal

TRAINED = {"ss_network_dim": "4", "ss_tag": "x" * 3000}
OTHERS = {"modelspec.title": "y" * 5000, "sshs_model_hash": "0"}


def by_kohya(tensors: Tensors, metadata: dict[str, str]) -> dict[str, str]:
    """The formulas of `precalculate_safetensors_hashes`."""
    whole = safetensors.torch.save(tensors, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    data = whole[8 + int.from_bytes(whole[:8], "little") :]
    file = io.BytesIO(whole)
    file.seek(0x100000)
    legacy = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(data).hexdigest(), "sshs_legacy_hash": legacy}


@pytest.mark.parametrize("elements", [10, 260_000, 300_000])
def test_kohyas_hashes(tmp_path, elements):
    """Of a file that ends before what is looked at, in it, and behind it."""
    tensors = {
        "b.up": normal((elements,), 1),
        "a.down": normal((33, 9), 2, torch.float16),
        "c.alpha": torch.tensor(4.0),
    }
    path = tmp_path / "a.safetensors"
    metadata = {**TRAINED, **OTHERS}
    safetensors.torch.save_file(tensors, path, metadata)
    assert kohya_hashes(path) == by_kohya(tensors, metadata)


def test_a_header_that_reaches_so_far(tmp_path):
    tensors = {f"{number:06}" + "n" * 100: torch.tensor([float(number)]) for number in range(9000)}
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path)
    assert kohya_hashes(path)["sshs_model_hash"] == by_kohya(tensors, {})["sshs_model_hash"]


@pytest.mark.parametrize("size", [0, 100, 0x100000 + 5, 0x200000])
def test_the_first_short_hash(tmp_path: Path, size):
    data = bytes(number % 251 for number in range(size))
    path = tmp_path / "a.ckpt"
    path.write_bytes(data)
    assert old_short_hash(path) == hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
