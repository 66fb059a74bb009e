"""What the modules of an adapter are called that is made of a model's differences: the way back of `targets.py`.

    model.diffusion_model.input_blocks.1.1.proj_in.weight
        kohya      ─►  lora_unet_down_blocks_0_attentions_0_proj_in
        comfy      ─►  diffusion_model.input_blocks.1.1.proj_in
        diffusers  ─►  unet.down_blocks.0.attentions.0.proj_in
        peft       ─►  base_model.model.model.diffusion_model.input_blocks.1.1.proj_in

Kohya's names of Stable Diffusion 1 and 2 are diffusers', of all else the original's; those of text encoders are
transformers'. Where a naming has several tensors for one, each is a module of its own: rows of the difference.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from streammerge.models.adapters.dialects import SPELLINGS, Dialect, spelled
from streammerge.models.adapters.targets import Targets
from streammerge.models.configs import embedding_and_head
from streammerge.models.dialects import Component, Recognised, Source, recognise
from streammerge.models.dialects.encoders import CLIP, T5
from streammerge.models.dialects.pieces import whole
from streammerge.models.dialects.places import Role
from streammerge.models.dialects.recognition import moved
from streammerge.models.dialects.rules import Side, accented
from streammerge.models.dialects.unets import UNET
from streammerge.tensors import TensorInfo

_EMBEDDING: Final = re.compile(
    r"(?:.*\.)?(?:(?:\w*_)?emb(?:s|ed|eds|edding|eddings)?|embed_(?!out)\w+|\w*embeddings?|wte|wpe|shared"
    r"|relative_attention_bias)"
)
"""The names of modules that are tables of words or of positions, and of some that are convolutions of patches."""

DECODER: Final = "decoder.block."
"""The beginning of names that T5 has as a language model, and not as a text encoder."""

NO_VECTORS: Final = "biases, norms and other vectors: --biases"
NO_PLACE: Final = "PEFT has no place for such vectors, nor has diffusers for any: --names comfy"
NO_NAME: Final = "no program has names for them in adapters"
NO_TABLES: Final = "kohya's tools and diffusers have no factors of embeddings: --names comfy"
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
    if known is None or any(name.startswith(DECODER) for name in tensors):
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
        called = functools.partial(spelled, dialect, "denoiser", roles=(), like={})
        for name, info in tensors.items():
            inner = name if dialect == "peft" else _within(name)
            yield _module(inner, name, whole(name, info), dialect, called)
        return
    for component in known.components:
        yield from _of_component(known, component, dialect)
    for name, info in known.others.items():
        yield _nameless(name, whole(name, info), NO_NAME)


def _within(name: str) -> str:
    """What a tensor of a model that isn't recognised is called in its denoiser."""
    return name.removeprefix("model.diffusion_model.").removeprefix("diffusion_model.")


def _of_component(known: Recognised, component: Component, dialect: Dialect) -> Iterator[Module]:
    own, side = component.place.own, _side(known, component, dialect)
    roles = {part.role for part in known.components}
    called = functools.partial(spelled, dialect, component.role, roles=roles, like=_unusual(known, dialect))
    accent = component.kind.accent if dialect == "comfy" else ()
    for inner, source in component.seen(side).items():
        yield _module(accented(inner, accent), own(inner), moved(source, own), dialect, called)
    for inner in component.unnamed(side):
        yield _nameless(own(inner), whole(own(inner), component.tensors[inner]), NO_NAME)


def _side(known: Recognised, component: Component, dialect: Dialect) -> Side:
    """In which naming a dialect has a component's modules."""
    if component.kind is T5:
        return component.side
    is_kohyas = dialect == "kohya" and component.kind is UNET and known.architecture in _IN_DIFFUSERS
    return "theirs" if component.kind is CLIP or dialect == "diffusers" or is_kohyas else "ours"


_IN_DIFFUSERS: Final = ("Stable Diffusion 1", "Stable Diffusion 2")
"""Of these kohya's names are diffusers'."""


def _unusual(known: Recognised, dialect: Dialect) -> Mapping[Role | None, str]:
    """What stands before the modules of components that are other than most models'."""
    found: dict[Role | None, str] = {}
    if dialect == "comfy" and known.architecture == "Stable Diffusion 2":
        found["CLIP"] = "text_encoders.clip_h.transformer."
    if dialect == "comfy" and any(name.startswith("text_encoders.umt5xxl.") for name in known.tensors):
        found["T5"] = "text_encoders.umt5xxl.transformer."
    if dialect == "diffusers" and any(each.role == "denoiser" and each.kind is UNET for each in known.components):
        found["denoiser"] = "unet."
    if dialect == "diffusers" and any(each.role == "CLIP 2" for each in known.components):
        found["T5"] = "text_encoder_3."
    return found


def _module(inner: str, name: str, source: Source, dialect: Dialect, called: Callable[[str], str | None]) -> Module:
    """A tensor as a module's weight or bias: `inner` is its name in its component, `name` in the model."""
    stem, _, part = inner.rpartition(".")
    module, shape, spelling = called(stem), source.info.shape, SPELLINGS[dialect]
    if module is None:
        return _nameless(name, source, NO_NAME)
    if part not in ("weight", "bias") or not stem:
        return _nameless(name, source, NO_MODULE)
    if "diff" not in spelling.tensors and (len(shape) < 2 or part == "bias"):
        return _nameless(name, source, NO_PLACE)
    if not spelling.has_tables and is_table(stem, shape):
        return _nameless(name, source, NO_TABLES)
    return Module(f"{module}.{part}", part, source, module)


def is_table(module: str, shape: tuple[int, ...]) -> bool:
    """Whether a module is a table of words or of positions, whose factors PEFT keeps the other way round."""
    return len(shape) == 2 and _EMBEDDING.fullmatch(module) is not None


def _nameless(name: str, source: Source, reason: str) -> Module:
    return Module(name, "", source, reason=reason)


def tensor_names(module: Module, dialect: Dialect) -> Mapping[str, str]:
    """What the tensors of a module are called, by their roles."""
    tensors, shape = SPELLINGS[dialect].tensors, module.source.info.shape
    if len(shape) < 2 or module.part == "bias":
        role = "diff_b" if module.part == "bias" else "diff"
        return {"diff": f"{module.name}.{tensors[role]}"}
    table = "embedding." if "embedding.up" in tensors and is_table(module.name, shape) else ""
    own = {role: tensors.get(table + role) for role in ("up", "down", "alpha")}
    return {role: f"{module.name}.{tail}" for role, tail in own.items() if tail is not None}
