"""How long a merge takes on the CPU and on a card, and which of them `auto` is."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

import streammerge
from benchmarks.standin import Cards
from streammerge.cli.main import main
from streammerge.compute.rates import FILE, Known, Rates, cards_here, keep
from streammerge.plan.estimates import elsewhere, estimates_of
from tests.make.models import assert_same_bytes, load_model, near, normal, save_models

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of cards without torch")

SLOW, FAST = Rates(1e6, 1e6, 1e6, 0.0), Rates(1e12, 1e12, 1e12, 0.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMMERGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.fixture
def paths(folder):
    base = {"w": normal((700, 500), 1), "v": normal((50,), 2)}
    return save_models(folder, base=base, a=near(base, 1), b=near(base, 2))


@pytest.fixture
def cards():
    with Cards(seen=True).there() as found:
        yield found


def known(cpu: Rates, card: Rates) -> None:
    keep(Known(cpu, card, "Stand-in", "2026-01-02"), cards_here())


def merged(paths, **options):
    return streammerge.merge(
        streammerge.slerp(paths["a"], paths["b"], t=0.3),
        output=paths["a"].with_name("out.safetensors"),
        **{"sync": False, "force": True, **options},
    )


def test_auto_is_the_faster_device_and_the_bytes_are_the_same(paths, cards):
    known(SLOW, FAST)
    on_card = merged(paths, device="auto")
    made = load_model(paths["a"].with_name("out.safetensors"))
    assert on_card.device == "cuda"
    assert cards.lanes
    known(FAST, SLOW)
    cards.lanes.clear()
    assert merged(paths, device="auto").device == "cpu"
    assert not cards.lanes
    assert_same_bytes(load_model(paths["a"].with_name("out.safetensors")), made)


def test_auto_measures_where_nothing_is_known(paths, cards, folder):
    report = merged(paths, device="auto")
    assert (folder / "cache" / FILE).exists()
    assert report.device in ("cpu", "cuda")


def test_auto_is_the_card_where_nothing_can_be_known(paths, cards, folder, monkeypatch):
    monkeypatch.setenv("STREAMMERGE_CACHE", "/dev/null/cache")
    assert merged(paths, device="auto").device == "cuda"


def test_auto_without_a_card_asks_nobody(paths, folder):
    assert merged(paths, device="auto").device == "cpu"
    assert not list((folder / "cache").iterdir())


def test_a_merge_on_a_card_measures_once_and_one_on_the_cpu_never(paths, cards, folder):
    assert merged(paths).elsewhere is None
    assert not list((folder / "cache").iterdir())
    merged(paths, device="cuda")
    assert [path.name for path in (folder / "cache").iterdir()] == [FILE]


def test_the_final_table_tells_where_it_would_have_been_faster(paths, cards):
    known(SLOW, FAST)
    report = merged(paths)
    assert report.elsewhere is not None
    assert report.elsewhere.device == "cuda"
    assert 0 <= report.elsewhere.seconds <= 0.8 * report.seconds["total"]
    assert dict(report.rows())["faster"].startswith("--device cuda would take about ")
    assert report.to_json()["elsewhere"]["device"] == "cuda"
    assert merged(paths, device="cuda").elsewhere is None
    known(FAST, SLOW)
    assert merged(paths).elsewhere is None
    found = merged(paths, device="cuda").elsewhere
    assert found is not None
    assert found.device == "cpu"


def test_nothing_is_said_where_there_is_no_card(paths, folder):
    report = merged(paths)
    assert report.elsewhere is None
    assert "faster" not in dict(report.rows())
    assert "elsewhere" not in report.to_json()


def test_the_plan_tells_both(paths, cards, capsys):
    known(SLOW, FAST)
    words = ["plan", str(paths["a"]), str(paths["b"]), "-m", "slerp", "-p", "t=0.3"]
    assert main(words) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("time"))
    assert "on the CPU, about 0.0 s on Stand-in (--device cuda), by rates of 2026-01-02" in row
    assert main([*words, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["estimated_seconds"]) == {"cpu", "cuda"}
    assert main([*words, "--device", "mps"]) == 0
    assert "\ntime" not in capsys.readouterr().out


def test_estimates_follow_bytes_operations_and_decompositions(paths, folder):
    def estimate(merge, cpu: Rates, card: Rates, **options):
        made = streammerge.make_plan(merge, output=folder / "o.safetensors", **options)
        found = estimates_of(made, Known(cpu, card, "x", "y"))
        assert found is not None
        return found

    linear = streammerge.linear(paths["a"], paths["b"])
    ties = streammerge.ties(paths["a"], paths["b"], base=paths["base"], density=0.5)
    iso_c = streammerge.iso_c(paths["a"], paths["b"], base=paths["base"])
    moving = replace(FAST, moving=1e6)
    nbytes = 3 * 4 * (700 * 500 + 50)
    assert estimate(linear, moving, FAST).cpu == pytest.approx(nbytes / 1e6, rel=0.01)
    assert estimate(linear, FAST, moving).card == pytest.approx(nbytes / 1e6, rel=0.01)
    assert estimate(ties, FAST, moving).card > 2 * estimate(linear, FAST, moving).card
    computing = replace(FAST, computing=1e6)
    assert estimate(ties, FAST, computing).card > 5 * estimate(linear, FAST, computing).card
    decomposing = replace(FAST, decomposing=1e9)
    assert estimate(iso_c, FAST, decomposing).card > 1 > estimate(ties, FAST, decomposing).card
    assert estimate(linear, replace(FAST, starting=3.0), FAST).faster == "cuda"
    assert estimate(linear, FAST, replace(FAST, starting=3.0)).faster == "cpu"
    elsewhere_planned = streammerge.make_plan(linear, output=folder / "o", device="mps")
    assert estimates_of(elsewhere_planned, Known(FAST, FAST, "", "")) is None


def test_what_a_slow_disk_takes_is_counted_there_too(paths, cards, folder):
    known(Rates(1e7, 1e12, 1e12, 0.0), Rates(2e7, 1e12, 1e12, 0.0))
    made = streammerge.make_plan(streammerge.linear(paths["a"], paths["b"]), output=folder / "o.safetensors")
    found = estimates_of(made)
    assert found is not None
    assert found.cpu == pytest.approx(2 * found.card, rel=0.01)
    told = elsewhere(made, "cpu", found.cpu)
    assert told is not None
    assert told.seconds == pytest.approx(found.card)
    assert elsewhere(made, "cpu", 10 * found.cpu) is None
    quick = elsewhere(made, "cpu", found.cpu / 10)
    assert quick is not None
    assert quick.seconds == pytest.approx(found.card / 10)
    assert elsewhere(made, "xpu", 1.0) is elsewhere(made, "cpu", 0.0) is None
