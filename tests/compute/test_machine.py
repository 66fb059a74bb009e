"""What the machine offers: how files are read, how memory is shared out."""

import sys
from pathlib import Path

import pytest

from streammerge.compute import machine
from streammerge.compute.machine import (
    DEFAULT_WORK_BYTES,
    MAPPED_BYTES,
    MIB,
    choose_device,
    choose_io,
    free_bytes,
    is_virtual_machine,
    share_out,
)
from streammerge.errors import DeviceError


@pytest.fixture
def bare_metal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "is_virtual_machine", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "_file_system", lambda path: "nfs4" if "mount" in str(path) else "ext4")


def test_what_was_asked_for_is_taken(bare_metal):
    assert choose_io("mmap", [Path("/mount/a")]) == "mmap"
    assert choose_io("pread", [Path("a")]) == "pread"


def test_local_files_are_mapped(bare_metal):
    assert choose_io("auto", [Path("a"), Path("b")]) == "mmap"


def test_files_on_a_network_are_read(bare_metal):
    assert choose_io("auto", [Path("a"), Path("/mount/b")]) == "pread"


def test_where_nobody_tells_what_it_is_files_are_read(bare_metal, monkeypatch):
    for name in ("", "fuseblk", "fuse.rclone", "virtiofs", "9p"):
        monkeypatch.setattr(machine, "_file_system", lambda path, name=name: name)
        assert choose_io("auto", [Path("a")]) == "pread"


def test_windows_reads(bare_metal, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert choose_io("auto", [Path("a")]) == "pread"


def test_virtual_machines_read(bare_metal, monkeypatch):
    monkeypatch.setattr(machine, "is_virtual_machine", lambda: True)
    assert choose_io("auto", [Path("a")]) == "pread"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu vme hypervisor avx\n", True),
        ("processor : 0\nflags\t\t: fpu vme avx\nbugs : hypervisor\n", False),
        ("Features : asimd\n", False),
    ],
)
def test_a_hypervisor_is_known_by_the_processors_flags(tmp_path: Path, text: str, expected: bool):
    (tmp_path / "cpuinfo").write_text(text)
    assert is_virtual_machine(tmp_path / "cpuinfo") is expected


def test_where_the_processor_cannot_be_asked_it_is_no_virtual_machine(tmp_path: Path):
    assert not is_virtual_machine(tmp_path / "nothing")


def test_lanes_stay_within_the_default(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)
    for lane in (MIB // 2, 3 * MIB, 10 * MIB, 30 * MIB):
        allotment = share_out(lane)
        assert allotment.threads >= 1
        assert allotment.work_bytes <= DEFAULT_WORK_BYTES
        assert MAPPED_BYTES[1] <= allotment.mapped_bytes <= MAPPED_BYTES[0]


def test_a_lane_larger_than_the_default_runs_alone():
    assert share_out(100 * MIB) == machine.Allotment(1, MAPPED_BYTES[1], 102 * MIB)


def test_a_limit_and_a_devices_limit_mean_fewer_lanes():
    assert share_out(4 * MIB, threads=8, limit=30 * MIB).threads == 5
    assert share_out(4 * MIB, threads=8, limit=300 * MIB, device_limit=9 * MIB).threads == 2
    assert share_out(4 * MIB, threads=8, limit=300 * MIB, device_limit=1).threads == 1


@pytest.mark.parametrize("card", ["nvidia0", "nvidiactl", "kfd", "dxg", "dri/renderD128"])
def test_auto_asks_torch_where_there_may_be_a_card(bare_metal, tmp_path, card):
    (tmp_path / card).parent.mkdir(exist_ok=True)
    (tmp_path / card).touch()
    assert choose_device("auto", tmp_path) == "auto"
    assert choose_device("cpu", tmp_path) == "cpu"


def test_auto_is_the_cpu_where_there_can_be_none(bare_metal, monkeypatch, tmp_path):
    assert choose_device("auto", tmp_path) == "cpu"
    assert choose_device("cuda", tmp_path) == "cuda"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert choose_device("auto", tmp_path) == "auto"


@pytest.mark.parametrize(
    ("limit", "taken", "free"),
    [("5000000", "2000000", 3_000_000), ("5", "9", 0), ("max", "7", None), (f"{2**62}", "0", None), ("", "", None)],
)
def test_what_is_free_is_free_in_the_container(tmp_path: Path, monkeypatch, limit: str, taken: str, free: int | None):
    """None: as much as the machine has."""
    import psutil

    class Memory:
        available = 10**9

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(taken + "\n")
    assert free_bytes(tmp_path) == (10**9 if free is None else free)
    assert free_bytes(tmp_path / "nothing") == 10**9


def test_a_torch_that_can_not_be_loaded_is_no_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeviceError, match=r"torch can't be loaded: .*\n  Allow the process more memory"):
        machine.import_torch()
