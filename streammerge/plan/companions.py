"""What an output folder gets beside its weights: the layout's companions, with a config and a card of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from streammerge.errors import OutputError, listed
from streammerge.formats.companions import Companion
from streammerge.formats.layout import COMPONENT_STEMS, FOLDER_STEMS, is_file_name
from streammerge.formats.pipelines import INDEX
from streammerge.models import configs
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.config_meaning import contradictions
from streammerge.models.configs import OF_DIFFUSERS, Adapted, adapt, config_in, embedding_and_head
from streammerge.models.dialects import recognise
from streammerge.models.folders import ModelFolder, read_folder, root_of, stem_of
from streammerge.models.merged import Merged
from streammerge.models.modules import ROLES
from streammerge.plan.beside import CONFIG, Beside, card_beside, kept_of, of_a_file, stated_in
from streammerge.plan.pipelines import PipelineFolder, pipeline_of
from streammerge.plan.templates import wanted_template, with_template
from streammerge.plan.tokenizer_files import TokenizerFiles
from streammerge.recipe.metadata import stored_names
from streammerge.recipe.options import Options
from streammerge.recipe.recipe import Recipe
from streammerge.tensors import Model

ADAPTER: Final = "adapter_model"
"""How PEFT calls the file of an adapter's weights."""


LACKING: Final = (
    f"diffusers needs the component's {CONFIG} beside its weights, and a checkpoint has none: copy that of a pipeline "
    "of the same architecture"
)
"""What is told of weights for diffusers that nothing lies beside."""


def beside_output(merged: Merged, recipe: Recipe | None, output: Path, options: Options) -> Beside:
    """What an output gets beside its weights: nothing if it is a file, or if the layout is none of a folder.

    CheckpointError if the layout's config can't be read.
    """
    if not is_file_name(output) and (merged.companions is not None or merged.factored is not None):
        return _beside_adapter(merged, recipe, output, options)
    root = root_of(merged)
    folder = root.folder if isinstance(root, Checkpoint) else None
    if is_file_name(output) and merged.companions:
        raise OutputError(
            f"{output}: PEFT's adapters are folders: {merged.companions[0].name} lies beside the weights",
            advice=f"Use -o {output.with_suffix('')}, or other names.",
        )
    if is_file_name(output):
        lost = [f"{output} is a file: {each} not written" for each in _beyond_weights(merged, recipe)]
        whole = recipe is not None and not recipe.only
        of_pipeline = pipeline.path if (pipeline := pipeline_of(merged, options.names)) and whole else None
        told = (*of_a_file(output, folder, CONFIG), *of_a_file(output, of_pipeline, INDEX))
        return Beside(notes=tuple(lost), details=told if options.companions else ())
    if pipeline := pipeline_of(merged, options.names):
        return PipelineFolder(merged, recipe, output, options, pipeline).beside()
    of_diffusers = options.names == "diffusers" and folder is None and is_loaded_by_diffusers(merged)
    stem = COMPONENT_STEMS[1] if of_diffusers else stem_of(root.path if isinstance(root, Checkpoint) else None)
    if not options.companions or not isinstance(root, Checkpoint):
        return Beside(stem=stem)
    if folder is None:
        lost = [f"the layout is a file: {each} not written" for each in _beyond_weights(merged, recipe)]
        lacking = [LACKING] if of_diffusers else []
        return Beside(stem=stem, notes=(*lost, *lacking), details=tuple(_needed(root)))
    found = read_folder(folder, (file.path for file in root.files))
    if found.library is None:
        none = f"{folder} has no {CONFIG} that is copied, so nothing is written beside the weights"
        return Beside(stem=stem, left=found.left, details=(none,))
    if options.names in ("original", "bare") and OF_DIFFUSERS in (config_in(folder) or {}):
        others = tuple((each.name, "it is for diffusers' names") for each in found.companions)
        return Beside(stem=FOLDER_STEMS[0], left=(*found.left, *others))
    return _Folder(merged, recipe, output, options, root, found).beside(stem)


def _beyond_weights(merged: Merged, recipe: Recipe | None) -> Iterator[str]:
    """What the merge makes that is nobody's file yet, and stands in files beside weights alone."""
    if merged.tokenizer is not None:
        yield "the tokenizer of the tokens that come out, whose rows the weights have, is"
    if recipe is not None and recipe.chat_template:
        yield "the chat template is"


