"""The program as functions: open the inputs, decide, plan, run, report."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge import __version__
from streammerge.checking import Checker, ReadBack, checkpoint_reader
from streammerge.checkpoints import open_model
from streammerge.copying import Copying
from streammerge.errors import MergeError, PlanError, refusal
from streammerge.formats.files import ByteFile
from streammerge.inputs import OpenInputs, check_output, check_with_library
from streammerge.ledger import Ledger
from streammerge.machine import MAPPED_BYTES, MIB, Allotment, choose_io, peak_resident_bytes, resident_bytes
from streammerge.merged import Decision, Merged, node_of
from streammerge.nodes import Stored, leaves
from streammerge.older import find_older
from streammerge.options import Options, format_size
from streammerge.plan import OVERHEAD_BYTES, Plan, make_plan
from streammerge.progress import Progress
from streammerge.recipe import Recipe
from streammerge.report import Report
from streammerge.resuming import Beginning, Tell, beginning
from streammerge.tensors import Model

if TYPE_CHECKING:
    import torch

    from streammerge.works import Sink

Watch = Callable[[Progress], None]
"""Called from time to time while a merge runs, with what has been done so far."""


def run_merge(
    recipe: Recipe | Model,
    output: Path,
    options: Options,
    watch: Watch | None = None,
    tell: Tell = lambda _: None,
) -> Report:
    """Merge to the output. It is complete when this returns; when it raises, what lay there is as it was.

    `tell` is given lines for the user while it begins: what there is to be resumed.
    """
    started = time.perf_counter()
    with saying_what_is_on_disk(), planned(recipe, output, options) as plan, beginning(plan, tell) as begun:
        return _carry_out(begun, started, watch, tell)


def run_verification(recipe: Recipe | Model, output: Path, options: Options, watch: Watch | None = None) -> Plan:
    """Compute every byte of an output again and compare; OutputError if the recipe gives anything else."""
    with planned(recipe, output, options, replacing=True) as plan, open_model(output) as found:
        machine = Machine(plan)
        machine.check(checkpoint_reader(plan, found), output, watch)
        return plan


@contextlib.contextmanager
def planned(recipe: Recipe | Model, output: Path, options: Options, *, replacing: bool = False) -> Iterator[Plan]:
    """The plan of a merge, its inputs open for as long as the `with` statement lasts."""
    opened = OpenInputs()
    try:
        merged = opened.merge(recipe) if isinstance(recipe, Recipe) else as_merged(recipe)
        method = recipe.method if isinstance(recipe, Recipe) else ""
        metadata = output_metadata(recipe, options)
        description = recipe.describe() if isinstance(recipe, Recipe) else {}
        inputs = opened.files or files_of(merged)
        plan = make_plan(
            merged, output, options, method=method, inputs=inputs, metadata=metadata, description=description
        )
        if not replacing:
            # an interrupted run may have put its output in place; whoever resumes it looks again
            check_output(plan, find_older(plan.output), may_exist=options.force or options.resume)
        yield plan
    finally:
        opened.close()


class Machine:
    """The lanes in which a plan is carried out: as many as the memory allows, on the device that was asked for."""

    def __init__(self, plan: Plan) -> None:
        import_torch()  # the bare import is the base line of what the merge takes
        self.plan = plan
        self.baseline = resident_bytes()
        from streammerge.devices import check_float64, find_device, vram_limit

        self.device: torch.device = find_device(plan.options.device)
        check_float64(self.device, plan.jobs)
        self.allotment = allot_memory(plan, self.baseline, vram_limit(self.device, plan.options.max_vram))
        self.io = choose_io(plan.options.io, [file.path for file in plan.inputs])
        if self.device.type == "cuda" and plan.options.io == "auto":
            self.io = "pread"  # straight into pinned memory

    def run(self, sink: Sink, copying: Copying, watch: Watch | None) -> None:
        """Give every byte of the output that is computed to the sink, and finish the copying."""
        from streammerge.devices import open_lanes
        from streammerge.engine import run
        from streammerge.works import MergeWork, together_works

        progress, held, ledger = copying.progress, self.allotment.held_bytes, copying.ledger
        computed = [job for job in self.plan.jobs if job.compute is not None and not ledger.has_all(job)]
        lanes = open_lanes(self.device, self.io, self.allotment)

        def look() -> None:
            if watch:
                watch(progress)

        if computed and (together := together_works(self.plan.together)):
            with progress.doing("measure the whole model", self.plan.bytes_before_writing):
                run(together, lanes, sink, progress, look)
        works = (MergeWork(job, ledger) for job in computed)
        run(works, lanes, sink, progress, look, copying, held_bytes=held)

    def check(self, read: ReadBack, path: Path, watch: Watch | None) -> None:
        """Compute every byte again and compare it with what is read back."""
        checker = Checker(read)
        self.run(checker, Copying(self.plan.jobs, checker, self.plan.new_progress()), watch)
        checker.report(path)

    def peak_vram_bytes(self) -> int:
        """The most memory that was taken on a CUDA device."""
        import torch

        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def _carry_out(begun: Beginning, started: float, watch: Watch | None, tell: Tell) -> Report:
    from streammerge.bookkeeping import Bookkeeper
    from streammerge.writing import OutputWriter

    plan = begun.plan
    if begun.is_complete:
        begun.finish()
        tell("resumed: everything was written already, and has been put in place")
        nothing = Copying((), OutputWriter(plan.output), plan.new_progress(), Ledger(begun.journal.contents.entry))
        return report_of(plan, [started] * 3 + [time.perf_counter()], nothing, None)
    older = find_older(plan.output)
    check_output(plan, older, may_exist=plan.options.force)
    if older.strays:
        tell(f"note: {len(older.strays)} shards of an older output are left: {older.strays[0].name} …")
    plan.check_disk(begun.present_bytes)
    machine = Machine(plan) if plan.options.torch_must_check else None
    writer, ledger = OutputWriter(plan.output, begun.journal), Ledger(begun.journal.contents.entry)
    with saying_what_is_on_disk(writer.state), writer:
        copying = Copying(plan.jobs, writer, plan.new_progress(ledger.found.spans.nbytes), ledger)
        copying.progress.nonfinite.update(ledger.found.nonfinite)
        with copying.ahead():
            machine = machine or Machine(plan)
            check_with_library(plan)
        marks = [started, time.perf_counter()]
        bookkeeper = Bookkeeper(begun, writer, ledger)
        with bookkeeper.every(plan.options.journal if begun.can_be_resumed else 0.0):
            machine.run(writer, copying, bookkeeper.watching(watch))
        marks.append(time.perf_counter())
        if plan.options.sync:
            writer.sync()
        with writer.judging():
            if plan.options.verify:
                writer.forget()
                machine.check(writer.read, plan.output.path, watch)
            for file in plan.inputs:
                file.check_unchanged()
            check_output(plan, older, may_exist=plan.options.force)
            writer.check()
        writer.commit(sync=plan.options.sync, superseded=older.superseded, identity=begun.request)
    marks.append(time.perf_counter())
    return report_of(plan, marks, copying, machine)


def report_of(plan: Plan, marks: list[float], copying: Copying, machine: Machine | None) -> Report:
    """How it went, with the times at which the parts began; no machine if there was nothing to be done any more."""
    seconds = dict(zip(("plan", "merge", "sync"), (b - a for a, b in itertools.pairwise(marks)), strict=True))
    return Report(
        output=[str(path) for path in plan.output.paths],
        method=plan.method,
        merged=plan.count("merged"),
        copied=plan.count("copied"),
        dropped=plan.count("dropped"),
        left_out={model: len(names) for model, names in plan.merged.left_out.items()},
        nonfinite=dict(sorted(copying.progress.nonfinite.items())),
        bytes_read=copying.progress.bytes_read,
        bytes_written=plan.output.nbytes,
        seconds={**seconds, "ahead": copying.seconds_ahead, "total": marks[-1] - marks[0]},
        peak_rss_bytes=peak_resident_bytes(),
        baseline_rss_bytes=machine.baseline if machine else peak_resident_bytes(),
        peak_vram_bytes=machine.peak_vram_bytes() if machine else 0,
        device=str(machine.device) if machine else plan.options.device,
        dtype=sorted({job.info.dtype.name for job in plan.jobs}),
        threads=machine.allotment.threads if machine else 0,
        io=machine.io if machine else plan.options.io,
        resumed_bytes=copying.ledger.found.spans.nbytes,
        inputs=plan.inputs,
        version=__version__,
    )


def import_torch() -> None:
    """Import torch without looking for garbage on the way: there is none, and the search takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if enabled:
            gc.enable()


