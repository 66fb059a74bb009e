"""Small tensors that lie side by side, in the output and in every input, computed as if they were one.

A model has hundreds of tensors of a few kB. To plan, read and compute each of them by itself takes longer than its
elements do; linear combinations of neighbours with the same coefficients are one combination of a longer range.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from streammerge.compute.expressions import BLOCK, Combined, Node, Rounded, Stored, Term
from streammerge.compute.job import Job
from streammerge.tensors import TensorInfo

TOGETHER: Final = 32
"""So many tensors are made as one at the most: more are hardly faster, and all their expressions are held."""


def neighbours(jobs: Iterable[Job]) -> Iterator[Sequence[Job]]:
    """The jobs in their order, those that can be made as one together: by compiled loops, a block at the most."""
    group: list[Job] = []
    elements = 0
    for job in jobs:
        if len(group) == TOGETHER or (group and not _continues(group[0], job, elements)):
            yield group
            group, elements = [], 0
        group.append(job)
        elements += job.info.elements
    if group:
        yield group


def as_one(jobs: Sequence[Job]) -> Job:
    """The job of neighbours."""
    first, last = jobs[0], jobs[-1]
    if first is last:
        return first
    shape = (sum(job.info.elements for job in jobs),)
    info, node = TensorInfo(first.info.dtype, shape), _of_shape(first.node, shape)
    return Job(f"{first.name} to {last.name}", info, node, first.compute, first.file, first.offset, is_compiled=True)


def _continues(first: Job, job: Job, elements: int) -> bool:
    """Whether the job's tensor comes after so many elements that begin with the first's, in all files."""
    if not first.is_compiled or elements + job.info.elements > BLOCK:
        return False
    is_alike = job.is_compiled and (job.info.dtype, job.compute, job.file) == (
        first.info.dtype,
        first.compute,
        first.file,
    )
    return (
        is_alike
        and job.offset == first.offset + elements * first.info.dtype.bits // 8
        and _is_behind(first.node, job.node, elements)
    )


def _is_behind(first: Node, node: Node, elements: int) -> bool:
    """Whether both are the same of what lies in the same files, so many elements apart."""
    match first, node:
        case Stored(), Stored():
            is_there = node.start == first.start + elements * first.info.dtype.bits // 8
            return is_there and node.file is first.file and node.info.dtype == first.info.dtype
        case Rounded(), Rounded():
            return node.info.dtype == first.info.dtype and _is_behind(first.source, node.source, elements)
        case Combined(), Combined():
            return (
                node.divisor == first.divisor
                and len(node.terms) == len(first.terms)
                and all(
                    one.coefficient == other.coefficient and _is_behind(one.node, other.node, elements)
                    for one, other in zip(first.terms, node.terms, strict=True)
                )
            )
        case _:
            return False


def _of_shape(node: Node, shape: tuple[int, ...]) -> Node:
    """The same of the elements that begin where its own do."""
    info = TensorInfo(node.info.dtype, shape)
    match node:
        case Rounded():
            return replace(node, info=info, source=_of_shape(node.source, shape))
        case Combined():
            terms = tuple(Term(term.coefficient, _of_shape(term.node, shape)) for term in node.terms)
            return replace(node, info=info, terms=terms)
        case Stored():
            return replace(node, info=info)
        case _:
            raise AssertionError(f"{type(node).__name__} has no neighbours")
