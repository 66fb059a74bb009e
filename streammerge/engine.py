"""The whole program, from what is asked for to the report.

    open ─► plan ─► begin ─► copy ahead ─► work ─► verify ─► commit ─► report

`planned` opens the inputs and plans; `Run` does the rest, one method for each word. Everything before `work` reads
headers only, but for what is copied as it is: that is under way while torch is being imported.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.compute.machine import may_have_cards, usable_cores
from streammerge.errors import DeviceError, OutputError, saying_what_is_on_disk
from streammerge.formats.claims import NOTHING, Claims, file_key
from streammerge.formats.descriptors import check_open_files
from streammerge.formats.files import path_of
from streammerge.formats.layout import output_of
from streammerge.formats.safetensors import check_with_library
from streammerge.methods.loading import method_failure
from streammerge.models.checkpoints import open_model
from streammerge.plan.companions import beside_output
from streammerge.plan.inputs import OpenInputs
from streammerge.plan.locating import with_places
from streammerge.plan.naming import as_named
from streammerge.plan.pipelines import as_written, check_folder
from streammerge.plan.plan import Plan, plan_merge
from streammerge.recipe.files import Mergeable, as_recipe
from streammerge.recipe.options import Options, as_options
from streammerge.recipe.recipe import Recipe
from streammerge.report import PARTS, Measuring, Report, Watch
from streammerge.storage.companions import note_on_older
from streammerge.storage.copying import Copying
from streammerge.storage.hashing import (
    FileHashes,
    HashingWriter,
    check_sidecar,
    hash_output,
    hashing,
    is_in_sidecar,
    write_sidecar,
)
from streammerge.storage.ledger import Coverage, Entry, Ledger, Span
from streammerge.storage.resume import Beginning, Bookkeeper, Tell, beginning
from streammerge.storage.stated import metadata_of
from streammerge.storage.target import check_output, check_place, find_older
from streammerge.storage.writer import OutputWriter
from streammerge.tensors import Model
from streammerge.workers.confirmation import Confirmed, confirm, confirm_finished
from streammerge.workers.machine import Machine
from streammerge.workers.outcome import report_of

Checking = Callable[[Plan], None]
"""What raises OutputError for a plan whose output can't go where it is wanted."""


def merge(recipe: Mergeable, *, output: str | os.PathLike[str], **options: Any) -> Report:  # noqa: ANN401
    """Merge to the output file or folder and say how it went; the options are the fields of `Options`.

    Sizes may be text such as "512MB"; `dtype`, `layout`, `on_shape_mismatch`, `on_missing`, `on_prediction_mismatch`
    and `seed` change the recipe. The output is complete when this returns. When it raises a MergeError, what lay at the
    output is as it was.
    """
    with saying_what_is_on_disk():
        return run_merge(as_recipe(recipe, options), output_path(output), as_options(options))


def make_plan(recipe: Mergeable, *, output: str | os.PathLike[str], **options: Any) -> Plan:  # noqa: ANN401
    """What `merge` would do with the same arguments, from headers alone."""
    with planned(as_recipe(recipe, options), output_path(output), as_options(options), measuring=None) as plan:
        return within_bounds(plan)


def within_bounds(plan: Plan) -> Plan:
    """The plan with the memory that --max-ram leaves for workers; PlanError, as the merge's, where that is too little.

    Only then is torch imported if it is needed: what it takes can't be told without. A plan for a device that isn't
    here stays what it is.
    """
    if plan.options.max_ram is None:
        return plan
    try:
        return replace(plan, allotted=Machine(plan).allotment)
    except DeviceError:
        return plan


def output_path(output: str | os.PathLike[str]) -> Path:
    """The output's path; OutputError for an empty text, which would be taken for the folder that we are in."""
    if os.fspath(output) == "":
        raise OutputError("the output's name is empty", advice="Name a file, such as OUT.safetensors, or a folder.")
    return path_of(output)


def run_merge(
    recipe: Recipe | Model,
    output: Path,
    options: Options,
    watch: Watch | None = None,
    tell: Tell = lambda _: None,
    beside: Claims = NOTHING,
) -> Report:
    """Merge to the output. It is complete when this returns; when it raises, what lay there is as it was.

    `tell` is given lines for the user while it begins: what there is to be resumed. `beside` is what is read and
    written around the merge, which must be none of its files.
    """
    started = time.perf_counter()
    checking = functools.partial(check_place, beside=beside)
    with saying_what_is_on_disk(), planned(recipe, output, options, checking=checking) as plan:
        return carry_out(plan, started, watch, tell, beside)


