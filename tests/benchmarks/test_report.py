"""Results survive the file, and the report tells what they are and what is missing."""

from __future__ import annotations

import pytest

from benchmarks import own, report, results, tables
from benchmarks.cases import CASES
from benchmarks.limits import Limit
from benchmarks.results import ToolResult
from streammerge.compute.machine import MIB
from tests.benchmarks.measurements import case_result


def test_results_survive_the_file(tmp_path):
    result = case_result()
    found = results.load(results.save(result, tmp_path))
    expected = results.to_json(result)
    assert results.to_json(found) == expected
    (_, _, script) = found.tools
    assert [bool(run.process.curve) for run in script.warm] == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["article-fp16.json"]
    assert next(results.load_all([*CASES], tmp_path)).name == "article-fp16"


def test_results_can_be_read_by_people(tmp_path):
    lines = results.save(case_result(), tmp_path).read_text().splitlines()
    assert len(lines) < 1000
    assert any(line.strip().startswith("[0.3, ") for line in lines)


def test_the_report_tells_what_is_missing(tmp_path):
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert "There are no results yet" in text
    results.save(case_result(), tmp_path)
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert "Not measured: article-fp32-ckpt, sdxl" in text
    assert "10.5x" in text
    assert "160 MiB" in text
    assert "miniatures" not in text


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (Limit(200 * MIB, 190 * MIB, 4, True), "200 MiB"),
        (Limit(200 * MIB, 100 * MIB, 9, False), "100 to 200 MiB"),
        (Limit(200 * MIB, 0, 9, False), "at most 200 MiB"),
        (Limit(0, 100 * MIB, 9, False), "more than 100 MiB"),
        (None, ""),
    ],
)
def test_the_smallest_memory_in_words(limit, said):
    assert report.smallest(ToolResult("x", "x", limit=limit)) == said


def test_there_is_nothing_about_gpus_where_there_is_none():
    result = case_result()
    result.tools.append(ToolResult(own.CUDA.name, own.CUDA.title, skipped="there is no CUDA device here"))
    assert "cuda" not in report.tools_table(result)
    assert "CUDA" not in report.notes_of(result)


def test_tables_are_markdown():
    assert tables.table(("a", "b"), [("1|2", "3\n4")]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 4 |"


def test_the_readme_shows_the_article():
    text = report.readme_table(case_result())
    assert "| **streammerge** | 3.0 s | 1.5 s |" in text
    assert "`cat` of the inputs and `cp` of one output, takes " in text
    assert "Medians of 2 to 3 runs" in text
    assert "2026-01-01" in text
