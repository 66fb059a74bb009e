"""The benchmarks work as a whole, in miniature, and resume."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks import figures, report, results, running
from benchmarks.cases import CASES
from benchmarks.running import Settings


def bench(*words: object) -> int:
    return program.main([str(word) for word in words])


@pytest.fixture(scope="module")
def quick(made) -> Path:
    """The article and SLERP, measured in miniature: streammerge, the plain script and one variant."""
    words = ["--quick", "--no-limits", "--runs", "1", "--folder", made, "--keep"]
    assert bench("run", *words, "--cases", "article-fp16", "slerp", "--tools", "streammerge", "script") == 0
    return Path(made) / "results-quick"


def test_all_are_measured_and_right(quick):
    for name in ("article-fp16", "slerp"):
        result = results.load(quick / f"{name}.json")
        assert result.complete
        assert not result.skipped
        for tool in ("streammerge", "script"):
            found = result.tool(tool)
            assert found is not None
            assert found.failure == ""
            assert found.check is not None
            assert found.check.ok, found.check.text
            (run,) = found.good()
            assert 0 < run.loop < run.process.wall
            assert run.process.curve
        assert result.floor(0) > 0


def test_variants_are_measured_too(quick):
    result = results.load(quick / "slerp.json")
    assert figures.ratio(result, "streammerge", "streammerge:linear", figures.loop) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="drops pages of single files")
def test_cold_runs_are_measured(quick):
    result = results.load(quick / "article-fp16.json")
    assert len(result.disk_rates) == 1
    share = figures.of_disk(result, result.tool("streammerge"))
    assert share is not None
    assert share.median > 0


def test_the_report_is_whole(quick):
    text = (quick / report.REPORT).read_text(encoding="utf-8")
    assert "miniatures" in text
    for heading in ("## Targets", "## article-fp16", "## slerp", "## How it is measured"):
        assert heading in text
    for picture in ("article-fp16-memory.png", "article-fp16-time.png"):
        assert picture in text
        data = (quick / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 200_000


def test_nothing_is_left_behind(quick, made):
    assert not (made / "work").exists()
    assert not (made / "logs").exists()


def test_what_is_done_is_not_done_again(quick, made, capsys):
    before = (quick / "slerp.json").stat().st_mtime_ns
    assert bench("run", "--quick", "--folder", made, "--cases", "slerp", "--keep") == 0
    assert "0 of 1 cases to measure" in capsys.readouterr().out
    assert (quick / "slerp.json").stat().st_mtime_ns == before
    settings = Settings(made, quick=True, results=quick)
    assert program.is_done(CASES["slerp"], settings, "2026-01-01")
    assert not program.is_done(CASES["slerp"], settings, "2999-01-01")
    assert not program.is_done(CASES["slerp"], dataclasses.replace(settings, quick=False), "")


def test_miniatures_never_replace_real_results(made):
    arguments = program.parser().parse_args(["run", "--quick", "--folder", str(made)])
    assert program.settings_from(arguments).results != results.FOLDER


def test_list_and_help_tell_everything(capsys):
    assert bench("list") == 0
    out = capsys.readouterr().out
    for case in CASES:
        assert case in out
    with pytest.raises(SystemExit):
        bench("--help")
    assert "resumes" in capsys.readouterr().out


def test_a_case_that_breaks_down_does_not_stop_the_others(made, monkeypatch, tmp_path, capsys):
    done = []

    def run(self):
        if self.case.name == "ties":
            raise RuntimeError("broken")
        done.append(self.case.name)
        return self.result

    monkeypatch.setattr(running.CaseRunner, "run", run)
    words = ["--quick", "--folder", made, "--results", tmp_path, "--again", "--keep", "--cases", "ties", "sdxl"]
    assert bench("run", *words) == 1
    assert done == ["sdxl"]
    assert "RuntimeError: broken" in capsys.readouterr().err
