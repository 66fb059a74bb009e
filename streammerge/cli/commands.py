"""What each command does once its words are understood."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from streammerge.cli.manual import describe_method, example, method_rows
from streammerge.cli.screen import say, say_on_stderr, show_report, show_table, watching
from streammerge.cli.words import RECIPE_SUFFIXES, is_there, options_from, recipe_from, recorded_from
from streammerge.errors import format_size, one_line
from streammerge.formats.claims import Claim, Claims, file_key
from streammerge.methods import METHODS, find_method
from streammerge.methods.loading import load_methods
from streammerge.methods.registry import Method
from streammerge.models.blocks import abridged, unet_blocks
from streammerge.plan.plan import Plan
from streammerge.recipe.presets import PRESETS
from streammerge.report import dump_json
from streammerge.storage.side_files import check_side_file, write_text


def merge(arguments: argparse.Namespace) -> int:
    """Merge, show progress and the final table, write the report."""
    from streammerge.engine import planned, run_merge
    from streammerge.errors import saying_what_is_on_disk

    with saying_what_is_on_disk():
        recipe, options = recipe_from(arguments), options_from(arguments)
        beside = claims_of(arguments) + reported(arguments)
        if arguments.recipe_from_metadata:
            check_recorded_inputs(arguments)
        if arguments.verbose and not arguments.quiet:
            with planned(recipe, arguments.output, replace(options, hash_inputs=False), beside=beside) as shown:
                show_plan(shown, every_tensor=True)
    with watching("merge", quiet=arguments.quiet) as watch:
        report = run_merge(recipe, arguments.output, options, watch, telling(quiet=arguments.quiet), beside)
    if arguments.report is not None:
        with saying_what_is_on_disk(lambda: "The output is complete."):
            write_text(arguments.report, dump_json(report.to_json()))
    show_report(report, quiet=arguments.quiet)
    return 0


def check_recorded_inputs(arguments: argparse.Namespace) -> None:
    """CheckpointError if a recipe in metadata comes with its inputs' hashes, and these are others."""
    from streammerge.tools.verification import check_inputs

    recorded = recorded_from(arguments)
    if recorded.hashes:
        check_inputs(recorded)


def plan(arguments: argparse.Namespace) -> int:
    """Show what would happen."""
    from streammerge.engine import planned
    from streammerge.errors import saying_what_is_on_disk

    output = arguments.output or Path("merged.safetensors")
    with saying_what_is_on_disk():
        recipe, options = recipe_from(arguments), replace(options_from(arguments), hash_inputs=False)
        with planned(recipe, output, options, replacing=arguments.output is None) as made:
            if arguments.json:
                say(dump_json(made.to_json()).rstrip())
            elif not arguments.quiet:
                show_plan(made, every_tensor=arguments.verbose)
            made.check_disk()
    return 0


def show_plan(plan: Plan, *, every_tensor: bool) -> None:
    """The plan for people: the fates of the tensors, grouped by reason or one by one, and the costs."""
    if every_tensor:
        for name, fate in plan.decisions.told():
            why = f"{fate.why}   {fate.detail}".rstrip()
            say(one_line(f"{fate.action:<8} {fate.info!s:<28} {name}   {why}"))
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
            ("peak RAM", f"{format_size(plan.work_bytes)} above import torch (about 220 MB)"),
        ]
    )


def before_writing(plan: Plan) -> list[tuple[str, str]]:
    """What has to be read of all tensors before the first is written, if anything."""
    members = [member for together in plan.together for member in together.members]
    if not members:
        return []
    passes = max(member.method.passes for member in members)
    what = f"{format_size(plan.bytes_before_writing)} of these, {passes} pass{'es' * (passes > 1)} over the whole model"
    return [("before writing", f"{what}, in which {len(members):,} tensors are measured together")]


def verify(arguments: argparse.Namespace) -> int:
    """Check an output's format, index and hashes, and its values against the recipe: say what was checked."""
    from streammerge.models.checkpoints import open_model
    from streammerge.recipe.metadata import has_recipe
    from streammerge.tools.verification import check_files

    with open_model(arguments.merged) as found:
        say(f"{found.path}: a valid model, {found.container}, {len(found.tensors):,} tensors")
        for line in check_files(found):
            say(one_line(line))
        recorded = has_recipe(found.metadata)
    bound = all("=" in word and not is_there(word) for word in arguments.models) and not arguments.recipe
    if recorded and bound:
        return verify_recorded(arguments)
    if not (arguments.models or arguments.recipe):
        say("values: not checked: there is no recipe in its metadata.")
        say("Name the recipe, or the models and options it was made with, to compute every byte again.")
        return 0
    return verify_values(arguments, sampled=False)


