"""Checkpoints on disk as models: one file or many, opened by content, read lazily."""

from __future__ import annotations

import functools
import operator
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from streammerge.compute.expressions import Node, Stored, Viewed, is_stored
from streammerge.errors import CheckpointError, count, counted
from streammerge.formats.files import LFS_POINTER, ByteFile, path_of, read_errors
from streammerge.formats.pipelines import (
    INDEX,
    NO_SCHEDULER,
    Scheduler,
    is_pipeline_index,
    scheduler_of,
)
from streammerge.formats.safetensors import is_safetensors, read_header
from streammerge.formats.shards import is_index, read_index
from streammerge.formats.tables import Names
from streammerge.formats.torchzip.archive import StoredView, is_torch_zip, legacy_torch_reason, read_torch_zip
from streammerge.formats.torchzip.state_dicts import NONE_LEFT, LeftTensors
from streammerge.models.hub import located
from streammerge.models.located import components_at, distributed_at, weights_file
from streammerge.models.stored import StoredTensors, compact
from streammerge.tensors import TensorInfo

if TYPE_CHECKING:
    import torch


OTHERS: Final = {
    b"GGUF": (
        "is GGUF, whose tensors are quantised in blocks that streammerge does not decode; merge the safetensors that "
        "it was made from"
    ),
    LFS_POINTER: "is a pointer of Git LFS and not the file that it stands for; fetch that: git lfs pull",
    b"<!doctype html": "is a web page and not a model; log in where it was fetched from, or copy its download link",
    b"<html": "is a web page and not a model; log in where it was fetched from, or copy its download link",
}
"""What else is often called a model, by its first bytes in whatever case."""


PIPELINE: Final = "diffusers pipeline"
"""What the container is called whose components have folders of their own."""


ROW_BYTES: Final = 24
"""What a tensor takes in a table: places of a description, of a file and in it."""

