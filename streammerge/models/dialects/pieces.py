"""What a tensor of one naming is made of in another: whole tensors, rows of one, or several one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from streammerge.models.dialects.rules import Link
from streammerge.tensors import TensorInfo, described


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of a tensor that a model has."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor as it is seen: what it looks like, and the pieces that it is made of, one after the other, by rows.

    `transposed`: of its only piece, which is a whole matrix. Otherwise the elements keep their order; where the shape
    is not the pieces', they are the same in number.
    """

    info: TensorInfo
    pieces: tuple[Piece, ...]
    transposed: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The model's tensors of which it is made, each once."""
        return tuple(dict.fromkeys(piece.tensor for piece in self.pieces))

    def is_whole(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether it is the tensor of this name, as it is."""
        return self.tensors == (name,) and len(self.pieces) == 1 and not self.transposed and self.info == tensors[name]


def whole(name: str, info: TensorInfo, shape: tuple[int, ...] | None = None) -> Source:
    """A whole tensor, in another shape if one is given."""
    return Source(described(info.dtype, info.shape if shape is None else shape), (Piece(name, 0, rows(info)),))


def rows(info: TensorInfo) -> int:
    """How many rows a tensor has: one if it is a scalar."""
    return info.shape[0] if info.shape else 1


Tensors = Mapping[str, TensorInfo]


def to_theirs(link: Link, tensors: Tensors) -> dict[str, Source] | None:
    """The tensors of the other naming, made of the original one; None if its shape is not what the rules expect."""
    info, name = tensors[link.ours], link.ours
    if len(link.theirs) == 1:
        source = _one(link, name, info, to_ours=False)
        return None if source is None else {link.theirs[0]: source}
    ends = list(_ends(link, info, tensors))
    if not info.shape or not ends or ends != sorted(set(ends)) or ends[-1] != info.shape[0]:
        return None
    parts = zip(link.theirs, [0, *ends], ends, strict=False)
    return {
        theirs: Source(described(info.dtype, (stop - start, *info.shape[1:])), (Piece(name, start, stop),))
        for theirs, start, stop in parts
    }


def to_ours(link: Link, tensors: Tensors) -> Source | None:
    """The original tensor, made of those of the other naming; None if their shapes are not what the rules expect."""
    infos = [tensors[name] for name in link.theirs]
    first = infos[0]
    if len(infos) == 1:
        return _one(link, link.theirs[0], first, to_ours=True)
    if not all(info.shape and info.dtype == first.dtype and info.shape[1:] == first.shape[1:] for info in infos):
        return None
    heads = infos[:-1] if link.way == "wide rows" else infos
    if len({info.shape for info in heads}) > 1 or (
        link.way == "wide rows" and heads[0].shape[1:] not in _square(first)
    ):
        return None
    shape = (sum(map(rows, infos)), *first.shape[1:])
    pieces = tuple(Piece(name, 0, rows(info)) for name, info in zip(link.theirs, infos, strict=True))
    return Source(described(first.dtype, shape), pieces)


def _square(info: TensorInfo) -> tuple[tuple[int, ...], ...]:
    """What may follow the first dimension of a matrix that has as many columns as rows, or of a bias."""
    return (), (info.shape[0],)


def _ends(link: Link, info: TensorInfo, tensors: Tensors) -> Iterator[int]:
    """Where the rows of each part end."""
    count, length = len(link.theirs), rows(info)
    if link.way == "rows":
        yield from (length * number // count for number in range(1, count + 1) if length % count == 0)
        return
    weight = tensors.get(f"{link.ours.rpartition('.')[0]}.weight")
    if weight is not None and len(weight.shape) == 2:
        yield from (weight.shape[1] * number for number in range(1, count))
        yield length


def _one(link: Link, name: str, info: TensorInfo, *, to_ours: bool) -> Source | None:
    """A tensor that is one in both namings."""
    if link.way == "halves":
        half, odd = divmod(rows(info), 2)
        return None if odd or not info.shape else Source(info, (Piece(name, half, 2 * half), Piece(name, 0, half)))
    if link.way == "transposed":
        if len(info.shape) != 2:
            return None
        return Source(described(info.dtype, info.shape[::-1]), (Piece(name, 0, rows(info)),), transposed=True)
    if link.way == "flat" and len(info.shape) >= 2:
        matrix = info.shape[:2]
        return None if math.prod(info.shape[2:]) != 1 else whole(name, info, (*matrix, 1, 1) if to_ours else matrix)
    return whole(name, info)
