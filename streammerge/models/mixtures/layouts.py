"""How mixtures store their experts: each matrix a tensor, or all experts of a layer in one, lying one way or the other.

| form | tensors of a layer |
|---|---|
| separate | `experts.E.gate_proj`, `up_proj`, `down_proj`, or Mixtral's `w1`, `w3`, `w2` |
| fused | `experts.gate_up_proj` [E, 2·I, H], `experts.down_proj` [E, H, I], or with `.weight`: transformers 5 |
| transposed | [E, H, 2·I] and [E, I, H]: Llama 4, Qwen3-VL |
| interleaved | the same, gate and up by turns: gpt-oss |

A model in one form is seen in another's: `experts_as`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from streammerge.compute.expressions import Joined, Node, Viewed
from streammerge.compute.parts import in_shape, rows_of, transposed
from streammerge.errors import PlanError
from streammerge.formats.tables import Column, Names
from streammerge.models.views import Decoded, View
from streammerge.tensors import Model, TensorInfo, described

Form = Literal["separate", "fused", "transposed", "interleaved"]

Part = Literal["gate", "up", "down"]

_PARTS: Final[Mapping[str, Part]] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
_LAYER: Final = r"(?P<layer>(?:.*\.)?layers\.\d+\.)(?P<block>block_sparse_moe|mlp|feed_forward)\."
_SEPARATE: Final = re.compile(rf"{_LAYER}experts\.(?P<number>\d+)\.(?P<part>{'|'.join(_PARTS)})\.weight")
_FUSED: Final = re.compile(rf"{_LAYER}experts\.(?P<part>gate_up_proj|down_proj)(?P<suffix>(?:\.weight)?)")
_ROUTER: Final = re.compile(rf"{_LAYER}(?P<router>gate|router)\.(?P<last>\w+)")
_BIAS: Final = re.compile(rf"{_LAYER}experts\..*bias")

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Block:
    """The experts of one layer: in which form, how many, what their names begin and end with, and what chooses them.

    Two are equal whose experts are called alike and lie alike, however many there are.
    """

    form: Form
    count: int = field(compare=False)
    start: str
    parts: tuple[str, str, str]
    router: str = field(compare=False)
    suffix: str = ""

    def separate(self, number: int, part: Part) -> str:
        """What a matrix of an expert is called, where each is a tensor."""
        return f"{self.start}experts.{number}.{self.parts[('gate', 'up', 'down').index(part)]}.weight"

    @property
    def gate_up(self) -> str:
        """The tensor of all that goes in, where there is one."""
        return f"{self.start}experts.gate_up_proj{self.suffix}"

    @property
    def down(self) -> str:
        """The tensor of all that goes out, where there is one."""
        return f"{self.start}experts.down_proj{self.suffix}"


def blocks_of(tensors: Tensors) -> dict[str, Block]:
    """The experts of every layer that has some, by what the layer's names begin with."""
    routers = {m["layer"]: m["router"] for name in tensors if (m := _ROUTER.fullmatch(name))}
    found: dict[str, Block] = {}
    counts: dict[str, int] = {}
    for name, info in tensors.items():
        if match := _SEPARATE.fullmatch(name):
            layer, own = match["layer"], ("gate_proj", "up_proj", "down_proj")
            parts = own if match["part"] in own else ("w1", "w3", "w2")
            counts[layer] = max(counts.get(layer, 0), int(match["number"]) + 1)
            start = layer + match["block"] + "."
            found[layer] = Block("separate", counts[layer], start, parts, routers.get(layer, "gate"))
        elif (match := _FUSED.fullmatch(name)) and match["part"] == "gate_up_proj":
            layer, start = match["layer"], match["layer"] + match["block"] + "."
            router, suffix = routers.get(layer, "gate"), match["suffix"]
            form = _form(info, tensors.get(f"{start}experts.down_proj{suffix}"), router, match["block"])
            if form is not None:
                found[layer] = Block(form, info.shape[0], start, ("", "", ""), router, suffix)
    return found


def _form(gate_up: TensorInfo, down: TensorInfo | None, router: str, block: str) -> Form | None:
    """In which form all experts are in one tensor: the shapes tell which way they lie."""
    if down is None or len(gate_up.shape) != 3 or len(down.shape) != 3 or gate_up.shape[0] != down.shape[0]:
        return None
    (_, a, b), (_, c, d) = gate_up.shape, down.shape
    if (a, b) == (2 * d, c):
        return "fused"
    if (a, b) != (d, 2 * c):
        return None
    return "interleaved" if (block, router) == ("mlp", "router") else "transposed"


def experts_as(model: Model, layout: Tensors, name: str) -> ExpertsAs | None:
    """A model with its experts in the form that those of a layout are in; None where nothing has to be changed.

    PlanError if they are in another form and can't be brought into that one.
    """
    values = Decoded(model)
    own, wanted = blocks_of(values.tensors), blocks_of(layout)
    if not own or not wanted or _alike(own, wanted):
        return None
    advice = "Both must be mixtures of one architecture."
    if values.left:
        told = "its experts are stored otherwise than the layout's, and some as codes that can't be decoded"
        raise PlanError(f"{name}: {told}", found=sorted(values.left), advice="Decode the model.")
    if own.keys() != wanted.keys():
        odd = sorted(own.keys() ^ wanted.keys())
        raise PlanError(f"{name}: other layers have experts than in the layout", found=odd, advice=advice)
    if biased := [each for tensors in (values.tensors, layout) for each in tensors if _BIAS.fullmatch(each)]:
        raise PlanError(
            f"{name}: its experts are stored otherwise than the layout's, and have biases", found=biased, advice=advice
        )
    for layer, block in own.items():
        if block.count != wanted[layer].count:
            raise PlanError(
                f"{name}: {layer}* has {block.count} experts, and in the layout {wanted[layer].count}", advice=advice
            )
    return ExpertsAs(values, own, wanted, layout)


