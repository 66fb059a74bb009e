"""A job: one tensor of the output, what it is made of, and where its bytes go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from streammerge.compute.expressions import Node
from streammerge.tensors import DType, TensorInfo


class Job:
    """One output tensor: its expression, the dtype it is computed in, and where its bytes go.

    `compute` is None where stored bytes are copied, and `is_compiled` says whether compiled loops do all of it. The
    expression may be left to be made when it is asked for.
    """

    __slots__ = ("_make", "_node", "compute", "file", "info", "is_compiled", "name", "offset")

    def __init__(
        self,
        name: str,
        info: TensorInfo,
        node: Node | None,
        compute: DType | None,
        file: int,
        offset: int,
        make: Callable[[str], Node] | None = None,
        *,
        is_compiled: bool = False,
    ) -> None:
        self.name: Final = name
        self.info: Final = info
        self.compute: Final = compute
        self.file: Final = file
        self.offset: Final = offset
        self.is_compiled: Final = is_compiled
        self._node = node
        self._make = make

    @property
    def node(self) -> Node:
        """The tensor's expression."""
        if self._node is None:
            assert self._make is not None
            self._node = self._make(self.name)
        return self._node
