"""Zips that two readers might understand differently are refused, or read as torch reads them."""

from __future__ import annotations

import contextlib
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge import open_model
from streammerge.errors import CheckpointError
from tests.formats.torchzip.test_directory import Unseekable
from tests.make.models import assert_same_bytes

Members = list[tuple[str, bytes]]
TENSORS = {"l.a": torch.arange(6.0).reshape(2, 3), "l.b": torch.ones(4, dtype=torch.float16)}
OTHER = torch.full((6,), 666.0).numpy().tobytes()


def members_of(folder: Path) -> Members:
    torch.save(TENSORS, folder / "m.pt")
    with zipfile.ZipFile(folder / "m.pt") as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def write(path: Path, members: Members) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def check(path: Path) -> bool:
    """Whether the file is read: then as torch reads it, if torch does."""
    with contextlib.suppress(CheckpointError), open_model(path) as model:
        read = {name: model.read(name, 0, info.elements).reshape(info.shape) for name, info in model.tensors.items()}
        with contextlib.suppress(RuntimeError, ValueError):
            assert_same_bytes(read, torch.load(path, weights_only=True))
        return True
    return False


def replaced(members: Members, name: str, change: Callable[[str, bytes], tuple[str, bytes]]) -> Members:
    return [change(*member) if member[0] == name else member for member in members]


def test_what_is_unchanged_is_read(tmp_path):
    assert check(write(tmp_path / "x.pt", members_of(tmp_path)))


@pytest.mark.parametrize("name", ["m/DATA/0", "M/data/0", "m/data/0", "M/DATA/0", "m/Data.pkl", "m/BYTEORDER"])
@pytest.mark.parametrize("first", [False, True])
def test_a_second_member_of_a_name_that_torch_takes_for_the_same_is_refused(tmp_path, name, first):
    members = members_of(tmp_path)
    more = [(name, OTHER)]
    assert not check(write(tmp_path / "x.pt", [*more, *members] if first else [*members, *more]))


@pytest.mark.parametrize("order", [b"big", b"LITTLE", b"", b"little"])
@pytest.mark.parametrize("name", ["m/byteorder", "m/BYTEORDER", "M/ByteOrder"])
def test_the_byte_order_is_that_which_torch_sees(tmp_path, name, order):
    members = replaced(members_of(tmp_path), "m/byteorder", lambda _name, _data: (name, order))
    assert check(write(tmp_path / "x.pt", members)) == (order == b"little")


@pytest.mark.parametrize("name", ["m/data/0", "m/data.pkl", "m/version"])
def test_a_member_in_capitals_is_found_as_torch_finds_it(tmp_path, name):
    members = replaced(members_of(tmp_path), name, lambda name, data: (name.upper(), data))
    assert check(write(tmp_path / "x.pt", members))


def test_a_folder_that_torch_does_not_look_into_is_refused(tmp_path):
    """Torch takes the first member's folder for that of all."""
    members = members_of(tmp_path)
    other = [(name.replace("m/", "n/"), OTHER if name.endswith("/0") else data) for name, data in members]
    assert not check(write(tmp_path / "x.pt", [other[2], *members]))
    assert not check(write(tmp_path / "x.pt", [("top", b""), *members]))
    assert not check(write(tmp_path / "x.pt", [*members, *other]))


@pytest.mark.parametrize("name", ["m/../m/data/0", "/m/data/0", "m\\data\\0", "m//data/0", "m/data/0/", "m/data/00"])
def test_other_spellings_of_a_path_are_other_members(tmp_path, name):
    members = members_of(tmp_path)
    assert check(write(tmp_path / "x.pt", [*members, (name, OTHER)]))
    renamed = replaced(members, "m/data/0", lambda _name, data: (name, data))
    assert not check(write(tmp_path / "x.pt", renamed))


def test_a_name_that_nul_ends_is_another_member(tmp_path):
    path = write(tmp_path / "x.pt", [*members_of(tmp_path), ("m/data/0_", OTHER)])
    path.write_bytes(path.read_bytes().replace(b"m/data/0_", b"m/data/0\0"))
    assert check(path)


def test_sizes_after_the_data_are_read(tmp_path):
    """As programs write that can't go back in a file."""
    file = Unseekable()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members_of(tmp_path):
            archive.writestr(zipfile.ZipInfo(name), data)
    (tmp_path / "x.pt").write_bytes(file.getvalue())
    assert struct.unpack_from("<H", (tmp_path / "x.pt").read_bytes(), 6)[0] & 8
    assert check(tmp_path / "x.pt")


CHANGES: dict[str, Callable[[random.Random, str, bytes], Members]] = {
    "keep": lambda _, name, data: [(name, data)],
    "drop": lambda _, name, data: [],
    "capitals": lambda _, name, data: [(name.swapcase(), data)],
    "twice": lambda _, name, data: [(name, data), (name.swapcase(), bytes(len(data)))],
    "twice, first": lambda _, name, data: [(name.title(), bytes(len(data))), (name, data)],
    "elsewhere": lambda _, name, data: [("n" + name[1:], data)],
    "also elsewhere": lambda _, name, data: [(name, data), ("n" + name[1:], bytes(len(data)))],
    "above": lambda _, name, data: [(name, data), ("x/../" + name, bytes(len(data)))],
    "other bytes": lambda chance, name, data: [(name, chance.randbytes(len(data)))],
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["keep", *CHANGES]), min_size=12, max_size=12), st.randoms(use_true_random=False))
def test_whatever_is_done_to_members_is_refused_or_read_as_torch_does(tmp_path, changes, chance):
    changed: Members = []
    for change, (name, data) in zip(changes, members_of(tmp_path), strict=False):
        changed += CHANGES["keep" if name.endswith("data.pkl") and change == "other bytes" else change](
            chance, name, data
        )
    if chance.random() < 0.5:
        chance.shuffle(changed)
    check(write(tmp_path / "x.pt", changed))