def _alike(own: Mapping[str, Block], wanted: Mapping[str, Block]) -> bool:
    """Whether what both have is called the same, and lies the same way."""
    return all(own[layer] == wanted[layer] for layer in own.keys() & wanted.keys())


@dataclass(frozen=True, eq=False)
class ExpertsAs(View):
    """A mixture's values with its experts, which are `own`, in the form of a layout's, which are `wanted`."""

    model: Decoded
    own: Mapping[str, Block]
    wanted: Mapping[str, Block]
    layout: Tensors

    @functools.cached_property
    def tensors(self) -> Tensors:
        """What is no expert's as it is, and the experts as the layout has them, as far as the model has them."""
        kept = {new: self.values.tensors[old] for old, new in self._renamed()}
        made = dict(self._made())
        return Column(Names.of([*kept, *made]), [*kept.values(), *made.values()])

    @functools.cached_property
    def _old(self) -> Mapping[str, str]:
        return {new: old for old, new in self._renamed() if new != old}

    def _renamed(self) -> Iterator[tuple[str, str]]:
        """What is in no expert, and what it is called in the layout's way."""
        for name in self.values.tensors:
            if _SEPARATE.fullmatch(name) or _FUSED.fullmatch(name):
                continue
            match = _ROUTER.fullmatch(name)
            if match and match["layer"] in self.own:
                block = self.wanted[match["layer"]]
                yield name, f"{block.start}{block.router}.{match['last']}"
            else:
                yield name, name

    def _made(self) -> Iterator[tuple[str, TensorInfo]]:
        """The experts in the layout's form, by name, where the model has all that they are made of."""
        for name in self.layout:
            match = _SEPARATE.fullmatch(name) or _FUSED.fullmatch(name)
            if match is None or match["layer"] not in self.own:
                continue
            try:
                yield name, self.node(name).info
            except KeyError:
                continue

    def node(self, name: str) -> Node:
        """The tensor; of an expert put together, or cut out."""
        if match := _SEPARATE.fullmatch(name):
            if match["layer"] in self.own:
                return self._matrix(match["layer"], int(match["number"]), _PARTS[match["part"]])
        elif (match := _FUSED.fullmatch(name)) and match["layer"] in self.own:
            return self._fused(match["layer"], match["part"] == "down_proj")
        return self.values.node(self._old.get(name, name))

    def _matrix(self, layer: str, number: int, part: Part) -> Node:
        """A matrix of an expert as dense models have it: [I, H], or [H, I] of what goes out."""
        block = self.own[layer]
        if block.form == "separate":
            return self.values.node(block.separate(number, part))
        whole = self.values.node(block.down if part == "down" else block.gate_up)
        _, rows, width = whole.info.shape
        one = in_shape(rows_of(whole, number, number + 1), (rows, width))
        if part == "down":
            return one if block.form == "fused" else transposed(one)
        second = int(part == "up")
        if block.form == "fused":
            return rows_of(one, second * rows // 2, (second + 1) * rows // 2)
        half = width // 2
        info = described(one.info.dtype, (half, rows))
        if block.form == "transposed":
            return Viewed(info, one, second * half, (1, width), info.shape)
        return Viewed(info, one, second, (2, width), info.shape)

    def _fused(self, layer: str, is_down: bool) -> Node:
        """All experts of a layer in one tensor."""
        block = self.wanted[layer]
        parts: tuple[Part, ...] = ("down",) if is_down else ("gate", "up")
        experts = [[self._matrix(layer, number, part) for part in parts] for number in range(block.count)]
        infos = {(node.info.dtype, node.info.shape) for expert in experts for node in expert}
        if len(infos) != 1:
            raise PlanError(
                f"{layer}*: experts of different shapes or dtypes can't be one tensor, which the layout has",
                found=[f"{dtype} {list(shape)}" for dtype, shape in infos],
                advice="Take this model for the layout: --layout.",
            )
        (dtype, (rows, width)) = next(iter(infos))
        high = rows * len(parts)
        if block.form == "fused":
            flat = [node for expert in experts for node in expert]
            return Joined(described(dtype, (block.count, high, width)), tuple(flat))
        each = [Joined(described(dtype, (high, width)), tuple(expert)) for expert in experts]
        made = [self._turned(node, interleaved=block.form == "interleaved" and not is_down) for node in each]
        return Joined(described(dtype, (block.count, width, high)), tuple(made))

    @staticmethod
    def _turned(node: Node, *, interleaved: bool) -> Node:
        """A matrix with its rows as columns, those of both halves by turns if they are interleaved."""
        if not interleaved:
            return transposed(node)
        high, width = node.info.shape
        half = high // 2
        by_turns = described(node.info.dtype, (width, half, 2))
        return in_shape(Viewed(by_turns, node, 0, (1, width, half * width), by_turns.shape), (width, high))

    @property
    def kept_bytes(self) -> int:
        """What is kept in memory of the names."""
        return 200 * len(self.tensors)
