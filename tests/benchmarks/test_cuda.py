"""What is measured on a card, in miniature and with the CPU in its place."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks import card, cuda, inputs, own, report, results
from benchmarks.card import CardResult, CardRun, Checks, Context, Difference, Rate, Skipped
from benchmarks.card_merges import LINEAR, MERGES
from benchmarks.card_section import HEADING, NOTHING, card_section
from benchmarks.cuda import CardBench, CudaSettings, Part
from benchmarks.tools import CannotRun
from streammerge.compute.machine import MIB
from streammerge.tools.bench.floor import Floor

MACHINE = dict.fromkeys(("system", "processor", "cores", "python", "torch", "safetensors", "cuda"), "x")


@pytest.fixture(scope="module")
def quick(made) -> CardResult:
    assert program.main(["cuda", "--quick", "--folder", str(made)]) == 0
    found = card.load(Path(made) / "results-quick")
    assert found is not None
    return found


def test_every_part_is_measured(quick):
    assert quick.complete
    assert not quick.skipped
    assert quick.quick
    assert quick.context is not None
    assert quick.context.rss > 50 * MIB
    assert len(quick.floors) == 2
    assert {rate.step for rate in quick.rates} == {"to the card", "from the card", "reading", "writing", "loop"}
    assert {(rate.elements, rate.threads) for rate in quick.rates if rate.step == "loop"} == {
        *((elements, count) for elements in (2**12, 2**14) for count in (1, 2))
    }
    assert all(rate.seconds > 0 for rate in quick.rates)
    assert quick.took > 0


def test_the_tests_that_need_a_card_are_run(quick):
    assert quick.tests is not None
    assert quick.tests.ok
    assert "passed" in quick.tests.summary or "skipped" in quick.tests.summary


def test_merges_are_run_on_both_sides_and_compared(quick):
    for name in ("linear", "article"):
        for side in ("card", "cpu"):
            (run,) = quick.good(name, side)
            assert 0 < run.loop < run.wall
            assert run.peak_rss > 0
            assert run.loops
    assert [one.merge for one in quick.differences] == ["linear", "article"]
    for one in quick.differences:
        assert one.ok
        assert one.compared == one.elements > 10_000
        assert one.differing == 0
    assert quick.good("linear", "card", 2)[0].threads == 2


def test_nothing_is_left_but_results(quick, made):
    assert {path.name for path in Path(made).rglob("*")} == {"results-quick", card.FILE}


def test_the_report_has_what_was_measured(quick, made, tmp_path):
    text = report.write(Path(made) / "results-quick").read_text(encoding="utf-8")
    section = text[text.index(HEADING) :]
    assert "miniatures" in section
    assert "| bare linear loop | 16,384 | 2 |" in section
    assert f"equal in all of {quick.differences[0].elements:,}" in section
    assert NOTHING not in section


def test_models_that_were_there_are_left(bench, monkeypatch):
    (there,) = inputs.find_or_make(LINEAR, bench.settings.folder, quick=True)["a"].parent.glob("complete")
    monkeypatch.setattr(bench, "parts", lambda: iter([Part("one", partial(bench.make, LINEAR))]))
    assert bench.run() == 0
    assert there.exists()


def test_without_a_card_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own, "has_cuda", lambda: False)
    words = ["cuda", "--folder", str(tmp_path / "bench"), "--results", str(tmp_path / "results")]
    assert program.main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "There is no CUDA device here: nothing was measured, nothing written."
    ]
    assert not list(tmp_path.iterdir())


def test_without_results_the_report_says_so(tmp_path):
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert NOTHING in text
    assert "| ties / linear, loop | ≤ 3 |  | left out: no card was at hand |" in text


@pytest.mark.slow
def test_all_that_a_card_is_asked_for_can_be_said_to_a_stand_in(tmp_path):
    assert program.main(["cuda", "--dry", "--folder", str(tmp_path), "--budget", "1200"]) == 0
    found = card.load(tmp_path / "results-quick")
    assert found is not None
    assert found.complete
    assert not found.skipped
    assert found.card == "Stand-in"
    assert found.context is not None
    assert found.tests is not None
    assert found.tests.ok
    assert {run.merge for run in found.runs} == {case.name for case in MERGES}
    assert not [run for run in found.runs if run.failure]
    assert all(one.ok for one in found.differences)
    assert any(run.vram for run in found.runs)


def test_the_commit_can_be_told_where_git_cannot(tmp_path):
    words = ["cuda", "--quick", "--folder", str(tmp_path), "--commit", "abc1234"]
    settings = program.cuda_settings(program.parser().parse_args(words))
    assert CardBench(settings, lambda text: None).result.commit == "abc1234"


def test_miniatures_never_replace_real_results(tmp_path):
    arguments = program.parser().parse_args(["cuda", "--quick", "--folder", str(tmp_path)])
    assert program.cuda_settings(arguments).results != results.FOLDER
    arguments = program.parser().parse_args(["cuda", "--folder", str(tmp_path)])
    assert program.cuda_settings(arguments).results == results.FOLDER
    assert program.cuda_settings(arguments).device == "cuda"


@pytest.fixture
def bench(tmp_path, monkeypatch) -> CardBench:
    monkeypatch.setattr(CardBench, "begun", lambda self: made_up())
    return CardBench(CudaSettings(tmp_path / "bench", tmp_path / "results", quick=True), lambda text: None)


def made_up() -> CardResult:
    """Figures of a card, made up."""
    return CardResult("a card", "1.2", "2026-01-01", "abc", "0.3", False, {**MACHINE, "ram_bytes": "1000000000"})


def test_every_part_is_saved_and_one_that_breaks_stops_none(bench, monkeypatch, capsys):
    seen = []

    def fails() -> None:
        raise RuntimeError("broken")

    def refuses() -> None:
        raise CannotRun("there is no room")

    def looks() -> None:
        found = card.load(bench.settings.results)
        assert found is not None
        seen.extend(found.skipped)

    parts = [Part("one", fails), Part("two", refuses), Part("three", looks)]
    monkeypatch.setattr(bench, "parts", lambda: iter(parts))
    assert bench.run() == 1
    assert seen == [Skipped("one", "broke down: RuntimeError('broken')"), Skipped("two", "there is no room")]
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_parts_are_skipped_when_the_time_is_spent(bench):
    bench.settings = dataclasses.replace(bench.settings, budget=1.0)
    assert bench.run() == 0
    found = card.load(bench.settings.results)
    assert found is not None
    assert [one.part for one in found.skipped] == [part.name for part in bench.parts()]
    assert {one.reason for one in found.skipped} == {"the 1 s were spent"}
    assert not found.runs


def test_the_parts_are_everything_that_is_to_be_measured(bench):
    names = [part.name for part in bench.parts()]
    for method in ("linear", "ties", "slerp", "model_stock", "dare_ties", "della", "iso_c", "tsv_m", "article"):
        assert method in names
    for count in (1, 2, 4, 8, 16):
        assert f"linear by {count} threads" in names
        assert f"ties by {count} threads" in names
    assert names.index("tests that need a card") < names.index("linear") < names.index("linear by 1 threads")
    assert "iso_c, run 2" not in names


def test_a_merge_that_fails_is_told_with_its_last_line(bench, made, quick):
    bench.make(LINEAR)
    bench.models["sd2"]["a"] = bench.models["sd2"]["a"].with_name("gone.safetensors")
    with pytest.raises(CannotRun, match="not compared"):
        bench.both(LINEAR)
    assert [run.failure.startswith("failed: ") for run in bench.result.runs] == [True, True]
    assert LINEAR.name in card_section(bench.result)


@pytest.mark.skipif(own.has_cuda(), reason="there is a card")
def test_a_context_that_cannot_be_made_is_a_reason(bench):
    bench.settings = dataclasses.replace(bench.settings, quick=False)
    with pytest.raises(CannotRun, match=r"a CUDA context can't be made: .+"):
        bench.context()


def test_too_small_a_disk_is_a_reason(bench, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CannotRun, match="are free"):
        bench.make(LINEAR)
    with pytest.raises(CannotRun, match="not made"):
        bench.floor()


def test_figures_are_kept_of_rates_that_were_cut_short(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text('warning: hot\n{"step": "reading", "seconds": 1.5, "nbytes": 3}\n[1]\n{"step": "writ')
    assert cuda.rates_in(log) == [Rate("reading", 1.5, 3)]


def test_the_section_tells_what_was_aimed_at_and_what_was_found():
    result = made_up()
    result.context = Context(500 * MIB, 400 * MIB, 200 * MIB)
    result.tests = Checks(False, 3.0, "FAILED tests/x\n==== 1 failed, 2 passed in 3.00s ====\n")
    result.floors = [Floor(1.0, 1.0)]
    result.rates = [Rate("loop", 0.5, 10**9, 4, 2**21, 184 * MIB), Rate("loop", 0.8, 10**9, 1, 2**18)]
    result.runs = [
        CardRun("linear", "card", wall=3.0, loop=0.6, peak_rss=600 * MIB, vram=200_000_000),
        CardRun("linear", "cpu", wall=3.0, loop=2.4, peak_rss=64 * MIB, loops="compiled"),
        CardRun("ties", "card", wall=5.0, loop=2.4, peak_rss=600 * MIB, vram=600_000_000),
        CardRun("iso_c", "card", failure="stopped after 60 s", wall=60.0),
    ]
    result.differences = [
        Difference("linear", 100, 100, 0, 0, 0),
        Difference("ties", 100, 80, 7, 2, 3, "some.weight", 1),
    ]
    result.skipped = [Skipped("della", "the 430 s were spent")]
    text = card_section(result)
    assert "| linear: loop / (`cat` inputs + `cp` output) | ≤ 0.4 | 0.30 | reached |" in text
    assert "| linear: loop / the fastest bare loop | ≤ 1.3 | 1.20 | reached |" in text
    assert "| ties / linear, loop | ≤ 3 | 4.00 | **not reached**, by 33% |" in text
    assert "| slerp / linear, loop | ≤ 2 |  | not measured |" in text
    assert "| 600.00 MB | **not reached**" in text
    assert "| 100.00 MiB | reached |" in text
    assert "**failed**: 1 failed, 2 passed in 3.00s" in text
    assert "equal in all of 100" in text
    assert "**1 tensors unlike**, **7 in 2 tensors apart, by 3 in the last place at most** (some.weight)" in text
    assert "80 of 100 compared" in text
    assert "stopped after 60 s" in text
    assert "della: not measured: the 430 s were spent" in text
    assert "cut short" in text


def test_what_was_measured_survives_the_file(quick, tmp_path):
    card.save(quick, tmp_path)
    assert card.load(tmp_path) == quick


@pytest.mark.parametrize(
    ("letters", "passed", "failed"), [("..s", 74, 0), (".F.", 74, 1), (".E", 73, 1), ("xX", 72, 0), ("", 72, 0)]
)
def test_tests_that_are_cut_short_are_right_if_none_has_failed_by_then(letters, passed, failed):
    said = f"{'.' * 72} [ 16%]\n{letters}"
    found = Checks.told(said, 150.4, ok=False, cut_short=True)
    assert found.ok == (failed == 0)
    assert found.summary == f"{passed} passed, {failed} failed, then stopped after 150 s"


def test_tests_that_end_are_as_right_as_they_say():
    assert not Checks.told("no module named pytest", 150, ok=False, cut_short=True).ok
    assert not Checks.told(".F\n1 failed in 2 s", 2, ok=False, cut_short=False).ok
    assert len(Checks.told("." * 10_000, 2, ok=True, cut_short=False).tail) == card.TAIL


@pytest.mark.parametrize(("found", "ok"), [((5, 5, 1, 1, 1), True), ((5, 5, 1, 1, 2), False), ((5, 0, 0, 0, 0), False)])
def test_one_unit_apart_is_right(found, ok):
    assert Difference("x", *found).ok == ok
