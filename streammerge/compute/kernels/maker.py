"""A maker that computes by compiled loops, and by torch what they don't know: torch is imported when that comes."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from streammerge.compute.costs import piece_elements, row_elements, row_width
from streammerge.compute.expressions import (
    BLOCK,
    Applied,
    ByBlock,
    ByGram,
    Joined,
    Node,
    Product,
    Surveyed,
    applications,
    stored_leaves,
)
from streammerge.compute.inputs import Input, elements_of, inputs_of
from streammerge.compute.kernels.blocks import Kernels
from streammerge.compute.kernels.library import CHUNK, KINDS, LIMITS, Found, kernels
from streammerge.compute.kernels.operands import BlockOperands
from streammerge.compute.kernels.program import COMPUTES, Program, can_be_compiled, can_be_summed, compiled, registers
from streammerge.compute.kernels.sums import SummedBlocks
from streammerge.compute.makers import Block, Blocks, Measurer, Range, Statistics, Wanted
from streammerge.errors import OutOfMemoryError, machine_is_full
from streammerge.findings import Finding
from streammerge.formats.readers import Reader, page_aligned
from streammerge.methods.statistics.passes import Pass
from streammerge.tensors import DType, TensorInfo

if TYPE_CHECKING:
    from streammerge.compute.tensor_maker import TensorMaker

SPACE: Final = 3 << 19
"""Bytes of inputs that lie side by side, if whole blocks are more: half of the second-level cache or less."""


def is_compiled(node: Node, stored: DType, compute: DType) -> bool:
    """Whether compiled loops are there, and make all of a tensor that is computed and stored so."""
    return kernels() is not None and _have_kinds(stored, compute) and can_be_compiled(node)


def is_summed(node: Node, stored: DType, compute: DType) -> bool:
    """Whether compiled loops are there, and make all of such a tensor but the products in it."""
    return kernels() is not None and _have_kinds(stored, compute) and can_be_summed(node)


def _have_kinds(stored: DType, compute: DType) -> bool:
    return compute.name in COMPUTES and stored.name in KINDS


def maker_bytes(node: Node, info: TensorInfo) -> int:
    """What a maker holds for a tensor, or for neighbours of it: inputs, the stored block, registers, ranks in rows."""
    whole = any(isinstance(part, ByGram | ByBlock) for part in applications(node))
    by_rows = [part for part in applications(node) if isinstance(part, ByBlock) and part.method.needs.rows]
    inputs = list(inputs_of(node))
    elements = min(BLOCK, info.elements) if whole else at_once(inputs)
    elements = max([elements, *map(row_elements, by_rows)])
    told = sum(row_elements(part) * 8 * len(part.inputs) + 80 * max(row_width(part), CHUNK) for part in by_rows)
    beside = BLOCK * info.dtype.bits // 8 + registers(node) * CHUNK * 16
    read = element_bytes(inputs) + element_bytes([leaf for leaf in inputs if isinstance(leaf, Joined)])
    return elements * read + told + beside


def element_bytes(leaves: Sequence[Input]) -> int:
    """What an element of every input takes."""
    return sum(leaf.info.dtype.bits // 8 for leaf in leaves)


def at_once(leaves: Sequence[Input]) -> int:
    """How many elements of all inputs are read side by side."""
    return max(min(SPACE // max(element_bytes(leaves), 1) // CHUNK * CHUNK, BLOCK), CHUNK)


class KernelMaker:
    """Reads into buffers, computes by one call a block, and hands out bytes to write."""

    def __init__(self, reader: Reader) -> None:
        library = kernels()
        assert library is not None
        self.reader = reader
        self.kernels = Kernels(library)
        self.room = BLOCK
        self._bytes_read = 0
        self._out = page_aligned(0)
        self._tensors: TensorMaker | None = None
        self._running = contextlib.ExitStack()
        self._measured: tuple[Node, DType, Program | None] | None = None

    stretches: None = None
    """Every block is measured as soon as it is read, while it lies in the cache."""

    @property
    def bytes_read(self) -> int:
        """How much it has read, by torch too."""
        return self._bytes_read + (self._tensors.bytes_read if self._tensors else 0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What torch needs, from when something comes for it."""
        with self._running:
            if self._tensors:
                self._running.enter_context(self._tensors.running())
            yield

    @property
    def by_torch(self) -> TensorMaker:
        """The maker for what has no kernel."""
        if self._tensors is None:
            from streammerge.compute.lanes import Lane
            from streammerge.compute.tensor_maker import TensorMaker

            self._tensors = TensorMaker(Lane(self.reader))
            self._tensors.make_room(self.room)
            self._running.enter_context(self._tensors.running())
        return self._tensors

    def blocks(self, wanted: Wanted, known: Statistics, *, suspicious: bool = False) -> Blocks:
        """The tensor's blocks, by compiled loops if there are some for all of it."""
        if not wanted.unscaled and _have_kinds(wanted.stored, wanted.compute):
            if can_be_compiled(wanted.node):
                program = compiled([wanted.node], wanted.compute, known, base=wanted.base)
                return KernelBlocks(self, wanted, program, suspicious=suspicious)
            if can_be_summed(wanted.node) and not suspicious:
                return SummedBlocks(self.by_torch.blocks(wanted, known), self.kernels, self, wanted, known)
        return self.by_torch.blocks(wanted, known, suspicious=suspicious)

    def measurer(self, compute: DType, known: Statistics) -> Measurer:
        """For inputs that are computed in this dtype."""
        return KernelMeasurer(self, compute, known)

    def program(self, node: Applied, compute: DType, known: Statistics) -> Program | None:
        """That of the node's inputs, if compiled loops measure them; it is kept for the next block."""
        if self._measured is None or self._measured[0] is not node or self._measured[1] != compute:
            has_loops = compute.name in COMPUTES and can_be_compiled(node)
            self._measured = node, compute, compiled(node.inputs, compute, known) if has_loops else None
        return self._measured[2]

    def read(self, inputs: Sequence[Input], start: int, stop: int, *, is_again: bool = False) -> list[memoryview]:
        """Elements [start, stop) of every input, as they are stored. What is read again is counted once."""
        ranges = [elements_of(leaf, start, stop) for leaf in inputs]
        blocks = self.reader.read_all([part for parts in ranges for part in parts])
        self._bytes_read += 0 if is_again else sum(map(len, blocks))
        if all(len(parts) == 1 for parts in ranges):
            return blocks
        found = iter(blocks)
        return [_in_a_row([next(found) for _ in parts]) for parts in ranges]

    def out(self, nbytes: int) -> memoryview:
        """Memory for what is to be written."""
        if len(self._out) < nbytes:
            self._out = page_aligned(nbytes)
        return self._out[:nbytes]

    def check(self) -> None:
        """CheckpointError if something that was read is void."""
        self.reader.check()

    def make_room(self, elements: int) -> None:
        """Give all buffers back, and take smaller ones from now on."""
        self.room = min(self.room, elements)
        self._out = page_aligned(0)
        self.kernels.release()
        if self._tensors:
            self._tensors.make_room(elements)

    def release(self) -> None:
        """Give mapped memory back."""
        self.reader.release()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether the machine's memory has run out."""
        said = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        return said or (self._tensors is not None and self._tensors.is_out_of_memory(error))

    def no_memory_left(self) -> OutOfMemoryError:
        """What there is to say then."""
        return machine_is_full()


