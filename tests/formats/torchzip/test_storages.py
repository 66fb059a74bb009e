"""Tensors lie in their storages, wherever in the file these are, or are refused."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
import torch

from streammerge.formats.torchzip.archive import StoredView, read_torch_zip
from streammerge.tensors import DTYPES, TensorInfo
from tests.formats.torchzip.bombs import count_steps
from tests.formats.torchzip.checkpoints import bits, craft, load, one, refused, save
from tests.formats.torchzip.opcodes import dict_, named, number, numbers, storage, tensor, text, tuple_


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
