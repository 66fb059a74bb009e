"""Distributed checkpoints of torch as models: every tensor put together of its chunks, as it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Final

from streammerge.compute.expressions import Joined, Node, Viewed
from streammerge.errors import CheckpointError
from streammerge.formats.files import ByteFile, read_errors
from streammerge.formats.torchzip.archive import StoredView, read_torch_tensor
from streammerge.formats.torchzip.distributed import CHUNKS, METADATA, Box, Chunk, Chunked, Distributed, chunk_files
from streammerge.tensors import TensorInfo, contiguous_strides, described

MAX_ACROSS: Final = 128
"""The most chunks that lie beside each other in a row of a tensor."""

MAX_FILES: Final = 4096
"""The most files that one checkpoint's chunks may lie in."""


def chunk_nodes(
    folder: Path, found: Distributed, node: Callable[[ByteFile, StoredView], Node]
) -> tuple[dict[str, Node], tuple[ByteFile, ...]]:
    """Every tensor as an expression of chunks, and the files that these lie in; `node` says what a stored view is.

    CheckpointError if a chunk is not where it is said to be, or a tensor's chunks are not just all of it.
    """
    paths = chunk_files(folder)
    if len(paths) > MAX_FILES:
        raise CheckpointError(f"{folder}: its tensors lie in {len(paths):,} files; {MAX_FILES:,} are read at most")
    files = {path.name: ByteFile(path) for path in paths}
    stored = _read_chunks(folder, found.tensors, files, node)
    for file in files.values():
        file.index = folder / METADATA
    nodes = {name: _Assembly(folder, name, tensor, stored).node() for name, tensor in found.tensors.items()}
    return nodes, tuple(files.values())


def _read_chunks(
    folder: Path,
    tensors: Mapping[str, Chunked],
    files: Mapping[str, ByteFile],
    node: Callable[[ByteFile, StoredView], Node],
) -> dict[Chunk, Node]:
    """What each chunk is, file by file: only its description is read."""
    by_file: dict[str, list[tuple[Chunk, str, TensorInfo]]] = {}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            by_file.setdefault(chunk.file, []).append((chunk, name, tensor.info))
    made: dict[Chunk, Node] = {}
    for called, chunks in by_file.items():
        file = files.get(called)
        if file is None:
            raise CheckpointError(
                f"{folder}: {called} is missing, in which {len(chunks):,} of its chunks are",
                advice="The checkpoint is incomplete: copy the files of all ranks.",
            )
        with ExitStack() as stack, read_errors(file.path):
            opened = stack.enter_context(file.path.open("rb"))
            for chunk, name, info in sorted(chunks, key=lambda each: each[0].start):
                made[chunk] = node(file, _checked(file, opened, chunk, name, info))
    return made


def _checked(file: ByteFile, opened: BinaryIO, chunk: Chunk, name: str, info: TensorInfo) -> StoredView:
    """A chunk that is what was said of it."""
    if chunk.start + chunk.nbytes > file.nbytes:
        raise CheckpointError(
            f"{file.path}: it ends before its byte {chunk.start + chunk.nbytes:,}, where {name} has a chunk",
            advice="It is incomplete. Copy it again.",
        )
    view = read_torch_tensor(file.path, opened, chunk.start, chunk.nbytes)
    wanted = TensorInfo(info.dtype, shape_of(chunk.box))
    if view.info != wanted:
        raise CheckpointError(
            f"{file.path}: a chunk of {name} is {view.info}, and {METADATA} says {wanted}", advice=CHUNKS
        )
    return view


def shape_of(box: Box) -> tuple[int, ...]:
    """How large a part is."""
    return tuple(stop - start for start, stop in box)


class _Assembly:
    """One tensor of its chunks, which are cut apart again and again between two of them until each is alone."""

    def __init__(self, folder: Path, name: str, tensor: Chunked, stored: Mapping[Chunk, Node]) -> None:
        self.folder, self.name, self.tensor, self.stored = folder, name, tensor, stored

    def node(self) -> Node:
        return self._within(tuple((0, size) for size in self.tensor.info.shape), self.tensor.chunks)

    def _within(self, box: Box, chunks: Sequence[Chunk]) -> Node:
        """What the chunks make of a part of the tensor."""
        if len(chunks) == 1 and chunks[0].box == box:
            return self.stored[chunks[0]]
        for axis in range(len(box)):
            bands = _bands(axis, box, chunks)
            if len(bands) > 1:
                parts = [self._within((*box[:axis], span, *box[axis + 1 :]), own) for span, own in bands]
                return self._put_together(axis, box, parts, [span[0] - box[axis][0] for span, _ in bands])
        raise CheckpointError(
            f"{self.folder}: the chunks of {self.name} are not just all of it",
            found=[f"{list(chunk.box)} of {list(self.tensor.info.shape)}" for chunk in chunks],
            advice=CHUNKS,
        )

    def _put_together(self, axis: int, box: Box, parts: Sequence[Node], starts: Sequence[int]) -> Node:
        """Parts that follow each other along an axis."""
        info = self._info(box)
        if all(size == 1 for size in info.shape[:axis]):
            return Joined(info, tuple(parts))
        if len(parts) > MAX_ACROSS:
            raise CheckpointError(
                f"{self.folder}: {self.name} has {len(parts)} chunks beside each other in every row; {MAX_ACROSS} are "
                "read at most",
                advice="Save it again from fewer ranks.",
            )
        made: Node | None = None
        for part, start in zip(parts, starts, strict=True):
            shape = part.info.shape
            first = tuple(start if place == axis else 0 for place in range(len(shape)))
            made = Viewed(info, part, 0, contiguous_strides(shape), shape, made, first)
        assert made is not None
        return made

    def _info(self, box: Box) -> TensorInfo:
        return described(self.tensor.info.dtype, shape_of(box))


def _bands(axis: int, box: Box, chunks: Sequence[Chunk]) -> list[tuple[tuple[int, int], list[Chunk]]]:
    """The box cut across an axis wherever no chunk is cut, and the chunks of each piece; nothing if some is bare."""
    bands: list[tuple[tuple[int, int], list[Chunk]]] = []
    reach = box[axis][0]
    for chunk in sorted(chunks, key=lambda each: each.box[axis]):
        start, stop = chunk.box[axis]
        if start >= reach:
            if start > reach:
                return []
            bands.append(((start, stop), []))
        span, own = bands[-1]
        own.append(chunk)
        reach = max(reach, stop)
        bands[-1] = ((span[0], reach), own)
    return bands if reach == box[axis][1] else []
