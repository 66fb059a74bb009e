"""Inputs that are one architecture under different names: read in the layout's, and told of."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from streammerge.compute.expressions import stored_place
from streammerge.errors import PlanError, count, listed, plural
from streammerge.models.adapters.dialects import Dialect
from streammerge.models.dialects import Component, Naming, Reading, Recognised, read_as, recognise
from streammerge.models.dialects.translation import Translated
from streammerge.models.merged import Merged, as_merged
from streammerge.models.prediction import is_of_denoiser
from streammerge.models.views import Decoded, Selected, node_of
from streammerge.recipe.options import NAMINGS, Options
from streammerge.tensors import Model, TensorInfo

WITHOUT: Final = "Without --names the output has the layout model's names."
"""What to say where a naming can't be had."""

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Named:
    """Models in the names of one of them, as far as they are known, and what the user should know of that."""

    models: Mapping[str, Model]
    remarks: tuple[str, ...] = ()
    experts: int = 0
    """What is kept in memory of experts that are stored otherwise."""

    @property
    def kept_bytes(self) -> int:
        """What is kept in memory of other names."""
        return sum(model.kept_bytes for model in self.models.values() if isinstance(model, Translated)) + self.experts


def of_models(naming: Naming | Dialect | None) -> Naming | None:
    """A naming that models have; PlanError for one that only adapters have."""
    found = next((each for each in NAMINGS if each == naming), None)
    if naming is not None and found is None:
        raise PlanError(f"{naming} names are an adapter's, and this is no merge of adapters alone", advice=WITHOUT)
    return found


def as_named(model: Model, options: Options) -> Merged:
    """A model that is no recipe's as a merge, in the names that are asked for."""
    if options.names is None:
        return as_merged(model)
    named = in_naming(model, "the model", of_models(options.names) or "original")
    merged = as_merged(named.models["the model"])
    return replace(merged, remarks=(*merged.remarks, *named.remarks))


def in_one_naming(models: Mapping[str, Model], layout: str) -> Named:
    """Every model in the names of the layout's; itself where these are its own, or nobody knows what its names mean."""
    own = models[layout]
    strangers = [name for name, model in models.items() if name != layout and _differ(model.tensors, own.tensors)]
    known = recognise(own.tensors) if strangers else None
    if known is None:
        return _in_one_form(models, layout, strangers)
    seen, remarks = dict(models), list[str]()
    for name in strangers:
        values = Decoded(models[name])
        found = None if values.left else recognise(values.tensors)  # codes that nobody can read can't be cut or joined
        reading = read_as(found, known) if found else None
        if found and reading:
            again = _second_names(values, reading)
            sources = {called: source for called, source in reading.sources.items() if called not in again}
            seen[name] = Translated(models[name], sources)
            remarks += [*_remarks(name, layout, reading, again), *_decoding(name, values)]
    return Named(seen, tuple(remarks))


def _in_one_form(models: Mapping[str, Model], layout: str, strangers: Sequence[str]) -> Named:
    """Mixtures with their experts stored as the layout's are; PlanError where they can't be seen so."""
    from streammerge.models.mixtures.layouts import experts_as  # late: most models are no mixtures

    seen, remarks, kept = dict(models), list[str](), 0
    own = Decoded(models[layout]).tensors
    for name in strangers:
        found = experts_as(models[name], own, name)
        if found is not None:
            seen[name], kept = found, kept + found.kept_bytes
            told = f"its experts are stored otherwise than those of {layout}, and are read in that form"
            remarks.append(f"{name}: {told}")
    return Named(seen, tuple(remarks), kept)


