"""The program as functions: open the inputs, decide, plan, run, report."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.compute.machine import peak_resident_bytes
from streammerge.errors import OutputError, saying_what_is_on_disk
from streammerge.formats.claims import NOTHING, Claim, Claims, file_key
from streammerge.methods.loading import method_failure
from streammerge.models.checkpoints import open_model
from streammerge.models.merged import as_merged, files_of
from streammerge.plan.inputs import OUTPUT, OpenInputs, check_with_library, input_claims, output_metadata
from streammerge.plan.plan import Plan, plan_merge
from streammerge.recipe.files import Mergeable, as_recipe
from streammerge.recipe.options import Options, as_options
from streammerge.recipe.recipe import Recipe
from streammerge.report import InputFile, Report
from streammerge.storage.copying import Copying
from streammerge.storage.hashing import (
    FileHashes,
    HashingWriter,
    check_sidecar,
    hash_output,
    hashing,
    input_hashes,
    is_in_sidecar,
    sidecar_of,
    stale_sidecar,
    write_sidecar,
)
from streammerge.storage.journal import journal_path
from streammerge.storage.ledger import Coverage, Entry, Ledger, Span
from streammerge.storage.resume import Beginning, Tell, beginning
from streammerge.storage.target import check_output, find_older
from streammerge.tensors import Model
from streammerge.version import __version__
from streammerge.workers.confirmation import Confirmed, confirm, confirm_finished
from streammerge.workers.machine import Machine, Watch


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
    with (
        saying_what_is_on_disk(),
        planned(recipe, output, options, beside=beside) as plan,
        beginning(plan, tell) as begun,
    ):
        return _carry_out(begun, started, watch, tell, beside)


def run_verification(
    recipe: Recipe | Model, output: Path, options: Options, watch: Watch | None = None, *, sampled: bool = False
) -> Confirmed:
    """Compute an output again, every byte or samples of it, and compare; OutputError if the recipe gives another."""
    with planned(recipe, output, options, replacing=True) as plan, open_model(output) as found:
        return confirm(plan, found, watch, sampled=sampled)


@contextlib.contextmanager
def planned(
    recipe: Recipe | Model, output: Path, options: Options, *, replacing: bool = False, beside: Claims = NOTHING
) -> Iterator[Plan]:
    """The plan of a merge, its inputs open for as long as the `with` statement lasts.

    Unless it is `replacing` whatever lies at the output, or writing none, the output is checked.
    """
    opened = OpenInputs()
    try:
        merged = opened.merge(recipe) if isinstance(recipe, Recipe) else as_merged(recipe)
        method = recipe.method if isinstance(recipe, Recipe) else ""
        recorded = isinstance(recipe, Recipe) and options.metadata and options.hash_inputs
        hashes = input_hashes(recipe, opened) if isinstance(recipe, Recipe) and recorded else None
        metadata = output_metadata(recipe, options, opened, hashes)
        description = recipe.describe() if isinstance(recipe, Recipe) else {}
        inputs = opened.files or files_of(merged)
        plan = plan_merge(
            merged,
            output,
            options,
            method=method,
            inputs=inputs,
            metadata=metadata,
            description=description,
            described_bytes=opened.described_bytes,
            left=opened.left,
        )
        if replacing:
            (input_claims(plan.inputs) + beside).check()
        else:
            # an interrupted run may have put its output in place; whoever resumes it looks again
            beside += claims_beside(plan)
            check_output(plan, find_older(plan.output), beside, may_exist=options.force or options.resume)
        yield plan
    except (Exception, SystemExit) as error:
        if (failure := method_failure(error)) is not None:
            raise failure from error
        raise
    finally:
        opened.close()


def claims_beside(plan: Plan) -> Claims:
    """What a merge writes beside its output."""
    journal = Claim(journal_path(plan.output), "the merge's journal", OUTPUT)
    hashes = (Claim(sidecar_of(plan.output), "the file of hashes", OUTPUT),) if plan.options.hash else ()
    return Claims(written=(journal, *hashes))


def _carry_out(begun: Beginning, started: float, watch: Watch | None, tell: Tell, beside: Claims) -> Report:
    from streammerge.storage.resume import Bookkeeper
    from streammerge.storage.writer import OutputWriter

    plan = begun.plan
    if begun.is_complete:
        return _finish(begun, started, tell)
    if begun.is_there:
        return _confirm(begun, started, watch, tell)
    for note in plan.left_notes():
        tell(f"note: {note}")
    older = find_older(plan.output)
    check_output(plan, older, beside, may_exist=plan.options.force)
    for remark in plan.merged.remarks:
        tell(f"note: {remark}")
    if plan.options.hash:
        check_sidecar(plan.output, force=plan.options.force)
    inputs = {file_key(file.path) for file in plan.inputs}
    if strays := [path for path in older.strays if file_key(path) not in inputs]:
        tell(f"note: {len(strays)} shards of an older output are left: {strays[0].name} …")
    plan.check_disk(begun.present_bytes)
    machine = Machine(plan) if plan.options.torch_must_check else None
    writer, ledger = OutputWriter(plan.output, begun.journal), Ledger(begun.journal.contents.entry)
    with saying_what_is_on_disk(writer.state), writer, hashing(writer, wanted=plan.options.hash) as sink:
        copying = Copying(plan.jobs, sink, plan.new_progress(ledger.found.spans.nbytes), ledger)
        copying.progress.findings.update(ledger.found.findings)
        with copying.ahead():
            machine = machine or Machine(plan)
            check_with_library(plan)
        marks = [started, time.perf_counter()]
        bookkeeper = Bookkeeper(begun, writer, ledger)
        with bookkeeper.every(plan.options.journal if begun.can_be_resumed else 0.0):
            machine.run(sink, copying, bookkeeper.watching(watch))
        hashes = sink.finish() if isinstance(sink, HashingWriter) else []
        marks.append(time.perf_counter())
        if plan.options.sync:
            writer.sync()
        with writer.judging():
            if plan.options.verify:
                writer.forget()
                machine.check(writer.read, plan.output.path, watch)
            for file in plan.inputs:
                file.check_unchanged()
            check_output(plan, older, beside, may_exist=plan.options.force)
            writer.check()
        writer.commit(sync=plan.options.sync, superseded=older.superseded, identity=begun.request)
    if hashes:
        write_sidecar(plan.output, hashes, sync=plan.options.sync)
    marks.append(time.perf_counter())
    return report_of(plan, marks, copying, machine, hashes)


def _finish(begun: Beginning, started: float, tell: Tell) -> Report:
    """Put in place what an earlier run has written, all of it."""
    plan = begun.plan
    begun.finish()
    tell("resumed: everything was written already, and has been put in place")
    hashes = hash_output(plan.output) if plan.options.hash else []
    if hashes:
        write_sidecar(plan.output, hashes, sync=plan.options.sync)
    return _report_of_nothing(plan, started, begun.journal.contents.entry, hashes)


def _confirm(begun: Beginning, started: float, watch: Watch | None, tell: Tell) -> Report:
    """Make sure that the output, which is in place, is what the merge would write; give it hashes if it has none."""
    plan = begun.plan
    confirmed = confirm_finished(plan, watch)
    tell(f"nothing to do: the output is there already; {confirmed}")
    hashes = hash_output(plan.output) if plan.options.hash else []
    if hashes and not is_in_sidecar(plan.output, hashes):
        check_sidecar(plan.output, force=plan.options.force)
        write_sidecar(plan.output, hashes, sync=plan.options.sync)
    whole = Entry(Coverage(Span(number, 0, file.nbytes) for number, file in enumerate(plan.output.files)))
    return _report_of_nothing(plan, started, whole, hashes)


def _report_of_nothing(plan: Plan, started: float, there: Entry, hashes: list[FileHashes]) -> Report:
    """The report of a merge of which all was there."""
    from streammerge.storage.writer import OutputWriter

    nothing = Copying((), OutputWriter(plan.output), plan.new_progress(), Ledger(there))
    return report_of(plan, [started] * 3 + [time.perf_counter()], nothing, None, hashes)


def report_of(
    plan: Plan, marks: list[float], copying: Copying, machine: Machine | None, hashes: Sequence[FileHashes]
) -> Report:
    """How it went, with the times at which the parts began; no machine if there was nothing to be done any more."""
    seconds = dict(zip(("plan", "merge", "sync"), (b - a for a, b in itertools.pairwise(marks)), strict=True))
    return Report(
        output=[str(path) for path in plan.output.paths],
        method=plan.method,
        merged=plan.count("merged"),
        copied=plan.count("copied"),
        dropped=plan.count("dropped"),
        left_out=plan.merged.left_out,
        findings=dict(sorted(copying.progress.findings.items())),
        on_nonfinite=plan.options.on_nonfinite,
        bytes_read=copying.progress.bytes_read,
        bytes_written=plan.output.nbytes,
        seconds={**seconds, "ahead": copying.seconds_ahead, "total": marks[-1] - marks[0]},
        peak_rss_bytes=peak_resident_bytes(),
        baseline_rss_bytes=machine.baseline if machine else peak_resident_bytes(),
        peak_vram_bytes=machine.peak_vram_bytes() if machine else 0,
        device=str(machine.device) if machine else plan.options.device,
        dtype=sorted({kind.info.dtype.name for kind in plan.jobs.kinds}),
        threads=machine.allotment.threads if machine else 0,
        io=machine.io if machine else plan.options.io,
        resumed_bytes=copying.ledger.found.spans.nbytes,
        inputs=[InputFile(str(file.path), file.nbytes) for file in plan.inputs],
        hashes=hashes_by_file(plan, hashes),
        stale_hashes="" if hashes else stale_sidecar(plan.output),
        version=__version__,
    )


def hashes_by_file(plan: Plan, hashes: Sequence[FileHashes]) -> Mapping[str, Mapping[str, str]]:
    """The hashes of the output for its report."""
    return {
        str(file.path): {"sha256": found.sha256, "tensors": found.tensors}
        for file, found in zip(plan.output.files, hashes, strict=False)
    }


def merge(recipe: Mergeable, *, output: str | os.PathLike[str], **options: Any) -> Report:  # noqa: ANN401
    """Merge to the output file or folder and say how it went; the options are the fields of `Options`.

    Sizes may be text such as "512MB"; `dtype`, `layout`, `on_shape_mismatch`, `on_missing` and `seed` change the
    recipe.

    The output is complete when this returns. When it raises a MergeError, what lay at the output is as it was.
    """
    with saying_what_is_on_disk():
        return run_merge(as_recipe(recipe, options), output_path(output), as_options(options))


def make_plan(recipe: Mergeable, *, output: str | os.PathLike[str], **options: Any) -> Plan:  # noqa: ANN401
    """What `merge` would do with the same arguments, from headers alone."""
    with planned(as_recipe(recipe, options), output_path(output), as_options(options), replacing=True) as plan:
        return plan


def output_path(output: str | os.PathLike[str]) -> Path:
    """The output's path; OutputError for an empty text, which would be taken for the folder that we are in."""
    if os.fspath(output) == "":
        raise OutputError("the output's name is empty", advice="Name a file, such as OUT.safetensors, or a folder.")
    return Path(output)
