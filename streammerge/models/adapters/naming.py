"""What the modules of an adapter are called that is made of a model's differences: the way back of `targets.py`.

    model.diffusion_model.input_blocks.1.1.proj_in.weight
        kohya   ─►  lora_unet_down_blocks_0_attentions_0_proj_in
        comfy   ─►  diffusion_model.input_blocks.1.1.proj_in
        peft    ─►  base_model.model.model.diffusion_model.input_blocks.1.1.proj_in

Kohya's names of Stable Diffusion 1 and 2 are diffusers', of all else the original's; those of text encoders are
transformers'. Where a naming has several tensors for one, each is a module of its own: rows of the difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from streammerge.models.adapters.dialects import COMFY
from streammerge.models.adapters.modules import PEFT
from streammerge.models.adapters.ranks import Dialect
from streammerge.models.adapters.targets import Targets, underscored
from streammerge.models.configs import embedding_and_head
from streammerge.models.dialects import Component, Recognised, Source, recognise
from streammerge.models.dialects.encoders import CLIP, T5
from streammerge.models.dialects.pieces import whole
from streammerge.models.dialects.places import Role
from streammerge.models.dialects.recognition import moved
from streammerge.models.dialects.unets import UNET
from streammerge.tensors import TensorInfo

EMBEDDING: Final = re.compile(
    r"(?:.*\.)?(?:(?:\w*_)?emb(?:s|ed|eds|edding|eddings)?|embed_(?!out)\w+|\w*embeddings?|wte|wpe|shared)"
)
"""The names of modules that are tables of words or of positions."""

TRANSPOSED: Final = re.compile(r"(?:.*\.)?(?:c_attn|c_proj|c_fc|q_attn)")
"""The modules of GPT-2 and its kin whose weights lie transposed."""

NO_VECTORS: Final = "biases, norms and other vectors: --biases"
NO_PLACE: Final = "PEFT's files have no place for vectors: --names comfy"
NO_NAME: Final = "no program has names for them in adapters"
NO_TABLES: Final = "kohya's tools have no factors of embeddings: --names comfy"
NOT_FOUND: Final = "it could not be told again which tensors these names mean"
NO_MODULE: Final = "their names end neither in weight nor in bias"


@dataclass(frozen=True, slots=True)
class Module:
    """A module's weight or bias, as a naming has it: how it is called, and which of the model's tensors it is.

    Without a `name` it can't be written, for this `reason`.
    """

    key: str
    part: str
    source: Source
    name: str = ""
    reason: str = ""


def usual_dialect(tensors: Mapping[str, TensorInfo]) -> Dialect:
    """Whose names adapters of such a model have as a rule."""
    known = recognise(tensors)
    if known is None:
        return "peft" if embedding_and_head(tensors)[0] else "comfy"
    denoiser = known.component("denoiser")
    return "kohya" if denoiser is None or denoiser.kind is UNET else "comfy"


def modules_of(tensors: Mapping[str, TensorInfo], dialect: Dialect) -> Iterator[Module]:
    """All tensors of a model as modules of an adapter; what has no name in a dialect is told too.

    A name that would mean something else, or nothing, when it is read again is none.
    """
    targets = Targets(tensors)
    for module in _modules(tensors, dialect):
        found = targets.find(module.name, module.part) if module.name else None
        if module.name and (found is None or found.pieces != module.source.pieces):
            yield _nameless(module.source.tensors[0], module.source, NOT_FOUND)
        else:
            yield module


def _modules(tensors: Mapping[str, TensorInfo], dialect: Dialect) -> Iterator[Module]:
    known = recognise(tensors) if dialect != "peft" else None
    if known is None:
        prefix = {"kohya": "lora_unet_", "comfy": "diffusion_model.", "peft": PEFT}[dialect]
        for name, info in tensors.items():
            yield _module(name, whole(name, info), prefix, dialect)
        return
    for component in known.components:
        yield from _of_component(known, component, dialect)
    for name, info in known.others.items():
        yield _nameless(name, whole(name, info), NO_NAME)


def _of_component(known: Recognised, component: Component, dialect: Dialect) -> Iterator[Module]:
    prefix = (_KOHYA if dialect == "kohya" else COMFY).get(component.role, "")
    if component.role == "CLIP" and dialect == "kohya" and len(_encoders(known)) > 1:
        prefix = "lora_te1_"
    if component.role == "T5" and any(name.startswith("text_encoders.umt5xxl.") for name in known.tensors):
        prefix = prefix.replace("t5xxl", "umt5xxl")
    own, theirs = component.place.own, component.kind in (CLIP, T5) or _is_in_diffusers(known, component, dialect)
    side = "theirs" if theirs else "ours"
    if component.kind is T5:
        side = component.side
    for inner, source in component.seen(side).items():  # type: ignore[arg-type]
        found = moved(source, own)
        if prefix:
            yield _module(inner, found, prefix, dialect)
        else:
            yield _nameless(own(inner), found, NO_NAME)
    for inner in component.unnamed(side):  # type: ignore[arg-type]
        yield _nameless(own(inner), whole(own(inner), component.tensors[inner]), NO_NAME)


def _is_in_diffusers(known: Recognised, component: Component, dialect: Dialect) -> bool:
    """Whether the denoiser's modules are called as in diffusers: kohya's of Stable Diffusion 1 and 2."""
    return dialect == "kohya" and component.kind is UNET and known.architecture in _IN_DIFFUSERS


_IN_DIFFUSERS: Final = ("Stable Diffusion 1", "Stable Diffusion 2")

_KOHYA: Final[Mapping[Role, str]] = {
    "denoiser": "lora_unet_",
    "CLIP": "lora_te_",
    "CLIP 2": "lora_te2_",
    "T5": "lora_te3_",
}


def _encoders(known: Recognised) -> list[Role]:
    return [part.role for part in known.components if part.role in ("CLIP", "CLIP 2", "T5")]


def _module(name: str, source: Source, prefix: str, dialect: Dialect) -> Module:
    """A tensor as a module's weight or bias, by its name in the dialect's naming."""
    stem, _, part = name.rpartition(".")
    for own in ("model.diffusion_model.", "diffusion_model."):
        stem = stem.removeprefix(own) if dialect != "peft" else stem
    called = prefix + (underscored(stem) if dialect == "kohya" else stem)
    shape = source.info.shape
    if part not in ("weight", "bias") or not stem:
        return _nameless(name, source, NO_MODULE)
    if dialect == "peft" and len(shape) < 2:
        return _nameless(name, source, NO_PLACE)
    if dialect == "kohya" and EMBEDDING.fullmatch(stem) and len(shape) > 1:
        return _nameless(name, source, NO_TABLES)
    return Module(f"{called}.{part}", part, source, called)


def _nameless(name: str, source: Source, reason: str) -> Module:
    return Module(name, "", source, reason=reason)


def tensor_names(module: Module, dialect: Dialect) -> Mapping[str, str]:
    """What the tensors of a module are called, by their roles."""
    name, is_matrix = module.name, len(module.source.info.shape) > 1
    if not is_matrix or module.part == "bias":
        return {"diff": f"{name}.{'diff_b' if module.part == 'bias' else 'diff'}"}
    if dialect != "peft":
        return {"up": f"{name}.lora_up.weight", "down": f"{name}.lora_down.weight", "alpha": f"{name}.alpha"}
    if EMBEDDING.fullmatch(name):
        return {"up": f"{name}.lora_embedding_B", "down": f"{name}.lora_embedding_A"}
    return {"up": f"{name}.lora_B.weight", "down": f"{name}.lora_A.weight"}
