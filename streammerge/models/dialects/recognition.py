"""What a model's names are: its components, and the naming of each, told by its tensors alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from streammerge.models.adapters.recognition import adapter_text
from streammerge.models.architecture import guess_architecture
from streammerge.models.dialects.depth import MIDAS
from streammerge.models.dialects.dits import FLUX, FLUX2, HUNYUAN_DIT, SD3, Z_IMAGE
from streammerge.models.dialects.encoders import CLIP, T5
from streammerge.models.dialects.pieces import Source, to_ours, to_theirs, whole
from streammerge.models.dialects.places import (
    ARRANGEMENTS,
    ROLES,
    SECOND,
    UNKNOWN_ARRANGEMENT,
    Arrangement,
    Place,
    Role,
)
from streammerge.models.dialects.rules import Kind, Linking, Side
from streammerge.models.dialects.unets import UNET
from streammerge.models.dialects.vaes import VAE, WAN_22_VAE, WAN_VAE
from streammerge.models.dialects.videos import HUNYUAN, QWEN_IMAGE, WAN
from streammerge.models.prediction import is_of_denoiser
from streammerge.tensors import TensorInfo

Naming = Literal["original", "diffusers", "bare"]
"""Names as in original checkpoints, as in diffusers' folders, or the original ones with nothing before them."""

KINDS: Final[Mapping[Role, tuple[Kind, ...]]] = {
    "denoiser": (UNET, FLUX2, HUNYUAN, FLUX, SD3, QWEN_IMAGE, Z_IMAGE, HUNYUAN_DIT, WAN),
    "ControlNet": (UNET,),
    "VAE": (WAN_VAE, WAN_22_VAE, VAE),
    "CLIP": (CLIP, T5),
    "CLIP 2": (CLIP, T5),
    "T5": (T5,),
    "depth": (MIDAS,),
}
"""What a component of each role may be."""

TITLES: Final[Mapping[Role, str]] = {"ControlNet": "ControlNet", "CLIP": "text encoder", "CLIP 2": "text encoder 2"}
"""What components are called, if not as their kind is."""

WITHOUT_MODEL: Final = "embeddings.token_embedding.weight"
"""By this name CLIP's text encoder is known where its names lack `text_model.`."""

CONTROL: Final = ("input_hint_block.", "zero_convs.", "controlnet_")
"""How names start that a ControlNet has, and what it is for has not."""

MOST_UNKNOWN: Final = 0.25
"""The share of a component's names that the rules may not know: with more of them it is something else."""


@dataclass(frozen=True, eq=False)
class Component:
    """A part of a model that is known: what it does, how it is built, where its names are and what they are.

    `tensors` are the component's, by their names in its naming, without what the file puts before them.
    """

    role: Role
    kind: Kind
    place: Place
    tensors: Mapping[str, TensorInfo]

    @property
    def title(self) -> str:
        """What people call it."""
        return TITLES.get(
            self.role, "transformer" if self.role == "denoiser" and self.kind is not UNET else self.kind.name
        )

    @property
    def side(self) -> Side:
        """In which of the two namings of its kind it is."""
        return self.place.side

    @functools.cached_property
    def linking(self) -> Linking:
        """How its names and those of the other naming belong together."""
        return Linking(self.kind, self.tensors, self.side)

    @functools.cached_property
    def _translated(self) -> tuple[Mapping[str, Source], tuple[str, ...]]:
        """Its tensors in the other naming, and which of its own have no name there."""
        found: dict[str, Source] = {}
        for link in self.linking.links.values():
            if self.side == "ours":
                found |= to_theirs(link, self.tensors) or {}
            elif (source := to_ours(link, self.tensors)) is not None:
                found[link.ours] = source
        used = {name for source in found.values() for name in source.tensors}
        return found, tuple(name for name in self.tensors if name not in used)

    def seen(self, side: Side) -> Mapping[str, Source]:
        """Its tensors in a naming of its kind, made of pieces of `tensors`. What has no name there is left out."""
        if side == self.side:
            return {name: whole(name, info) for name, info in self.tensors.items()}
        return self._translated[0]

    def unnamed(self, side: Side) -> tuple[str, ...]:
        """Those of its tensors that have no name in this naming."""
        return () if side == self.side else self._translated[1]


