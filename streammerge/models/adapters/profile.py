"""What an adapter's header tells of it: its dialect, how many modules it has of which ranks, and for which model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError, count
from streammerge.models.adapters.config import Config, read_configs
from streammerge.models.adapters.parameters import parameter_path, parameters_of
from streammerge.models.adapters.parts import sorted_parts
from streammerge.tensors import TensorInfo

BASES: Final = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
"""Keys of metadata that tell of the model which an adapter was made for, the closest first."""

NAMES: Final[Mapping[str, str]] = {
    "kohya's names": r"(?:lora|oft)_(?:unet|te\d?)_",
    "OneTrainer's names": r"lora_transformer_",
    "LyCORIS' names": r"lycoris_",
    "PEFT's names": r"base_model\.model\.",
    "ComfyUI's names": r"(?:model\.)?diffusion_model\.|text_encoders\.",
    "diffusers' names": r"(?:unet|transformer|text_encoder\w*)\.",
}
"""Whose names modules have, by how they begin; the first that fits."""

RANKED: Final[Mapping[str, int]] = {
    "down": 0,
    "embedding.down": 0,
    "hada.w1_b": 0,
    "lokr.w2_b": 0,
    "lokr.w1_b": 0,
    "vera.d": 0,
    "mlx.b": 0,
}
"""Parts whose first dimension is their module's rank."""


@dataclass(frozen=True)
class Profile:
    """What is told of an adapter; `ranks` has of each rank how many modules have it."""

    names: str
    modules: int
    ranks: Mapping[int, int] = field(default_factory=dict)
    base: str = ""

    def __str__(self) -> str:
        low, high = min(self.ranks, default=0), max(self.ranks, default=0)
        ranks = f", rank {low}" + (f" to {high}" if high > low else "") if high else ""
        base = f", for {self.base}" if self.base else ""
        return f"{self.names}: {count(range(self.modules), 'module')}{ranks}{base}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        ranks = {str(rank): number for rank, number in sorted(self.ranks.items())}
        return {"names": self.names, "modules": self.modules, "ranks": ranks, "base": self.base}


def profile_of(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], path: Path) -> Profile:
    """What the header of an adapter at this path tells, and its adapter_config.json."""
    found, configs = sorted_parts(tensors), _configs(metadata, path)
    own = _ranks_of_parameters(found.modules, configs)
    ranks: Counter[int] = Counter()
    for module, roles in found.modules.items():
        shapes = (tensors[roles[role]].shape for role in RANKED if role in roles)
        ranks.update([own.get(module, shape[0]) for shape in shapes if shape][:1])
    return Profile(_names(found.modules), len(found.modules), ranks, _base(metadata, configs))


def _configs(metadata: Mapping[str, str], path: Path) -> Mapping[str, Config]:
    """What the adapter's config says; nothing where that can't be read."""
    try:
        return read_configs(path, metadata)
    except CheckpointError:
        return {}


def _ranks_of_parameters(modules: Iterable[str], configs: Mapping[str, Config]) -> Mapping[str, int]:
    """The rank of one expert where the factors of all of them are one tensor, as far as that can be told."""
    config = configs.get("")
    try:
        parameters = parameters_of(modules, config) if config is not None else {}
    except ValueError:
        return {}
    found = {each: config.rank(parameter_path(each, name)) for each, name in parameters.items()} if config else {}
    return {module: rank for module, rank in found.items() if rank}


def _names(modules: Mapping[str, Any]) -> str:
    counted = Counter(
        next((name for name, begin in NAMES.items() if re.match(begin, module)), "the model's own names")
        for module in modules
    )
    return " and ".join(name for name, _ in counted.most_common())


def _base(metadata: Mapping[str, str], configs: Mapping[str, Config]) -> str:
    """The model that an adapter was made for, as it says itself."""
    said = next((metadata[key] for key in BASES if metadata.get(key)), "")
    named = (config.said.get("base_model_name_or_path") for config in configs.values())
    return next((name for name in named if isinstance(name, str) and name), said)