def allot_memory(plan: Plan, baseline: int, vram: int | None) -> Allotment:
    """Share out what --max-ram leaves beside what the process takes already; PlanError naming the least that works."""
    limit, wanted = plan.options.max_ram, plan.options.max_vram
    if vram is not None and vram < plan.lane_bytes:
        what = f"{format_size(vram)} of memory on the card" if wanted != vram else f"--max-vram {format_size(vram)}"
        raise PlanError(
            f"{what} is too small: one worker's buffers take {format_size(plan.lane_bytes)}",
            advice=f"The least that works is {-(-plan.lane_bytes // MIB)}MiB.",
        )
    if limit is None:
        return plan.allot(vram_limit=vram)
    needed = plan.lane_bytes + MAPPED_BYTES[1] + plan.held_bytes
    fixed = baseline + OVERHEAD_BYTES
    if limit < fixed + needed:
        raise PlanError(
            f"--max-ram {format_size(limit)} is too small: Python and torch take {format_size(fixed)}, and this merge "
            f"needs {format_size(needed)} to work in",
            advice=f"The least that works is {-(-(fixed + needed) // MIB)}MiB.",
        )
    return plan.allot(limit - fixed, vram)


def as_merged(model: Model) -> Merged:
    """Any model as a merge: its tensors as they are."""
    if isinstance(model, Merged):
        return model
    return Merged(
        tuple(
            Decision(name, "copied", "from the model", info, node_of(model, name))
            for name, info in model.tensors.items()
        )
    )


