"""One model in the names of another: which of its components are whose there, and what follows for its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from streammerge.models.architecture import UNKNOWN
from streammerge.models.dialects.encoders import CLIP
from streammerge.models.dialects.pieces import Source, whole
from streammerge.models.dialects.recognition import Component, Recognised, moved
from streammerge.tensors import TensorInfo, described

WIDTHS = ("token_embedding.weight", "text_model.embeddings.token_embedding.weight")
"""By the shape of this tensor a text encoder is told from another, in both namings."""


@dataclass(frozen=True)
class Reading:
    """A model in the names of another: what of its tensors each tensor is made of, and what is to be told of that.

    `read` are the components that have other names there, `reshaped` those that only have a convolution for a matrix;
    `unnamed` are tensors that have no name there, and keep their own; `second` those of a component that is there under
    other names, too.
    """

    sources: Mapping[str, Source]
    read: tuple[Component, ...]
    reshaped: tuple[Component, ...]
    unnamed: tuple[str, ...]
    second: frozenset[str] = frozenset()


def read_as(found: Recognised, layout: Recognised) -> Reading | None:
    """What is found of a model in the names of the layout; None if these are its own."""
    sources, unnamed = dict[str, Source](), list[str]()
    read, reshaped = list[Component](), list[Component]()
    pairs = list(_pairs(found, layout))
    for own, other in pairs:
        seen = {name: moved(source, own.place.own) for name, source in own.seen(other.side).items()}
        made = {other.place.own(name): _in_shape(source, other.tensors.get(name)) for name, source in seen.items()}
        if any(not source.is_whole(name, found.tensors) for name, source in made.items()):
            (reshaped if own.place == other.place else read).append(own)
        sources |= made
        unnamed += map(own.place.own, own.unnamed(other.side))
    used = {piece.tensor for source in sources.values() for piece in source.pieces}
    for name, info in found.tensors.items():
        if name not in used:
            sources.setdefault(name, whole(name, info))
    second = frozenset(_second_names(found, [own for own, _ in pairs]))
    if not read and not reshaped and not second:
        return None
    return Reading(
        sources, tuple(dict.fromkeys(read)), tuple(dict.fromkeys(reshaped)), tuple(dict.fromkeys(unnamed)), second
    )


def _second_names(found: Recognised, paired: Sequence[Component]) -> Iterator[str]:
    """The names of components that are not the layout's, while another one of the same role is."""
    for component in found.components:
        if component not in paired and any(component.role == other.role for other in paired):
            yield from map(component.place.own, component.tensors)


def _pairs(found: Recognised, layout: Recognised) -> Iterator[tuple[Component, Component]]:
    """Each component of the layout that the model has too, and the model's."""
    for other in layout.components:
        fitting = [own for own in found.components if _is_counterpart(own, other, found, layout)]
        if fitting:
            yield next((own for own in fitting if own.place.prefix == other.place.prefix), fitting[0]), other


def _is_counterpart(own: Component, other: Component, found: Recognised, layout: Recognised) -> bool:
    if own.kind is not other.kind:
        return False
    widths = width(own), width(other)
    if own.kind is CLIP and "" in (own.place.prefix, other.place.prefix) and None not in widths:
        return widths[0] == widths[1]  # nothing else tells which one it is
    known = {found.architecture, layout.architecture} - {UNKNOWN}
    return own.role == other.role and (own.role != "denoiser" or len(known) < 2)


def width(component: Component) -> int | None:
    """How wide a text encoder is; None for what is none."""
    infos = (component.tensors.get(name) for name in WIDTHS)
    return next((info.shape[-1] for info in infos if info is not None and info.shape), None)


def _in_shape(source: Source, layout: TensorInfo | None) -> Source:
    """The tensor in the layout's shape, where one of them is a matrix and the other the same as a 1×1 convolution."""
    shape = source.info.shape
    if layout is None or layout.shape == shape or source.transposed:
        return source
    matrices = {_as_matrix(shape), _as_matrix(layout.shape)}
    return replace(source, info=described(source.info.dtype, layout.shape)) if len(matrices) == 1 else source


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if len(shape) == 4 and math.prod(shape[2:]) == 1 else shape