def verify_recorded(arguments: argparse.Namespace) -> int:
    """Check an output's inputs and values by the recipe in its metadata, as far as its models are there."""
    from streammerge.recipe.metadata import ModelsMissingError
    from streammerge.tools.verification import check_inputs

    named = bool(arguments.models)
    arguments.models, arguments.recipe_from_metadata = [arguments.merged, *arguments.models], True
    try:
        recorded = recorded_from(arguments)
    except ModelsMissingError as error:
        if arguments.all or named:
            raise
        say(f"values: not checked: {error}")
        return 0
    say(one_line(check_inputs(recorded)))
    return verify_values(arguments, sampled=not arguments.all)


def verify_values(arguments: argparse.Namespace, *, sampled: bool) -> int:
    """Compute an output again and compare."""
    from streammerge.engine import run_verification

    recipe, options = recipe_from(arguments), options_from(arguments)
    with watching("verify", quiet=arguments.quiet) as watch:
        confirmed = run_verification(recipe, Path(arguments.merged), options, watch, sampled=sampled)
    say(f"values: {confirmed}{' (--all computes every byte)' * sampled}")
    for remark in confirmed.remarks:
        say(one_line(remark))
    if not (sampled or confirmed.remarks):
        say("Every byte is what the recipe gives.")
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Time a merge against its floor, and show what it takes."""
    from streammerge.engine import planned
    from streammerge.errors import saying_what_is_on_disk
    from streammerge.tools.bench.benchmark import OUTPUT, Timing, time_merge

    folder = (arguments.output or Path(OUTPUT)).absolute().parent
    timing = Timing(arguments.runs, arguments.cold, arguments.sync)
    beside = claims_of(arguments.merge) + reported(arguments)
    with saying_what_is_on_disk(lambda: "What was measured so far, and every output, is removed."):
        recipe, options = recipe_from(arguments.merge), options_from(arguments.merge)
        with planned(recipe, folder / OUTPUT, options, replacing=True, beside=beside) as made:
            measured = time_merge(arguments.merge_words, made, folder, timing, telling(quiet=arguments.quiet))
    if arguments.report is not None:
        write_text(arguments.report, dump_json(measured.to_json()))
    if arguments.json:
        say(dump_json(measured.to_json()).rstrip())
    else:
        show_table(measured.rows())
    return 0


def telling(*, quiet: bool) -> Callable[[str], None]:
    """Says on stderr what is being done, or nothing."""
    return (lambda _: None) if quiet else say_on_stderr


def inspect(arguments: argparse.Namespace) -> int:
    """Show what the header tells."""
    from streammerge.models.checkpoints import open_model
    from streammerge.plan.entries import entries_of
    from streammerge.tools.inspection import inspect_model, render

    entry = entries_of(arguments.entry, {"model": arguments.model})["model"]
    with open_model(arguments.model, entry) as model:
        inspection = inspect_model(
            model.tensors,
            path=model.path,
            nbytes=model.nbytes,
            metadata=model.metadata,
            container=model.container,
            left=model.left,
        )
    if arguments.json:
        say(dump_json(inspection.to_json(tensors=True, match=arguments.match)).rstrip())
    else:
        say(render(inspection, tensors=arguments.tensors, match=arguments.match))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Compare two models and show how far they are apart."""
    from streammerge.models.checkpoints import open_model
    from streammerge.plan.entries import entries_of
    from streammerge.plan.inputs import input_claims
    from streammerge.tools import comparison, plotting

    written = Claims(written=(*side_file(arguments.csv, "the table"), *side_file(arguments.plot, "the plot")))
    if arguments.plot:
        plotting.kind_of_plot(arguments.plot)
    entries = entries_of(arguments.entry, {"a": arguments.a, "b": arguments.b})
    with (
        open_model(arguments.a, entries["a"]) as a,
        open_model(arguments.b, entries["b"]) as b,
        watching("compare", quiet=arguments.quiet) as watch,
    ):
        (input_claims((*a.files, *b.files)) + written).check()
        from streammerge.tools import similarity

        compared = similarity.compare_models(
            a,
            b,
            match=arguments.match,
            device=arguments.device,
            threads=arguments.threads,
            io=arguments.io,
            watch=watch,
        )
    if arguments.csv:
        comparison.write_csv(compared, arguments.csv)
    if arguments.plot:
        plotting.plot(compared, arguments.plot)
    if arguments.json:
        say(dump_json(comparison.to_json(compared)).rstrip())
    else:
        say(comparison.render(compared, least=arguments.least))
    return 0