def files_of(merged: Merged) -> list[ByteFile]:
    """Every file that is read by a merge of models that were opened elsewhere."""
    stored = (leaf for node in merged.nodes.values() for leaf in leaves(node) if isinstance(leaf, Stored))
    return list({id(leaf.file): leaf.file for leaf in stored}.values())


def output_metadata(recipe: Recipe | Model, options: Options) -> dict[str, str]:
    """The output's `__metadata__`: the format mark that loaders look for, and the recipe unless it is not wanted."""
    marks = {"format": "pt"}
    if isinstance(recipe, Recipe) and options.metadata:
        marks["streammerge.recipe"] = json.dumps(recipe.describe(), separators=(",", ":"))
    return marks


@contextlib.contextmanager
def saying_what_is_on_disk(state: Callable[[], str] = lambda: "Nothing was written.") -> Iterator[None]:
    """Add to an error what state it leaves the disk in, unless who raised it said so already.

    What the system refused, and nobody nearer put into words, becomes an error of ours here.
    """
    try:
        yield
    except MergeError as error:
        error.state = error.state or state()
        raise
    except KeyboardInterrupt as interrupt:
        interrupt.args = interrupt.args or (state(),)
        raise
    except BrokenPipeError:  # whoever read what we print has stopped reading
        raise
    except (OSError, MemoryError) as error:
        refused = refusal(error)
        refused.state = state()
        raise refused from error
