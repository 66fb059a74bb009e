"""`streammerge plan`, and a merge with `--dry-run`: what would happen, from headers alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.cli.arguments import add_merge_arguments, new_parser
from streammerge.cli.screen import say, show_table
from streammerge.errors import format_size, one_line, saying_what_is_on_disk

if TYPE_CHECKING:
    from streammerge.plan.estimates import Estimates
    from streammerge.plan.plan import Plan


def run(words: Sequence[str]) -> int:
    """Show what a merge would do, from headers alone."""
    parser = new_parser(
        "plan", None, "Show what a merge would do to every tensor and what it costs. Reads headers only."
    )
    add_merge_arguments(parser)
    return plan(parser.parse_intermixed_args(words))


def plan(arguments: argparse.Namespace) -> int:
    """Show what would happen."""
    from streammerge.cli.request import read_request
    from streammerge.engine import planned, within_bounds
    from streammerge.report import dump_json
    from streammerge.storage.target import check_place

    with saying_what_is_on_disk():
        request = read_request(arguments)
        show, options = request.show, replace(request.options, hash_inputs=False)
        output = request.output or Path("merged.safetensors")
        with planned(request.recipe, output, options, measuring=None) as headers_only:
            if request.output is not None:
                check_place(headers_only)
            made = within_bounds(headers_only)
            if show.as_json:
                say(dump_json({**made.to_json(), **estimated(made)}).rstrip())
            elif not show.quiet:
                show_plan(made, every_tensor=show.verbose)
            made.check_disk()
    return 0


def show_plan(plan: Plan, *, every_tensor: bool) -> None:
    """The plan for people: the fates of the tensors, grouped by reason or one by one, and the costs."""
    if every_tensor:
        for name, fate in plan.decisions.told():
            why = f"{fate.why}   {fate.detail}".rstrip()
            say(one_line(f"{fate.action:<8} {fate.info!s:<28} {name}   {why}"))
        for row in (row for account in plan.merged.accounts for row in account.rows()):
            say(one_line(f"adapted  {row}"))
    else:
        for outcome, number in plan.summary().items():
            say(one_line(f"{number:>6,}  {outcome}"))
    for note in plan.notes():
        say(one_line(f"note: {note}"))
    say()
    show_table(
        [
            ("output", f"{plan.output.path}: {len(plan.jobs):,} tensors, {format_size(plan.output.nbytes)}"),
            ("free disk", format_size(plan.free_disk)),
            ("to read", f"{format_size(plan.bytes_to_read)}, {plan.passes} pass{'es' * (plan.passes > 1)}"),
            *before_writing(plan),
            *on_cards(plan),
            *by_device(plan),
            ("peak RAM", f"{format_size(plan.work_bytes)} {above(plan)}"),
        ]
    )


def on_cards(plan: Plan) -> list[tuple[str, str]]:
    """On what device other than the CPU it is computed, by how many workers, and what is taken of its memory."""
    from streammerge.compute.machine import VRAM_BYTES

    if plan.options.device == "cpu":
        return []

    allotted = plan.allotted or plan.memory.allot()
    cards = f" on {allotted.cards} cards" if allotted.cards > 1 else ""
    workers = f"{allotted.threads} worker{'s' * (allotted.threads > 1)}{cards}"
    memory = format_size(plan.options.max_vram or VRAM_BYTES + plan.memory.card_bytes)
    each = " on each" if allotted.cards > 1 else ""
    return [("device", f"{plan.options.device}: {workers}, at most {memory} of memory{each}")]


def by_device(plan: Plan) -> list[tuple[str, str]]:
    """What it takes on the CPU and on the card, where there is one that was measured."""
    found = estimates_here(plan)
    return [("time", found.told())] if found else []


def estimated(plan: Plan) -> dict[str, dict[str, float]]:
    """The same for machines: seconds by device."""
    found = estimates_here(plan)
    return {"estimated_seconds": {"cpu": round(found.cpu, 3), "cuda": round(found.card, 3)}} if found else {}


def estimates_here(plan: Plan) -> Estimates | None:
    """What is expected; None where there are no cards."""
    from streammerge.compute.machine import may_have_cards

    if not may_have_cards():
        return None
    from streammerge.plan.estimates import estimates_of

    return estimates_of(plan)


def above(plan: Plan) -> str:
    """What the RAM is counted above."""
    return "above import torch (about 220 MB)" if plan.needs_torch else "in all, without torch"


def before_writing(plan: Plan) -> list[tuple[str, str]]:
    """What has to be read of all tensors before the first is written, if anything."""
    members = [member for together in plan.together for member in together.members]
    if not members:
        return []
    passes = max(member.method.passes for member in members)
    what = f"{format_size(plan.bytes_before_writing)} of these, {passes} pass{'es' * (passes > 1)} over the whole model"
    return [("before writing", f"{what}, in which {len(members):,} tensors are measured together")]
