"""Expressions: what the elements of one output tensor are, before any of them is read.

A merge is described per tensor by a small tree. Leaves are byte ranges of files; inner nodes say how blocks of their
children become a block of theirs. Trees are built from headers alone, folded, counted, and only then evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from streammerge.compute.rows import Rows
from streammerge.formats.files import ByteFile
from streammerge.formats.readers import FileRange
from streammerge.tensors import Model, TensorInfo

if TYPE_CHECKING:
    from streammerge.methods.contract import ParameterValue
    from streammerge.methods.place import Within
    from streammerge.methods.registry import BlockMethod, GramMethod, WholeMethod
    from streammerge.methods.statistics.slices import Slices


BLOCK: Final = 2**18
"""Elements that are computed at once at the most: few enough for the CPU's caches, enough to be worth the calls."""

PIECE: Final = 2**17
"""Elements that methods are given at once, which make many temporary tensors of that size. Both are constants, because
sums over a tensor are taken block by block, and random numbers piece by piece, whatever the threads and limits."""


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor whose elements lie one after the other in a file, from byte `start`."""

    info: TensorInfo
    file: ByteFile
    start: int

    def elements(self, start: int, stop: int) -> FileRange:
        """Where elements [start, stop) are, of as many bits as fill bytes."""
        size = self.info.dtype.bits // 8
        return FileRange(self.file, self.start + start * size, self.start + stop * size)


@dataclass(frozen=True, slots=True, eq=False)
class Viewed:
    """A tensor spread over another's flat elements, as strides say; outside `inner` it is `around`, or else zero.

    Element (i, j, …), counted from `first` if it isn't empty, is `source[offset + i·stride₀ + j·stride₁ + …]` inside of
    `inner`, else that of `around`, a tensor of the same shape. It serves torch's strided storages (inner = shape),
    slices (the source's strides), zero padding, and what is put into the corner or the midst of a larger tensor.
    """

    info: TensorInfo
    source: Node
    offset: int
    strides: tuple[int, ...]
    inner: tuple[int, ...]
    around: Node | None = None
    first: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """A tensor whose flat elements are those of its parts, one part after the other; all are of its dtype."""

    info: TensorInfo
    parts: tuple[Node, ...]

    def within(self, start: int, stop: int) -> Iterator[tuple[Node, int, int]]:
        """The parts in which elements [start, stop) lie, and which of their own elements these are."""
        first = 0
        for part in self.parts:
            last = first + part.info.elements
            if max(start, first) < min(stop, last):
                yield part, max(start, first) - first, min(stop, last) - first
            first = last


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """A tensor made of rows of others, along their first dimension, as `rows` say: of the sources by their number."""

    info: TensorInfo
    sources: tuple[Node, ...]
    rows: Rows


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """A tensor as a file would hold it: its elements rounded to the dtype of `info`."""

    info: TensorInfo
    source: Node


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A product of matrices, `left` · factors₀ · factors₁ · …, of which only the factors are held as wholes.

    A factor is a matrix whose rows lie along its first dimension, and `left` one whose rows are as long as the first
    factor has rows. No factor is empty. The product's flat elements are those of a tensor of the shape
    that `info` says: so a convolution's kernels are rows, and a low-rank difference of them is one product.

    With several `groups` its one factor is so many blocks, one below the other, that stand along a diagonal: each of
    them multiplies its own share of a row. With several `bands` it is so many blocks, one below the other, of which
    each multiplies its own share of the rows: many products of one size, one below the other.
    """

    info: TensorInfo
    left: Node
    factors: tuple[Node, ...]
    groups: int = 1
    bands: int = 1

    @property
    def inner(self) -> int:
        """How many elements a row of `left` has."""
        return self.factors[0].info.shape[0] // self.bands

    @property
    def width(self) -> int:
        """How many elements a row of the product has."""
        last = self.factors[-1].info
        return self.groups * (last.elements // last.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class External:
    """A tensor of a model that is not ours and can only be asked to read itself; `told` is what it holds, if known."""

    info: TensorInfo
    model: Model
    name: str
    told: str = ""


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a linear combination."""

    coefficient: float
    node: Node


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """Σ coefficient · node / divisor: what every linear method comes to. No term has the coefficient 0.

    The sum is divided where a mean's weights, such as 1/3, would have to be rounded before they are multiplied.
    """

    info: TensorInfo
    terms: tuple[Term, ...]
    divisor: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class ByGram:
    """A linear combination whose coefficients depend on the inner products of its inputs."""

    info: TensorInfo
    method: GramMethod
    parameters: Mapping[str, ParameterValue]
    inputs: tuple[Node, ...]
    name: str = ""
    seed: int = 0
    within: Within = ()

    @property
    def slices(self) -> Slices | None:
        """What each combination is made for, if not for the whole tensor."""
        return self.method.slices(self.parameters) if self.method.slices else None


@dataclass(frozen=True, slots=True, eq=False)
class ByBlock:
    """A function of the inputs' blocks (the base, if there is one, comes first) and of statistics of the tensors.

    `together` are the tensors of which the statistics are taken, if not of this one alone; among the blocks of all of
    them, its own begin with `first_block`. Its statistics are `shared` where another tensor needs the same ones.
    """

    info: TensorInfo
    method: BlockMethod
    parameters: Mapping[str, ParameterValue]
    inputs: tuple[Node, ...] = field(default=())
    name: str = ""
    seed: int = 0
    within: Within = ()
    together: Together | None = None
    first_block: int = 0
    shared: Shared | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ByWhole:
    """A function of the whole inputs, the base first if there is one."""

    info: TensorInfo
    method: WholeMethod
    parameters: Mapping[str, ParameterValue]
    inputs: tuple[Node, ...]
    name: str = ""
    seed: int = 0
    within: Within = ()


@dataclass(frozen=True, slots=True, eq=False)
class Together:
    """Tensors of one merge whose statistics are taken over all of them, in this order, as if they were one tensor.

    Every member refers to it, so it comes before them: they are added one by one while it is decided what becomes of
    the tensors, and none later.
    """

    members: list[ByBlock] = field(default_factory=list)


ModelStatistics = dict[Together, Any]
"""The statistics of tensors that have been measured together. They are no part of the expressions: who carries out a
merge, or reads from one, holds them and hands them on."""


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """Statistics that several tensors need: the first of them measures, and the others are told."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a tensor, and whether it may hold infinite values or NaNs of which this doesn't tell."""

    statistics: Any
    suspicious: bool


SharedStatistics = dict[Shared, Measured]
"""What has been measured in one run, for those that share it."""

Node = Stored | Viewed | Joined | Gathered | Rounded | Product | External | Combined | ByGram | ByBlock | ByWhole

Applied = ByGram | ByBlock | ByWhole
"""A method applied to inputs, of which something must be known before a block can be computed."""

Surveyed = Applied | Product
"""What may have to be gone over, or held, before a block of it can be computed."""


def children(node: Node) -> tuple[Node, ...]:
    """The nodes that this one is computed from."""
    if isinstance(node, Combined):
        return tuple(term.node for term in node.terms)
    if isinstance(node, Applied):
        return node.inputs
    match node:
        case Viewed():
            return (node.source,) if node.around is None else (node.source, node.around)
        case Joined():
            return node.parts
        case Gathered():
            return node.sources
        case Rounded():
            return (node.source,)
        case Product():
            return (node.left, *node.factors)
        case _:
            return ()


def block_method(node: Node) -> BlockMethod | None:
    """The method of blocks whose result it is, if it is one's."""
    return node.method if isinstance(node, ByBlock) else None


def is_product_of_two(node: Node) -> bool:
    """Whether it is the product of two factors, and of no blocks of them."""
    return isinstance(node, Product) and len(node.factors) == node.groups == node.bands == 1


def walk(node: Node) -> Iterator[Node]:
    """The node's whole tree, children before parents."""
    for child in children(node):
        if isinstance(child, Stored):  # most are
            yield child
        else:
            yield from walk(child)
    yield node


def leaves(node: Node) -> Iterator[Stored | External]:
    """The tree's leaves: what will be read."""
    return (part for part in walk(node) if isinstance(part, Stored | External))


def is_stored(node: Node) -> TypeGuard[Stored]:
    """Whether it is the bytes of a file, as they lie there."""
    return isinstance(node, Stored)


def stored_place(node: Node) -> object:
    """Equal for tensors that are the same bytes of the same open file, as they lie there; None for what is none."""
    return (id(node.file), node.start, node.info.dtype.name, node.info.shape) if isinstance(node, Stored) else None


def stored_leaves(node: Node) -> Iterator[Stored]:
    """The byte ranges of files that the tree reads."""
    return (leaf for leaf in leaves(node) if isinstance(leaf, Stored))


def gives(part: Node, whole: Node) -> bool:
    """Whether anything that is read for a part is read for the whole, too."""
    own = {_place_of(leaf) for leaf in leaves(part)}
    return any(_place_of(leaf) in own for leaf in leaves(whole))


def _place_of(leaf: Stored | External) -> object:
    return stored_place(leaf) if isinstance(leaf, Stored) else (id(leaf.model), leaf.name)


def has_external(node: Node) -> bool:
    """Whether something of it lies in a model that is not ours, and nobody knows what."""
    return any(isinstance(leaf, External) and not leaf.told for leaf in leaves(node))


def applications(node: Node) -> Iterator[Applied]:
    """The methods that are applied in the tree, but for those that are folded into coefficients."""
    return (part for part in walk(node) if isinstance(part, Applied))


def surveyed(node: Node) -> Iterator[Surveyed]:
    """What in the tree has to be gone over, or held, before a block can be computed; children before parents."""
    return (part for part in walk(node) if isinstance(part, Surveyed))


def measured_together(node: Node) -> Iterator[tuple[ByBlock, Together]]:
    """What in the tree has its statistics taken with other tensors, and with which."""
    for part in walk(node):
        if isinstance(part, ByBlock) and part.together is not None:
            yield part, part.together


def is_merged(node: Node) -> bool:
    """Whether tensors are merged in it, be it one with itself: it is more than read, viewed or rounded."""
    return any(isinstance(part, Combined | Applied | Product) for part in walk(node))


def is_computed(node: Node) -> bool:
    """Whether its elements are more than stored ones: there is arithmetic or rounding on their way."""
    return any(isinstance(part, Combined | Applied | Rounded | Product) for part in walk(node))


def rounded(node: Node, info: TensorInfo) -> Node:
    """The tensor as a file would hold it that stores it so: itself if that is how its elements are stored already."""
    is_exact = node.info.dtype == info.dtype and not is_computed(node)
    return node if is_exact else Rounded(info, node)
