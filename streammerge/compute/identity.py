"""Which expressions are the same: of one kind, that cost the same, or to the last byte of what they compute."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Hashable, Iterable
from typing import Any, Final

from streammerge.compute.expressions import (
    Applied,
    ByBlock,
    Combined,
    External,
    Gathered,
    Joined,
    Node,
    Product,
    Rounded,
    Stored,
    Together,
    Viewed,
)
from streammerge.compute.job import Job
from streammerge.formats.files import ByteFile

USUAL: Final = 65504.0
"""Coefficients beyond it, which not every dtype can hold, make a kind of their own."""

MARK: Final = "#"
"""What digests begin with."""


def kind_of(node: Node) -> Hashable:
    """Equal for expressions that differ in no more than names, places in files, and coefficients of a usual size.

    What they cost is the same, and so is what they are computed in.
    """
    own = node.info.dtype.name, node.info.shape
    match node:
        case Stored():
            return own
        case Combined(terms=terms):
            is_same = len(terms) == 1 and terms[0].coefficient == 1
            largest = max((abs(term.coefficient) for term in terms), default=0.0)
            beyond = largest if largest > USUAL else 0.0
            return "combined", own, is_same, beyond, *(kind_of(term.node) for term in terms)
        case External():
            return "external", own, node.told
        case Viewed(around=around):
            around_it = None if around is None else kind_of(around)
            return "viewed", own, node.inner, node.strides, node.first, kind_of(node.source), around_it
        case Joined(parts=parts):
            return "joined", own, *map(kind_of, parts)
        case Gathered(sources=sources):
            used = tuple(sorted(node.rows.used().items()))
            return "gathered", own, used, *map(kind_of, sources)
        case Rounded():
            return "rounded", own, kind_of(node.source)
        case Product(left=left, factors=factors):
            return "product", own, node.groups, node.bands, kind_of(left), *map(kind_of, factors)
    together = id(node.together) if isinstance(node, ByBlock) and node.together is not None else 0
    parameters = tuple(node.parameters.items())
    return id(node.method), own, together, parameters, *map(kind_of, node.inputs)


def digest(data: bytes | Iterable[bytes]) -> str:
    """A short digest of bytes, or of pieces of them."""
    made = hashlib.blake2b(digest_size=12)
    for piece in (data,) if isinstance(data, bytes) else data:
        made.update(piece)
    return MARK + made.hexdigest()


class Describer:
    """Says of expressions what they compute, with inputs by their number."""

    def __init__(self, files: Iterable[ByteFile]) -> None:
        self.numbers = {id(file): number for number, file in enumerate(files)}
        self._together = functools.cache(self._describe_together)

    def job(self, job: Job) -> bytes:
        """What its bytes are made of, computed in, and where they go."""
        computed = job.compute.name if job.compute else None
        return json.dumps([str(job.info), computed, job.file, job.offset, self.node(job.node)]).encode()

    def node(self, node: Node) -> list[Any]:
        """The expression, as plain values."""
        info = str(node.info)
        match node:
            case Stored():
                return ["stored", info, self.numbers.get(id(node.file), str(node.file.path)), node.start]
            case Viewed():
                around = [self.node(node.around)] if node.around is not None else []
                first = [{"first": node.first}] if node.first else []
                return ["viewed", info, self.node(node.source), node.offset, node.strides, node.inner, *around, *first]
            case Joined():
                return ["joined", info, [self.node(part) for part in node.parts]]
            case Gathered():
                return ["gathered", info, node.rows.digest(), *map(self.node, node.sources)]
            case Rounded():
                return ["rounded", info, self.node(node.source)]
            case Product():
                groups = [node.groups] if node.groups > 1 else []
                bands = [{"bands": node.bands}] if node.bands > 1 else []
                return ["product", info, self.node(node.left), *map(self.node, node.factors), *groups, *bands]
            case Combined():
                terms = [[term.coefficient.hex(), self.node(term.node)] for term in node.terms]
                return ["combined", info, node.divisor.hex(), terms]
            case External():
                return ["external", info, node.name, *([node.told] if node.told else [])]
            case _:
                return self._applied(node)

    def _applied(self, node: Applied) -> list[Any]:
        together = self._together(node.together) if isinstance(node, ByBlock) and node.together else None
        parameters = repr(sorted(node.parameters.items()))
        inputs = [self.node(part) for part in node.inputs]
        return [node.method.name, str(node.info), parameters, node.name, node.seed, together, inputs]

    def _describe_together(self, together: Together) -> str:
        """Its members without what they are together with: else there would be no end."""
        return digest(json.dumps([[m.name, [self.node(part) for part in m.inputs]] for m in together.members]).encode())
