"""Pictures of results, made to be read on white and on black."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import figures
from benchmarks.results import CaseResult, ToolResult, median_run

COLOURS: Final = ("#e4572e", "#3a86c8", "#8a63d2", "#2a9d6f", "#c28a1c", "#c2478f", "#6b7a8f")
GREY: Final = "#808890"
"""Text and axes: readable on white and on black, the background being transparent."""

MUCH: Final = 8.0
"""Where one tool takes so many times as long as another, memory is drawn over a logarithmic axis of time."""


EARLIEST: Final = 0.3
"""Seconds at which a logarithmic axis of time starts: before, only Python is there."""


def shown(result: CaseResult) -> list[ToolResult]:
    """The tools that are drawn: streammerge without the sync, and the peers that came to an end."""
    hidden = (f"{figures.STREAMMERGE}-sync", f"{figures.STREAMMERGE}-cuda")
    return [tool for tool in result.tools if tool.good() and ":" not in tool.name and tool.name not in hidden]


def memory_plot(result: CaseResult, path: Path) -> None:
    """Resident memory over time of every tool, on one axis."""
    figure, axes = new_figure(8, 4)
    longest = []
    for tool, colour in zip(shown(result), COLOURS, strict=False):
        run = median_run(tool.good())
        if run is None or not run.process.curve:
            continue
        times = [sample.seconds for sample in run.process.curve]
        axes.plot(
            times, [sample.resident / 1e9 for sample in run.process.curve], color=colour, label=label(tool), lw=1.8
        )
        axes.plot(times[-1], run.process.curve[-1].resident / 1e9, "o", color=colour, ms=4)
        longest.append(times[-1])
    if longest and max(longest) > MUCH * min(longest):
        axes.set_xscale("log")
        axes.set_xlim(left=EARLIEST)
    axes.axhline(result.import_torch_rss / 1e9, color=GREY, lw=0.8, ls=":", label="import torch")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("resident memory, GB")
    axes.set_title(result.title, fontsize=10, color=GREY)
    legend(axes)
    figure.savefig(path, transparent=True)


def time_plot(result: CaseResult, path: Path) -> None:
    """The whole process of every tool as a bar beside the floor, its merge loop inside where it is told."""
    tools = shown(result)
    figure, axes = new_figure(8, 0.9 + 0.42 * (len(tools) + 1))
    floor = sum(result.floor(number) for number in range(len(result.floors))) / max(1, len(result.floors))
    names, seconds = ["floor: cat inputs, cp output"], [floor]
    colours: list[str] = [GREY]
    for tool, colour in zip(tools, COLOURS, strict=False):
        if time := figures.spread(tool, figures.wall):
            names.append(label(tool))
            seconds.append(time.median)
            colours.append(colour)
    axes.barh(names, seconds, color=colours, height=0.62)
    for place, tool in enumerate(tools, 1):
        if inner := figures.spread(tool, figures.loop):
            axes.barh(place, inner.median, color="black", alpha=0.3, height=0.3)
    for place, value in enumerate(seconds):
        axes.annotate(f" {value:.1f} s", (value, place), va="center", fontsize=9, color=GREY)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds, median; dark: the merge loop, where the tool tells it")
    axes.set_title(result.title, fontsize=10, color=GREY)
    figure.savefig(path, transparent=True)


def scaling_plot(series: Sequence[tuple[str, Sequence[CaseResult]]], path: Path) -> None:
    """Loop time and peak memory over the bytes read and written, for each series."""
    figure, (times, memory) = new_figure(8, 3.4, columns=2)
    for (name, points), colour in zip(series, COLOURS, strict=False):
        tools = [(point, point.tool(figures.STREAMMERGE)) for point in points]
        moved = [(point.input_bytes + point.output_bytes) / 1e9 for point, _ in tools]
        loops = [figures.spread(tool, figures.loop) for _, tool in tools]
        kept = [(x, time.median) for x, time in zip(moved, loops, strict=True) if time]
        times.plot([x for x, _ in kept], [y for _, y in kept], "o-", color=colour, label=name, lw=1.5, ms=4)
        peaks = [figures.peak_rss(tool) / 1e6 if tool else 0 for _, tool in tools]
        memory.plot(moved, peaks, "o-", color=colour, label=name, lw=1.5, ms=4)
    for axes in (times, memory):
        axes.set_xscale("log")
        axes.set_xlabel("GB read and written")
    times.set_yscale("log")
    times.set_ylabel("merge loop, seconds")
    memory.set_ylim(bottom=0)
    memory.set_ylabel("peak RSS, MB")
    legend(times)
    figure.savefig(path, transparent=True)


def label(tool: ToolResult) -> str:
    """The tool's name, with a warning if what it makes is not right."""
    wrong = tool.check is not None and not tool.check.ok
    return f"{tool.name}{' (wrong output)' * wrong}"


def new_figure(width: float, height: float, columns: int = 1) -> Any:  # noqa: ANN401  (matplotlib's)
    """An empty figure and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    made = [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
    for axes in made:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=GREY, labelsize=9)
        axes.xaxis.label.set_color(GREY)
        axes.yaxis.label.set_color(GREY)
    return figure, made if columns > 1 else made[0]


def legend(axes: Any) -> None:  # noqa: ANN401
    """A legend without a frame, in the colour of the axes."""
    made = axes.legend(frameon=False, fontsize=9)
    for text in made.get_texts():
        text.set_color(GREY)
