"""What streammerge set out to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks import figures
from benchmarks.own import NAME, variant_name
from benchmarks.results import CaseResult
from streammerge.tools.bench.benchmark import Spread

Results = Mapping[str, CaseResult]

FLAT_MIB: Final = 8.0
"""How much the peak may differ over sizes and still be called flat."""


@dataclass(frozen=True)
class Target:
    """A promise: what is compared, the bound, whether it is an upper one, and how the figure is found."""

    text: str
    bound: float
    upper: bool
    unit: str
    find: Callable[[Results], Spread | float | None]

    def row(self, results: Results) -> tuple[str, str, str, str]:
        """The promise, the bound, what was measured, and the verdict in words."""
        bound = f"{'≤' if self.upper else '≥'} {self.bound:g}{self.unit}"
        found = self.find(results)
        if found is None:
            return self.text, bound, "", "not measured"
        value = found.median if isinstance(found, Spread) else found
        shown = f"{value:.2f}{self.unit}"
        if isinstance(found, Spread):
            shown += f" ({found.low:.2f} to {found.high:.2f})"
        return self.text, bound, shown, self.verdict(value)

    def verdict(self, value: float) -> str:
        """`reached`, or by how much not."""
        if value <= self.bound if self.upper else value >= self.bound:
            return "reached"
        off = (value / self.bound - 1) if self.upper else (1 - value / self.bound)
        return f"**not reached**, by {off:.0%}"


def process_ratio(case: str, peer: str) -> Callable[[Results], Spread | None]:
    """A peer's whole process over streammerge's, without the final sync."""
    return lambda results: figures.ratio(results[case], peer, NAME, figures.wall) if case in results else None


def loop_ratio(case: str, above: str, below: str) -> Callable[[Results], Spread | None]:
    """One merge loop of streammerge over another, of the same inputs."""
    return lambda results: figures.ratio(results[case], above, below, figures.loop) if case in results else None


def loop_over_floor(results: Results) -> Spread | None:
    """The article's loop over its floor."""
    found = results.get("article-fp16")
    return figures.over_floor(found, found.tool(NAME)) if found else None


def least_of_disk(results: Results) -> float | None:
    """The least median share of the disk's rate, over the cases with cold runs that a single pass merges."""
    one_pass = [result for name, result in results.items() if name not in ("slerp", "ties", "methods")]
    shares = [figures.of_disk(result, result.tool(NAME)) for result in one_pass if figures.fits_cache(result)]
    return min((100 * share.median for share in shares if share), default=None)


def most_memory(results: Results) -> float | None:
    """The largest peak, above a bare import of torch where there was one, of every run of streammerge in every case."""
    found = [
        figures.own_memory(result, tool)
        for result in results.values()
        for tool in result.tools
        if tool.name.startswith(NAME) and not tool.name.endswith("-cuda") and tool.good()
    ]
    return max(found, default=None)


def scaling_points(results: Results, *, models: bool) -> list[CaseResult]:
    """The points of a series that fit the page cache: by size, or by the number of models."""
    found = [result for name, result in results.items() if name.startswith("scale-")]
    chosen = [result for result in found if result.name.endswith("-models") == models]
    return [
        result for result in chosen if figures.fits_cache(result) and figures.spread(result.tool(NAME), figures.loop)
    ]


def off_the_line(*, models: bool) -> Callable[[Results], float | None]:
    """The largest relative distance of a loop's time from a straight line over the bytes moved, in %."""

    def find(results: Results) -> float | None:
        points = []
        for result in scaling_points(results, models=models):
            if time := figures.spread(result.tool(NAME), figures.loop):
                points.append((float(result.input_bytes + result.output_bytes), time.median))
        return 100 * figures.line_through(points) if len(points) > 2 else None

    return find


def memory_range(*, models: bool) -> Callable[[Results], float | None]:
    """MiB between the largest and the smallest peak of a series, the points beyond the page cache included."""

    def find(results: Results) -> float | None:
        series = [one for name, one in results.items() if name.startswith("scale-")]
        tools = [one.tool(NAME) for one in series if one.name.endswith("-models") == models]
        peaks = [figures.peak_rss(tool) for tool in tools if tool and tool.good()]
        return (max(peaks) - min(peaks)) / 2**20 if len(peaks) > 1 else None

    return find


TARGETS: Final[Sequence[Target]] = (
    Target("article, float16, warm: merge loop / (`cat` inputs + `cp` output)", 1.25, True, "", loop_over_floor),
    Target(
        "article, float16: mergekit-pytorch / streammerge, whole process, no sync",
        *(8, False, "x", process_ratio("article-fp16", "mergekit-pytorch")),
    ),
    Target(
        "article, float16: sd-mecha / streammerge, whole process, no sync",
        *(12, False, "x", process_ratio("article-fp16", "sd-mecha")),
    ),
    Target(
        "article, float16: plain script / streammerge, whole process, no sync",
        *(9, False, "x", process_ratio("article-fp16", "script")),
    ),
    Target(
        "article, weights 0.5/0.5 / weights 0.5/0.4, merge loop",
        *(0.75, True, "", loop_ratio("article-fp16", NAME, variant_name("base-read"))),
    ),
    Target(
        "SLERP / linear merge of the same two models, merge loop",
        *(2.2, True, "x", loop_ratio("slerp", NAME, variant_name("linear"))),
    ),
    Target(
        "TIES / task arithmetic of the same three models, merge loop",
        *(5, True, "x", loop_ratio("ties", NAME, variant_name("linear"))),
    ),
    Target(
        "TIES: mergekit-pytorch / streammerge, whole process, no sync",
        *(20, False, "x", process_ratio("ties", "mergekit-pytorch")),
    ),
    Target(
        "cold cache: share of the disk's sequential rate, least of all one-pass cases", 90, False, " %", least_of_disk
    ),
    Target("peak RSS, above `import torch` where it is imported, most of all cases", 64, True, " MiB", most_memory),
    Target("loop time off a line over bytes, by size", 5, True, " %", off_the_line(models=False)),
    Target("loop time off a line over bytes, by models", 5, True, " %", off_the_line(models=True)),
    Target("peak RSS, largest less smallest, by size", FLAT_MIB, True, " MiB", memory_range(models=False)),
    Target("peak RSS, largest less smallest, by models", FLAT_MIB, True, " MiB", memory_range(models=True)),
)
"""Every target, in the order of the report."""