def carry_out(
    plan: Plan, started: float, watch: Watch | None, tell: Tell, beside: Claims, *, weighs: bool = False
) -> Report:
    """Do what is planned, and say how it went since the time at which it was started.

    If it `weighs`, it is measured how far adapters move the model that they are put into.
    """
    with beginning(plan, tell) as begun:
        run = Run(begun, started, watch, tell, beside)
        if weighs and plan.is_baked:
            run.ledger.weigh_against(plan.layout_files)
        report = run.to_report()
    if plan.options.upload is not None:
        from streammerge.storage.uploading import UPLOADED, upload

        with saying_what_is_on_disk(lambda: UPLOADED):
            upload(plan.options.upload, plan.output, tell)
    return report


def run_verification(
    recipe: Recipe | Model, output: Path, options: Options, watch: Watch | None = None, *, sampled: bool = False
) -> Confirmed:
    """Compute an output again, every byte or samples of it, and compare; OutputError if the recipe gives another."""
    with open_model(output) as found:
        place = found.path if found.is_pipeline else output_of(output, found.path)
        with planned(recipe, place, options) as plan:
            return confirm(plan, found, watch, sampled=sampled)


@contextlib.contextmanager
def planned(
    recipe: Recipe | Model,
    output: Path,
    options: Options,
    *,
    measuring: Measuring | None = contextlib.nullcontext,
    checking: Checking | None = None,
) -> Iterator[Plan]:
    """The plan of a merge, its inputs open for as long as the `with` statement lasts.

    What has to be measured before the header is known is, as `measuring` shows; without it the plan says what the
    output is at the most. Whether the output may be written is for `checking` to say, before that takes its time too.
    """
    opened = OpenInputs()
    try:
        plan = _plan(recipe, output, options, opened, measuring, checking)
        if checking is not None:
            checking(plan)
        yield plan
    except (Exception, SystemExit) as error:
        if (failure := method_failure(error)) is not None:
            raise failure from error
        raise
    finally:
        opened.close()


def _plan(
    asked: Recipe | Model,
    output: Path,
    options: Options,
    opened: OpenInputs,
    measuring: Measuring | None,
    checking: Checking | None,
) -> Plan:
    """The plan of a recipe, whose inputs are opened, or of a model that is none's."""
    recipe: Recipe | None = None
    if isinstance(asked, Recipe):
        recipe = with_places(asked)
        merged = opened.merge(recipe, naming=options.names)
    else:
        merged = as_named(asked, options)
    check_folder(merged, recipe, output, options)
    merged = as_written(merged, output, options)
    beside = functools.partial(beside_output, recipe=recipe, output=output, options=options)
    if measuring is not None and merged.factored is not None and merged.factored.has_to_be_measured:
        from streammerge.workers.measuring import with_measured_ranks  # late: only adapters of a rank are measured

        if checking is not None:  # of what lies beside the weights some hangs on what isn't measured yet
            named = replace(beside(merged), companions=())
            checking(plan_merge(merged, output, options, opened.sources(merged), beside=named))
        with measuring() as watch:
            merged = with_measured_ranks(merged, output, options, opened, watch)
    planning = functools.partial(
        plan_merge,
        merged,
        output,
        sources=opened.sources(merged),
        recipe=recipe,
        metadata=metadata_of(recipe, merged, options, opened),
        beside=beside(merged),
    )
    return _planned_somewhere(options, lambda chosen: planning(options=chosen))


def _planned_somewhere(options: Options, planning: Callable[[Options], Plan]) -> Plan:
    """The plan for the device that is asked for, or where that is `auto` and there are cards, for the faster one."""
    if options.device != "auto" or not may_have_cards():
        return planning(options)
    from streammerge.plan.estimates import plan_where_faster

    return plan_where_faster(options, planning)


