"""Figures and targets are judged within a round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import figures, report, targets
from benchmarks.results import Run, ToolResult
from streammerge.tools.bench.benchmark import Spread
from tests.benchmarks.measurements import GB, case_result, process, tool_result


def test_ratios_are_taken_within_a_round():
    found = figures.ratio(case_result(), "script", "streammerge", figures.wall)
    assert found == Spread(10.5, 10.0, 11.0)
    assert figures.ratio(case_result(), "nobody", "streammerge", figures.wall) is None


def test_the_loop_is_compared_with_the_floor_of_its_round():
    result = case_result()
    assert figures.over_floor(result, result.tool("streammerge")) == Spread(1.0, 0.75, 1.0)
    assert figures.over_floor(result, result.tool("script")) is None


def test_the_share_of_the_disk_counts_what_must_be_read_once():
    cold = [
        Run(0, process(5.0), loop=4.0, own={"bytes_read": 20 * GB}),
        Run(1, process(5.0), 4.0, {"bytes_read": 4 * GB}),
    ]
    tool = ToolResult("streammerge", "streammerge", cold=cold)
    result = case_result(tools=[tool], disk_rates=[2.0 * GB, 2.0 * GB])
    assert figures.of_disk(result, tool) == Spread(0.75, 0.5, 1.0)


def test_memory_is_told_above_the_import_of_torch():
    result = case_result()
    tool = result.tool("streammerge")
    assert tool is not None
    assert figures.own_memory(result, tool) == 30
    assert targets.most_memory({"article-fp16": result}) == 30


def test_what_fits_the_page_cache():
    assert figures.fits_cache(case_result())
    assert not figures.fits_cache(case_result(input_bytes=20 * GB))


@given(slope=st.floats(0.1, 10), start=st.floats(0, 5))
def test_a_line_is_a_line(slope, start):
    points = [(float(x), start + slope * x) for x in (1, 3, 10, 30)]
    assert figures.line_through(points) < 1e-6
    bent = [*points[:-1], (30.0, 2 * points[-1][1])]
    assert figures.line_through(bent) > 0.03


def test_targets_are_judged():
    rows = {row[0]: row for row in (target.row({"article-fp16": case_result()}) for target in targets.TARGETS)}
    loop = next(row for text, row in rows.items() if "`cat`" in text)
    assert loop[2:] == ("1.00 (0.75 to 1.00)", "reached")
    script = next(row for text, row in rows.items() if "plain script" in text)
    assert script[3] == "reached"
    halves = next(row for text, row in rows.items() if "0.5/0.4" in text)
    assert halves[2].startswith("0.50 ")
    assert next(row for text, row in rows.items() if "sd-mecha" in text)[3] == "not measured"


@pytest.mark.parametrize(
    ("upper", "value", "said"),
    [
        (True, 1.2, "reached"),
        (True, 1.5, "**not reached**, by 20%"),
        (False, 1.3, "reached"),
        (False, 1.0, "**not reached**, by 20%"),
    ],
)
def test_by_how_much_a_target_is_missed(upper, value, said):
    assert targets.Target("x", 1.25, upper, "", lambda _: value).row({})[3] == said


def test_scaling_is_judged_over_what_fits_the_cache():
    found = {}
    for gigabytes, loop in (("0.3", 0.1), ("1", 0.1), ("3", 0.1), ("30", 0.9)):
        size = int(float(gigabytes) * GB)
        tool = tool_result("streammerge", [size / GB * 10] * 3, loop)
        found[f"scale-{gigabytes}GB"] = case_result(
            f"scale-{gigabytes}GB", tools=[tool], input_bytes=size, output_bytes=size // 2
        )
    off = targets.off_the_line(models=False)(found)
    assert off is not None
    assert off < 0.01
    assert targets.memory_range(models=False)(found) == 0
    assert targets.off_the_line(models=True)(found) is None
    assert report.scaling_row(found["scale-30GB"])[7] == "too small: the disk sets the pace"