NODE_BYTES: Final = 800
"""What a tensor takes that is no row of a table: its name, its view of a storage, and where it is to be found."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its tensors in file order, each known by its place in a file and nothing read yet.

    `left` are tensors of a torch file that are not the model's, `folder` the one that was opened, if no single file
    was. Of a pipeline `components` are the files, or indexes, that each of them was opened by, and `scheduler` is what
    its scheduler says of it. `chunks` is how many pieces tensors are in that are not whole. Close it, or use it in a
    `with` statement, when nothing is going to be read any more.
    """

    path: Path
    container: str
    nodes: Mapping[str, Node]
    files: tuple[ByteFile, ...]
    metadata: Mapping[str, str]
    left: LeftTensors = NONE_LEFT
    folder: Path | None = None
    components: Mapping[str, Path] = field(default_factory=dict)
    scheduler: Scheduler = NO_SCHEDULER
    chunks: int = 0

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Names and descriptions, in file order."""
        if isinstance(self.nodes, StoredTensors):
            return self.nodes.infos
        return {name: node.info for name, node in self.nodes.items()}

    @property
    def is_pipeline(self) -> bool:
        """Whether it is a folder of several components."""
        return bool(self.components)

    @property
    def nbytes(self) -> int:
        """The size of all the model's files."""
        return sum(file.nbytes for file in self.files)

    @property
    def names(self) -> Names | None:
        """The table of the tensors' names, if they are in one."""
        return self.nodes.infos.names if isinstance(self.nodes, StoredTensors) else None

    @property
    def described_bytes(self) -> int:
        """What is kept in memory of the tensors' descriptions, a table of names left out."""
        return (len(self.nodes) + self.chunks) * (NODE_BYTES if self.names is None else ROW_BYTES)

    def node(self, name: str) -> Node:
        """Where the tensor's elements come from."""
        return self.nodes[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in its stored dtype, as a copy."""
        from streammerge.compute.reading import read_stored

        return read_stored(self.nodes[name], start, stop)

    def close(self) -> None:
        """Close the files that were opened."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_model(path: str | os.PathLike[str], entry: str = "") -> Checkpoint:
    """Open a checkpoint by its content: safetensors, a torch zip, or shards of either (a folder or an index file).

    So is the folder of a distributed checkpoint of torch (`.metadata` and `*.distcp`), without the optimizer's state.

    The folder of a diffusers pipeline is one model, in which the names of a component's tensors begin with its own. A
    name on Hugging Face's hub, `org/name[@revision]`, stands for its folder in the local cache, if it is there.

    Only headers are read. Where several dicts of a torch file could be the model, `entry` names the one that is: by its
    keys, joined with dots, or `.` for the outermost. Raises CheckpointError if the file is none of these, is damaged,
    would need code to be run, or has no such entry.
    """
    if os.fspath(path) == "":
        raise CheckpointError("the model's name is empty", advice="Name a checkpoint file, or a folder of one.")
    named = located(path_of(path), os.fspath(path))
    if components := components_at(named):
        return _open_pipeline(named, components, entry)
    if distributed := distributed_at(named):
        return _open_distributed(named, distributed, entry)
    path = weights_file(named)
    opened = _open_shards(path, entry) if is_index(path) else _open_file(path, entry)
    return opened if path == named and not is_index(path) else replace(opened, folder=path.parent)


def _open_file(path: Path, entry: str) -> Checkpoint:
    file = ByteFile(path)
    with read_errors(path), path.open("rb") as opened:
        head = opened.read(512)
    if is_torch_zip(head):
        return _open_torch_zip(file, entry)
    if is_safetensors(head):
        if entry:
            raise CheckpointError(
                f"{path}: is safetensors, which has no dicts of which {entry!r} could be one",
                advice="Leave the entry out.",
            )
        return _open_safetensors(file)
    known = (reason for start, reason in OTHERS.items() if head.lower().startswith(start.lower()))
    reason = next(known, None) or legacy_torch_reason(head)
    raise CheckpointError(
        f"{path}: {reason or 'is neither safetensors nor a torch zip'}",
        found=[] if reason else [f"it starts with the bytes {head[:8].hex(' ') or '(none: it is empty)'}"],
        advice="" if reason else "Check that it is a model and was downloaded whole.",
    )


def _open_safetensors(file: ByteFile) -> Checkpoint:
    header = read_header(file.path, file.nbytes)
    nodes = StoredTensors(header.names, header.infos, header.starts, (file,))
    return Checkpoint(file.path, "safetensors", nodes, (file,), header.metadata)


def _open_torch_zip(file: ByteFile, entry: str) -> Checkpoint:
    found = read_torch_zip(file.path, entry)
    nodes = {name: _torch_node(file, view) for name, view in found.tensors.items()}
    return Checkpoint(file.path, "torch zip", nodes, (file,), {}, found.left)


def _torch_node(file: ByteFile, view: StoredView) -> Node:
    """A view of a storage: flat bytes if it lies flat, else strides over them."""
    dtype, size = view.info.dtype, view.info.dtype.bits // 8
    if view.contiguous:
        return Stored(view.info, file, view.storage_start + view.offset * size)
    storage = Stored(TensorInfo(dtype, (view.storage_nbytes // size,)), file, view.storage_start)
    return Viewed(view.info, storage, view.offset, view.stride, view.info.shape)


def _open_shards(path: Path, entry: str) -> Checkpoint:
    """All shards as one model, in the order of the shards and of the tensors in them.

    Where two shards hold a tensor, the index decides; one that the index forgot is in the model all the same, unless
    two shards hold it.
    """
    index, gathered, files = read_index(path), _Gathered(), list[ByteFile]()
    containers, metadata, left = list[str](), list[Mapping[str, str]](), list[LeftTensors]()
    meant: dict[str, dict[str, str]] = {shard.name: {} for shard in index.shards}
    for name, shard in index.weight_map.items():
        meant[shard][name] = name
    forgotten: dict[str, list[str]] = {}
    missing: list[str] = []
    for shard_path in index.shards:
        checkpoint, own = _open_file(shard_path, entry), meant.pop(shard_path.name)
        for name, node in checkpoint.nodes.items():
            if name in own:  # by the index's text, which is there once, however many shards have been read
                gathered.add(own[name], node)
            elif name not in index.weight_map:
                forgotten.setdefault(name, []).append(shard_path.name)
                gathered.add(name, node)
        missing += [f"{name}: not in {shard_path.name}" for name in own if name not in checkpoint.nodes]
        files += checkpoint.files
        containers.append(checkpoint.container)
        metadata.append(checkpoint.metadata)
        left.append(checkpoint.left)
    _check_shards(path, forgotten, missing)
    for file in files:
        file.index = path
    what = f"sharded {containers[0]} ({len(containers)} files)"
    nodes = gathered.nodes(files)
    return Checkpoint(path, what, nodes, tuple(files), metadata[0], functools.reduce(operator.add, left))


class _Gathered:
    """The tensors of shards, in little memory for as long as all of them lie flat in their files."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._infos: list[TensorInfo] = []
        self._starts = array("Q")
        self._files: list[ByteFile] = []
        self._numbers = array("I")
        self._others: dict[str, Node] | None = None

    def add(self, name: str, node: Node) -> None:
        """One more tensor."""
        if self._others is None and is_stored(node):
            if not self._files or self._files[-1] is not node.file:
                self._files.append(node.file)
            self._names.append(name)
            self._infos.append(node.info)
            self._starts.append(node.start)
            self._numbers.append(len(self._files) - 1)
            return
        if self._others is None:
            self._others = dict(self._flat())
        self._others[name] = node

    def nodes(self, files: Sequence[ByteFile]) -> Mapping[str, Node]:
        """All of them by name."""
        if self._others is not None:
            return compact(self._others, files)
        return StoredTensors(Names.of(self._names), self._infos, self._starts, self._files, self._numbers)

    def _flat(self) -> Iterator[tuple[str, Node]]:
        for place, name in enumerate(self._names):
            yield name, Stored(self._infos[place], self._files[self._numbers[place]], self._starts[place])


def _check_shards(path: Path, forgotten: Mapping[str, list[str]], missing: Sequence[str]) -> None:
    """CheckpointError if two shards hold a tensor and the index doesn't say which is meant, or none has one of its."""
    twice = [f"{name}   {', '.join(names)}" for name, names in forgotten.items() if len(names) > 1]
    if twice:
        raise CheckpointError(
            f"{path}: {counted(twice, 'tensor', 'is', 'are')} in several shards, and not in the index",
            found=twice,
            advice="Say in the index's weight_map which file is meant, or fetch index and shards again.",
        )
    if missing:
        raise CheckpointError(
            f"{path}: {counted(missing, 'tensor', 'is', 'are')} not in the shards that the index names",
            found=missing,
            advice="Index and shards are of different models, or a shard is incomplete. Fetch them again.",
        )


def _open_distributed(path: Path, folder: Path, entry: str) -> Checkpoint:
    """The chunks of all ranks as one model; what lies beside the weights is that of the folder which was named."""
    from streammerge.formats.torchzip.distributed import read_distributed
    from streammerge.models.distributed import chunk_nodes

    found = read_distributed(folder, entry)
    nodes, files = chunk_nodes(folder, found, _torch_node)
    chunks = sum(len(tensor.chunks) for tensor in found.tensors.values())
    what = f"distributed checkpoint of torch ({count(files, 'file')})"
    return Checkpoint(folder, what, nodes, files, {}, found.left, path, chunks=chunks)


def _open_pipeline(path: Path, components: Mapping[str, Path], entry: str) -> Checkpoint:
    """A pipeline's components as one model, one after the other, each behind its name."""
    folder = path.parent if is_pipeline_index(path) else path
    opened = {name: open_model(weights, entry) for name, weights in components.items()}
    nodes = {f"{name}.{own}": node for name, part in opened.items() for own, node in part.nodes.items()}
    files = tuple(file for part in opened.values() for file in part.files)
    for file in files:
        file.index = file.index or folder / INDEX
    left = functools.reduce(operator.add, (part.left for part in opened.values()))
    return Checkpoint(
        folder,
        f"{PIPELINE} ({', '.join(components)})",
        compact(nodes, files),
        files,
        _common([part.metadata for part in opened.values()]),
        left,
        components=components,
        scheduler=scheduler_of(folder),
    )


def _common(all_metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What the metadata of every component say, so that it is said of the whole."""
    first, *others = all_metadata
    return {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
