"""Files that aren't what they should be are refused, and nothing in them is run."""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.errors import CheckpointError
from streammerge.formats.torchzip import state_dicts
from streammerge.formats.torchzip.archive import read_torch_zip
from streammerge.formats.torchzip.directory import MAX_MEMBERS
from streammerge.formats.torchzip.state_dicts import NONE_LEFT
from tests.formats.torchzip.bombs import BOMBS, cost
from tests.formats.torchzip.checkpoints import craft, load, one, refused, save, write_zip
from tests.formats.torchzip.harmful_pickles import HARMFUL, harmful
from tests.formats.torchzip.opcodes import call, dict_, number, numbers, tensor, text
from tests.references.cases import mostly


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
@pytest.mark.parametrize("name", mostly(("memo", "storages", "named entries", "all at once", "tensors"), BOMBS))
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
