"""What an output folder gets beside its weights: the layout's companions, with a config and a card of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError, listed
from streammerge.formats.companions import Companion
from streammerge.formats.layout import is_file_name
from streammerge.models import configs
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.configs import Adapted, adapt, are_decoded, config_in, embedding_and_head
from streammerge.models.folders import CODE, ModelFolder, read_folder, root_of, stem_of
from streammerge.models.hub import name_of
from streammerge.models.merged import Merged
from streammerge.recipe.card import CARD, CardModel, is_unchanged_card, model_card, read_stated
from streammerge.recipe.metadata import methods_of, stored_names
from streammerge.recipe.options import Options
from streammerge.recipe.recipe import Recipe
from streammerge.tensors import Model

CONFIG: Final = "config.json"

TEMPLATE: Final = "chat_template.jinja"
"""Where libraries look for a chat template first."""

OF_CODES: Final = ("quantization_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files that say how weights are stored as codes."""


@dataclass(frozen=True)
class Beside:
    """What is written beside weights, and what these are called.

    `notes` are what the user should know whatever is asked, `left` what is not copied, each name with the reason.
    """

    companions: tuple[Companion, ...] = ()
    stem: str = "model"
    notes: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    details: tuple[str, ...] = field(default=())

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


def beside_output(merged: Merged, recipe: Recipe | None, output: Path, options: Options) -> Beside:
    """What an output gets beside its weights: nothing if it is a file, or if the layout is none of a folder.

    CheckpointError if the layout's config can't be read.
    """
    root = root_of(merged)
    folder = root.folder if isinstance(root, Checkpoint) else None
    if is_file_name(output):
        return Beside(details=tuple(_of_a_file(output, folder)) if options.companions else ())
    stem = stem_of(root.path if isinstance(root, Checkpoint) else None)
    if not options.companions or not isinstance(root, Checkpoint):
        return Beside(stem=stem)
    if folder is None:
        return Beside(stem=stem, details=tuple(_needed(root)))
    found = read_folder(folder, (file.path for file in root.files))
    if found.library is None:
        none = f"{folder} has no {CONFIG} that is copied, so nothing is written beside the weights"
        return Beside(stem=stem, left=found.left, details=(none,))
    return _Folder(merged, recipe, output, options, root, found).beside(stem)


@dataclass(frozen=True)
class _Folder:
    """A merge into a folder whose layout is a folder."""

    merged: Merged
    recipe: Recipe | None
    output: Path
    options: Options
    root: Checkpoint
    found: ModelFolder

    def beside(self, stem: str) -> Beside:
        config = config_in(self.found.path)
        adapted = None if config is None else self._adapted(config)
        kept, left = self._kept()
        if adapted is not None and adapted.changed:
            made = Companion(CONFIG, adapted.encoded(), ", ".join(adapted.changed))
            kept = [made if each.name == CONFIG else each for each in kept]
        if self.recipe is not None and self.recipe.chat_template:
            made = Companion(TEMPLATE, self.recipe.chat_template.encode("utf-8", "replace"), "the recipe's")
            kept = [*(each for each in kept if each.name != TEMPLATE), made]
        notes = [f"{CONFIG}: {note}" for note in (adapted.notes if adapted else ())]
        if self.recipe is not None and self.options.metadata:
            card = self.output / CARD
            if is_unchanged_card(card) or not (card.exists() or card.is_symlink()):
                kept.append(self._card(self.recipe, config or {}))
            else:
                notes.append(f"{card} is not streammerge's, or was written on, and stays as it is")
        return Beside(tuple(kept), stem, tuple(notes), tuple(left))

    def _kept(self) -> tuple[list[Companion], list[tuple[str, str]]]:
        """What is copied, and what is not: files on codes have nothing to say where weights are decoded."""
        of_codes = {each.name for each in self.found.companions if each.name in OF_CODES}
        gone = of_codes if of_codes and are_decoded(self.root.tensors, self.merged.tensors) else set()
        kept = [each for each in self.found.companions if each.name not in gone]
        return kept, [*self.found.left, *((name, "the weights are decoded") for name in sorted(gone))]

    def _adapted(self, config: Mapping[str, Any]) -> Adapted:
        untied, layers = self._unties(config), self._layers()
        adapted = adapt(config, self.root.tensors, self.merged.tensors, untied=untied, layers=layers)
        keys = configs.numbered_keys(config) if layers is not None else []
        if not keys:
            return adapted
        return replace(adapted, notes=(*adapted.notes, f"{', '.join(keys)} speak of layers by other numbers, and stay"))

    def _layers(self) -> list[int] | None:
        """Which of the layout's layers each is, in a stack of slices."""
        if self.recipe is None or not self.recipe.is_stack:
            return None
        firsts = [entry.source.inputs[0] for entry in self.recipe.inputs if isinstance(entry.source, Recipe)]
        return [number for first in firsts if first.layers is not None for number in range(*first.layers)]

    def _unties(self, config: Mapping[str, Any]) -> bool:
        """Whether the output's embeddings, tied in the layout, come out as others than the input's."""
        if not configs.is_tied(config):
            return False
        embedding, head = embedding_and_head(self.merged.tensors)
        if not (embedding and head):
            return False
        made = [self.merged.decisions.of(name) for name in (embedding, head)]
        alike = (made[0].action, made[0].parameters) == (made[1].action, made[1].parameters)
        return not alike or any(_stated(path).get(configs.TIED) is False for path in self._paths())

    def _paths(self) -> list[Path]:
        return list(dict.fromkeys(self.recipe.paths())) if self.recipe is not None else []

    def _card(self, recipe: Recipe, config: Mapping[str, Any]) -> Companion:
        names = stored_names(recipe.paths())
        models = [CardModel(_called(path, name), read_stated(path)) for path, name in names.items()]
        library = "diffusers" if "_class_name" in config else self.found.library
        card = model_card(recipe.describe(names), models, library, methods_of(recipe))
        return Companion(CARD, card, "the model's card")


def _called(path: Path, name: str) -> str:
    """What a model is called on the hub, or in the recipe."""
    on_hub = name_of(path)
    return on_hub.name if on_hub is not None else name


def _stated(path: Path) -> Mapping[str, Any]:
    """What a model's config says; nothing if there is none that can be read."""
    try:
        return (config_in(path) if path.is_dir() else None) or {}
    except CheckpointError:
        return {}


def _of_a_file(output: Path, folder: Path | None) -> Iterator[str]:
    """What a folder would have that a file has not."""
    if folder is not None and (folder / CONFIG).is_file():
        yield (
            f"{output} is a file: {CONFIG} and all else beside the weights stay in {folder}; "
            f"-o {output.with_suffix('')} writes a folder that has them"
        )


def _needed(root: Model) -> Iterator[str]:
    """What libraries want beside the weights of a language model that is laid out as a file."""
    if any(embedding_and_head(root.tensors)):
        yield (
            f"the layout is a file: what loads the output as a folder needs {CONFIG}, generation_config.json and the "
            "tokenizer's files (tokenizer.json, tokenizer_config.json) beside it; name the folder of the layout to "
            "have them copied"
        )
