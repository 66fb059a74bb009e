"""What is written beside weights, whatever kind of folder they go to: files that are copied or made, and the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError, listed
from streammerge.formats.companions import Companion
from streammerge.formats.layout import Component
from streammerge.models.configs import Tensors, are_decoded, config_in
from streammerge.models.folders import CODE, ModelFolder
from streammerge.models.hub import name_of
from streammerge.recipe.card import CARD, CardModel, is_unchanged_card, model_card, read_stated
from streammerge.recipe.description import describe
from streammerge.recipe.metadata import methods_of, stored_names
from streammerge.recipe.recipe import Recipe

CONFIG: Final = "config.json"

OF_CODES: Final = ("quantization_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files that say how weights are stored as codes."""

Left = tuple[str, str]
"""The name of a file that is not copied, and the reason."""


@dataclass(frozen=True)
class Beside:
    """What is written beside weights, and what these are called.

    `notes` are what the user should know whatever is asked, `left` what is not copied, each name with the reason. A
    pipeline has `components`, to which all its tensors belong.
    """

    companions: tuple[Companion, ...] = ()
    stem: str = "model"
    notes: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()
    details: tuple[str, ...] = field(default=())
    components: tuple[Component, ...] = ()

    def told(self) -> list[str]:
        """All there is to know, for the plan."""
        copied = [each.name for each in self.companions if each.source is not None]
        code = [each.name for each in self.companions if each.why == CODE]
        made = [f"{each.name} ({each.why})" for each in self.companions if each.source is None]
        lines = [
            f"beside the weights are copied: {', '.join(copied)}" if copied else "",
            f"of these are code, which is copied as data and not run: {', '.join(code)}" if code else "",
            f"written anew: {', '.join(made)}" if made else "",
            *(f"not copied: {listed(names)}: {reason}" for reason, names in self._by_reason().items()),
        ]
        return [*filter(None, lines), *self.details]

    def _by_reason(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, reason in self.left:
            found.setdefault(reason, []).append(name)
        return found

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "companions": [
                {"name": each.name, "bytes": each.nbytes, "copied": each.source is not None, "why": each.why}
                for each in self.companions
            ],
            "not_copied": [{"name": name, "why": reason} for name, reason in self.left],
        }


def kept_of(found: ModelFolder, before: Tensors, after: Tensors) -> tuple[list[Companion], list[Left]]:
    """What is copied, and what is not: files on codes have nothing to say where weights are decoded."""
    of_codes = {each.name for each in found.companions if each.name in OF_CODES}
    gone = of_codes if of_codes and are_decoded(before, after) else set()
    kept = [each for each in found.companions if each.name not in gone]
    return kept, [*found.left, *((name, "the weights are decoded") for name in sorted(gone))]


def card_beside(
    recipe: Recipe, output: Path, library: str | None, *, is_adapter: bool = False
) -> tuple[list[Companion], list[str]]:
    """The card of a merge that is written to a folder; no card and a note if somebody's own stays there."""
    there = output / CARD
    if (there.exists() or there.is_symlink()) and not is_unchanged_card(there):
        return [], [f"{there} is not streammerge's, or was written on, and stays as it is"]
    names = stored_names(recipe.paths())
    models = [CardModel(_called(path, name), read_stated(path)) for path, name in names.items()]
    base = recipe.base.source if recipe.base is not None else None
    adapts = (_called(base, names[base]) if isinstance(base, Path) else "") if is_adapter else None
    card = model_card(describe(recipe, names), models, library, methods_of(recipe), adapts=adapts)
    return [Companion(CARD, card, "the model's card")], []


def _called(path: Path, name: str) -> str:
    """What a model is called on the hub, or in the recipe."""
    on_hub = name_of(path)
    return on_hub.name if on_hub is not None else name


def stated_in(path: Path) -> Mapping[str, Any]:
    """What a model's config says; nothing if there is none that can be read."""
    try:
        return (config_in(path) if path.is_dir() else None) or {}
    except CheckpointError:
        return {}


def of_a_file(output: Path, folder: Path | None, config: str) -> Iterator[str]:
    """What a folder would have that a file has not."""
    if folder is not None and (folder / config).is_file():
        yield (
            f"{output} is a file: {config} and all else beside the weights stay in {folder}; "
            f"-o {output.with_suffix('')} writes a folder that has them"
        )
