"""Models seen otherwise: decoded, cast, renamed. A view has a model's tensors in another form, and reads them from it.

To add one, write a class that says which `tensors` there are and what expression (`node`) each of them is: everything
else, reading and nesting and merging, follows from these two. Only headers are needed to make one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.compute.expressions import External, ModelStatistics, Node, rounded
from streammerge.errors import PlanError, count, plural
from streammerge.formats.tables import Column, Names
from streammerge.models.codes import Quantised, find_quantised
from streammerge.models.dtypes import parse_element_dtype, stored_as
from streammerge.models.quantised import DECODED, decoded, marks_of
from streammerge.tensors import Model, TensorInfo, described

if TYPE_CHECKING:
    import torch


def node_of(model: Model, name: str) -> Node:
    """The expression for a model's tensor; a model that is none of ours can only be asked to read itself."""
    own = getattr(model, "node", None)
    if own is None:
        return External(model.tensors[name], model, name)
    found: Node = own(name)
    return found


class View:
    """A model made of another `model`: what it has are `tensors`, and a `node` for each."""

    model: Model

    @functools.cached_property
    def values(self) -> Decoded:
        """What the model's tensors stand for, if some are codes: who takes codes for numbers, or takes them without
        what belongs to them, takes nonsense."""
        return self.model if isinstance(self.model, Decoded) else Decoded(self.model)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The names and descriptions of what is seen."""
        raise NotImplementedError

    def node(self, name: str) -> Node:
        """The tensor as an expression over the model's."""
        raise NotImplementedError

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, as they are seen."""
        from streammerge.compute.reading import read_merged

        return read_merged(self.node(name), self.tensors[name].dtype, start, stop, self._measured)

    @functools.cached_property
    def _measured(self) -> ModelStatistics:
        """What reading has measured of whole models."""
        return {}


@dataclass(frozen=True, eq=False)
class Decoded(View):
    """A model's values: weights that are stored as codes and a scale are multiplied, and the scales left out.

    Codes that can't be decoded stay what they are, and so does what belongs to them. The model's quantised weights are
    looked for unless they are `known`.
    """

    model: Model
    known: Mapping[str, Quantised] | None = None

    @functools.cached_property
    def weights(self) -> Mapping[str, Quantised]:
        """The model's quantised weights, decoded or not."""
        return find_quantised(self.model.tensors) if self.known is None else self.known

    @functools.cached_property
    def left(self) -> frozenset[str]:
        """The codes that can't be decoded, and what belongs to them: no values, and not to be touched."""
        found = (weight for weight in self.weights.values() if not weight.is_readable)
        return frozenset(name for weight in found for name in (weight.codes, *weight.companions))

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The model's tensors, but for the scales."""
        beside = {name for weight in self.weights.values() for name in weight.companions} - self.left
        marks = marks_of(self.model.tensors).items()
        beside |= {mark for mark, prefix in marks if not any(name.startswith(prefix) for name in self.left)}
        return seen(self.model.tensors, self._seen, beside) if self.weights or beside else self.model.tensors

    def _seen(self, name: str, info: TensorInfo) -> TensorInfo:
        return described(DECODED, info.shape) if name in self.weights and name not in self.left else info

    def has_values(self, name: str) -> bool:
        """Whether arithmetic on the tensor means anything."""
        weight = self.weights.get(name)
        return weight.is_readable if weight else self.model.tensors[name].dtype.mergeable

    def node(self, name: str) -> Node:
        """The tensor, decoded if it is stored as codes."""
        weight = self.weights.get(name)
        if weight is None or not weight.is_readable:
            return node_of(self.model, name)
        return decoded(weight, functools.partial(node_of, self.model))


@dataclass(frozen=True, eq=False)
class Cast(View):
    """A model's values as a file of another dtype would hold them; what is not floating point stays what it is."""

    model: Model
    dtype: str

    def __post_init__(self) -> None:
        parse_element_dtype(self.dtype, "Cast")

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The values' tensors, in this dtype."""
        values, dtype = self.values, parse_element_dtype(self.dtype, "Cast")
        return seen(values.tensors, lambda name, info: info if name in values.left else stored_as(info, dtype))

    def node(self, name: str) -> Node:
        """The tensor, rounded."""
        return rounded(self.values.node(name), self.tensors[name])


@dataclass(frozen=True, eq=False)
class Renamed(View):
    """Those of a model's values that are named, under new names: `names` has what the model calls each of them.

    A name for what only belongs to codes, as scales do, names nothing: the values are there without.
    """

    model: Model
    names: Mapping[str, str]

    def __post_init__(self) -> None:
        missing = [old for old in self.names.values() if old not in self.model.tensors]
        coded = [old for old in self.names.values() if old in self.values.left]
        for found, why in ((missing, "not in the model"), (coded, "quantised in a way that streammerge can't decode")):
            if found:
                told = f"{count(found, 'tensor')} to be renamed {plural(found, 'is', 'are')} {why}"
                raise PlanError(told, found=found)

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The new names, in their order, and what the model's tensors are."""
        own = self.values.tensors
        named = {new: own[old] for new, old in self.names.items() if old in own}
        return Column(Names.of(named), list(named.values()))

    def node(self, name: str) -> Node:
        """The model's tensor."""
        return self.values.node(self.names[name])


@dataclass(frozen=True, eq=False)
class Selected(View):
    """Those of a model's tensors that are named, codes as they are stored: `names` has what the model calls each.

    Codes have to keep what belongs to them: whoever selects leaves out whole components, and renames all of one alike.
    """

    model: Model
    names: Mapping[str, str]

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that are left, in their order."""
        own = self.model.tensors
        return Column(Names.of(self.names), [own[old] for old in self.names.values()])

    def node(self, name: str) -> Node:
        """The model's tensor."""
        return node_of(self.model, self.names[name])


@dataclass(frozen=True, eq=False)
class Assembled(View):
    """A model with parts of others behind its own tensors, codes as they are stored."""

    model: Model
    parts: tuple[Model, ...]

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The model's tensors and those of the parts; of one name the first is meant."""
        found = {name: info for one in reversed((self.model, *self.parts)) for name, info in one.tensors.items()}
        names = dict.fromkeys(name for one in (self.model, *self.parts) for name in one.tensors)
        return Column(Names.of(names), [found[name] for name in names])

    def node(self, name: str) -> Node:
        """The tensor of the first that has it."""
        return node_of(next(one for one in (self.model, *self.parts) if name in one.tensors), name)


def seen(
    tensors: Mapping[str, TensorInfo],
    see: Callable[[str, TensorInfo], TensorInfo],
    without: frozenset[str] | set[str] = frozenset(),
) -> Column[TensorInfo]:
    """The tensors as they are seen, some of them left out, in little memory."""
    kept = [(name, see(name, info)) for name, info in tensors.items() if name not in without]
    return Column(Names.of(name for name, _ in kept), [info for _, info in kept])


def beneath(model: Model) -> Model:
    """The model under all views of it, which alone knows its files, its inputs and how it is nested."""
    while isinstance(model, View):
        model = model.model
    return model
