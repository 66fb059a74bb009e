"""Cards that share the work: as many as are asked for, each within its limit, and the bytes are those of one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import streammerge
from benchmarks.standin import Cards
from streammerge.cli.main import main
from streammerge.compute.devices import find_devices, vram_limit
from streammerge.compute.expressions import BLOCK
from streammerge.compute.machine import CARD_THREADS, MIB, cards_of
from streammerge.errors import DeviceError
from tests.make.models import assert_same_bytes, merge_to, near, normal, save_models

DEVICES = ["cuda:0", "cuda:1", "cuda:2"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    base = {name: normal((3 * BLOCK + 7,), seed, torch.float16) for seed, name in enumerate("abcdef")}
    base["matrix"] = normal((300, 200), 9, torch.float16)
    return save_models(tmp_path_factory.mktemp("models"), base=base, one=near(base, 1, 0.1), two=near(base, 2, 0.1))


def merges(paths):
    base, one, two = paths.values()
    return {
        "linear": streammerge.linear(one, two),
        "slerp": streammerge.slerp(one, two, t=0.3),
        "ties": streammerge.ties(one, two, base=base, density=0.3),
        "dare_ties": streammerge.dare_ties(one, two, base=base, density=0.3),
        "iso_c": streammerge.iso_c(one, two, base=base),
        "emr": streammerge.emr(one, two, base=base, task=1),
    }


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties", "iso_c", "emr"])
def test_several_cards_give_the_bytes_of_one(paths, tmp_path, method):
    merge = merges(paths)[method]
    with Cards(1).there():
        one = merge_to(tmp_path / "one.safetensors", merge, device="cuda", threads=1)
    for device, used in (("cuda:all", DEVICES), ("cuda:2,cuda:0", ["cuda:2", "cuda:0"])):
        with Cards(3).there() as cards:
            made = merge_to(tmp_path / "several.safetensors", merge, device=device, threads=6)
        assert len(cards.lanes) > len(used)
        assert [lane.card for lane in cards.lanes] == (3 * used)[: len(cards.lanes)]
        assert_same_bytes(made, one)


def test_each_card_stays_within_the_limit(paths, tmp_path):
    limit = 12 * MIB
    with Cards(2).there() as cards:
        report = streammerge.merge(
            merges(paths)["slerp"], output=tmp_path / "o", device="cuda:all", max_vram=limit, threads=8, sync=False
        )
    assert set(cards.peaks) == {"cuda:0", "cuda:1"}
    assert 0 < max(cards.peaks.values()) <= limit
    assert report.device == "cuda:0,cuda:1"
    rows = dict(report.rows())
    assert rows["run on"].startswith("cuda:0, cuda:1, ")
    assert rows["peak VRAM"].endswith(" on one card")
    assert report.peak_vram_bytes == max(cards.peaks.values())


def test_cards_without_a_worker_are_not_named(paths, tmp_path):
    with Cards(3).there() as cards:
        report = streammerge.merge(
            merges(paths)["linear"], output=tmp_path / "o.safetensors", device="cuda:all", threads=2, sync=False
        )
    assert report.device == "cuda:0,cuda:1"
    assert [lane.card for lane in cards.lanes] == ["cuda:0", "cuda:1"]


def test_the_fullest_card_sets_the_limit():
    with Cards(2, memory=1000 * MIB).there() as cards:
        cards.take("cuda:1", 900 * MIB)
        assert vram_limit(find_devices("cuda:all"), None) == 90 * MIB
        assert vram_limit(find_devices("cuda:0"), None) == 512_000_000
        assert vram_limit(find_devices("cuda:0"), 7) == 7


def test_devices_are_found_by_name():
    with Cards(3).there():
        assert list(map(str, find_devices("cuda:all"))) == DEVICES
        assert list(map(str, find_devices("cuda:1,cuda:0"))) == ["cuda:1", "cuda:0"]
        assert list(map(str, find_devices("cuda"))) == ["cuda"]
        assert list(map(str, find_devices("cuda:2"))) == ["cuda:2"]
        assert list(map(str, find_devices("cpu"))) == ["cpu"]
    with Cards(1).there():
        assert list(map(str, find_devices("cuda:all"))) == ["cuda:0"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("cuda:7", "no device 'cuda:7' on this machine\n  there is: cpu, cuda:0, cuda:1, cuda\n"),
        ("cuda:0,cuda:7", "no device 'cuda:7'"),
        ("cuda:0,", "no device ''"),
        ("xpu:all", "no device 'xpu:all'"),
        ("cpu:all", "no device 'cpu:all'"),
        ("all", "no device 'all'"),
        ("cuda:ALL", "no device 'cuda:ALL'"),
        ("cuda:0,cuda:0", "names a card twice"),
        ("cuda,cuda:1", "only cards with a number can share the work"),
        ("cpu,cuda:1", "only cards with a number can share the work"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(paths, tmp_path, name, what):
    with Cards(2).there(), pytest.raises(DeviceError) as raised:
        streammerge.merge(merges(paths)["linear"], output=tmp_path / "o.safetensors", device=name)
    assert what in str(raised.value)
    assert "Nothing was written." in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_cards_that_are_not_alike_are_refused():
    with Cards(3, models=["A100", "A100", "T4"]).there():
        with pytest.raises(DeviceError, match=r"not alike.*\n  cuda:0 is cuda A100\n.*\n  cuda:2 is cuda T4"):
            find_devices("cuda:all")
        assert len(find_devices("cuda:0,cuda:1")) == 2


def test_without_any_card_all_of_them_are_refused(monkeypatch):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False, device_count=lambda: 0))
    with pytest.raises(DeviceError, match=r"no device 'cuda:all' on this machine\n  there is: cpu"):
        find_devices("cuda:all")


def test_cards_are_counted_without_torch(tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert cards_of("cuda:all", tmp_path) == 2
    assert [cards_of(name, tmp_path) for name in ("cpu", "cuda", "cuda:1", "auto", "xpu:all")] == [1] * 5
    assert cards_of("cuda:0,cuda:2,cuda:3", tmp_path) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert cards_of("cuda:all", tmp_path) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cards_of("cuda:all", tmp_path) == 1


def test_the_plan_tells_of_cards_and_of_what_is_taken_of_them(paths, capsys):
    words = [str(paths["one"]), str(paths["two"])]
    assert main(["plan", *words, "--device", "cuda:0,cuda:1", "--max-vram", "64MiB", "--threads", "8"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("device"))
    assert "cuda:0,cuda:1: 8 workers on 2 cards" in row
    assert "67.1 MB of memory on each" in row
    assert main(["plan", *words]) == 0
    assert "\ndevice" not in capsys.readouterr().out


def test_more_cards_have_more_workers(paths, tmp_path, monkeypatch):
    monkeypatch.setattr("streammerge.compute.machine.usable_cores", lambda: 64)
    for count in (1, 2, 3):
        made = streammerge.make_plan(merges(paths)["linear"], output=tmp_path / "o", device="cuda:all")
        allotted = made.memory.allot(cards=count)
        assert allotted.threads == CARD_THREADS * count
        assert allotted.cards == count
        assert allotted.blocks == made.memory.allot(cards=1).blocks
