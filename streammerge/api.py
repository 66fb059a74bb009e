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
from streammerge.machine import MAPPED_BYTES, MIB, Allotment, choose_io, peak_resident_bytes, resident_bytes
from streammerge.merged import Decision, Merged, node_of
from streammerge.nodes import Stored, leaves
from streammerge.options import Options, format_size
from streammerge.plan import OVERHEAD_BYTES, Plan, make_plan
from streammerge.progress import Progress
from streammerge.recipe import Recipe
from streammerge.report import Report
from streammerge.tensors import Model

if TYPE_CHECKING:
    import torch

    from streammerge.works import Sink

Watch = Callable[[Progress], None]
"""Called from time to time while a merge runs, with what has been done so far."""


def run_merge(recipe: Recipe | Model, output: Path, options: Options, watch: Watch | None = None) -> Report:
    """Merge to the output. It is complete when this returns; when it raises, what lay there is as it was."""
    started = time.perf_counter()
    with saying_what_is_on_disk(), planned(recipe, output, options) as plan:
        return _carry_out(plan, started, watch)


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
        inputs = opened.files or files_of(merged)
        plan = make_plan(merged, output, options, method=method, inputs=inputs, metadata=metadata)
        if not replacing:
            check_output(plan)
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

        progress, held = copying.progress, self.allotment.held_bytes
        lanes = open_lanes(self.device, self.io, self.allotment)

        def look() -> None:
            if watch:
                watch(progress)

        if together := together_works(self.plan.together):
            with progress.doing("measure the whole model", self.plan.bytes_before_writing):
                run(together, lanes, sink, progress, look)
        works = (MergeWork(job) for job in self.plan.jobs if job.compute is not None)
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


def _carry_out(plan: Plan, started: float, watch: Watch | None) -> Report:
    from streammerge.writing import OutputWriter

    plan.check_disk()
    machine = Machine(plan) if plan.options.torch_must_check else None
    with saying_what_is_on_disk("The unfinished output was removed."), OutputWriter(plan.output) as writer:
        copying = Copying(plan.jobs, writer, plan.new_progress())
        with copying.ahead():
            machine = machine or Machine(plan)
            check_with_library(plan)
        marks = [started, time.perf_counter()]
        machine.run(writer, copying, watch)
        marks.append(time.perf_counter())
        if plan.options.sync:
            writer.sync()
        if plan.options.verify:
            writer.forget()
            machine.check(writer.read, plan.output.path, watch)
        for file in plan.inputs:
            file.check_unchanged()
        writer.commit(sync=plan.options.sync)
    marks.append(time.perf_counter())
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
        seconds={**seconds, "ahead": copying.seconds_ahead, "total": marks[-1] - started},
        peak_rss_bytes=peak_resident_bytes(),
        baseline_rss_bytes=machine.baseline,
        peak_vram_bytes=machine.peak_vram_bytes(),
        device=str(machine.device),
        dtype=sorted({job.info.dtype.name for job in plan.jobs}),
        threads=machine.allotment.threads,
        io=machine.io,
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
def saying_what_is_on_disk(state: str = "Nothing was written.") -> Iterator[None]:
    """Add to an error what state it leaves the disk in, unless who raised it said so already.

    What the system refused, and nobody nearer put into words, becomes an error of ours here.
    """
    try:
        yield
    except MergeError as error:
        error.state = error.state or state
        raise
    except BrokenPipeError:  # whoever read what we print has stopped reading
        raise
    except (OSError, MemoryError) as error:
        refused = refusal(error)
        refused.state = state
        raise refused from error
