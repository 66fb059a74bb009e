"""The report in Markdown, its plots, and the README's table, from the results that there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import card, figures
from benchmarks.card_section import card_section
from benchmarks.cases import CASES, COMPARED
from benchmarks.own import CUDA, NAME, SYNCED
from benchmarks.results import FOLDER, CaseResult, ToolResult, load_all
from benchmarks.tables import table
from benchmarks.targets import TARGETS
from streammerge.compute.machine import MIB
from streammerge.errors import format_size
from streammerge.tools.bench.benchmark import Spread

REPORT: Final = "report.md"

HOW: Final = """\
## How it is measured

- The floor (`cat` of the inputs to nowhere, `cp` of a file of the output's size) and the tools take turns, round by
  round; ratios are taken within a round, figures are medians, in brackets the least and the greatest.
- *Process* is the whole program from its start to its end, measured from outside; *loop* is the merging alone, as far
  as the tool tells; what streammerge copies while torch is still being imported counts as part of it. CPU time, peak
  RSS and bytes are the system's own accounts (`wait4`, `/proc`), of the program and its children; *anonymous* is the
  most that was seen, looking every 20 ms. Memory-mapped reads take no calls: they show in *from disk* only, and there
  only when they aren't cached.
- Peers never wait for the disk at the end. So streammerge runs with `--no-sync` where it is compared, and a row of its
  own shows it with the final sync, which is its default.
- Warm: inputs were read before every run. Cold: they were dropped from the page cache; the disk's sequential rate is
  measured right before each round. Inputs and output that don't fit the RAM can't be warm, and the case says so.
- Smallest memory: the smallest memory control group, without swap, in which the tool finishes within four times its
  usual time (and 10 s), found by bisection to 8 %. It counts the page cache that the program itself brings in.
- Every tool's output is checked once: names, shapes, dtypes, and numbers against float64 (every tensor at three places;
  for TIES and SLERP a sample of whole tensors). *Rounded more than once* is no error, but less than could be had.
- A tool that used up its time in a case has fewer runs; the column *runs* says how many.
"""


def write(folder: Path = FOLDER) -> Path:
    """Write the report and the plots beside the results."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {result.name: result for result in load_all([*CASES], folder)}
    parts = ["# streammerge: RAM and time", introduction(list(found.values()))]
    if found:
        parts += ["## Targets", targets_table(found)]
    for case in COMPARED:
        if case.name in found:
            parts.append(case_section(found[case.name], folder))
    parts += [
        scaling_section(found, folder),
        methods_section(found.get("methods")),
        card_section(card.load(folder)),
        HOW,
    ]
    path = folder / REPORT
    path.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")
    return path


def introduction(found: Sequence[CaseResult]) -> str:
    """What it ran on, and when."""
    if not found:
        return "There are no results yet: `make bench` measures them."
    lines = ["Made by `make bench`; `python -m benchmarks --help` tells how to make parts of it."]
    if any(result.quick for result in found):
        lines.append("\n**These are miniatures, to see that everything works: their figures mean nothing.**")
    commits = ", ".join(sorted({result.commit for result in found}))
    lines += [f"\n{line}" for line in dict.fromkeys(machine_line(result) for result in found)]
    lines.append(f"\nMeasured at commit {commits}.")
    missing = [case.name for case in CASES.values() if case.name not in {result.name for result in found}]
    if missing:
        lines.append(f"\nNot measured: {', '.join(missing)}.")
    return "\n".join(lines)


def machine_line(result: CaseResult) -> str:
    """Hardware, versions, date."""
    machine = result.machine
    ram = format_size(int(machine["ram_bytes"]))
    gpu = f", {machine['cuda']}" if machine.get("cuda") else ""
    return (
        f"{machine['cores']} cores ({machine['processor']}), {ram} RAM{gpu}, {machine['system']}; streammerge "
        f"{result.version}, torch {machine['torch']}, safetensors {machine['safetensors']}, Python "
        f"{machine['python']}; {result.date}."
    )


def targets_table(found: dict[str, CaseResult]) -> str:
    """What was promised, what was measured."""
    rows = [target.row(found) for target in TARGETS]
    return table(("target", "bound", "measured", ""), rows)


def case_section(result: CaseResult, folder: Path) -> str:
    """One case: its facts, its tables, its plots."""
    parts = [f"## {result.name}: {result.title}"]
    if result.skipped:
        return "\n\n".join([*parts, f"Skipped: {result.skipped}."])
    parts += [facts(result), tools_table(result)]
    if notes := notes_of(result):
        parts.append(notes)
    if any(tool.cold for tool in result.tools):
        parts.append(cold_table(result))
    elif result.cold_note:
        parts.append(f"Cold: {result.cold_note}.")
    from benchmarks import plots

    if plots.shown(result):
        plots.memory_plot(result, folder / f"{result.name}-memory.png")
        plots.time_plot(result, folder / f"{result.name}-time.png")
        parts.append(f"![memory over time]({result.name}-memory.png)\n![time]({result.name}-time.png)")
    return "\n\n".join(parts)


