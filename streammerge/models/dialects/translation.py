"""Models in other names: views whose tensors are made of a model's, whole, cut or joined."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from streammerge.compute.expressions import Node
from streammerge.compute.parts import in_shape, joined, rows_of, transposed
from streammerge.formats.tables import Column, Names
from streammerge.models.dialects.pieces import Source
from streammerge.models.views import View
from streammerge.tensors import Model, TensorInfo

SOURCE_BYTES: Final = 500
"""What is kept in memory of a tensor that is seen under another name."""


@dataclass(frozen=True, eq=False)
class Translated(View):
    """A model's values under other names: `sources` has of which of them each tensor is made.

    What is only called otherwise, or is rows of a stored tensor, stays a range of bytes of its file.
    """

    model: Model
    sources: Mapping[str, Source]

    @property
    def kept_bytes(self) -> int:
        """What is kept in memory of the names."""
        return SOURCE_BYTES * len(self.sources)

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The new names, in their order, and what is behind them."""
        return Column(Names.of(self.sources), [source.info for source in self.sources.values()])

    def node(self, name: str) -> Node:
        """The tensor, put together."""
        source = self.sources[name]
        parts = [rows_of(self.values.node(piece.tensor), piece.start, piece.stop) for piece in source.pieces]
        return transposed(parts[0]) if source.transposed else in_shape(joined(parts, source.info), source.info.shape)