def _beside_adapter(merged: Merged, recipe: Recipe | None, output: Path, options: Options) -> Beside:
    """An adapter's config, and its card."""
    own = merged.companions or ()
    if not options.companions or not own or recipe is None or not options.metadata:
        return Beside(own if options.companions else (), ADAPTER)
    card, told = card_beside(recipe, output, "peft", is_adapter=True)
    return Beside((*own, *card), ADAPTER, tuple(told))


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
        own = config_in(self.found.path)
        config = own if own is None or self.merged.config is None else self.merged.config
        adapted = None if config is None else self._adapted(config)
        if adapted is not None and config is not own:
            adapted = replace(adapted, changed=(f"of a {config['model_type']}" if config else "", *adapted.changed))
        kept, left = kept_of(self.found, self.root.tensors, self.merged.tensors)
        if self.merged.tokenizer is not None:
            files = TokenizerFiles(self.found, self.merged.tokenizer)
            kept, left = files.placed(kept, left)
            adapted = None if adapted is None else files.adapted(adapted)
        if adapted is not None and adapted.changed:
            made = Companion(CONFIG, adapted.encoded(), ", ".join(adapted.changed))
            kept = [made if each.name == CONFIG else each for each in kept]
        said = (*(adapted.notes if adapted else ()), *self._contradictions(own or {}))
        notes = [f"{CONFIG}: {note}" for note in said]
        if self.recipe is not None and is_renamed(self.recipe):
            notes.append(f"{CONFIG} is that of the layout, whose tensors have other names here: see whether it fits")
        if self.recipe is not None and self.recipe.chat_template:
            text, why = wanted_template(self.recipe.chat_template, self._paths())
            kept = list(with_template(kept, self.found.path, text, why)) if text else kept
            notes += [] if text else [f"chat_template: {why}, so there is none in the output"]
        if self.recipe is not None and self.options.metadata:
            library = "diffusers" if "_class_name" in (config or {}) else self.found.library
            card, told = card_beside(self.recipe, self.output, library)
            kept, notes = [*kept, *card], [*notes, *told]
        return Beside(tuple(kept), stem, tuple(notes), tuple(left))

    def _contradictions(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Where other models' configs say that their weights are for another arithmetic."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for path, name in stored_names(self._paths()).items():
            for each in contradictions(config, stated_in(path)):
                found.setdefault((each.key, str(each.own)[:60], str(each.other)[:60]), []).append(name)
        for (key, own, other), names in found.items():
            yield f"{key} is {own}, as in the layout, while it is {other} in {listed(names)}: see whether they fit"

    def _adapted(self, config: Mapping[str, Any]) -> Adapted:
        untied, layers = self._unties(config), self._layers()
        adapted = adapt(config, self.root.tensors, self.merged.tensors, untied=untied, layers=layers)
        keys = configs.numbered_keys(config) if layers is not None else []
        if not keys:
            return adapted
        return replace(adapted, notes=(*adapted.notes, f"{', '.join(keys)} speak of layers by other numbers, and stay"))

    def _layers(self) -> list[int] | None:
        """Which of the layout's layers each is, in a stack of slices."""
        stack = self._stack()
        if stack is None:
            return None
        firsts = [entry.source.inputs[0] for entry in stack.inputs if isinstance(entry.source, Recipe)]
        return [number for first in firsts if first.layers is not None for number in range(*first.layers)]

    def _stack(self) -> Recipe | None:
        """The stack of slices that the layers of the language model are."""
        recipe = self.recipe
        if recipe is None or not recipe.by_module:
            return recipe if recipe is not None and recipe.is_stack else None
        stacks = {each.name: each.source for each in recipe.inputs if isinstance(each.source, Recipe)}
        return next((each for name, each in stacks.items() if each.is_stack and ROLES.get(name) == "text"), None)

    def _unties(self, config: Mapping[str, Any]) -> bool:
        """Whether the output's embeddings, tied in the layout, come out as others than the input's."""
        if not configs.is_tied(config):
            return False
        embedding, head = embedding_and_head(self.merged.tensors)
        if not (embedding and head):
            return False
        made = [self.merged.decisions.of(name) for name in (embedding, head)]
        alike = (made[0].action, made[0].parameters) == (made[1].action, made[1].parameters)
        return not alike or any(stated_in(path).get(configs.TIED) is False for path in self._paths())

    def _paths(self) -> list[Path]:
        return list(dict.fromkeys(self.recipe.paths())) if self.recipe is not None else []


def is_loaded_by_diffusers(model: Model) -> bool:
    """Whether it is one component alone that diffusers loads; text encoders are transformers'."""
    found = recognise(model.tensors)
    return found is not None and [part.role in ("denoiser", "ControlNet", "VAE") for part in found.components] == [True]


def is_renamed(recipe: Recipe) -> bool:
    """Whether the layout's tensors have other names in the merge, for it is seen under other prefixes."""
    layout = recipe.named[recipe.layout_name]
    return bool(layout.prefixes) or (isinstance(layout.source, Recipe) and is_renamed(layout.source))


def _needed(root: Model) -> Iterator[str]:
    """What libraries want beside the weights of a language model that is laid out as a file."""
    if any(embedding_and_head(root.tensors)):
        yield (
            f"the layout is a file: what loads the output as a folder needs {CONFIG}, generation_config.json and the "
            "tokenizer's files (tokenizer.json, tokenizer_config.json) beside it; name the folder of the layout to "
            "have them copied"
        )
