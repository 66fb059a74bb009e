"""Where a recipe's models are: those that are named as on the hub are looked for in its cache, or fetched into it.

All of them are asked for before the first is fetched, so that whatever is missing is told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from streammerge.errors import CheckpointError, RecipeError, count
from streammerge.formats.files import read_errors
from streammerge.models.hub import HubName, check_there, is_there, sought
from streammerge.models.located import index_at, known_by
from streammerge.recipe.naming import file_of, same_source
from streammerge.recipe.recipe import Input, Recipe

Change = Callable[[Path | HubName], Path]


def with_places(recipe: Recipe) -> Recipe:
    """The recipe, of whose models it is known where they lie. CheckpointError that tells of all that can't be had."""
    from streammerge.models.downloads import Order, check_disk  # late: most models are files

    problems, found = list[CheckpointError](), dict[Path | HubName, Path | Order]()
    for source in dict.fromkeys(_sources(recipe)):
        try:
            found[source] = sought(source)
            _check_path(source)
        except CheckpointError as error:
            problems.append(error)
    if problems:
        raise _together(problems)
    check_disk([each for each in found.values() if isinstance(each, Order)])
    places = {source: each if isinstance(each, Path) else each.fetched() for source, each in found.items()}
    return _changed(recipe, places.__getitem__)


def _sources(recipe: Recipe) -> Iterator[Path | HubName]:
    """Every model and adapter that is no recipe, as it is named."""
    for entry in recipe.named.values():
        if isinstance(entry.source, Recipe):
            yield from _sources(entry.source)
        else:
            yield entry.source
        yield from (each.source for each in entry.adapters if not isinstance(each.source, Recipe))


def _check_path(source: Path | HubName) -> None:
    """CheckpointError if nothing is at a path."""
    if isinstance(source, Path) and not is_there(source) and not index_at(source):
        check_there(source)
        with read_errors(source):
            source.lstat()


def _together(problems: Sequence[CheckpointError]) -> CheckpointError:
    """One error that tells of all."""
    if len(problems) == 1:
        return problems[0]
    advices = list(dict.fromkeys(problem.advice for problem in problems))
    found = [problem.what if len(advices) == 1 else f"{problem.what}. {problem.advice}" for problem in problems]
    shared = advices[0] if len(advices) == 1 else ""
    return CheckpointError(f"{count(problems, 'model')} of the recipe can't be had", found=found, advice=shared)


def _changed(recipe: Recipe, place: Change) -> Recipe:
    """The recipe with every model where it lies; RecipeError if its base turns out to be one of its models."""
    base = None if recipe.base is None else _placed(recipe.base, place)
    inputs = tuple(_placed(entry, place) for entry in recipe.inputs)
    others = tuple(_placed(entry, place) for entry in recipe.others)
    if base and (twin := _twin(base, inputs)) is not None:
        raise RecipeError(
            f"{recipe.where}: the base is the same model as {twin.name}, under another name",
            found=[f"{base.name}   {file_of(base)}", f"{twin.name}   {file_of(twin)}"],
            advice="Write both in one way.",
        )
    return replace(recipe, inputs=inputs, base=base, others=others)


def _twin(base: Input, inputs: Sequence[Input]) -> Input | None:
    """The model that is the base as well, under another name: it would count as one more that differs in nothing."""
    is_listed = any(entry.name == base.name for entry in inputs)
    others = [entry for entry in inputs if not (is_listed and same_source(base, entry))]
    known = _as_known(base)
    return next((entry for entry in others if same_source(known, _as_known(entry))), None)


def _as_known(entry: Input) -> Input:
    """The input by the one path of its model, if it is no recipe."""
    return replace(entry, source=known_by(entry.source)) if isinstance(entry.source, Path) else entry


def _placed(entry: Input, place: Change) -> Input:
    source = _changed(entry.source, place) if isinstance(entry.source, Recipe) else place(entry.source)
    return replace(entry, source=source, adapters=tuple(_placed(each, place) for each in entry.adapters))
