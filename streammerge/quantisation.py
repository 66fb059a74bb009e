"""Weights that are stored as codes, known by the tensors that stand beside them: what they are, and their decoding.

Codes must never be averaged: 8-bit floats with a scale beside them are multiplied by it while they are read, all other
kinds are for the user to decode. Copied as they are, with what stands beside them, they stay what they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from streammerge.methods.registry import BlockMethod
from streammerge.nodes import ByBlock, Node, Viewed
from streammerge.tensors import DTYPES, Model, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

FP8_MARK: Final = "scaled_fp8"
"""A tensor by which ComfyUI knows a model with scales beside its weights; it holds nothing itself."""

DECODED: Final = DTYPES["BF16"]
"""What a decoded weight is stored as unless something else is asked for: the codes were made of no more digits."""

TILE: Final = 128
"""The size of blocks that share a scale where the shapes don't tell it otherwise: DeepSeek's."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight stored as codes: what kind of them, in which tensor, which tensors stand beside it.

    `scale` is the one among these that the codes are multiplied by; "" where that would not be all.
    """

    codes: str
    kind: str
    companions: tuple[str, ...]
    scale: str = ""

    @property
    def is_readable(self) -> bool:
        """Whether it can be decoded while it is read."""
        return bool(self.scale)


@dataclass(frozen=True, slots=True)
class _Sign:
    """A name that tells of a quantised weight: what follows its stem, what follows the stem of its codes, the kind."""

    pattern: re.Pattern[str]
    codes: str
    kind: str


def _sign(companion: str, codes: str, kind: str) -> _Sign:
    return _Sign(re.compile(rf"(?P<stem>.+?)(?:{companion})"), codes, kind)


SIGNS: Final = (
    _sign(r"\.weight\.(nested_)?(absmax|quant_map)|\.weight\.quant_state\..+", ".weight", "bitsandbytes, 4 or 8 bits"),
    _sign(r"\.(SCB|weight_format)", ".weight", "bitsandbytes, 8 bits"),
    _sign(r"\.(qzeros|scales|g_idx)", ".qweight", "GPTQ or AWQ"),
    _sign(r"\.weight_(scale_2|global_scale)", ".weight", "NVFP4"),
    _sign(r"\.weight_(scale|scale_2|global_scale|shape|zero_point)", ".weight_packed", "packed (compressed-tensors)"),
    _sign(r"_scales", "_blocks", "MXFP4"),
    _sign(r"\._scale", "._data", "quanto"),
    _sign(r"\.(scale_weight|weight_scale|weight_scale_inv)", ".weight", "scale"),
    _sign(r"\.(scale_input|input_scale|comfy_quant|weight_zero_point)", ".weight", "beside"),
    _sign(r"_scale(_inv)?", "", "scale"),
)
"""In their order: what several signs tell, the first of them says."""


def find_quantised(tensors: Mapping[str, TensorInfo]) -> dict[str, Quantised]:
    """The quantised weights of a model, by the name of their codes, and by the name that the weight would have."""
    signs: dict[str, dict[str, str]] = {}
    for name in tensors:
        for sign in SIGNS:
            match = sign.pattern.fullmatch(name)
            codes = match["stem"] + sign.codes if match else ""
            if codes in tensors and codes != name:
                signs.setdefault(codes, {})[name] = sign.kind
                break
    found = {}
    for codes, kinds in signs.items():
        quantised = _judge(codes, kinds, tensors)
        if quantised is not None:
            found[codes] = found[weight_name(codes)] = quantised
    return found


def weight_name(codes: str) -> str:
    """What a weight is called where it isn't quantised."""
    for ending, plain in ((".qweight", ".weight"), (".weight_packed", ".weight"), ("._data", ""), ("_blocks", "")):
        if codes.endswith(ending):
            return codes.removesuffix(ending) + plain
    return codes


