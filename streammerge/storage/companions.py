"""Companions where an output is: whether they are what a merge writes, and which of an older output are left there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from streammerge.errors import OutputError, count, listed, plural
from streammerge.formats.companions import Companion
from streammerge.formats.layout import OutputLayout
from streammerge.formats.pipelines import is_variant
from streammerge.recipe.card import CARD
from streammerge.storage.placing import name_within
from streammerge.storage.target import files_in

LOADED: Final = frozenset(
    {
        *("config.json", "generation_config.json", "adapter_config.json", "quantization_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
        *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
        *("video_preprocessor_config.json", "normalizer.json", "modules.json"),
    }
)
"""Files that libraries look for beside weights, and load if they are there."""


def check_companions(layout: OutputLayout) -> Iterator[str]:
    """What is to be said of an output's companions; OutputError if one is not what this merge writes.

    People write on cards: that one is another is only said. So it is where there are none at all.
    """
    differing = [each.name for each in layout.companions if not each.is_at(layout.path_of(each))]
    there = [each.name for each in layout.companions if layout.path_of(each).exists()]
    if layout.companions and not there:
        yield f"companions: none of the {len(layout.companions)} that this merge writes beside weights is there"
        return
    if CARD in differing:
        yield f"companions: {CARD} is {'another' if CARD in there else 'not there'}"
        differing.remove(CARD)
    if differing:
        raise OutputError(
            f"{layout.folder}: the tensors are what the recipe gives, {count(differing, 'file')} beside them not",
            found=[f"{name}: {'another' if name in there else 'not there'}" for name in differing],
            advice="They, or those that they were made of, were changed after the merge. Merge again, or leave them "
            "out with --no-companions.",
        )


def note_on_older(layout: OutputLayout) -> Iterator[str]:
    """What the user should know of files that lie where an output is written: those that stay would be loaded too."""
    if not layout.companions:
        return
    written = {layout.path_of(companion) for companion in layout.companions}
    there = {path for folder in {path.parent for path in written} for path in files_in(folder)} - {*layout.paths}
    stale = sorted(name_within(layout.folder, path) for path in there if path.name in LOADED or is_variant(path))
    if stale:
        yield f"{layout.folder} has {listed(stale)}, which are not this merge's and would be loaded with it"
    changed = [each.name for each in layout.companions if _is_replaced(layout, each)]
    if changed:
        yield f"{listed(changed)} of {layout.folder} {plural(changed, 'is', 'are')} replaced"


def _is_replaced(layout: OutputLayout, companion: Companion) -> bool:
    """Whether there is another file in a companion's place, which is no card of ours."""
    path = layout.path_of(companion)
    return companion.name != CARD and path.exists() and not companion.is_at(path)
