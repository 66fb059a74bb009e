"""What torch wrote in formats of before is told, and how to convert it."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import pytest
import torch

from streammerge.formats.torchzip.archive import is_torch_zip, legacy_torch_reason
from tests.formats.torchzip.checkpoints import check_same, save


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
