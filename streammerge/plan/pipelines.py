"""A pipeline as an output: each component in its folder with its config, and all else that the layout's index names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from streammerge.errors import CheckpointError, OutputError, counted, listed, plural
from streammerge.formats.companions import Companion, is_companion_name
from streammerge.formats.layout import COMPONENT, Component, is_file_name
from streammerge.formats.pipelines import INDEX, SCHEDULER, index_of, is_variant, named_components
from streammerge.formats.shards import is_index
from streammerge.models.adapters.dialects import Dialect
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.configs import Tensors, adapt, config_in
from streammerge.models.dialects import Naming
from streammerge.models.dialects.places import DIFFUSERS
from streammerge.models.folders import ModelFolder, read_folder, root_of, stem_of
from streammerge.models.merged import Merged
from streammerge.plan.beside import CONFIG, Beside, Left, card_beside, kept_of
from streammerge.plan.meaning import is_pipeline, sampling_of
from streammerge.plan.sampling import scheduler_saying, with_marks
from streammerge.recipe.options import Options
from streammerge.recipe.recipe import Recipe
from streammerge.tensors import TensorInfo

AS_A_FILE: Final = (
    "Name a file, such as OUT.safetensors (--names original makes a checkpoint of it, as A1111 and ComfyUI load it)"
)
"""What can be written of any pipeline."""


def pipeline_of(merged: Merged, naming: Naming | Dialect | None) -> Checkpoint | None:
    """The pipeline that a merge has its names of, if it has."""
    root = root_of(merged) if naming in (None, "diffusers") else None
    return root if is_pipeline(root) else None


def check_folder(merged: Merged, recipe: Recipe | None, output: Path, options: Options) -> None:
    """OutputError if a folder would have to be a pipeline and can't: by its tensors, or because it lacks configs."""
    if is_file_name(output):
        return
    root = pipeline_of(merged, options.names)
    if root is None:
        if options.names == "diffusers" and any(name.startswith(DIFFUSERS) for name in merged.tensors):
            raise OutputError(
                f"{output}: a folder in diffusers' names is a pipeline, and the layout has none of the configs that it "
                "needs",
                advice="Have the folder of a pipeline of the same architecture first, with the weight 0: its configs "
                f"go in, and none of its weights: streammerge PIPELINE:0 MODEL -o {output}. Or name a file: "
                f"-o {output}.safetensors.",
            )
        return
    if recipe is not None and recipe.only:
        raise OutputError(
            f"{output}: a component alone is no pipeline",
            advice=f"Name a file: --only {recipe.only} --names diffusers -o diffusion_pytorch_model.safetensors; or "
            f"merge the components, which are models too, with their configs: {root.path}/{recipe.only}.",
        )
    if not options.companions:
        raise OutputError(
            f"{output}: the layout is a pipeline, and weights alone are none",
            advice=f"Leave out --no-companions. {AS_A_FILE}.",
        )
    if not (root.path / INDEX).is_file():
        raise OutputError(
            f"{output}: the layout's folder has no {INDEX}, without which nothing loads a pipeline",
            advice=f"Fetch it too. {AS_A_FILE}.",
        )
    strange = sorted(name for name in merged.tensors if name.partition(".")[0] not in root.components)
    if strange:
        raise OutputError(
            f"{output}: {counted(strange, 'tensor', 'is', 'are')} of no component that the layout's "
            f"{INDEX} names, so no config says how to load {plural(strange, 'it', 'them')}",
            found=strange,
            advice=f"Leave {plural(strange, 'it', 'them')} out (--drop GLOB), or have as layout a pipeline that has "
            f"the component. {AS_A_FILE}.",
        )
    _check_names(root, output)


def as_written(merged: Merged, output: Path, options: Options) -> Merged:
    """The merge as it is written: with tensors that say how it is sampled, where no scheduler of a pipeline does."""
    is_folder = not is_file_name(output) and pipeline_of(merged, options.names) is not None
    return merged if is_folder else with_marks(merged, output)


def _check_names(root: Checkpoint, output: Path) -> None:
    """OutputError if components can't have folders by their names."""
    odd = [name for name in root.components if not COMPONENT.fullmatch(name)]
    folded = [name.casefold() for name in root.components]
    odd += [name for name in root.components if folded.count(name.casefold()) > 1]
    if odd:
        raise OutputError(
            f"{output}: {INDEX} of {root.path} names components that diffusers can't have, or one twice but for "
            "capitals",
            found=sorted(odd),
            advice=f"Give them, and their folders, other names. {AS_A_FILE}.",
        )


