"""What devices do in a second is measured once, and forgotten rather than a trouble to anyone."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.standin import Cards
from streammerge.compute import probing, rates
from streammerge.compute.rates import FILE, Known, Rates, cache_folder, cards_here, keep, key, known_rates

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of cards without torch")

CPU = Rates(4e9, 2e9, 1e10, 0.0)
CARD = Rates(2e10, 1e11, 1e12, 2.5)
KNOWN = Known(CPU, CARD, "A card", "2026-01-02")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_what_is_kept_is_known_again(folder):
    assert known_rates("two cards") is None
    keep(KNOWN, "two cards")
    keep(replace(KNOWN, name="Another"), "one card")
    assert known_rates("two cards") == KNOWN
    assert [path.name for path in folder.iterdir()] == [FILE]
    other = known_rates("one card")
    assert other is not None
    assert other.name == "Another"
    assert known_rates("three cards") is None
    assert known_rates("") is None


def test_rates_of_other_versions_are_not_these(monkeypatch):
    keep(KNOWN, "a card")
    for name, value in (("__version__", "0.0"), ("torch_version", lambda: "1.0"), ("usable_cores", lambda: 999)):
        with monkeypatch.context() as patch:
            patch.setattr(rates, name, value)
            assert known_rates("a card") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert known_rates("a card") is None


def damaged(change) -> str:
    kept = {key("a card"): asdict(KNOWN)}
    change(kept[key("a card")])
    return json.dumps(kept)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\xff",
        "[" * 30000,
        " " * (1 << 17) + "{}",
        json.dumps({"a card": 1}),
        lambda: json.dumps({key("a card"): 7}),
        lambda: damaged(lambda one: one.pop("cpu")),
        lambda: damaged(lambda one: one["card"].pop("moving")),
        lambda: damaged(lambda one: one["card"].update(moving="fast")),
        lambda: damaged(lambda one: one["card"].update(moving=None)),
        lambda: damaged(lambda one: one["card"].update(moving=0)),
        lambda: damaged(lambda one: one["cpu"].update(computing=-1.0)),
        lambda: damaged(lambda one: one["cpu"].update(computing=math.nan)),
        lambda: damaged(lambda one: one["card"].update(starting=math.inf)),
        lambda: damaged(lambda one: one["card"].update(starting=10**400)),
        lambda: damaged(lambda one: one.pop("name")),
    ],
)
def test_a_damaged_file_is_no_file(folder, text):
    (folder / FILE).write_text(text() if callable(text) else text, encoding="latin-1")
    assert known_rates("a card") is None
    keep(KNOWN, "a card")
    assert known_rates("a card") == KNOWN


def test_a_folder_in_place_of_the_file_is_no_trouble(folder):
    (folder / FILE).mkdir()
    assert known_rates("a card") is None
    keep(KNOWN, "a card")
    assert known_rates("a card") is None
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("STREAMMERGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "streammerge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "streammerge"
    assert not cache_folder().exists()


def test_a_folder_that_cannot_be_made_measures_nothing(folder, monkeypatch):
    (folder / "file").touch()
    monkeypatch.setenv("STREAMMERGE_CACHE", str(folder / "file" / "below"))
    monkeypatch.setattr(probing, "measure", lambda: pytest.fail("measured in vain"))
    with Cards(seen=True).there():
        assert probing.rates_here() is None
    keep(KNOWN, "a card")


def test_rates_are_measured_once(monkeypatch):
    measured = []
    measure = probing.measure

    def counted() -> Known:
        measured.append(1)
        return measure()

    monkeypatch.setattr(probing, "measure", counted)
    with Cards(seen=True).there():
        first = probing.rates_here()
        assert first is not None
        assert first.cpu.is_sensible
        assert first.card.is_sensible
        assert probing.rates_here() == first
    assert measured == [1]
    assert known_rates() is None  # the card is gone


def test_what_cannot_be_measured_is_not_known(monkeypatch):
    def fails():
        raise RuntimeError("CUDA error: the card fell off the bus")

    monkeypatch.setattr(probing, "measure", fails)
    with Cards(seen=True).there():
        assert probing.rates_here() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Cards(0, seen=True).there():
        assert probing.rates_here() is None


def test_cards_are_told_without_torch(tmp_path, monkeypatch):
    assert cards_here(tmp_path / "driver", tmp_path) == ""
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    assert cards_here(tmp_path / "driver", tmp_path) == "nvidia0, nvidia1"
    for number in "01":
        folder = tmp_path / "driver" / number
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t NVIDIA T{number}\nIRQ: 3\n")
    assert cards_here(tmp_path / "driver", tmp_path) == "NVIDIA T0, NVIDIA T1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cards_here(tmp_path / "driver", tmp_path) == ""
    monkeypatch.setattr("sys.platform", "darwin")
    assert cards_here(tmp_path / "driver", tmp_path) == ""