def methods(arguments: argparse.Namespace) -> int:
    """List the methods, or describe one; or list the presets of values by block."""
    if arguments.presets:
        show_presets(as_json=arguments.json)
        return 0
    for path in arguments.methods:
        load_methods(path)
    chosen = [find_method(arguments.name)] if arguments.name else [METHODS[name] for name in sorted(METHODS)]
    if arguments.json:
        say(dump_json([describe_method(method) for method in chosen]).rstrip())
    elif arguments.name:
        show_method(chosen[0])
    else:
        show_table([(method.name, f"{method.kind:<7} {method.formula}") for method in chosen])
    return 0


def show_presets(*, as_json: bool) -> None:
    """Every preset with its values: those of Stable Diffusion's 26 blocks, then those of SDXL's 20."""
    if as_json:
        say(dump_json({count: {name: list(row) for name, row in table.items()} for count, table in PRESETS.items()}))
        return
    for count, table in PRESETS.items():
        say(f"{count} blocks: {abridged(unet_blocks(count // 2 - 1))}\n")
        show_table([(name, ",".join(f"{value:.4g}" for value in row)) for name, row in table.items()])
        say()


def show_method(method: Method) -> None:
    """A method for people: its formula and source, what it takes, its parameters, an example."""
    say(f"{method.name} ({method.kind})\n")
    say(method.doc + "\n")
    show_table(method_rows(method))
    say(f"\n{example(method)}")


def recipes(arguments: argparse.Namespace) -> int:
    """List the packaged recipes, or print one."""
    from streammerge.recipe.files import packaged_recipe, packaged_recipes

    if arguments.name:
        packaged_recipe(arguments.name)
        say(packaged_recipes()[arguments.name].rstrip())
        return 0
    for name in packaged_recipes():
        inputs = packaged_recipe(name)["inputs"]
        words = " ".join(f"{key}={key.upper()}" for key in inputs)
        say(f"{name}\n  streammerge --recipe {name} {words} -o OUT.safetensors")
        for key, what in inputs.items():
            say(f"    {key:<8} {what}")
    return 0


def clean(arguments: argparse.Namespace) -> int:
    """List what merges that were stopped left behind, and remove it."""
    from streammerge.storage.leftovers import find_leftovers, finish_placing, remove

    if not arguments.dry_run:
        for path in finish_placing(arguments.folder):
            say(one_line(f"{path.name}: the output that it tells of was complete, and has been put in place"))
    found = find_leftovers(arguments.folder)
    for leftover in found:
        say(one_line(str(leftover)))
    removed = [] if arguments.dry_run else remove(found)
    stale = [leftover for leftover in found if not leftover.in_use] if arguments.dry_run else removed
    size = format_size(sum(leftover.nbytes for leftover in stale))
    if not found:
        say("nothing is left of merges that were stopped")
    else:
        say(f"{len(stale)} files, {size}, {'would be' if arguments.dry_run else 'were'} removed")
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """The founding job, step by step, each with the command that a user would type."""
    from streammerge.tools.demo.story import tell

    tell(
        Path(arguments.folder),
        full=arguments.full,
        dtype="F16" if arguments.dtype == "fp16" else "F32",
        container=arguments.container,
        seed=arguments.seed,
        models_only=arguments.models_only,
        force=arguments.force,
        say=say,
    )
    return 0


def claims_of(arguments: argparse.Namespace) -> Claims:
    """What a merge's command line names beside models: the recipe, and files of methods.

    An output whose metadata are the recipe may be made again in its place.
    """
    claims = [Claim(path, "the file of methods") for path in arguments.methods]
    first = Path(arguments.models[0]) if arguments.models and not arguments.recipe else None
    if first is not None and arguments.recipe_from_metadata:
        is_output = arguments.output is not None and file_key(first) == file_key(arguments.output)
        claims += [] if is_output else [Claim(first, "the model with the recipe,")]
    elif first is not None and first.suffix.lower() in RECIPE_SUFFIXES:
        claims.append(Claim(first, "the recipe"))
    return Claims(tuple(claims))


def reported(arguments: argparse.Namespace) -> Claims:
    """The report, if one is wanted; OutputError if it could not be written."""
    return Claims(written=side_file(arguments.report, "the report"))


def side_file(path: Path | None, what: str) -> tuple[Claim, ...]:
    """What tells of the work, to be written after it; OutputError if that is sure to fail."""
    check_side_file(path, what)
    return () if path is None else (Claim(path, what),)
