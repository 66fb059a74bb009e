"""Weights as 8-bit floats with a scale, as ComfyUI reads them: made anew of whatever they are computed from.

    scale = max |θ| / m        codes = θ / scale        m is the greatest number of the 8-bit floats

Beside the codes, `X.weight`, stand `X.weight_scale`, one float32, and `X.comfy_quant`, JSON that says what they are.
(ComfyUI's QUANTIZATION.md, `comfy/ops.py` and comfy-kitchen's `tensor/fp8.py`.)
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from streammerge.compute.expressions import ByBlock, External, Node, Shared, Viewed, applications, block_method
from streammerge.errors import MethodError
from streammerge.methods.registry import BlockMethod, Needs, Statistics
from streammerge.methods.statistics.passes import Magnitudes, Pass, Vectors
from streammerge.methods.statistics.stretches import Pending, Stretch
from streammerge.methods.steps import Kernel, Step
from streammerge.methods.tracing import traced
from streammerge.models.codes import split_name
from streammerge.models.quantised import has_scales
from streammerge.tensors import DTYPES, DType, TensorInfo, described

if TYPE_CHECKING:
    import torch

    from streammerge.methods.contract import Parameters
    from streammerge.methods.place import Target

LIMITS: Final[Mapping[str, float]] = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
"""The greatest number of each kind of codes."""

LEAST: Final = 2.0**-126
"""The least scale: lesser ones have fewer digits, and some processors take them for 0."""

GREATEST: Final = 3.4028234663852886e38
"""The greatest float32."""


def names_beside(codes: str) -> tuple[str, str]:
    """What is called how beside these codes: their scale, and the mark."""
    module, own = split_name(codes)
    return f"{module}{own}_scale", f"{module}comfy_quant"


def encoded(node: Node, name: str, kind: DType, shared: Shared | None = None) -> Node:
    """The codes of a weight; what is measured of it is `shared` with their scale."""
    made = described(kind, node.info.shape)
    return ByBlock(made, _ENCODE[kind.name], {}, (node,), name, shared=shared)


def scale_of(node: Node, name: str, kind: DType, shared: Shared | None = None) -> Node:
    """The scale of the codes, with which it may share: the first element of a tensor that has it everywhere."""
    made = described(DTYPES["F32"], node.info.shape)
    everywhere = ByBlock(made, _SCALE[kind.name], {}, (node,), name, shared=shared)
    return Viewed(described(DTYPES["F32"], ()), everywhere, 0, (), ())


def mark_of(name: str, kind: DType) -> External:
    """What tells ComfyUI what the codes are."""
    text = json.dumps({"format": kind.torch_name})
    info = described(DTYPES["U8"], (len(text),))
    return External(info, Text(name, text), name, text)


def has_codes(node: Node) -> bool:
    """Whether the tensor is codes, or their scale, that are made anew."""
    return any(id(part.method) in _MADE for part in applications(node))


def loses_scales(node: Node) -> bool:
    """Whether it had scales, and is not given others."""
    return has_scales(node) and id(block_method(node)) not in _MADE


@dataclass(frozen=True, eq=False)
class Text:
    """A model of one tensor: the bytes of a text."""

    name: str
    text: str

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The one tensor."""
        return {self.name: described(DTYPES["U8"], (len(self.text),))}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some of the bytes."""
        import torch

        return torch.tensor(list(self.text[start:stop].encode("ascii")), dtype=torch.uint8)


class ScalePass(Pass[float]):
    """max |θ| of what is finite, and the scale that follows: 1 where nothing is, or all is 0."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.greatest = 0.0

    def measure(self, block: int, inputs: Sequence[torch.Tensor]) -> float:
        """The block's greatest magnitude."""
        return float(_finite(inputs).max())

    def begin(self, stretch: Stretch, inputs: Sequence[torch.Tensor]) -> Pending:
        """That of many blocks."""
        greatest = stretch.reduced(_finite(inputs), lambda rows: rows.amax(1)).double()
        return Pending([greatest], lambda told: (dict(zip(stretch.blocks, told[0].tolist(), strict=True)), ()))

    def measure_compiled(self, block: int, operands: Magnitudes) -> float:
        """The same by compiled loops."""
        return operands.made_by(_FINITE, 0).products(Vectors.INPUTS, wide=False).greatest[0]

    def add(self, block: int, measured: float) -> None:
        """Keep the greatest."""
        self.greatest = max(self.greatest, measured)

    def finish(self) -> float:
        """The scale, a float32."""
        if not self.greatest:
            return 1.0
        scale = self.greatest / self.limit
        if scale > GREATEST:
            raise MethodError(
                f"its values are as great as {self.greatest:g}: no float32 is their scale",
                advice="Give it another dtype, with a rule of its own.",
            )
        return max(float(struct.unpack("f", struct.pack("f", scale))[0]), LEAST)


def _finite(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """|x| where it is finite, else 0."""
    size = inputs[0].abs()
    return size.where(size < math.inf, 0.0)


_FINITE: Final = traced(_finite, 1)


def _encode(values: torch.Tensor, *, statistics: float) -> torch.Tensor:
    """θ / scale, which is a tensor's element: by numbers CUDA multiplies."""
    return values / values.new_full((), statistics)


def _scale(values: torch.Tensor, *, statistics: float) -> torch.Tensor:
    """The scale in every place."""
    return values.new_full(values.shape, statistics)


def _encode_steps(_target: Target, _parameters: Parameters, scale: float) -> Sequence[Step]:
    return Step("FILL", 1, (scale,)), Step("OVER", 0, (0, 1))


def _scale_steps(_target: Target, _parameters: Parameters, scale: float) -> Sequence[Step]:
    return (Step("FILL", 0, (scale,)),)


def _method(
    name: str, formula: str, function: Callable[..., torch.Tensor], kernel: Kernel, limit: float, *, blind: bool
) -> BlockMethod:
    def begin(_target: Target, _parameters: Parameters) -> ScalePass:
        return ScalePass(limit)

    needs, statistics = Needs(temporaries=3, temporaries_each=0, blind=blind), Statistics(begin, passes=1)
    return BlockMethod(
        name, (), "none", (1, 1), formula, function=function, needs=needs, statistics=statistics, kernel=kernel
    )


_ENCODE: Final = {
    kind: _method(f"encode {kind}", "codes = θ / scale", _encode, _encode_steps, limit, blind=False)
    for kind, limit in LIMITS.items()
}
_SCALE: Final = {
    kind: _method(f"scale {kind}", "scale = max |θ| / m", _scale, _scale_steps, limit, blind=True)
    for kind, limit in LIMITS.items()
}
_MADE: Final = frozenset(id(method) for method in (*_ENCODE.values(), *_SCALE.values()))
