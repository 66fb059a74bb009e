"""How many layers each stack of a model has: what a gradient is stretched over.

They are counted in the tensors' names. Layers of multi-token prediction stand behind the model's own under the next
numbers, and a file may hold a part of the layers only: where the config.json beside a model says how many there are,
that counts. What lies beyond the last layer takes the gradient's last value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.formats.objects import UnreadableError, read_object
from streammerge.formats.shards import is_index, is_model
from streammerge.models.views import beneath

MAX_CONFIG: Final = 4 * 2**20
"""The longest config.json, in bytes, that is read: those of image classifiers name tens of thousands of labels."""

MAX_LAYERS: Final = 10_000
"""The most layers that a config.json may speak of."""

_LAYER: Final = re.compile(r"^(.*?)\.(\d{1,9})\.")
_PREDICTION: Final = re.compile(r"(?:eh_proj|enorm|hnorm|shared_head)\.")
_MODEL_FILE: Final = re.compile(r"(?:pytorch_)?model(?:[-.].*)?")
_COUNTS: Final = ("num_hidden_layers", "n_layer", "n_layers")
_TOWERS: Final = (("vision", "visual", "image", "vit"), ("audio", "speech"))


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where a tensor is: in the layer of this number of a stack. `rest` is what follows in its name."""

    stack: str
    number: int
    rest: str

    def moved(self, number: int) -> str:
        """The tensor's name in the layer of another number."""
        return f"{self.stack}.{number}.{self.rest}"


def place_of(name: str) -> LayerPlace | None:
    """The layer that a tensor is in, by its name; None for what is in none."""
    match = _LAYER.match(name)
    return None if match is None else LayerPlace(match[1], int(match[2]), name[match.end() :])


@dataclass(frozen=True, slots=True)
class Layers:
    """How many layers each stack of a model has, and the number of the `first` of them."""

    counts: Mapping[str, int]
    first: int = 0

    @classmethod
    def of(cls, names: Iterable[str], config: Mapping[str, Any] | None = None) -> Layers:
        """Count the layers in tensor names such as `model.layers.31.mlp.up_proj.weight`, and ask the model's config."""
        counts: dict[str, int] = {}
        predicting: dict[str, int] = {}
        for name in names:
            match = _LAYER.match(name)
            if match is None:
                continue
            stack, index = match[1], int(match[2])
            counts[stack] = max(counts.get(stack, 0), index + 1)
            if index and _PREDICTION.match(name, match.end()):
                predicting[stack] = min(predicting.get(stack, index), index)
        return cls({**counts, **predicting, **_configured(counts, config or {})})

    def position(self, name: str) -> float:
        """Where in its stack a tensor lies, from 0 to 1; 0 for what is in no layer, 1 in a stack of one."""
        match = _LAYER.match(name)
        if not match:
            return 0.0
        count = self.counts.get(match[1], 1)
        return min((int(match[2]) - self.first) / (count - 1), 1.0) if count > 1 else 1.0


def _configured(counts: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, int]:
    """The layers that the config speaks of, by stack: of each tower the stack with the most layers."""
    if config.get("is_encoder_decoder") or "_diffusers_version" in config:  # several stacks under names of their own
        return {}
    said: dict[tuple[bool, int], set[int]] = {}
    for path, section in sections(config):
        for number in [number for key in _COUNTS if (number := _count(section.get(key), f"{path}.{key}"))][:1]:
            said.setdefault((bool(path), tower_of(path)), set()).add(number)
    stacks = {tower_of(stack): stack for stack in sorted(counts, key=lambda stack: counts[stack])}
    found = {stack: said.get((True, tower)) or said.get((False, tower), set()) for tower, stack in stacks.items()}
    return {stack: min(numbers) for stack, numbers in found.items() if len(numbers) == 1}


def sections(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and those in it (`text_config`, `thinker_config`), the outer ones first."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and not key.startswith(("quantization", "generation")):
            yield from sections(value, f"{path}.{key}")


def tower_of(name: str) -> int:
    """Which part of a multimodal model is meant: 0 the language model, and one number for each of the others."""
    words = name.lower()
    return next((number for number, marks in enumerate(_TOWERS, 1) if any(mark in words for mark in marks)), 0)


def _count(value: object, where: str) -> int:
    """The number of layers, 0 where none is said."""
    if value is None:
        return 0
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_LAYERS:
        return value
    raise CheckpointError(
        f"config.json: {where.lstrip('.')} must be a whole number from 1 to {MAX_LAYERS}, found {str(value)[:40]}",
        advice="Correct it, or move it away: then the layers are counted in the tensors' names.",
    )


def config_beside(path: Path) -> Mapping[str, Any]:
    """The config.json of a model; empty if there is none, or if a folder of many models has one that may be any's.

    CheckpointError if there is one that can't be read: a gradient must not be stretched over a wrong count.
    """
    file = path.parent / "config.json"
    if path.is_dir() or not file.is_file() or not _owns_folder(path):  # a folder is a pipeline's, of many models
        return {}
    try:
        return read_config(file)
    except UnreadableError as problem:
        raise CheckpointError(
            f"{file}: can't be read as the model's config, which says how many layers a gradient goes over: {problem}",
            advice="Fetch it again, or move it away: then the layers are counted in the tensors' names.",
        ) from None


def read_config(file: Path) -> Mapping[str, Any]:
    """The values of a config.json; UnreadableError if it is none."""
    return read_object(file, MAX_CONFIG)


def _owns_folder(path: Path) -> bool:
    """Whether the folder is the model's own: by the name that transformers gives its files, or because it is alone."""
    if is_index(path) or _MODEL_FILE.fullmatch(path.stem):
        return True
    return all(entry == path or not is_model(entry) for entry in path.parent.iterdir())


def layers_of(model: Any) -> Layers:  # noqa: ANN401  (any model: whether it has a path, or layers, is asked)
    """The layers of a model: those that it knows of, as a merge does, or that its names and its config tell."""
    own = getattr(model, "layers", None)
    if isinstance(own, Layers):
        return own
    path = getattr(beneath(model), "path", None)
    return Layers.of(model.tensors, config_beside(Path(path)) if isinstance(path, str | os.PathLike) else None)