class Run:
    """A plan that is being carried out: its methods are its course, in their order."""

    def __init__(self, begun: Beginning, started: float, watch: Watch | None, tell: Tell, beside: Claims) -> None:
        self.begun, self.watch, self.tell, self.beside = begun, watch, tell, beside
        self.plan, self.options = begun.plan, begun.plan.options
        self.older = find_older(self.plan.output)
        self.writer = OutputWriter(self.plan.output, begun.journal)
        self.ledger = Ledger(self.plan.jobs.nbytes, begun.journal.contents.entry)
        self.machine: Machine | None = None
        self.hashes: Sequence[FileHashes] = []
        self.marks, self.seconds_ahead = [started], 0.0

    def to_report(self) -> Report:
        """The whole course, or what is left of it where an earlier run was interrupted."""
        if self.begun.is_complete:
            return self.finish()
        if self.begun.is_there:
            return self.confirm()
        self.begin()
        wanted = self.options.hash
        with saying_what_is_on_disk(self.writer.state), self.writer, hashing(self.writer, wanted=wanted) as sink:
            copying = Copying(self.plan.jobs, sink, self.ledger)
            machine = self.copy_ahead(copying)
            self.work(machine, sink, copying)
            self.verify(machine)
            self.commit()
        self.write_hashes()
        return self.report()

    def begin(self) -> None:
        """See that the output may be written, and tell what the user should know before it is."""
        plan, strays = self.plan, self._strays()
        check_output(plan, self.older, self.beside, may_exist=self.options.force)
        for note in (*plan.left_notes(), *plan.merged.remarks):
            self.tell(f"note: {note}")
        if self.options.hash:
            check_sidecar(plan.output, force=self.options.force)
        for note in note_on_older(plan.output):
            self.tell(f"note: {note}")
        if strays:
            self.tell(f"note: {len(strays)} shards of an older output are left: {strays[0].name} …")
        plan.check_disk(self.begun.present_bytes)
        check_open_files(len(plan.inputs) + len(plan.output.files))
        if self.options.torch_must_check:
            self.machine = Machine(plan)

    def copy_ahead(self, copying: Copying) -> Machine:
        """Copy what is only copied for as long as torch is being imported and the inputs are looked at again."""
        with copying.ahead():
            machine = self.machine = self.machine or Machine(self.plan)
            check_with_library([file.path for file in self.plan.inputs], usable_cores())
        self.seconds_ahead = copying.seconds_ahead
        self._mark()
        return machine

    def work(self, machine: Machine, sink: OutputWriter | HashingWriter, copying: Copying) -> None:
        """Compute and write everything, note from time to time what is on the disk, and have the disk keep it."""
        bookkeeper = Bookkeeper(self.begun, self.writer, self.ledger)
        with bookkeeper.every(self.options.journal if self.begun.can_be_resumed else 0.0):
            machine.run(sink, self.ledger, bookkeeper.watching(self.watch), copying)
        self.hashes = sink.finish() if isinstance(sink, HashingWriter) else []
        self._mark()
        if self.options.sync:
            self.writer.sync()

    def verify(self, machine: Machine) -> None:
        """Judge the output: computed again if that is wanted, of inputs that have not changed, whole."""
        with self.writer.judging():
            if self.options.verify:
                self.writer.forget()
                machine.check(self.writer.read, self.plan.output.path, self.watch)
            for file in (*self.plan.inputs, *self.plan.output.copied):
                file.check_unchanged()
            check_output(self.plan, self.older, self.beside, may_exist=self.options.force)
            self.writer.check()

    def commit(self) -> None:
        """Give the output its name."""
        self.writer.commit(sync=self.options.sync, superseded=self.older.superseded, identity=self.begun.request)

    def write_hashes(self) -> None:
        """Write the output's hashes beside it, if they are wanted."""
        if self.hashes:
            write_sidecar(self.plan.output, self.hashes, sync=self.options.sync)

    def report(self) -> Report:
        """Say how it went."""
        self._mark()
        return report_of(self.plan, self.ledger, self.machine, self._seconds(), self.hashes)

    def finish(self) -> Report:
        """Put in place what an earlier run has written, all of it."""
        self.begun.finish()
        self.tell("resumed: everything was written already, and has been put in place")
        self.hashes = hash_output(self.plan.output) if self.options.hash else []
        self.write_hashes()
        return self.report()

    def confirm(self) -> Report:
        """Make sure that the output, which is in place, is what would be written; give it hashes if it has none."""
        confirmed = confirm_finished(self.plan, self.watch)
        self.tell(f"nothing to do: the output is there already; {confirmed}")
        self.hashes = hash_output(self.plan.output) if self.options.hash else []
        if self.hashes and not is_in_sidecar(self.plan.output, self.hashes):
            check_sidecar(self.plan.output, force=self.options.force)
            self.write_hashes()
        whole = Coverage(Span(number, 0, file.nbytes) for number, file in enumerate(self.plan.output.files))
        self.ledger = Ledger(self.plan.jobs.nbytes, Entry(whole))
        return self.report()

    def _strays(self) -> list[Path]:
        """Shards of an older output that nothing is going to replace, and that are none of the inputs."""
        inputs = {file_key(file.path) for file in self.plan.inputs}
        return [path for path in self.older.strays if file_key(path) not in inputs]

    def _mark(self) -> None:
        self.marks.append(time.perf_counter())

    def _seconds(self) -> Mapping[str, float]:
        """What each part took, nothing where it wasn't reached, because all was there."""
        parts = dict(zip(PARTS, (b - a for a, b in itertools.pairwise(self.marks)), strict=False))
        total = self.marks[-1] - self.marks[0]
        return {**dict.fromkeys(PARTS, 0.0), **parts, "ahead": self.seconds_ahead, "total": total}
