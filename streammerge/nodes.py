"""Expressions: what the elements of one output tensor are, before any of them is read.

A merge is described per tensor by a small tree. Leaves are byte ranges of files; inner nodes say how blocks of their
children become a block of theirs. Trees are built from headers alone, folded, counted, and only then evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from streammerge.formats.files import ByteFile
from streammerge.methods.registry import net
from streammerge.tensors import DTYPES, DType, Model, TensorInfo

if TYPE_CHECKING:
    from streammerge.methods.contract import ParameterValue
    from streammerge.methods.place import Within
    from streammerge.methods.registry import BlockMethod, GramMethod, WholeMethod
    from streammerge.methods.slices import Slices

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


@dataclass(frozen=True, slots=True, eq=False)
class Viewed:
    """A tensor spread over another's flat elements, as strides say, and zero outside `inner`.

    Element (i, j, …) is `source[offset + i·stride₀ + j·stride₁ + …]` where i, j, … lie inside `inner`, else zero. It
    serves torch's strided storages (inner = shape), slices (inner = shape, the source's strides) and zero padding.
    """

    info: TensorInfo
    source: Node
    offset: int
    strides: tuple[int, ...]
    inner: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class External:
    """A tensor of a model that is not ours and can only be asked to read itself."""

    info: TensorInfo
    model: Model
    name: str


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a linear combination."""

    coefficient: float
    node: Node


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """Σ coefficient · node: what every linear method comes to. No term has the coefficient 0."""

    info: TensorInfo
    terms: tuple[Term, ...]


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

    `together` are the tensors of which the statistics are taken, if not of this one alone.
    """

    info: TensorInfo
    method: BlockMethod
    parameters: Mapping[str, ParameterValue]
    inputs: tuple[Node, ...] = field(default=())
    name: str = ""
    seed: int = 0
    within: Within = ()
    together: Together | None = None


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


@dataclass(slots=True, eq=False)
class Together:
    """Tensors of one merge whose statistics are taken over all of them, in this order, as if they were one tensor.

    `found` are the statistics once they are known.
    """

    members: list[ByBlock] = field(default_factory=list)
    found: Any = None


Node = Stored | Viewed | External | Combined | ByGram | ByBlock | ByWhole
Applied = ByGram | ByBlock | ByWhole
"""A method applied to inputs, of which something must be known before a block can be computed."""


def combine(info: TensorInfo, terms: tuple[Term, ...]) -> Combined:
    """The linear combination of the terms, with nested combinations folded into it and zero terms left out.

    What has the coefficient 0 is never read: 0.5·depth + 0.5·waifu over one base does not read the base. A tensor that
    occurs twice is read once.
    """
    shares: dict[object, list[float]] = {}
    nodes: dict[object, Node] = {}
    for coefficient, node in _flatten(terms, 1.0):
        key = _identity(node)
        nodes.setdefault(key, node)
        shares.setdefault(key, []).append(coefficient)
    sums = {key: net(*contributions) for key, contributions in shares.items()}
    return Combined(info, tuple(Term(sums[key], node) for key, node in nodes.items() if sums[key]))


def _flatten(terms: tuple[Term, ...], factor: float) -> Iterator[tuple[float, Node]]:
    for term in terms:
        if isinstance(term.node, Combined):
            yield from _flatten(term.node.terms, factor * term.coefficient)
        else:
            yield factor * term.coefficient, term.node


def _identity(node: Node) -> object:
    """Equal for two leaves that are the same bytes of the same open file, and otherwise for the same node only."""
    return (id(node.file), node.start, node.info) if isinstance(node, Stored) else id(node)


def children(node: Node) -> tuple[Node, ...]:
    """The nodes that this one is computed from."""
    if isinstance(node, Combined):
        return tuple(term.node for term in node.terms)
    if isinstance(node, Applied):
        return node.inputs
    return (node.source,) if isinstance(node, Viewed) else ()


def walk(node: Node) -> Iterator[Node]:
    """The node's whole tree, children before parents."""
    for child in children(node):
        yield from walk(child)
    yield node


def leaves(node: Node) -> Iterator[Stored | External]:
    """The tree's leaves: what will be read."""
    return (part for part in walk(node) if isinstance(part, Stored | External))


def compute_dtype(node: Node, stored: DType) -> DType:
    """The dtype in which a tensor is computed unless the user says otherwise.

    float32; float64 where an input is float64, and for linear combinations that are stored as float32: there every
    rounding would show, for coefficients that nearly cancel in many places, and float64 costs no more per byte read.
    What is not computed at all keeps its own dtype, integers above all.
    """
    if not isinstance(node, Combined | Applied) and node.info.dtype == stored:
        return stored
    widest = max([stored.bits, *(leaf.info.dtype.bits for leaf in leaves(node))])
    is_combination = isinstance(node, Combined | ByGram)
    return DTYPES["F64" if widest >= 64 or (is_combination and stored.bits >= 32) else "F32"]


def slots(node: Node) -> int:
    """How many of a lane's slots evaluating the node takes, its own included."""
    match node:
        case Combined():
            return 1 + max((slots(term.node) for term in node.terms), default=0)
        case ByGram():
            # measured with all inputs at hand, then combined one after the other
            own = list(map(slots, node.inputs))
            return max(_side_by_side(own), 1 + max(own))
        case ByBlock() | ByWhole():
            return _side_by_side(map(slots, node.inputs))
        case Viewed():
            return 1 + slots(node.source)
        case _:
            return 1


def _side_by_side(needed: Iterable[int]) -> int:
    return max(place + own for place, own in enumerate(needed))
