"""PEFT's LoRA of a parameter (`target_parameters`): of all experts of a layer in one tensor, or of a plain matrix.

    Δ[e] = Bₑ Aₑ        A[e·r + k, i], B[o, k·E + e]: the ranks of experts one after the other in A, by turns in B

Whether matrices lie transposed, which hangs on versions, the shapes tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from streammerge.compute.expressions import ByWhole, Node, Product, Viewed
from streammerge.compute.matrices import permuted
from streammerge.compute.parts import in_shape, rows_of
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
        """What it does to some rows of one expert's matrix: of B its elements of these rows alone are picked."""
        number, first = divmod(start, self.height)
        count, rank, width = self.count, self.rank, self.down[0].info.shape[1]
        own = stop - start, rank
        left = Viewed(
            described(self.value.info.dtype, own), self.value, first * rank * count + number, (rank * count, count), own
        )
        right = rows_of(self.down[0], number * rank, (number + 1) * rank)
        made = Product(described(DTYPES["F32"], (stop - start, width)), left, (right,))
        return Change(self.kind, made.info.shape, made, rank=rank, scale=self.scale)

    def applied(self, weight: Node, strength: float) -> Node:
        """The tensor of all experts, changed."""
        return Change(self.kind, self.shape, self._product, rank=self.rank, scale=self.scale).applied(weight, strength)

    @property
    def _product(self) -> Node:
        """All of Bₑ Aₑ one below the other, or of (Bₑ Aₑ)ᵀ = Aₑᵀ Bₑᵀ: one product with a band for each expert."""
        count, rank = self.count, self.rank
        (high, total), width = self.value.info.shape, self.down[0].info.shape[1]
        own = {"count": count, "turned": self.is_turned}
        by_expert = ByWhole(described(DTYPES["F32"], (high, total)), BY_EXPERT, own, (self.value,), "experts")
        if self.is_turned:
            left, right = permuted(self.down[0], (count, rank, width), (0, 2, 1)), in_shape(by_expert, (total, high))
        else:
            left, right = in_shape(by_expert, (count * high, rank)), self.down[0]
        return Product(described(DTYPES["F32"], self.shape), left, (right,), bands=count)


def _by_expert(up: Tensor, *, count: int, turned: bool) -> Tensor:
    """θ[e, o, k] = B[o, k·E + e], or θ[e, k, o]"""
    order = (2, 1, 0) if turned else (2, 0, 1)
    return up.view(len(up), -1, count).permute(order).reshape(up.shape)


BY_EXPERT: Final = WholeMethod(
    "by expert", (), "none", (1, 1), "θ[e, o, k] = B[o, k·E + e]", function=_by_expert, temporaries=0
)
"""B of all experts, one after the other. It is held: what is one expert's lies all over B, which is read but once."""


def of_parameter(module: Module) -> Changes:
    """What a wrapper of a parameter changes: its config says of which rank, and so how many experts there are."""
    up, down = module.part("up", 2), module.part("down", 2)
    rank = module.config.rank(module.own_name) if module.config is not None else 0
    total = down.info.shape[0]
    if not rank or total % rank or len(up.info.shape) != 2 or len(down.info.shape) != 2 or up.info.shape[1] != total:
        raise module.differ("up", "down", f"should have as many ranks, a multiple of {rank}")
    if module.config is not None and module.config.fan_in_fan_out:
        raise Malformed(f"{module.name}   is of a parameter, for which fan_in_fan_out means nothing")
    if module.config is not None and module.config.is_dora:
        told = f"{module.config.where} says use_dora"
        raise Malformed(f"{module.name}   is of a parameter, which has no lengths, and {told}")
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
