"""Inputs that are one architecture under different names: read in the layout's, and told of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from streammerge.errors import count, listed, plural
from streammerge.models.dialects import Component, Reading, Recognised, read_as, recognise
from streammerge.models.dialects.translation import Translated
from streammerge.models.views import Decoded
from streammerge.tensors import Model, TensorInfo

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Named:
    """Models in the names of one of them, as far as they are known, and what the user should know of that."""

    models: Mapping[str, Model]
    remarks: tuple[str, ...] = ()


def in_one_naming(models: Mapping[str, Model], layout: str) -> Named:
    """Every model in the names of the layout's; itself where these are its own, or nobody knows what its names mean."""
    own = models[layout]
    strangers = [name for name, model in models.items() if name != layout and _differ(model.tensors, own.tensors)]
    known = recognise(own.tensors) if strangers else None
    if known is None:
        return Named(models)
    seen, remarks = dict(models), list[str]()
    for name in strangers:
        values = Decoded(models[name])
        found = recognise(values.tensors)
        reading = read_as(found, known) if found else None
        if found and reading:
            seen[name] = Translated(models[name], reading.sources)
            remarks += _remarks(name, layout, found, reading)
    return Named(seen, tuple(remarks))


def _differ(tensors: Tensors, layout: Tensors) -> bool:
    """Whether a name is not the layout's, or a tensor of another number of dimensions."""
    if tensors is layout:
        return False
    for name, info in tensors.items():
        own = layout.get(name)
        if own is None or len(own.shape) != len(info.shape):
            return True
    return False


def _remarks(name: str, layout: str, found: Recognised, reading: Reading) -> Iterator[str]:
    """`b: UNet, VAE in diffusers' names, read as a's`, and what has no name there."""
    for naming, parts in itertools.groupby(sorted(reading.read, key=_naming), _naming):
        yield f"{name}: {', '.join(part.title for part in parts)} in {naming} names, read as {layout}'s"
    left = reading.unnamed
    if left:
        yield (
            f"{name}: {count(left, 'tensor')} {plural(left, 'has', 'have')} no name among {layout}'s, and "
            f"{plural(left, 'keeps its', 'keep their')} own: {listed(left)}"
        )


def _naming(component: Component) -> str:
    return component.place.naming
