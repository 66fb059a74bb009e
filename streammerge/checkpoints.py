"""Checkpoints on disk as models: one file or many, opened by content, read lazily."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from streammerge.errors import CheckpointError
from streammerge.formats.files import ByteFile, read_errors
from streammerge.formats.safetensors import is_safetensors, read_header
from streammerge.formats.shards import find_weights, is_index, read_index
from streammerge.formats.torchzip import StoredView, is_torch_zip, legacy_torch_reason, read_torch_zip
from streammerge.nodes import Node, Stored, Viewed
from streammerge.tensors import TensorInfo

if TYPE_CHECKING:
    import torch


GGUF = (
    "is GGUF, whose tensors are quantised in blocks that streammerge does not decode; merge the safetensors that it "
    "was made from"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its tensors in file order, each known by its place in a file and nothing read yet.

    Close it, or use it in a `with` statement, when nothing is going to be read any more.
    """

    path: Path
    container: str
    nodes: Mapping[str, Node]
    files: tuple[ByteFile, ...]
    metadata: Mapping[str, str]

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Names and descriptions, in file order."""
        return {name: node.info for name, node in self.nodes.items()}

    @property
    def nbytes(self) -> int:
        """The size of all the model's files."""
        return sum(file.nbytes for file in self.files)

    def node(self, name: str) -> Node:
        """Where the tensor's elements come from."""
        return self.nodes[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in its stored dtype, as a copy."""
        from streammerge.surveys import read_stored

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


def open_model(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint by its content: safetensors, a torch zip, or shards of either (a folder or an index file).

    Only headers are read. Raises CheckpointError if it is none of these, is damaged, or would need code to be run.
    """
    path = Path(path)
    with read_errors(path):
        if path.is_dir():
            path = find_weights(path)
    if is_index(path):
        return _open_shards(path)
    return _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    file = ByteFile(path)
    with read_errors(path), path.open("rb") as opened:
        head = opened.read(512)
    if is_torch_zip(head):
        return _open_torch_zip(file)
    if is_safetensors(head):
        return _open_safetensors(file)
    reason = GGUF if head.startswith(b"GGUF") else legacy_torch_reason(head)
    raise CheckpointError(
        f"{path}: {reason or 'is neither safetensors nor a torch zip'}",
        found=[] if reason else [f"it starts with the bytes {head[:8].hex(' ') or '(none: it is empty)'}"],
        advice="" if reason else "Check that it is a model and was downloaded whole.",
    )


def _open_safetensors(file: ByteFile) -> Checkpoint:
    header = read_header(file.path, file.nbytes)
    nodes = {name: Stored(info, file, header.offsets[name]) for name, info in header.tensors.items()}
    return Checkpoint(file.path, "safetensors", nodes, (file,), header.metadata)


def _open_torch_zip(file: ByteFile) -> Checkpoint:
    views = read_torch_zip(file.path).tensors
    nodes = {name: _torch_node(file, view) for name, view in views.items()}
    return Checkpoint(file.path, "torch zip", nodes, (file,), {})


def _torch_node(file: ByteFile, view: StoredView) -> Node:
    """A view of a storage: flat bytes if it lies flat, else strides over them."""
    dtype, size = view.info.dtype, view.info.dtype.bits // 8
    if view.contiguous:
        return Stored(view.info, file, view.storage_start + view.offset * size)
    storage = Stored(TensorInfo(dtype, (view.storage_nbytes // size,)), file, view.storage_start)
    return Viewed(view.info, storage, view.offset, view.stride, view.info.shape)


def _open_shards(path: Path) -> Checkpoint:
    """All shards as one model, in the order of the shards and of the tensors in them.

    Where two shards hold a tensor, the index decides; one that the index forgot is in the model all the same.
    """
    index = read_index(path)
    shards = {shard: _open_file(shard) for shard in index.shards}
    nodes = {
        name: node
        for shard, checkpoint in shards.items()
        for name, node in checkpoint.nodes.items()
        if index.weight_map.get(name, shard) == shard
    }
    missing = [f"{name}: not in {shard.name}" for name, shard in index.weight_map.items() if name not in nodes]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors are not in the shards that the index names",
            found=missing,
            advice="Index and shards are of different models, or a shard is incomplete. Fetch them again.",
        )
    first = next(iter(shards.values()))
    files = tuple(file for checkpoint in shards.values() for file in checkpoint.files)
    for file in files:
        file.index = path
    return Checkpoint(path, f"sharded {first.container} ({len(shards)} files)", nodes, files, first.metadata)
