"""Folders of diffusers pipelines: which of their folders hold weights.

`model_index.json` names the components, each with the library and the class that load it; a component's folder has its
weights and a `config.json`. Folders that it doesn't name (older weights, other formats) are not the pipeline's.
(diffusers' `DiffusionPipeline.save_pretrained`.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError, count, plural
from streammerge.formats.objects import UnreadableError, read_object
from streammerge.formats.shards import PREFERRED, find_weights, is_index, is_model, is_plain_name

INDEX: Final = "model_index.json"
"""What names a pipeline's components."""

SCHEDULER: Final = Path("scheduler", "scheduler_config.json")
"""What says how a pipeline samples."""

PREDICTION_TYPE: Final = "prediction_type"
"""By this key it says what the model predicts."""

ZERO_SNR: Final = "rescale_betas_zero_snr"
"""By this key it says whether nothing of the image is left in the noise of the first step."""

COMPONENTS: Final = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The folders by which a pipeline is known whose index was left out."""

MAX_BYTES: Final = 2**18
"""The longest `model_index.json` that is read."""

_NO_WEIGHTS: Final = re.compile(r".*(?:Scheduler|Tokenizer|TokenizerFast|Processor|ProcessorPil|Extractor|Guider)")
"""What the classes of components are called that have no weights."""


_VARIANT: Final = re.compile(
    r"(?:diffusion_pytorch_)?model\.(?:[A-Za-z0-9_]+\.safetensors|safetensors\.index\.[A-Za-z0-9_]+\.json)"
)
"""What the weights of a variant are called: one file, or the index of its shards."""


@dataclass(frozen=True, slots=True)
class Scheduler:
    """What a pipeline's scheduler says of the model: what it predicts, "" if that isn't said; and whether the signal
    in its noise ends at zero, None if that isn't said."""

    prediction_type: str = ""
    zero_snr: bool | None = None


NO_SCHEDULER: Final = Scheduler()
"""What is said where there is none."""


def is_pipeline_index(path: Path) -> bool:
    """Whether the path is named as a pipeline's index is."""
    return path.name == INDEX


def pipeline_weights(folder: Path) -> dict[str, Path] | None:
    """The file, or index of shards, of each component that has weights, by its name; None if it is no pipeline.

    CheckpointError if the pipeline's index can't be read, a component that has weights isn't there, or it isn't clear
    which of several files are its weights.
    """
    if (folder / INDEX).is_file():
        found = _indexed(folder)
    elif any(map(_is_weights, folder.iterdir())):
        return None
    else:
        found = {name: folder / name for name in COMPONENTS if _has_weights(folder / name)}
    return {name: component_weights(path) for name, path in found.items()} or None


def named_components(folder: Path) -> Mapping[str, str]:
    """The components that a pipeline's index names, those that it does without left out, and the class of each.

    CheckpointError if the index can't be read.
    """
    return _named(folder / INDEX)


def index_of(folder: Path) -> Mapping[str, Any]:
    """All that a pipeline's index says; CheckpointError if it can't be read."""
    return _read(folder / INDEX)


def scheduler_of(folder: Path) -> Scheduler:
    """What a pipeline's scheduler says; nothing if nobody can read it."""
    try:
        stated = read_object(folder / SCHEDULER, MAX_BYTES)
    except UnreadableError:
        return NO_SCHEDULER
    kind, zero = stated.get(PREDICTION_TYPE), stated.get(ZERO_SNR)
    return Scheduler(kind if isinstance(kind, str) else "", zero if isinstance(zero, bool) else None)


def scheduler_config(folder: Path) -> Mapping[str, Any]:
    """All that a pipeline's scheduler says; CheckpointError if there is none, or nobody can read it."""
    return _read(
        folder / SCHEDULER, "the scheduler's config, which has to say how the model is sampled", "Fetch it again."
    )


def is_variant(weights: Path) -> bool:
    """Whether weights, or an index of them, are those of a variant, such as `model.fp16.safetensors`."""
    return _VARIANT.fullmatch(weights.name) is not None and weights.name not in PREFERRED


def check_alone(folder: Path) -> None:
    """CheckpointError if a pipeline's folder has a whole checkpoint beside the components, which may be meant too."""
    beside = sorted(entry.name for entry in folder.iterdir() if _is_weights(entry))
    if beside and (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder}: the folder is a diffusers pipeline, and holds a model beside it",
            found=beside,
            advice=f"Name the file, or {folder / INDEX} for the pipeline.",
        )


def component_weights(folder: Path) -> Path:
    """A component's weights: safetensors before torch files, and before variants such as `model.fp16.safetensors`."""
    plain = [folder / name for name in PREFERRED if ".safetensors" in name and (folder / name).is_file()]
    if plain:
        return plain[0]
    variants = sorted(entry for entry in folder.iterdir() if entry.is_file() and _VARIANT.fullmatch(entry.name))
    if len(variants) > 1:
        raise CheckpointError(
            f"{folder}: the folder holds {len(variants)} variants of the weights, and none that is no variant",
            found=[entry.name for entry in variants],
            advice="Leave the one that is meant there, and move the others away.",
        )
    return variants[0] if variants else find_weights(folder)


def _indexed(folder: Path) -> dict[str, Path]:
    """The components that the index names and that have weights; all that are known where it names none."""
    named = _named(folder / INDEX)
    found = {name: folder / name for name in named or COMPONENTS if _has_weights(folder / name)}
    absent = [
        f"{name}   {kind}"
        for name, kind in named.items()
        if name not in found and not _NO_WEIGHTS.fullmatch(kind) and _is_needed(folder / name)
    ]
    if absent:
        raise CheckpointError(
            f"{folder}: {count(absent, 'component')} that {INDEX} names {plural(absent, 'has', 'have')} no weights",
            found=absent,
            advice="Fetch the whole folder, or name a component's own folder.",
        )
    return found


def _is_needed(folder: Path) -> bool:
    """Whether a component without weights can't be one that has none: it isn't there, or its weights aren't."""
    return not folder.is_dir() or (folder / "config.json").is_file()


def _named(index: Path) -> Mapping[str, str]:
    """The class of each component, those left out that the pipeline does without."""
    return {name: value[1] for name, value in _read(index).items() if _is_component(name, value)}


def _read(
    path: Path,
    what: str = "a pipeline's index",
    advice: str = "Fetch it again, or name a component's own folder.",
) -> Mapping[str, Any]:
    """What the file says."""
    try:
        return read_object(path, MAX_BYTES)
    except UnreadableError as problem:
        raise CheckpointError(f"{path}: can't be read as {what}: {problem}", advice=advice) from None


def _is_component(name: str, value: Any) -> bool:  # noqa: ANN401
    """`"unet": ["diffusers", "UNet2DConditionModel"]`; without names between the quotes the pipeline lacks it."""
    return is_plain_name(name) and isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


def _is_text(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, str)


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(map(_is_weights, folder.iterdir()))


def _is_weights(path: Path) -> bool:
    return path.is_file() and (is_model(path) or is_index(path))
