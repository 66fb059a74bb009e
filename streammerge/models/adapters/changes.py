"""What a module of an adapter changes a tensor to, as expressions over the tensor and the adapter's factors.

    W' = W + s · Δ            with Δ a product of factors: LoRA, LoHa, LoKr, whole differences, …
    W' = m · V / ‖V‖          with V = W + s · Δ: DoRA
    W' = W ⊙ l                (IA)³

At another strength t than 1 it is W + t · (W' − W). Nothing is read to make these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from streammerge.compute.combining import combine
from streammerge.compute.expressions import ByBlock, Node, Product, Term
from streammerge.compute.matrices import permuted, rows_of, transposed, vector, zeros
from streammerge.compute.parts import in_shape, joined
from streammerge.methods.registry import BlockMethod, Needs
from streammerge.models.adapters.magnitudes import BY_COLUMN, BY_ROW
from streammerge.tensors import described

if TYPE_CHECKING:
    from torch import Tensor

Way = Literal["add", "multiply", "add multiplied", "replace"]
"""What is done with a tensor: a difference is added to it; it is multiplied, element by element; what it is multiplied
to is added to it; or another stands in its place."""


SAVED_WHOLE: Final = "saved"
"""The kind of what PEFT saves whole."""


def _multiply(one: Tensor, other: Tensor) -> Tensor:
    """θ = a ⊙ b"""
    return one * other


MULTIPLY: Final = BlockMethod(
    "multiply",
    (),
    "none",
    (2, 2),
    "θ = a ⊙ b",
    function=_multiply,
    needs=Needs(temporaries=1, temporaries_each=0),
)


@dataclass(frozen=True)
class Change:
    """What a module does to a tensor of this `shape`: its kind, its rank (0 where it has none), and its strength s.

    `value` is what is added, multiplied by, or put in the tensor's place; `factors` are what the tensor is multiplied
    by from the right, if that is added too. A `vector` along an `axis` is multiplied with all that lies behind each of
    its elements; as a `magnitude` it is how long that becomes. The shape may have the dimensions behind the first
    flattened. A tensor that need not be there is `optional`.
    """

    kind: str
    shape: tuple[int, ...]
    value: Node
    way: Way = "add"
    rank: int = 0
    scale: float = 1.0
    factors: tuple[Node, ...] = ()
    magnitude: Node | None = None
    axis: int = 0
    told: str = ""
    optional: bool = False

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape may be changed: one of the same matrix, or the same kernels, ones left out.

        What is multiplied has to have as many elements along the axis.
        """
        if self.way in ("multiply", "add multiplied"):
            return len(shape) > self.axis and shape[self.axis] == self.value.info.elements
        own, other = _without_ones(self.shape), _without_ones(shape)
        is_flat = len(own) == 2 and len(other) > 2
        return own == ((other[0], math.prod(other[1:])) if is_flat else other)

    def resizes(self, shape: Sequence[int]) -> bool:
        """Whether it stands in the place of a matrix that has other rows, as where a vocabulary was resized."""
        is_matrix = self.way == "replace" and len(self.shape) == len(shape) == 2
        return is_matrix and self.shape[1] == shape[1] and self.shape[0] != shape[0]

    @property
    def is_linear(self) -> bool:
        """Whether it adds what doesn't depend on the tensor."""
        return self.magnitude is None and self.way == "add" and not self.factors

    @property
    def is_saved(self) -> bool:
        """Whether it is the tensor itself, as PEFT saves modules."""
        return self.kind == SAVED_WHOLE

    @property
    def can_be_turned(self) -> bool:
        """Whether it may be told for a tensor that lies transposed in the model."""
        return len(self.shape) == 1 or self.is_linear or self.way == "multiply"

    def turned(self) -> Change:
        """The same for a tensor that lies transposed in the model; of a vector that is the same."""
        if len(self.shape) == 1:
            return self
        if self.way == "multiply":
            return replace(self, shape=self.shape[::-1], axis=1 - self.axis)
        return replace(self, shape=self.shape[::-1], value=transposed(self.value))

    def seen_as(self, shape: Sequence[int]) -> Change:
        """The same for a tensor of this shape, where several may be meant."""
        return self

    def of_rows(self, start: int, stop: int) -> Change:
        """What it does to rows [start, stop) alone; linear ones only."""
        return replace(self, shape=(stop - start, *self.shape[1:]), value=rows_of(self.value, start, stop))

    def applied(self, weight: Node, strength: float) -> Node:
        """The changed tensor."""
        if self.magnitude is not None:
            return _between(weight, self._resized(self._added(weight, self.scale)), strength)
        if self.way == "replace" and self.resizes(weight.info.shape):  # then the strength is 1
            return combine(described(weight.info.dtype, self.shape), (Term(1.0, self.value),))
        if self.way == "replace":
            return _between(weight, self.value, strength)
        if self.way == "multiply":
            return _between(weight, self._multiplied(weight), strength)
        return self._added(weight, strength * self.scale)

    def applied_to_rows(self, weight: Node, start: int, stop: int, strength: float) -> Node:
        """The tensor with its rows [start, stop) changed."""
        rows, info = weight.info.shape[0], weight.info
        if self.is_linear:
            lifted = _stacked(
                weight,
                zeros((start, *info.shape[1:])),
                self.value,
                zeros((rows - stop, *info.shape[1:])),
            )
            return combine(info, (Term(1.0, weight), Term(strength * self.scale, lifted)))
        changed = self.applied(rows_of(weight, start, stop), strength)
        above, below = rows_of(weight, 0, start), rows_of(weight, stop, rows)
        return combine(info, (Term(1.0, _stacked(weight, above, changed, below)),))

    def _added(self, weight: Node, strength: float) -> Node:
        """The tensor, and so much of the difference."""
        added = self._multiplied(weight) if self.way == "add multiplied" else self.value
        terms = [Term(1.0, weight), Term(strength, added)]
        if self.factors:
            terms.append(Term(strength, _from_the_right(weight, self.factors)))
        return combine(weight.info, tuple(terms))

    def _multiplied(self, weight: Node) -> Node:
        """The tensor, each element multiplied."""
        over = vector(self.value, weight.info.shape, self.axis)
        return ByBlock(weight.info, MULTIPLY, {}, (weight, over), self.kind)

    def _resized(self, weight: Node) -> Node:
        """Rows, or columns, of the length that the magnitudes say."""
        assert self.magnitude is not None
        over = vector(self.magnitude, weight.info.shape, self.axis)
        return ByBlock(weight.info, (BY_ROW, BY_COLUMN)[self.axis], {}, (weight, over), self.kind)


def _from_the_right(weight: Node, factors: tuple[Node, ...]) -> Node:
    """The tensor times matrices, which go over its inputs, at every place of its kernels."""
    outputs, inputs = weight.info.shape[:2]
    kernel = weight.info.elements // (outputs * inputs)
    if kernel == 1:
        return Product(weight.info, weight, factors)
    behind = permuted(weight, (outputs, inputs, kernel), (0, 2, 1))
    made = Product(described(weight.info.dtype, behind.info.shape), behind, factors)
    return in_shape(permuted(made, (outputs, kernel, inputs), (0, 2, 1)), weight.info.shape)


def _between(weight: Node, changed: Node, strength: float) -> Node:
    """W + t · (W' − W)"""
    return combine(weight.info, (Term(1.0 - strength, weight), Term(strength, changed)))


def _stacked(like: Node, *parts: Node) -> Node:
    """The parts one after the other, those left out that have no rows, in the shape of another tensor."""
    return joined([part for part in parts if part.info.elements], like.info)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without what stands for a kernel of one element."""
    kept = list(shape)
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)
