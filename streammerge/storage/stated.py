"""The output's `__metadata__`: what is known of its inputs, how it was made, and what the user wants to be there."""

from __future__ import annotations

from collections.abc import Mapping

from streammerge.models.merged import Merged
from streammerge.plan.inputs import OpenInputs
from streammerge.recipe.inherited import LICENCES, MERGED_FROM, TITLE, carried_metadata, named_so, stays_itself
from streammerge.recipe.metadata import Hashes, recipe_metadata
from streammerge.recipe.options import Options
from streammerge.recipe.recipe import Recipe
from streammerge.storage.hashing import input_hashes
from streammerge.storage.webui import merge_history


def metadata_of(recipe: Recipe | None, merged: Merged, options: Options, opened: OpenInputs) -> dict[str, str]:
    """All that is written of a merge into its output's metadata; of a model that is no recipe's, the mark alone."""
    if recipe is None:
        return _restated({"format": "pt", **dict(options.meta)}, merged)
    hashes = input_hashes(recipe, opened) if options.metadata and options.hash_inputs else None
    history = {} if hashes is None else merge_history(recipe, opened, hashes)
    return {**history, **_restated(_of_recipe(recipe, options, opened, hashes), merged)}


def _of_recipe(recipe: Recipe, options: Options, opened: OpenInputs, hashes: Hashes | None) -> dict[str, str]:
    """The mark that loaders look for, what the inputs' metadata say of use and licences, and the recipe, unless that is
    not wanted; with the inputs' hashes if there are any."""
    carried = carried_metadata(recipe, lambda path: opened.opened(path).metadata)
    marks = {"format": "pt", **named_so(carried, options.names)}
    if not options.metadata:
        names_inputs = {LICENCES, MERGED_FROM} if stays_itself(recipe) else {LICENCES, MERGED_FROM, TITLE}
        marks = {key: text for key, text in marks.items() if key not in names_inputs}
        return marks | dict(options.meta)
    return marks | dict(options.meta) | recipe_metadata(recipe, options, hashes)


def _restated(metadata: Mapping[str, str], merged: Merged) -> dict[str, str]:
    """The metadata with what has to be said, or said otherwise, of the output, without what would be wrong of it."""
    changes = merged.restated
    said = {key: changes.get(key, text) for key, text in metadata.items()}
    return {key: text for key, text in said.items() if text or key not in changes} | dict(merged.stated)