@dataclass(frozen=True)
class PipelineFolder:
    """A merge into a folder whose layout is the folder of a pipeline."""

    merged: Merged
    recipe: Recipe | None
    output: Path
    options: Options
    root: Checkpoint

    def beside(self) -> Beside:
        """What goes beside the weights, and which folders these go to.

        CheckpointError if the index or a config can't be read, or what the index names can't be copied.
        """
        before, after = _by_component(self.root.tensors), _by_component(self.merged.tensors)
        parts = [self._top([name for name in self.root.components if name not in after])]
        for name in self.root.components:
            if name in after:
                parts.append(_within(name, self._component(name, before.get(name, {}), after[name])))
        for name in named_components(self.root.path):
            if name not in self.root.components and (self.root.path / name).is_dir():
                parts.append(_within(name, self._found(name)))
        if self.recipe is not None and self.options.metadata:
            card, told = card_beside(self.recipe, self.output, "diffusers")
            parts.append(_Part(card, notes=told))
        parts = self._said(parts)
        return Beside(
            tuple(each for part in parts for each in part.companions),
            notes=(*self._of_variants(after), *(note for part in parts for note in part.notes)),
            left=tuple(each for part in parts for each in part.left),
            components=tuple(self._made(name) for name in self.root.components if name in after),
        )

    def _said(self, parts: list[_Part]) -> list[_Part]:
        """The same, with a scheduler that says of the model what those do that it is made of."""
        adapted = scheduler_saying(sampling_of(self.merged), self.root.path, self.output)
        if adapted is None:
            return parts
        name = SCHEDULER.as_posix()
        if not any(each.name == name for part in parts for each in part.companions):
            raise self._uncopied(SCHEDULER, "it isn't among what the pipeline's index names, or a link")
        made = Companion(name, adapted.encoded(), ", ".join(adapted.changed))
        told = _Part([], notes=[f"{name}: {note}" for note in adapted.notes])
        replaced = [
            replace(part, companions=[made if each.name == name else each for each in part.companions])
            for part in parts
        ]
        return [*replaced, told]

    def _top(self, gone: list[str]) -> _Part:
        """The files of the pipeline's own folder, its index without the components that are gone."""
        found = read_folder(self.root.path)
        if not any(each.name == INDEX for each in found.companions):
            raise self._uncopied(Path(INDEX), dict(found.left).get(INDEX, "not there"))
        folders = {*self.root.components, *named_components(self.root.path)} - {*gone}
        kept = [self._without(gone) if each.name == INDEX and gone else each for each in found.companions]
        return _Part(kept, [each for each in found.left if each[0] not in folders])

    def _without(self, gone: list[str]) -> Companion:
        """The index, which says of what isn't there any more that the pipeline does without it."""
        values = {**index_of(self.root.path)}
        values |= {name: [None, None] for name in gone if name in values}
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        return Companion(INDEX, text.encode("utf-8", "surrogatepass"), f"without {', '.join(gone)}")

    def _component(self, name: str, before: Tensors, after: Tensors) -> _Part:
        """What goes beside a component's weights; its config says what was written."""
        found, config = self._found(name), config_in(self.root.path / name)
        if config is None or not any(each.name == CONFIG for each in found.companions):
            raise self._uncopied(Path(name, CONFIG), dict(found.left).get(CONFIG, "not there"))
        kept, left = kept_of(found, before, after)
        adapted = adapt(config, before, after)
        if adapted.changed:
            made = Companion(CONFIG, adapted.encoded(), ", ".join(adapted.changed))
            kept = [made if each.name == CONFIG else each for each in kept]
        return _Part(kept, left, [f"{CONFIG}: {note}" for note in adapted.notes])

    def _found(self, name: str) -> ModelFolder:
        """The folder of a component; CheckpointError if it is somewhere else."""
        folder = self.root.path / name
        if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(self.root.path)):
            raise self._uncopied(Path(name), "a link out of the folder")
        return read_folder(folder, (file.path for file in self.root.files if file.path.parent == folder))

    def _uncopied(self, path: Path, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.root.path / path}: can't be copied, and nothing loads a pipeline without it: {reason}",
            advice=f"Fetch the pipeline again, or have all of it in one folder. {AS_A_FILE}.",
        )

    def _of_variants(self, after: Mapping[str, Tensors]) -> Iterator[str]:
        """Variants are read where there is nothing else, and are none where they are written."""
        found = [name for name, weights in self.root.components.items() if name in after and is_variant(weights)]
        if found:
            one = self.root.components[found[0]].name
            yield (
                f"of {listed(found)} a variant is read ({one}), and written under the usual name: "
                "load it without variant="
            )

    def _made(self, name: str) -> Component:
        """The component as it is written: in shards as large as the layout's, if it is in shards there."""
        weights = self.root.components[name]
        shards = [file.nbytes for file in self.root.files if file.index == weights] if is_index(weights) else []
        return Component(name, stem_of(weights), max(shards, default=None))


@dataclass(frozen=True)
class _Part:
    """What is written into a folder of a pipeline, what is not copied there, and what is to be told."""

    companions: Sequence[Companion]
    left: Sequence[Left] = ()
    notes: Sequence[str] = ()


def _within(name: str, found: _Part | ModelFolder) -> _Part:
    """The same in a folder of this name; what would lie too deep in it is left."""
    told = found.notes if isinstance(found, _Part) else ()
    made = [replace(each, name=f"{name}/{each.name}") for each in found.companions]
    deep = [(each.name, "no companion by its name") for each in made if not is_companion_name(each.name)]
    return _Part(
        [each for each in made if is_companion_name(each.name)],
        [*((f"{name}/{own}", reason) for own, reason in found.left), *deep],
        [f"{name}/{note}" for note in told],
    )


def _by_component(tensors: Tensors) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each component, as they are called in it."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        component, _, own = name.partition(".")
        found.setdefault(component, {})[own] = info
    return found
