"""Figures from results: medians, spreads, and ratios, which are taken within a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from benchmarks import own
from benchmarks.results import CaseResult, Run, ToolResult
from streammerge.compute.machine import MIB
from streammerge.tools.bench.benchmark import Spread

Figure = Callable[[Run], float]


def wall(run: Run) -> float:
    """Seconds of the whole process."""
    return run.process.wall


def loop(run: Run) -> float:
    """Seconds of the merge loop."""
    return run.loop


def cpu(run: Run) -> float:
    """Seconds of all cores together."""
    return run.process.cpu


def spread(tool: ToolResult | None, figure: Figure, condition: str = "warm") -> Spread | None:
    """Of the tool's runs; None if there are none that tell."""
    values = [figure(run) for run in tool.good(condition)] if tool else []
    return Spread.of(values) if any(values) else None


def ratio(result: CaseResult, above: str, below: str, figure: Figure) -> Spread | None:
    """One tool's figure over another's, in the rounds that both have; None without such a round."""
    over, under = result.tool(above), result.tool(below)
    if over is None or under is None:
        return None
    known = {run.round: figure(run) for run in under.good()}
    found = [figure(run) / known[run.round] for run in over.good() if known.get(run.round)]
    return Spread.of(found) if any(found) else None


def over_floor(result: CaseResult, tool: ToolResult | None) -> Spread | None:
    """The merge loop over the floor of its round."""
    values = [run.loop / result.floor(run.round) for run in tool.good() if run.loop] if tool else []
    return Spread.of(values) if values else None


def of_disk(result: CaseResult, tool: ToolResult | None) -> Spread | None:
    """The share of the disk's sequential rate that the cold loop reaches, over the bytes that must be read."""
    runs = tool.good("cold") if tool else []
    values = [
        must_read(result, run) / run.loop / result.disk_rates[run.round]
        for run in runs
        if run.loop and run.round < len(result.disk_rates)
    ]
    return Spread.of(values) if values else None


def must_read(result: CaseResult, run: Run) -> int:
    """The bytes of the inputs that one pass reads."""
    read = int(run.own.get("bytes_read", result.input_bytes))
    return min(read, result.input_bytes)


def peak_rss(tool: ToolResult) -> int:
    """The greatest resident memory of all runs."""
    return max((run.process.peak_rss for run in (*tool.good(), *tool.good("cold"))), default=0)


def peak_anonymous(tool: ToolResult) -> int:
    """The greatest anonymous memory of all runs."""
    return max((run.process.peak_anonymous for run in (*tool.good(), *tool.good("cold"))), default=0)


def own_memory(result: CaseResult, tool: ToolResult) -> float:
    """MiB of the peak: all of it where torch was not imported, else what is above a bare import of it."""
    return (peak_rss(tool) - (result.import_torch_rss if has_torch(tool) else 0)) / MIB


def has_torch(tool: ToolResult) -> bool:
    """Whether a run of streammerge imported torch, as its report says."""
    return any(run.own.get("baseline_rss_bytes", 1) for run in (*tool.good(), *tool.good("cold")))


def memory_text(result: CaseResult, tool: ToolResult) -> str:
    """The same in words."""
    return f"{own_memory(result, tool):.0f} MiB " + ("above `import torch`" if has_torch(tool) else "in all")


def fits_cache(result: CaseResult) -> bool:
    """Whether inputs and output fit the page cache, with an eighth of the RAM left to programs."""
    ram = int(result.machine.get("ram_bytes", 0))
    return result.input_bytes + result.output_bytes < ram * 7 / 8


def passes(result: CaseResult, tool: ToolResult) -> float:
    """How often a method reads an input, on average over those that it reads."""
    runs = tool.good()
    models = own_models(result, tool)
    return int(runs[0].own.get("bytes_read", 0)) / (models * result.output_bytes) if runs and models else 0.0


def own_models(result: CaseResult, tool: ToolResult) -> int:
    """How many inputs the merge of streammerge or one of its variants has."""
    from benchmarks.cases import CASES

    case, name = CASES[result.name], tool.name.partition(":")[2]
    merge = case.variants.get(name) if name else case.merge
    return len(merge.roles) if merge else 0


def line_through(points: list[tuple[float, float]]) -> float:
    """The largest share by which a point is off the straight line through them, fitted to relative errors."""
    if len(points) < 3:
        return 0.0
    weights = [1 / (y * y) for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    square = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / square
    return max(abs(mean_y + slope * (x - mean_x) - y) / y for x, y in points)


STREAMMERGE: Final = own.NAME
