"""A maker: one worker's own means of computing, whether by torch or by compiled loops. What the workers know of it.

maker.blocks(output, known)  ─►  the blocks of an output's tensor, computed, rounded, looked at
maker.measurer(compute, known)  ─►  what passes want to know of blocks of their inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from streammerge.compute.expressions import Node, Surveyed
from streammerge.compute.inputs import Input
from streammerge.errors import OutOfMemoryError
from streammerge.findings import Finding
from streammerge.methods.statistics.passes import Pass
from streammerge.tensors import DType

Statistics = Mapping[int, Any]
"""What is known of whole tensors: by the `id` of a ByGram node its coefficients, of a ByBlock node its statistics, of a
ByWhole node the tensor itself, of a Product its factors."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A tensor that is to be made: its expression, what it is computed in and stored as.

    Of what is `unscaled`, weights that had scales and are stored without, values are counted that become 0. With a
    `base` it is measured how far the tensor is from that.
    """

    node: Node
    compute: DType
    stored: DType
    unscaled: bool = False
    base: Input | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Elements as they are stored, until the maker makes the next; what is wrong with them, if anything is; and if that
    is measured, the squares of how far they are from the base, and of the base, each added up."""

    data: memoryview
    finding: Finding | None
    change: tuple[float, float] = (0.0, 0.0)


Range = tuple[int, int]
"""Elements [start, stop) of a tensor."""


class Blocks(Protocol):
    """The blocks of one tensor, for one worker."""

    def make(self, start: int, stop: int) -> Block:
        """Elements [start, stop), no more than the maker has room for."""
        ...

    def each(self, ranges: Sequence[Range]) -> Iterator[Block]:
        """The elements of one range after the other; the next may be under way before the last is handed out."""
        ...


class Measurer(Protocol):
    """Measures blocks of methods' inputs. It is `suspicious` once they may hold infinite values or NaNs."""

    @property
    def suspicious(self) -> bool:
        """See above."""
        ...

    def measure(self, step: Pass[Any], node: Surveyed, piece: int, block: int) -> Any:  # noqa: ANN401
        """What the pass wants to know of this piece of the node's inputs, which it counts as this block."""
        ...


class StretchMeasurer(Measurer, Protocol):
    """Measures many blocks in less time than one after the other."""

    def measure_all(
        self, step: Pass[Any], node: Surveyed, pieces: Sequence[int], first_block: int
    ) -> Iterator[tuple[int, Any]]:
        """What the pass wants to know of these pieces, which are counted from this block on, by their blocks; what is
        known of several together only is told as one's."""
        ...


class Maker(Protocol):
    """One worker's reader, buffers, and means of computing.

    `room` is how many elements it takes at once; it shrinks where memory runs out.
    """

    @property
    def room(self) -> int:
        """See above."""
        ...

    @property
    def stretches(self) -> Callable[[DType, Statistics], StretchMeasurer] | None:
        """What measures many blocks at once; None if nothing does."""
        ...

    @property
    def bytes_read(self) -> int:
        """How much it has read."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """What the worker's thread needs around its work."""
        ...

    def blocks(self, wanted: Wanted, known: Statistics, *, suspicious: bool = False) -> Blocks:
        """The tensor's blocks; if they are `suspicious`, inputs of all are looked at for what isn't finite."""
        ...

    def measurer(self, compute: DType, known: Statistics) -> Measurer:
        """For the inputs of methods, computed in this dtype."""
        ...

    def check(self) -> None:
        """CheckpointError if something that was read is void."""
        ...

    def make_room(self, elements: int) -> None:
        """Give all buffers back, and take no larger ones than for so many elements from now on, where they will do."""
        ...

    def release(self) -> None:
        """Give mapped memory back."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether this error says that memory has run out."""
        ...

    def no_memory_left(self) -> OutOfMemoryError:
        """The error to raise when there is not even room for the smallest windows."""
        ...
