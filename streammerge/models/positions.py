"""Text encoders' positions, which are the integers 0, 1, 2 … and nothing else, and what became of them elsewhere.

Tools that averaged them, or stored them as 16-bit floats, left 75.9975 or −0.003 where 76 and 0 were, and what is cut
to an integer then points to another position's embedding. They are never averaged here; broken ones are mended.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from streammerge.compute.expressions import External, Node, is_stored
from streammerge.tensors import DTYPES, Model, TensorInfo, described

if TYPE_CHECKING:
    import torch

MOST: Final = 4096
"""So many positions are looked at: text encoders have 77 to 512."""

_NAME: Final = re.compile(r"(.*\.)?(text_model|transformer)\.embeddings\.position_ids")
_FORMATS: Final[Mapping[str, str]] = {"I64": "q", "U64": "Q", "I32": "i", "U32": "I", "I16": "h", "U16": "H"}
"""How integers that hold every position are stored, for `struct`."""


def are_positions(name: str, info: TensorInfo) -> bool:
    """Whether the tensor is a text encoder's positions: by its name, and because it is one row."""
    if not name.endswith("position_ids") or not _NAME.fullmatch(name):
        return False
    return len(info.shape) in (1, 2) and info.elements == info.shape[-1] and 0 < info.elements <= MOST


def what_is_broken(model: Model, name: str) -> str:
    """What is wrong with a model's positions, in words; "" if nothing is. They are read if they are integers."""
    info = model.tensors[name]
    if info.dtype.name not in _FORMATS:
        return f"stored as {info.dtype}"
    values = _values(model, name, info)
    wrong = [f"{value} for {place}" for place, value in enumerate(values) if value != place]
    return f"{len(wrong):,} of {len(values):,} are wrong, such as {wrong[0]}" if wrong else ""


def _values(model: Model, name: str, info: TensorInfo) -> Sequence[int]:
    """The positions as they are stored; none where they don't lie flat in a file, which torch would have to be for."""
    node_of = getattr(model, "node", None)
    if node_of is None:
        return [int(value) for value in model.read(name, 0, info.elements).tolist()]
    node: Node = node_of(name)
    if not is_stored(node):
        return ()
    stored = _bytes_of(node.file.path, node.start, info.nbytes)
    return struct.unpack(f"<{info.elements}{_FORMATS[info.dtype.name]}", stored) if stored else ()


def _bytes_of(path: Path, start: int, nbytes: int) -> bytes:
    """Some bytes of a file, which is not kept open for them; none if they can't be read: who copies them says so."""
    try:
        with path.open("rb") as opened:
            opened.seek(start)
            found = opened.read(nbytes)
    except OSError:
        return b""
    return found if len(found) == nbytes else b""


def broken_positions(model: Model) -> dict[str, str]:
    """What is wrong with the positions of a model's text encoders, by tensor."""
    names = [name for name, info in model.tensors.items() if are_positions(name, info)]
    return {name: broken for name in names if (broken := what_is_broken(model, name))}


@dataclass(frozen=True, eq=False)
class Positions:
    """A model of one tensor: the integers from 0, as many as there are positions."""

    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The integers from `start` to before `stop`."""
        import torch

        return torch.arange(start, min(stop, self.tensors[name].elements), dtype=torch.int64)


def mended(name: str, shape: tuple[int, ...]) -> Node:
    """Positions as they should be."""
    info = described(DTYPES["I64"], shape)
    return External(info, Positions({name: info}), name, told="0, 1, 2 …")
