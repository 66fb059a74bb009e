"""Tensors that lie in files, in tables: a model of 50,000 tensors takes a few megabytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

from streammerge.compute.expressions import Node, Stored, is_stored
from streammerge.formats.files import ByteFile
from streammerge.formats.tables import Column, Names
from streammerge.tensors import TensorInfo


class StoredTensors(Mapping[str, Node]):
    """Tensors that lie in files, as expressions that are made when they are asked for."""

    def __init__(
        self,
        names: Names,
        infos: Sequence[TensorInfo],
        starts: Sequence[int],
        files: Sequence[ByteFile],
        numbers: Sequence[int] | None = None,
    ) -> None:
        """`starts` are where the tensors begin in their files; `numbers` say which these are, if not all the first."""
        self.infos = Column(names, infos)
        self._starts = starts
        self._files = files
        self._numbers = numbers

    def __getitem__(self, name: str) -> Node:
        place = self.infos.names.places[name]
        file = self._files[self._numbers[place] if self._numbers else 0]
        return Stored(self.infos.values_in_order[place], file, self._starts[place])

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos


def compact(nodes: Mapping[str, Node], files: Sequence[ByteFile]) -> Mapping[str, Node]:
    """The same in little memory, if all of them lie flat in these files."""
    numbers = {id(file): number for number, file in enumerate(files)}
    infos, starts, places = list[TensorInfo](), array("Q"), array("I")
    for node in nodes.values():
        if not is_stored(node):
            return nodes
        infos.append(node.info)
        starts.append(node.start)
        places.append(numbers[id(node.file)])
    return StoredTensors(Names.of(nodes), infos, starts, files, places)
