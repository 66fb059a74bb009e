"""What the report says of a card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.card import CardResult, CardRun, Difference, Side
from benchmarks.card_merges import LINEAR, MERGES, STREAMING, TIES, WHOLE
from benchmarks.tables import table
from benchmarks.targets import Target
from streammerge.compute.machine import MIB
from streammerge.errors import format_size
from streammerge.tools.bench.benchmark import Spread

HEADING: Final = "## On a card"

NOTHING: Final = "Nothing was measured on a card: `python -m benchmarks cuda` does it where there is one."

LEFT_OUT: Final = "left out: no card was at hand"

HEAD: Final = ("on the card", "bound", "measured", "")

EMPTY: Final = CardResult("", "", "", "", "", quick=False, machine={})
"""Of which no aim can be judged."""


def card_section(result: CardResult | None) -> str:
    """Everything about card and CPU side by side, or that there is nothing."""
    if result is None:
        rows = [(*one.row({})[:3], LEFT_OUT) for one in aims(EMPTY)]
        return "\n\n".join((HEADING, NOTHING, table(HEAD, rows)))
    parts = [
        HEADING,
        conditions(result),
        goals(result),
        merges(result),
        threads(result),
        rates(result),
        skipped(result),
    ]
    return "\n\n".join(part for part in parts if part)


def conditions(result: CardResult) -> str:
    """Card, host, versions, date, tests."""
    machine = result.machine
    measured = (
        f"{result.card}, driver {result.driver or 'unknown'}, torch {machine['torch']}; {machine['cores']} cores "
        f"({machine['processor']}), {format_size(int(machine['ram_bytes']))} RAM, {machine['system']}; streammerge "
        f"{result.version} at {result.commit or 'an unknown commit'}, {result.date}, in {result.took:.0f} s."
    )
    lines = [measured, "Page cache warm, without the final sync; ratios are those of medians."]
    if result.quick:
        lines.insert(0, "**These are miniatures, and the CPU in place of a card: their figures mean nothing.**")
    if not result.complete:
        lines.append("The run was cut short.")
    if context := result.context:
        lines.append(
            f"A process with a CUDA context and no merge takes {format_size(context.rss)} of RAM and "
            f"{format_size(context.vram)} of VRAM."
        )
    if tests := result.tests:
        lines.append(f"Tests that need a card: {'' if tests.ok else '**failed**: '}{tests.summary}.")
    return "\n".join(lines)


def goals(result: CardResult) -> str:
    """What was aimed at on a card, and what was measured."""
    return table(HEAD, [one.row({}) for one in aims(result)])


def aims(result: CardResult) -> list[Target]:
    """What is aimed at on a card."""
    found = [
        aim("linear: loop / (`cat` inputs + `cp` output)", 0.4, "", share(loop(result, "linear"), floor(result))),
        aim("linear: loop / the fastest bare loop", 1.3, "", share(loop(result, "linear"), fastest(result))),
    ]
    for case in STREAMING[1:]:
        bound = 2.0 if case.name in ("slerp", "model_stock") else 3.0
        ratio = share(loop(result, case.name), loop(result, "linear"))
        found.append(aim(f"{case.name} / linear, loop", bound, "", ratio))
    for case in WHOLE:
        walls = [run.wall for run in result.good(case.name, "card")]
        found.append(aim(f"{case.name}, whole command", 30.0, " s", min(walls, default=None)))
    streamed = [run for case in STREAMING for run in result.good(case.name, "card")]
    memory = [above(result, run) / MIB for run in streamed]
    found += [
        aim("VRAM, most of all that stream", 512.0, " MB", max((run.vram / 1e6 for run in streamed), default=None)),
        aim("RAM above the context, most of all that stream", 128.0, " MiB", max(memory, default=None)),
    ]
    return found


def aim(text: str, bound: float, unit: str, found: float | None) -> Target:
    """An upper bound, and what was measured."""
    return Target(text, bound, True, unit, lambda _: found)


def share(above_: float | None, below: float | None) -> float | None:
    """One over another, if both are there."""
    return above_ / below if above_ is not None and below else None


def loop(result: CardResult, merge: str, side: Side = "card") -> float | None:
    """The median of a loop's seconds."""
    found = result.loop(merge, side)
    return found.median if found else None


def floor(result: CardResult) -> float | None:
    """The median of the floors."""
    return Spread.of(one.seconds for one in result.floors).median if result.floors else None