def _judge(codes: str, kinds: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Quantised | None:
    """What the tensors beside some codes make of them; None where these are weights as they are."""
    info, companions = tensors[codes], tuple(kinds)
    named = [sign.kind for sign in SIGNS if sign.kind in kinds.values() and sign.kind not in ("scale", "beside")]
    if named:
        return Quantised(codes, named[0], companions)
    scales = [name for name, kind in kinds.items() if kind == "scale"]
    if not scales or info.dtype.bits > 8 or info.dtype.kind == "bool":
        return None
    if info.dtype.kind != "float":
        return Quantised(codes, f"{info.dtype} with a scale", companions)
    if len(scales) > 1 or not tensors[scales[0]].dtype.mergeable or tensors[scales[0]].dtype.bits < 16:
        return Quantised(codes, f"{info.dtype} with {', '.join(scales)}", companions)
    if spread(info.shape, tensors[scales[0]].shape) is None:
        shapes = f"{list(tensors[scales[0]].shape)} scales for {list(info.shape)}"
        return Quantised(codes, f"{info.dtype} with {shapes}", companions)
    return Quantised(codes, f"{info.dtype} with a scale", companions, scales[0])


@dataclass(frozen=True, slots=True)
class Spread:
    """How a scale's elements are spread over a tensor: a view of this shape, whose flat elements begin with its."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


def spread(shape: tuple[int, ...], scale: tuple[int, ...]) -> Spread | None:
    """One scale for the whole tensor, for each of its rows, or for each tile of a matrix; None for anything else."""
    ones = (0,) * len(shape)
    if all(size == 1 for size in scale):
        return Spread(shape, ones)
    if shape and scale[0] == shape[0] and all(size == 1 for size in scale[1:]):
        return Spread(shape, (1, *ones[1:]))
    if len(shape) != 2 or len(scale) != 2:
        return None
    (rows, columns), (down, across) = shape, scale
    height, width = _tile(rows, down, whole=False), _tile(columns, across, whole=True)
    return Spread((down, height, across, width), (across, 0, 1, 0)) if height and width else None


def _tile(size: int, tiles: int, *, whole: bool) -> int:
    """How long a tile is, 0 where nobody can tell. The last row of tiles may be cut off, columns must come out even."""
    if tiles == 1:
        return size
    if tiles and size % tiles == 0 and (size // tiles).bit_count() == 1:
        return size // tiles
    return TILE if not whole and -(-size // TILE) == tiles else 0


def _multiply(codes: Tensor, scale: Tensor) -> Tensor:
    """θ = codes · scale"""
    return codes * scale


DECODE: Final = BlockMethod(
    "decode", (), "none", (2, 2), "θ = codes · scale", function=_multiply, temporaries=1, temporaries_each=0
)


def decoded(quantised: Quantised, node_of: Callable[[str], Node]) -> Node:
    """The weight: its codes times its scale, which is spread over them."""
    codes, scale = node_of(quantised.codes), node_of(quantised.scale)
    way = spread(codes.info.shape, scale.info.shape)
    assert way is not None
    over = Viewed(TensorInfo(scale.info.dtype, way.shape), scale, 0, way.strides, way.shape)
    info = TensorInfo(DECODED, codes.info.shape)
    return ByBlock(info, DECODE, {}, (codes, over), quantised.codes)


@dataclass(frozen=True)
class CodedModels:
    """The quantised weights of a merge's models, by model. `beside` are tensors of the layout that belong to codes."""

    weights: Mapping[str, Mapping[str, Quantised]]
    beside: Mapping[str, str]

    @classmethod
    def of(cls, models: Mapping[str, Model], layout: str) -> CodedModels:
        """Look at every model's names."""
        weights = found_in_all({name: model.tensors for name, model in models.items()})
        beside = companions_of(weights[layout])
        mark = {FP8_MARK: ""} if beside and FP8_MARK in models[layout].tensors else {}
        return cls(weights, {**beside, **mark})

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

    def accounted(self, model: str) -> set[str]:
        """The model's tensors that are not left out where the layout does not have them: they were decoded with."""
        return {*companions_of(self.weights[model]), FP8_MARK} if self.weights[model] else set()


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