def facts(result: CaseResult) -> str:
    """The sizes, the floor, the base line of memory."""
    floors = [result.floor(number) for number in range(len(result.floors))]
    floor = f"floor {Spread.of(floors)} s; " if floors else ""
    warm = "" if figures.fits_cache(result) else "; more than the page cache holds, so no run is warm"
    return (
        f"{format_size(result.input_bytes)} in, {format_size(result.output_bytes)} out{warm}; {floor}"
        f"`import torch` {format_size(result.import_torch_rss)}; disk {format_size(result.disk_write_rate)}/s written, "
        f"{format_size(result.disk_read_rate)}/s read. {result.date}, {result.commit}."
        + f" {result.remark}"
        * bool(result.remark)
    )


def tools_table(result: CaseResult) -> str:
    """Every tool's warm runs."""
    head = (
        *("", "process, s", "against streammerge", "loop, s", "loop / floor", "CPU, s", "peak RSS", "anonymous"),
        *("read", "written", "from disk", "smallest memory", "output", "runs"),
    )
    return table(head, [tool_row(result, tool) for tool in result.tools if not tool.skipped])


def tool_row(result: CaseResult, tool: ToolResult) -> tuple[str, ...]:
    """One tool's warm runs, or why there are none."""
    name = f"**{tool.title}**" if tool.name == NAME else tool.title
    if not tool.good():
        return (name, tool.failure or "no run", *[""] * 12)
    runs = tool.good()
    ratio = figures.ratio(result, tool.name, NAME, figures.wall) if tool.name != NAME else None
    process = runs[len(runs) // 2].process
    own = tool.name.startswith(NAME)
    above = f", {figures.memory_text(result, tool)}" if own else ""
    return (
        name,
        shown(figures.spread(tool, figures.wall)),
        f"{ratio.median:.1f}x" if ratio else "",
        shown(figures.spread(tool, figures.loop)),
        shown(figures.over_floor(result, tool)),
        shown(figures.spread(tool, figures.cpu)),
        format_size(figures.peak_rss(tool)) + above,
        format_size(figures.peak_anonymous(tool)),
        format_size(process.called_read),
        format_size(process.called_written),
        format_size(process.disk_read),
        smallest(tool),
        verdict(tool),
        str(len(runs)),
    )


def shown(spread: Spread | None) -> str:
    """A figure with its spread."""
    return str(spread) if spread else ""


def verdict(tool: ToolResult) -> str:
    """Whether the output is right."""
    if tool.check is None:
        return ""
    return tool.check.text if tool.check.ok else f"**wrong**: {tool.check.text}"


def smallest(tool: ToolResult) -> str:
    """The smallest memory in which it finishes, as far as it was found."""
    limit = tool.limit
    if limit is None:
        return tool.limit_note
    if not limit.finishes:
        return f"more than {limit.fails / MIB:,.0f} MiB"
    found = f"{limit.finishes / MIB:,.0f} MiB"
    if limit.complete or not limit.fails:
        return found if limit.complete else f"at most {found}"
    return f"{limit.fails / MIB:,.0f} to {found}"


def notes_of(result: CaseResult) -> str:
    """What readers have to know about tools: their versions, their notes, their failures, why they don't run."""
    lines = []
    for tool in result.tools:
        if tool.skipped and tool.name != CUDA.name:  # where there is no GPU nothing is said of it
            lines.append(f"- {tool.title}: not run: {tool.skipped}")
            continue
        versions = ", ".join(f"{name} {version}" for name, version in tool.versions.items())
        said = [tool.note, f"later runs: {tool.failure}" if tool.good() and tool.failure else ""]
        text = "; ".join(part for part in (versions if not tool.name.startswith(NAME) else "", *said) if part)
        if text:
            lines.append(f"- {tool.title}: {text}")
    return "\n".join(lines)


def cold_table(result: CaseResult) -> str:
    """Runs whose inputs were not in the page cache."""
    rows = [
        (
            tool.title,
            shown(figures.spread(tool, figures.wall, "cold")),
            shown(figures.spread(tool, figures.loop, "cold")),
            format_size(max(run.process.disk_read for run in tool.good("cold"))),
            shown(figures.of_disk(result, tool)),
            str(len(tool.good("cold"))),
        )
        for tool in result.tools
        if tool.good("cold")
    ]
    rates = Spread.of(rate / 1e9 for rate in result.disk_rates)
    head = ("cold cache", "process, s", "loop, s", "from disk", "share of the disk's rate", "runs")
    return f"{table(head, rows)}\n\nThe disk read the inputs at {rates} GB/s."


def scaling_section(found: dict[str, CaseResult], folder: Path) -> str:
    """How time and memory grow."""
    series = [
        ("two models of growing size", [one for name, one in found.items() if name.endswith("GB")]),
        ("growing number of models", [one for name, one in found.items() if name.endswith("-models")]),
    ]
    series = [(name, [one for one in points if one.tools]) for name, points in series]
    skipped = [f"{one.name}: {one.skipped}" for one in found.values() if one.name.startswith("scale-") and one.skipped]
    points = [point for _, some in series for point in some]
    if not points:
        return ""
    from benchmarks import plots

    plots.scaling_plot(series, folder / "scaling.png")
    head = ("streammerge", "in", "out", "loop, s", "GB/s moved", "loop / floor", "peak RSS", "page cache", "runs")
    rows = [scaling_row(point) for point in points]
    told = "".join(f"\n\nSkipped: {reason}." for reason in skipped)
    return f"## Scaling\n\n{table(head, rows)}{told}\n\n![scaling](scaling.png)"


def scaling_row(point: CaseResult) -> tuple[str, ...]:
    """One point of a series."""
    tool = point.tool(NAME)
    loop = figures.spread(tool, figures.loop)
    if tool is None or loop is None:
        return (point.title, *[""] * 8)
    moved = point.input_bytes + point.output_bytes
    return (
        point.title,
        format_size(point.input_bytes),
        format_size(point.output_bytes),
        shown(loop),
        f"{moved / loop.median / 1e9:.2f}",
        shown(figures.over_floor(point, tool)),
        f"{figures.peak_rss(tool) / 1e6:.0f} MB",
        "fits" if figures.fits_cache(point) else "too small: the disk sets the pace",
        str(len(tool.good())),
    )


def methods_section(result: CaseResult | None) -> str:
    """Every method of the registry."""
    if result is None:
        return ""
    if result.skipped:
        return f"## Methods\n\nSkipped: {result.skipped}."
    head = ("method", "loop, s", "against linear", "passes", "GB/s of inputs", "peak RSS", "runs")
    rows = [methods_row(result, tool) for tool in result.tools if ":" in tool.name]
    return f"## Methods\n\n{result.title}; {facts(result)}\n\n{table(head, rows)}"


def methods_row(result: CaseResult, tool: ToolResult) -> tuple[str, ...]:
    """One method."""
    name = f"`{tool.name.partition(':')[2]}`"
    loop = figures.spread(tool, figures.loop)
    if loop is None:
        return (name, tool.skipped or tool.failure, *[""] * 5)
    ratio = figures.ratio(result, tool.name, NAME, figures.loop)
    once = figures.own_models(result, tool) * result.output_bytes
    return (
        name,
        shown(loop),
        f"{ratio.median:.1f}x" if ratio else "",
        f"{figures.passes(result, tool):.1f}",
        f"{once / loop.median / 1e9:.2f}",
        figures.memory_text(result, tool),
        str(len(tool.good())),
    )


def readme_table(result: CaseResult) -> str:
    """What the README shows: the article's case."""
    head = ("", "whole process", "merging alone", "peak RAM", "smallest memory", "output")
    named = [tool for tool in result.tools if tool.good() and ":" not in tool.name and tool.name != SYNCED.name]
    rows = [readme_row(result, tool) for tool in named]
    floor = Spread.of([result.floor(number) for number in range(len(result.floors))]).median
    runs = min(len(tool.good()) for tool in named)
    most = max(len(tool.good()) for tool in named)
    count = f"{most}" if runs == most else f"{runs} to {most}"
    what = result.title.rpartition(": ")[2]
    note = (
        f"{what[0].upper()}{what[1:]}, {format_size(result.input_bytes)}. The floor, `cat` of the inputs and `cp` of "
        f"one output, takes {floor:.1f} s. Medians of {count} runs, page cache warm, without the final sync. "
        f"{machine_line(result)} {result.remark}"
    )
    return f"{table(head, rows)}\n\n{note.strip()}"


def readme_row(result: CaseResult, tool: ToolResult) -> tuple[str, ...]:
    """One tool in the README."""
    wall, loop = figures.spread(tool, figures.wall), figures.spread(tool, figures.loop)
    own = tool.name.startswith(NAME)
    above = f", {figures.memory_text(result, tool)}" if own else ""
    return (
        f"**{tool.title}**" if tool.name == NAME else tool.title,
        f"{wall.median:.1f} s" if wall else "",
        f"{loop.median:.1f} s" if loop else "",
        format_size(figures.peak_rss(tool)) + above,
        smallest(tool),
        verdict(tool),
    )