def fastest(result: CardResult) -> float | None:
    """The seconds of the fastest bare loop."""
    return min((rate.seconds for rate in result.rates if rate.step == "loop"), default=None)


def above(result: CardResult, run: CardRun) -> int:
    """A run's RAM above a process that does nothing: with a CUDA context, with torch, or without either."""
    if run.side == "card" and result.context:
        return max(run.peak_rss - result.context.rss, 0)
    return max(run.peak_rss - run.baseline, 0)


def merges(result: CardResult) -> str:
    """Every merge on card and CPU, and how far their outputs are apart."""
    head = (
        *("", "card: loop, s", "process, s", "VRAM", "RAM above the context", "CPU: loop, s", "process, s"),
        *("RAM above what is imported", "computed by", "card / CPU, loop", "outputs compared"),
    )
    rows = [merge_row(result, case.name) for case in MERGES if any(run.merge == case.name for run in result.runs)]
    return table(head, rows) if rows else ""


def merge_row(result: CardResult, merge: str) -> tuple[str, ...]:
    """One merge."""
    on_cpu = result.good(merge, "cpu")
    ratio = share(loop(result, merge), loop(result, merge, "cpu"))
    found = next((one for one in result.differences if one.merge == merge), None)
    return (
        f"`{merge}`",
        *times(result, merge, "card"),
        format_size(max((run.vram for run in result.good(merge, "card")), default=0)),
        memory(result, merge, "card"),
        *times(result, merge, "cpu"),
        memory(result, merge, "cpu"),
        on_cpu[0].loops if on_cpu else "",
        f"{ratio:.2f}" if ratio else "",
        agreement(found) if found else "",
    )


def times(result: CardResult, merge: str, side: Side) -> tuple[str, str]:
    """Loop and whole process, or why there are none."""
    spread, runs = result.loop(merge, side), result.good(merge, side)
    if spread is None:
        return next((run.failure for run in result.all_runs(merge, side)), ""), ""
    return str(spread), str(Spread.of(run.wall for run in runs))


def memory(result: CardResult, merge: str, side: Side) -> str:
    """The most RAM of all runs above what does nothing."""
    runs = result.good(merge, side)
    return f"{max(above(result, run) for run in runs) / MIB:.0f} MiB" if runs else ""


def agreement(found: Difference) -> str:
    """How far outputs are apart, in words."""
    parts = []
    if found.unlike:
        parts.append(f"**{found.unlike} tensors unlike**")
    if found.differing:
        text = f"{found.differing:,} in {found.tensors} tensors apart, by {found.ulps} in the last place at most"
        parts.append(text if found.ulps <= 1 else f"**{text}** ({found.worst})")
    if found.compared < found.elements:
        parts.append(f"{found.compared:,} of {found.elements:,} compared")
    return ", ".join(parts) or f"equal in all of {found.elements:,}"


def threads(result: CardResult) -> str:
    """The loops by how many threads were asked for."""
    asked = sorted({run.asked for run in result.runs if run.asked})
    rows = [
        (
            f"`{case.name}` on the {'card' if side == 'card' else 'CPU'}",
            *(str(result.loop(case.name, side, count) or failure(result, case.name, side, count)) for count in asked),
        )
        for case in (LINEAR, TIES)
        for side in SIDES
        if any(run.asked and (run.merge, run.side) == (case.name, side) for run in result.runs)
    ]
    return table(("loop, s, by threads", *map(str, asked)), rows) if asked else ""


SIDES: Final[Sequence[Side]] = ("card", "cpu")


def failure(result: CardResult, merge: str, side: Side, asked: int) -> str:
    """Why there is no figure, as far as it is known."""
    return next((run.failure for run in result.all_runs(merge, side, asked)), "")


def rates(result: CardResult) -> str:
    """What card and host allow."""
    rows: list[tuple[str, ...]] = [
        (
            "bare linear loop" if rate.step == "loop" else rate.step,
            f"{rate.elements:,}" if rate.elements else "",
            str(rate.threads),
            f"{rate.seconds:.2f}",
            f"{rate.nbytes / rate.seconds / 1e9:.1f}",
            format_size(rate.vram) if rate.vram else "",
        )
        for rate in result.rates
    ]
    rows += [("floor", "", "", f"{one.seconds:.2f}", "", "") for one in result.floors]
    return table(("limits", "elements a range", "threads", "s", "GB/s", "VRAM"), rows) if rows else ""


def skipped(result: CardResult) -> str:
    """What was not measured."""
    return "\n".join(f"- {one.part}: not measured: {one.reason}" for one in result.skipped)
