"""Tensors that are parts of one thing which is computed as a whole, such as the two factors of a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from streammerge.compute.expressions import ByWhole, Node, Viewed
from streammerge.compute.job import Job


def whole_of(node: Node) -> ByWhole | None:
    """What the tensor is a part of, if it is one of something that is made from rows of matrices."""
    source = node.source if isinstance(node, Viewed) else None
    return source if isinstance(source, ByWhole) and source.method.readings else None


def sharing(groups: Iterable[Sequence[Job]]) -> Iterator[Sequence[Job]]:
    """The groups, those of single jobs that follow each other and are parts of one whole made one group."""
    held: list[Job] = []
    for group in groups:
        whole = whole_of(group[0].node) if len(group) == 1 and not group[0].is_compiled else None
        if held and (whole is None or whole is not whole_of(held[0].node)):
            yield held
            held = []
        if whole is None:
            yield group
        else:
            held = [*held, *group]
    if held:
        yield held
