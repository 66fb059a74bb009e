"""Folders of diffusers pipelines in miniature."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

from streammerge.models.dialects import recognise
from streammerge.models.dialects.translation import Translated
from tests.make.diffusion import ORIGINALS, part_of
from tests.make.models import MemoryModel, Tensors, make_tensors, save_model

PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""The components and what their weights are called."""

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
}
SAFETY = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}


@functools.lru_cache
def in_diffusers_names(seed: int) -> Tensors:
    """Stable Diffusion 1 as diffusers names it, each component behind its name."""
    model = MemoryModel(as_checkpoint(seed))
    found = recognise(model.tensors)
    assert found is not None
    view = Translated(model, found.named("diffusers"))
    named = {name: view.read(name, 0, info.elements).reshape(info.shape) for name, info in view.tensors.items()}
    return {name: tensor for name, tensor in named.items() if name.partition(".")[0] in PARTS}


KEPT = re.compile(
    r"model\.diffusion_model\.(?:time_embed|input_blocks\.[01]\.|middle_block\.0\.|output_blocks\.3\.1\.|out\.)"
    r"|first_stage_model\.(?:quant_conv|(?:en|de)coder\.(?:conv_|mid\.attn_1|mid\.block_1))"
    r"|cond_stage_model\.transformer\.text_model\.(?:embeddings|encoder\.layers\.0\.|final)"
)
"""The tensors of Stable Diffusion 1 that these pipelines have: so few that many can be merged."""


@functools.lru_cache
def as_checkpoint(seed: int) -> Tensors:
    """The same in its original names."""
    shapes = {name: shape for name, shape in ORIGINALS["sd1"]().items() if KEPT.match(name)}
    made = make_tensors(seed, torch.float32, shapes, scale=0.1)
    name = next(name for name in made if name.endswith("position_ids"))
    return {**made, name: torch.arange(made[name].numel()).reshape(shapes[name])}


def component(name: str, seed: int) -> Tensors:
    """The tensors of a component, as they are called in its own file."""
    return part_of(in_diffusers_names(seed), f"{name}.")


SHAPES = {name: {key: tensor.shape for key, tensor in component(name, 1).items()} for name in PARTS}


def save_pipeline(
    folder: Path,
    seed: int,
    *,
    shards: int = 1,
    variant: str = "",
    safety: bool = False,
    prediction: str = "epsilon",
) -> Path:
    """A pipeline with its configs, scheduler and tokenizer; its components in so many shards."""
    for name, stem in PARTS.items():
        _save_component(folder / name, stem, component(name, seed), shards, variant)
    _write(folder / "unet/config.json", {"_class_name": "UNet2DConditionModel", "sample_size": 8})
    _write(folder / "vae/config.json", {"_class_name": "AutoencoderKL", "latent_channels": 4})
    _write(folder / "text_encoder/config.json", {"architectures": ["CLIPTextModel"], "torch_dtype": "float32"})
    if safety:
        save_model(folder / "safety_checker/model.safetensors", make_tensors(seed))
        _write(folder / "safety_checker/config.json", {"architectures": ["StableDiffusionSafetyChecker"]})
    _write(folder / "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler", "prediction_type": prediction})
    _write(folder / "tokenizer/vocab.json", {"a": 0})
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "LICENSE.md").write_text("free")
    (folder / "README.md").write_text("of that model alone")
    _write(folder / "model_index.json", {**INDEX, **(SAFETY if safety else {})})
    return folder


def _save_component(folder: Path, stem: str, tensors: Tensors, shards: int, variant: str) -> None:
    infix = f".{variant}" if variant else ""
    if shards == 1:
        save_model(folder / f"{stem}{infix}.safetensors", tensors)
        return
    names, weight_map = list(tensors), dict[str, str]()
    for number in range(shards):
        own = names[number::shards]
        file = f"{stem}{infix}-{number + 1:05}-of-{shards:05}.safetensors"
        save_model(folder / file, {name: tensors[name] for name in own})
        weight_map |= dict.fromkeys(own, file)
    _write(folder / f"{stem}.safetensors.index{infix}.json", {"metadata": {}, "weight_map": weight_map})


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2))