def in_naming(model: Model, name: str, naming: Naming, architecture: str = "") -> Named:
    """A model in another naming; itself if these are its names. PlanError if its names aren't understood.

    A part of a model doesn't tell of which `architecture` that is.
    """
    values = Decoded(model)
    if values.left:
        told = f"{count(values.left, 'tensor')} {plural(values.left, 'is', 'are')} quantised in a way that streammerge"
        raise PlanError(f"{name}: {told} can't decode, nor name otherwise", found=sorted(values.left), advice=WITHOUT)
    found = recognise(values.tensors)
    if found is None:
        raise PlanError(f"{name}: its names are none that streammerge knows in several namings", advice=WITHOUT)
    if naming == "bare" and len(found.components) > 1:
        raise PlanError(
            f"{name}: bare names are those of one component, and it has {len(found.components)}",
            found=[f"{part.title}   {part.place.prefix}…" for part in found.components],
            advice=f"Drop the others, or name it otherwise. {WITHOUT}",
        )
    if found.unplaced:
        raise PlanError(
            f"{name}: its architecture isn't known, and so not what {naming} names are",
            found=[f"{part.title}   {part.place.prefix}…" for part in found.unplaced],
            advice=WITHOUT,
        )
    found = replace(found, architecture=architecture) if architecture else found
    sources, left = found.named(naming), _strange(found, naming)
    if all(source.is_whole(called, found.tensors) for called, source in sources.items()):
        return Named({name: model})
    if values.weights and (names := _under_another_prefix(model, found, naming)):
        return Named({name: Selected(model, names)})
    told = f"{count(left, 'tensor')} {plural(left, 'has', 'have')} no {naming} name, and {_keeping(left)}"
    remarks = (f"{name}: {told}",) if left else ()
    return Named({name: Translated(model, sources)}, (*remarks, *_decoding(name, values)))


def _strange(found: Recognised, naming: Naming) -> list[str]:
    """What has no name in a naming; marks of what a denoiser predicts are called so in all but diffusers'."""
    return [name for name in found.unnamed(naming) if naming == "diffusers" or not is_of_denoiser(name)]


def _under_another_prefix(model: Model, found: Recognised, naming: Naming) -> dict[str, str]:
    """What the tensors of one component are called, codes and all, if nothing but what stands before them changes."""
    [component, *others], own = found.components, found.components[0].place
    place = found.place(component, naming)
    if others or (place.side, place.within, place.accent) != (own.side, own.within, own.accent):
        return {}
    inside = [name for name in model.tensors if name not in found.others]
    names = {place.prefix + name.removeprefix(own.prefix): name for name in inside}
    is_all = all(name.startswith(own.prefix) for name in inside)
    return {**names, **{name: name for name in found.others}} if is_all else {}


def _decoding(name: str, values: Decoded) -> Iterator[str]:
    """What is told of codes that get other names, which their scales have not."""
    if values.weights:
        told = f"{count(values.weights, 'quantised weight')} {plural(values.weights, 'is', 'are')}"
        yield f"{name}: {told} decoded to be named so"


def _keeping(names: Sequence[str]) -> str:
    return f"{plural(names, 'keeps its', 'keep their')} own: {listed(names)}"


def _differ(tensors: Tensors, layout: Tensors) -> bool:
    """Whether one has a name that the other has not, or a tensor of another number of dimensions."""
    if tensors is layout:
        return False
    if len(tensors) != len(layout):
        return True
    for name, info in tensors.items():
        own = layout.get(name)
        if own is None or len(own.shape) != len(info.shape):
            return True
    return False


def _second_names(model: Model, reading: Reading) -> frozenset[str]:
    """Which of the tensors are other names of bytes that are read by their first ones."""
    if not reading.second:
        return reading.second
    first = {stored_place(node_of(model, name)) for name in model.tensors if name not in reading.second} - {None}
    return frozenset(name for name in reading.second if stored_place(node_of(model, name)) in first)


def _remarks(name: str, layout: str, reading: Reading, again: Collection[str]) -> Iterator[str]:
    """`b: UNet, VAE in diffusers' names, read as a's`, and what has no name there."""
    for naming, parts in itertools.groupby(sorted(reading.read, key=_naming), _naming):
        yield f"{name}: {', '.join(part.title for part in parts)} in {naming} names, read as {layout}'s"
    for part in reading.reshaped:
        yield f"{name}: {part.title} has matrices for 1×1 convolutions or the reverse, read in {layout}'s shapes"
    if again:
        yield f"{name}: {count(again, 'tensor')} of it {plural(again, 'has', 'have')} a second name, which is left out"
    left = reading.unnamed
    if left:
        told = f"{count(left, 'tensor')} {plural(left, 'has', 'have')} no name among {layout}'s"
        yield f"{name}: {told}, and {_keeping(left)}"


def _naming(component: Component) -> str:
    return component.place.naming
