"""Quantised weights in a merge: which of the models have them, what belongs to them, and their decoding.

Codes must never be averaged: 8-bit floats with a scale beside them are multiplied by it while they are read, all other
kinds are for the user to decode. Copied as they are, with what stands beside them, they stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from streammerge.compute.expressions import ByBlock, Node, Viewed, applications
from streammerge.methods.registry import BlockMethod, Needs
from streammerge.models.codes import Quantised, find_quantised, split_name
from streammerge.models.scales import spread
from streammerge.tensors import DTYPES, Model, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

FP8_MARK: Final = "scaled_fp8"
"""How a tensor is called by which ComfyUI knows a model with scales beside its weights; it holds nothing itself."""

DECODED: Final = DTYPES["BF16"]
"""What a decoded weight is stored as unless something else is asked for: the codes were made of no more digits."""


def _multiply(codes: Tensor, scale: Tensor) -> Tensor:
    """θ = codes · scale"""
    return codes * scale


DECODE: Final = BlockMethod(
    "decode",
    (),
    "none",
    (2, 2),
    "θ = codes · scale",
    function=_multiply,
    needs=Needs(temporaries=1, temporaries_each=0),
)


def decoded(quantised: Quantised, node_of: Callable[[str], Node]) -> Node:
    """The weight: its codes times its scale, which is spread over them."""
    codes, scale = node_of(quantised.codes), node_of(quantised.scale)
    shape, way = codes.info.shape, spread(codes.info.shape, scale.info.shape)
    assert way is not None
    over: Node = Viewed(TensorInfo(scale.info.dtype, way.shape), scale, 0, way.strides, way.shape)
    if way.cut:
        over = Viewed(TensorInfo(scale.info.dtype, shape), over, 0, way.cut, shape)
    return ByBlock(TensorInfo(DECODED, shape), DECODE, {}, (codes, over), quantised.codes)


def has_scales(node: Node) -> bool:
    """Whether the tensor is computed from codes that are multiplied by a scale."""
    return any(part.method is DECODE for part in applications(node))


@dataclass(frozen=True)
class CodedModels:
    """The quantised weights of a merge's models, by model. `beside` are tensors of the layout that belong to codes:
    each to those of this name, or, marks, to all whose names start so."""

    weights: Mapping[str, Mapping[str, Quantised]]
    beside: Mapping[str, str]
    marks: Mapping[str, str]

    @classmethod
    def of(cls, models: Mapping[str, Model], layout: str) -> CodedModels:
        """Look at every model's names."""
        weights = found_in_all({name: model.tensors for name, model in models.items()})
        return cls(weights, companions_of(weights[layout]), marks_of(models[layout].tensors))

    def is_beside(self, name: str) -> bool:
        """Whether a tensor of the layout belongs to codes."""
        return name in self.beside or name in self.marks

    def find(self, model: str, name: str) -> Quantised | None:
        """The model's weight, if it is stored as codes."""
        return self.weights[model].get(name)

    def unreadable(self, models: Iterable[str], name: str) -> dict[str, Quantised]:
        """Those of the models whose weight is stored as codes that can't be decoded."""
        found = {model: self.weights[model].get(name) for model in models}
        return {model: weight for model, weight in found.items() if weight is not None and not weight.is_readable}

    def stay_whole(self, weight: Quantised) -> bool:
        """Whether the layout has room for all that belongs to a model's weight, so that it can be copied as codes."""
        return all(self.beside.get(name) == weight.codes for name in weight.companions)

    def accounted(self, model: str, tensors: Mapping[str, TensorInfo]) -> set[str]:
        """The model's tensors that are not left out where the layout does not have them: they were decoded with."""
        return {*companions_of(self.weights[model]), *marks_of(tensors)}


def found_in_all(models: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, Mapping[str, Quantised]]:
    """The quantised weights of every model, found once for those that have the same tensors: they take memory."""
    found: dict[str, Mapping[str, Quantised]] = {}
    for name, tensors in models.items():
        same = next((other for other in found if models[other] == tensors), None)
        found[name] = find_quantised(tensors) if same is None else found[same]
    return found


CODED_BYTES: Final = 400
"""What is kept in memory of a quantised weight, and of what stands beside it."""


def kept_bytes(weights: Mapping[str, Mapping[str, Quantised]]) -> int:
    """What is kept in memory of the quantised weights of models."""
    return CODED_BYTES * sum(len(found) for found in {id(found): found for found in weights.values()}.values())


def companions_of(quantised: Mapping[str, Quantised]) -> dict[str, str]:
    """The tensors that stand beside codes, and the codes."""
    return dict(_companions(quantised))


def _companions(quantised: Mapping[str, Quantised]) -> Iterator[tuple[str, str]]:
    for weight in quantised.values():
        for name in weight.companions:
            yield name, weight.codes


def marks_of(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The marks of scaled weights among the tensors, each with how the names of these weights start."""
    return {
        name: split_name(name)[0] for name in tensors if name.endswith(FP8_MARK) and split_name(name)[1] == FP8_MARK
    }
