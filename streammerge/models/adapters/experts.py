"""PEFT's LoRA of a parameter (`target_parameters`): of all experts of a layer in one tensor, or of a plain matrix.

    Δ[e] = Bₑ Aₑ        A[e·r + k, i], B[o, k·E + e]: the ranks of experts one after the other in A, by turns in B

Whether matrices lie transposed, which hangs on versions, the shapes tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from streammerge.compute.expressions import ByWhole, Joined, Node, Product
from streammerge.compute.parts import range_of, rows_of, transposed
from streammerge.methods.registry import WholeMethod
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.modules import Changes, Malformed, Module
from streammerge.models.adapters.synonyms import language_paths
from streammerge.models.dialects.pieces import Piece, Source, rows, whole
from streammerge.models.mixtures.layouts import Block, Tensors
from streammerge.tensors import DTYPES, TensorInfo, described

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "LoRA of experts"

_OF_EXPERTS: Final = re.compile(r"(?P<layer>(?:.*\.)?layers\.\d+\.)(?:block_sparse_moe|mlp|feed_forward)\.experts")


@dataclass(frozen=True)
class Experts(Change):
    """A change of many matrices, one for each expert, Bₑ Aₑ; of a tensor of three dimensions, or of one for each of
    them, one below the other. `value` is B of all and `down` A; it is turned if each matrix lies transposed."""

    down: tuple[Node, ...] = ()
    is_turned: bool = False

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.down[0].info.shape[0] // self.rank

    @property
    def height(self) -> int:
        """How many rows the matrix of an expert has."""
        return self.shape[0] // self.count if len(self.shape) == 2 else self.shape[1]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the tensor, transposed matrices or not, or all of them together, is as large."""
        count, height, width = self.count, self.height, self.shape[-1]
        return tuple(shape) in ((count, height, width), (count, width, height), (count * height, width))

    def lies(self, shape: Sequence[int]) -> bool | None:
        """Whether the tensor's matrices lie transposed; None where they are square."""
        height, width = self.height, self.shape[-1]
        return None if height == width else tuple(shape) == (self.count, width, height)

    def turned(self) -> Change:
        """The same for matrices that lie transposed."""
        count, height, width = self.shape
        return replace(self, shape=(count, width, height), is_turned=not self.is_turned)

    def seen_as(self, shape: Sequence[int]) -> Change:
        """The same for the tensor of one expert, which is some rows."""
        return self if len(shape) > 2 else replace(self, shape=(self.count * self.height, self.shape[-1]))

    def of_rows(self, start: int, stop: int) -> Change:
        """What it does to some rows of one expert's matrix."""
        number, first = divmod(start, self.height)
        made = self._matrix(self._by_expert, number, first, first + stop - start)
        return Change(self.kind, (stop - start, self.shape[-1]), made, rank=self.rank, scale=self.scale)

    def applied(self, weight: Node, strength: float) -> Node:
        """The tensor of all experts, changed."""
        own, high = self._by_expert, self.value.info.shape[0]
        matrices = [self._matrix(own, number, 0, high) for number in range(self.count)]
        made = Joined(described(DTYPES["F32"], self.shape), tuple(matrices))
        return Change(self.kind, self.shape, made, rank=self.rank, scale=self.scale).applied(weight, strength)

    @property
    def _by_expert(self) -> Node:
        """B, each expert's own rows together."""
        info = described(DTYPES["F32"], self.value.info.shape)
        return ByWhole(info, BY_EXPERT, {"count": self.count}, (self.value,), "experts")

    def _matrix(self, by_expert: Node, number: int, start: int, stop: int) -> Node:
        """Rows [start, stop) of Bₑ Aₑ, or all of it transposed."""
        high, rank, width = self.value.info.shape[0], self.rank, self.down[0].info.shape[1]
        left = range_of(by_expert, (number * high + start) * rank, (stop - start, rank))
        right = rows_of(self.down[0], number * rank, (number + 1) * rank)
        if self.is_turned:
            return Product(described(DTYPES["F32"], (width, stop - start)), transposed(right), (transposed(left),))
        return Product(described(DTYPES["F32"], (stop - start, width)), left, (right,))


def _by_expert(up: Tensor, *, count: int) -> Tensor:
    """θ[e, o, k] = B[o, k·E + e]"""
    return up.view(len(up), -1, count).permute(2, 0, 1).reshape(up.shape)


BY_EXPERT: Final = WholeMethod(
    "by expert", (), "none", (1, 1), "θ[e, o, k] = B[o, k·E + e]", function=_by_expert, temporaries=1
)
"""B of all experts, one after the other. It is held: what is one expert's lies all over B, which is read for each."""


def of_parameter(module: Module) -> Changes:
    """What a wrapper of a parameter changes: its config says of which rank, and so how many experts there are."""
    up, down = module.part("up", 2), module.part("down", 2)
    rank = module.config.rank(module.own_name) if module.config is not None else 0
    total = down.info.shape[0]
    if not rank or total % rank or len(up.info.shape) != 2 or len(down.info.shape) != 2 or up.info.shape[1] != total:
        raise module.differ("up", "down", f"should have as many ranks, a multiple of {rank}")
    if module.config is not None and module.config.fan_in_fan_out:
        raise Malformed(f"{module.name}   is of a parameter, for which fan_in_fan_out means nothing")
    scale, told = module.scale(rank)
    if total == rank:
        value = Product(TensorInfo(DTYPES["F32"], (up.info.shape[0], down.info.shape[1])), up, (down,))
        change: Change = Change("LoRA", value.info.shape, value, rank=rank, scale=scale, told=told)
    else:
        shape = (total // rank, up.info.shape[0], down.info.shape[1])
        change = Experts(KIND, shape, up, rank=rank, scale=scale, down=(down,))
    if over := set(module.names) - {"up", "down"}:
        raise Malformed(f"{module.names[min(over)]}   has no meaning beside a parameter's factors")
    return {module.parameter: change}


def sources_of(
    path: str, parameter: str, blocks: Mapping[str, Block], tensors: Mapping[str, TensorInfo]
) -> Source | None:
    """What a parameter of experts is in a model that stores them otherwise; None if it has none of that name there."""
    for name in (path, *language_paths(path)):
        match = _OF_EXPERTS.fullmatch(name)
        block = blocks.get(match["layer"]) if match else None
        if block is not None and parameter in ("gate_up_proj", "down_proj"):
            return _stored(block, tensors, is_down=parameter == "down_proj")
    return None


def _stored(block: Block, tensors: Tensors, *, is_down: bool) -> Source | None:
    """The tensor of all experts, or those of each, one after the other."""
    if block.form != "separate":
        name = block.down if is_down else block.gate_up
        return whole(name, tensors[name]) if name in tensors else None
    names = [*_separate(block, is_down=is_down)]
    infos = [tensors[name] for name in names if name in tensors]
    if len(infos) < len(names) or len({info.shape for info in infos}) > 1:
        return None
    shape = (sum(map(rows, infos)), *infos[0].shape[1:])
    pieces = tuple(Piece(name, 0, rows(info)) for name, info in zip(names, infos, strict=True))
    return Source(described(infos[0].dtype, shape), pieces)


def _separate(block: Block, *, is_down: bool) -> Iterator[str]:
    for number in range(block.count):
        if is_down:
            yield block.separate(number, "down")
        else:
            yield from (block.separate(number, "gate"), block.separate(number, "up"))