@dataclass(frozen=True, eq=False)
class Recognised:
    """A model whose names are understood: all its tensors, its components, and what is in none of them."""

    tensors: Mapping[str, TensorInfo]
    architecture: str
    components: tuple[Component, ...]
    others: Mapping[str, TensorInfo]

    def component(self, role: Role) -> Component | None:
        """The component of this role."""
        return next((component for component in self.components if component.role == role), None)

    def named(self, naming: Naming) -> Mapping[str, Source]:
        """All of the model in a naming, each tensor with those of the model, by its own names, that it is made of.

        What has no name in it keeps its own: `unnamed` says which these are.
        """
        found: dict[str, Source] = {}
        for component in self._first:
            place, own = self.place(component, naming), component.place.own
            for name, source in component.seen(place.side).items():
                found[place.own(name)] = moved(source, own)
        return found | {name: whole(name, self.tensors[name]) for name in self.unnamed(naming)}

    def unnamed(self, naming: Naming) -> tuple[str, ...]:
        """The model's tensors that have no name in a naming, and keep their own."""
        left = list(self.others)
        for component in self.components:
            is_first = component in self._first
            names = component.unnamed(self.place(component, naming).side) if is_first else component.tensors
            left += map(component.place.own, names)
        return tuple(left)

    @property
    def _first(self) -> tuple[Component, ...]:
        """Of every role one component: what is there twice keeps its other names."""
        return tuple({component.role: component for component in reversed(self.components)}.values())[::-1]

    @property
    def unplaced(self) -> tuple[Component, ...]:
        """The components of which it isn't known where original checkpoints keep them, and where pipelines do."""
        known = self._arrangement
        return tuple(
            part
            for part in self.components
            if len(self.components) > 1 and not (part.role in known.original and part.role in known.diffusers)
        )

    def place(self, component: Component, naming: Naming) -> Place:
        """Where a naming has a component: its own place, if that isn't known."""
        home = self.homes(naming).get(component.role, component.place)
        if len(self.components) == 1:
            return _alone(component, naming, home)
        return replace(home, prefix="") if naming == "bare" else home

    def homes(self, naming: Naming) -> Mapping[Role, Place]:
        """Where whole models of the architecture have each component in a naming; nothing if that isn't known."""
        return self._arrangement.diffusers if naming == "diffusers" else self._arrangement.original

    @property
    def _arrangement(self) -> Arrangement:
        """By the architecture; where that isn't known, by how the model is built."""
        kinds = (component.kind.name for component in self.components if component.role == "denoiser")
        return ARRANGEMENTS.get(self.architecture) or ARRANGEMENTS.get(next(kinds, ""), UNKNOWN_ARRANGEMENT)


def _alone(component: Component, naming: Naming, home: Place) -> Place:
    """Where a component is that is all of a model: behind no prefix, but for the original's UNet and text encoders."""
    if naming == "diffusers":
        return Place("", "theirs")
    if component.kind is CLIP:  # some originals have it in transformers' names
        return home if naming == "original" else Place("", component.side)
    is_unet = component.kind is UNET and naming == "original"
    return Place(ARRANGEMENTS[UNET.name].original[component.role].prefix if is_unet else "", "ours")


def moved(source: Source, own: Callable[[str], str]) -> Source:
    """The source with its pieces under the names that the file gives them."""
    return replace(source, pieces=tuple(replace(piece, tensor=own(piece.tensor)) for piece in source.pieces))


def recognise(tensors: Mapping[str, TensorInfo]) -> Recognised | None:
    """What the names of a model are, by its header alone; None if no component of it is known."""
    if adapter_text(tensors):
        return None
    marks = {name: info for name, info in tensors.items() if is_of_denoiser(name)}  # they are called so everywhere
    groups = _by_place({name: info for name, info in tensors.items() if name not in marks} if marks else tensors)
    has_second = any(name.startswith(SECOND) for name in tensors)
    found, others = list[Component](), dict[str, TensorInfo]()
    for prefix in sorted(groups, key=len, reverse=True):
        role = "CLIP 2" if has_second and prefix == "cond_stage_model.model." else ROLES[prefix]
        component = _component(prefix, role, groups[prefix])
        if component is not None:
            found.append(component)
        elif prefix:
            groups[""] |= groups[prefix]
        else:
            others = groups[""]
    ordered = sorted(found, key=lambda component: list(KINDS).index(component.role))
    architecture = guess_architecture(tensors).partition(" (")[0]
    return Recognised(tensors, architecture, tuple(ordered), {**others, **marks}) if found else None


_PREFIX: Final = re.compile("|".join(re.escape(prefix) for prefix in sorted(ROLES, key=len, reverse=True)))


def _by_place(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors by what stands before their names."""
    groups: dict[str, dict[str, TensorInfo]] = {"": {}}
    for name, info in tensors.items():
        match = _PREFIX.match(name)
        groups.setdefault(match.group() if match else "", {})[name] = info
    return groups


def _component(prefix: str, role: Role | None, tensors: Mapping[str, TensorInfo]) -> Component | None:
    """The component behind a prefix, if its names are those of one."""
    names = [name[len(prefix) :] for name in tensors]
    roles = KINDS if role is None else {role: KINDS[role]}
    for kind in dict.fromkeys(kind for kinds in roles.values() for kind in kinds):
        for place in _places(prefix, kind, names):
            own = {place.inner(name): info for name, info in tensors.items()}
            component = Component(_role(role, kind, own), kind, place, own)
            if len(component.linking.unknown) <= MOST_UNKNOWN * len(own):
                return component
    return None


def _places(prefix: str, kind: Kind, names: Collection[str]) -> Iterator[Place]:
    """The component's place, if the names are of this kind."""
    if any(map(re.compile(kind.unless).match, names)):
        return
    if any(map(re.compile(kind.accented).match, names)):
        yield Place(prefix, "ours", accent=kind.accent)
    for side, sign in kind.signs.items():
        fits = re.compile(sign).match
        if any(map(fits, names)):
            yield Place(prefix, side)
    if kind is CLIP and WITHOUT_MODEL in names:
        yield Place(prefix, "theirs", "text_model.")


def _role(role: Role | None, kind: Kind, names: Collection[str]) -> Role:
    if kind is T5:
        return "T5"
    if kind in KINDS["denoiser"] and any(name.startswith(CONTROL) for name in names):
        return "ControlNet"
    return next(own for own, kinds in KINDS.items() if kind in kinds) if role is None else role