def _in_a_row(blocks: Sequence[memoryview]) -> memoryview:
    """Blocks one after the other, in memory of their own; where there is only one, itself."""
    if len(blocks) == 1:
        return blocks[0]
    whole, filled = page_aligned(sum(map(len, blocks))), 0
    for block in blocks:
        whole[filled : filled + len(block)] = block
        filled += len(block)
    return whole


class KernelBlocks:
    """The blocks of a tensor, made by a program."""

    def __init__(self, maker: KernelMaker, wanted: Wanted, program: Program, *, suspicious: bool) -> None:
        self.maker = maker
        self.wanted = wanted
        self.program = program
        self.suspicious = suspicious
        self.ranked, self.ranks = -1, memoryview(b"")
        self.by_ranks = len(program.rows) > 0
        self.step = program.piece * (1 if self.by_ranks else -(-at_once(program.inputs) // program.piece))

    def make(self, start: int, stop: int) -> Block:
        """Elements [start, stop), as many at once as lie side by side in the cache."""
        size, finding, step = self.wanted.stored.bits // 8, Finding(), self.step
        out, moved, length = self.maker.out((stop - start) * size), 0.0, 0.0
        for part in range(start // step, -(-stop // step)):
            first, last = max(part * step, start), min((part + 1) * step, stop)
            if self.by_ranks:
                self._rank(part)
            self._make(first, last, out[(first - start) * size : (last - start) * size], finding)
            change = self.program.take_departure()
            moved, length = moved + change[0], length + change[1]
        return Block(out, finding if finding.is_any else None, (moved, length))

    def each(self, ranges: Sequence[Range]) -> Iterator[Block]:
        """One range after the other."""
        return (self.make(*part) for part in ranges)

    def _rank(self, piece: int) -> None:
        """Rank the elements of a piece, unless they are what was ranked last: it may go on in the next block."""
        if piece == self.ranked:
            return
        maker, program, step = self.maker, self.program, self.program.piece
        start, stop = piece * step, min((piece + 1) * step, self.wanted.node.info.elements)
        blocks = maker.read(program.inputs, start, stop, is_again=True)
        self.ranks, self.ranked = maker.kernels.rank(program, blocks, stop - start, start, self.ranks), piece

    def _make(self, start: int, stop: int, out: memoryview, finding: Finding) -> None:
        maker, kind = self.maker, self.wanted.stored.name
        blocks = maker.read(self.program.inputs, start, stop)
        found = maker.kernels.store(self.program, blocks, stop - start, kind, out, start)
        if found:
            finding.add(finding_of(found, self.wanted.stored))
        if self.program.take_suspicion() or self.suspicious or (found and found.nonfinite):
            for leaf in inputs_of(self.wanted.node):  # those too that turned out not to be needed
                (block,) = maker.read([leaf], start, stop)
                if bad := maker.kernels.nonfinite(block, leaf.info.dtype.name, stop - start):
                    path = str(next(stored_leaves(leaf)).file.path)
                    finding.inputs[path] = finding.inputs.get(path, 0) + bad


def finding_of(found: Found, stored: DType) -> Finding:
    """What the loops have found, in the report's words."""
    finding = Finding(nonfinite=found.nonfinite, overflowed=found.overflowed, saturated=found.saturated)
    if finding.overflowed or finding.saturated:
        finding.largest = found.largest if found.largest >= 0 else math.inf
        finding.dtype, finding.limit = stored.torch_name, LIMITS[stored.name]
    return finding


class KernelMeasurer:
    """Measures blocks by compiled loops, or by torch where there are none for the method or its inputs."""

    def __init__(self, maker: KernelMaker, compute: DType, known: Statistics) -> None:
        self.maker = maker
        self.compute = compute
        self.known = known
        self.suspicious = False

    def measure(self, step: Pass[Any], node: Surveyed, piece: int, block: int) -> Any:  # noqa: ANN401
        """What the pass wants to know of this piece of the node's inputs, which it counts as this block."""
        program = None if isinstance(node, Product) else self.maker.program(node, self.compute, self.known)
        if program is None or isinstance(node, Product):
            measurer = self.maker.by_torch.measurer(self.compute, self.known)
            measured = measurer.measure(step, node, piece, block)
            self.suspicious |= measurer.suspicious
            return measured
        size = piece_elements(node)
        start, stop = piece * size, min((piece + 1) * size, node.info.elements)
        stop = min(start + step.part, stop) if step.part else stop
        blocks = self.maker.read(program.inputs, start, stop)
        operands = BlockOperands(self.maker.kernels, program, blocks, stop - start, len(node.inputs), start)
        measured = step.measure_compiled(block, operands)
        self.suspicious |= program.take_suspicion()
        return measured
