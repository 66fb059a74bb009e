"""Where every tensor of the output will lie: file names, headers, offsets, the index of shards. Pure arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streammerge.errors import OutputError
from streammerge.formats.header_entries import MAX_TENSORS
from streammerge.formats.safetensors import NewHeader, build_header
from streammerge.tensors import TensorInfo

SUFFIX = ".safetensors"

METADATA = "__metadata__"
"""The one name in a header that is no tensor's."""


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to be written: its final path, its header, and the tensors in it in file order."""

    path: Path
    header: NewHeader

    @property
    def nbytes(self) -> int:
        """The size of the whole file."""
        return self.header.file_bytes


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """All files of the output; `index` is the sharded one's index file and its text."""

    path: Path
    files: tuple[OutputFile, ...]
    index: tuple[Path, str] | None = None

    @property
    def paths(self) -> list[Path]:
        """Every path at which something will be put."""
        return [*(file.path for file in self.files), *([self.index[0]] if self.index else [])]

    @property
    def nbytes(self) -> int:
        """The size of all files together."""
        return sum(file.nbytes for file in self.files) + (len(self.index[1].encode()) if self.index else 0)


def lay_out(
    path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], shard_bytes: int | None = None
) -> OutputLayout:
    """The output's files: one, or shards of at most `shard_bytes` (or of one tensor that is larger) and their index.

    `OUT.safetensors` is written there, any other path is a folder that gets `model.safetensors`. OutputError if the
    path's suffix asks for another format, a tensor has a name that the format does not allow, or a file would hold more
    tensors than are read back.
    """
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".gguf"):
        raise OutputError(
            f"{path}: streammerge writes safetensors only, not {path.suffix}",
            advice=f"Name the output {path.with_suffix(SUFFIX).name}.",
        )
    if METADATA in tensors:
        raise OutputError(
            f"{path}: safetensors can't hold a tensor called {METADATA}", advice="Leave it out with --drop or a rule."
        )
    folder, stem = output_stem(path)
    shards = split(tensors, shard_bytes) if shard_bytes else [dict(tensors)]
    if (most := max(map(len, shards))) > MAX_TENSORS:
        raise OutputError(
            f"{path}: a file would hold {most:,} tensors; {MAX_TENSORS:,} are allowed",
            advice="Use --shard-size, or a smaller one, to write several files.",
        )
    if len(shards) == 1:
        return OutputLayout(path, (OutputFile(folder / f"{stem}{SUFFIX}", build_header(tensors, metadata)),))
    names = [f"{stem}-{number:05}-of-{len(shards):05}{SUFFIX}" for number in range(1, len(shards) + 1)]
    files = tuple(
        OutputFile(folder / name, build_header(shard, metadata)) for name, shard in zip(names, shards, strict=True)
    )
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(info.nbytes for info in tensors.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    return OutputLayout(path, files, (folder / f"{stem}{SUFFIX}.index.json", index))


def output_stem(path: Path) -> tuple[Path, str]:
    """The folder that an output's files go to, and what their names begin with."""
    return (path.parent, path.stem) if path.suffix == SUFFIX else (path, "model")


def is_shard_name(name: str, stem: str) -> bool:
    """Whether a shard of an output of this stem is called so, whatever the number of shards."""
    return re.fullmatch(re.escape(stem) + r"-[0-9]{5,}-of-[0-9]{5,}" + re.escape(SUFFIX), name) is not None


def is_output_name(name: str, stem: str) -> bool:
    """Whether a file of an output of this stem is called so: the only one, a shard, or the index of shards."""
    return name in (f"{stem}{SUFFIX}", f"{stem}{SUFFIX}.index.json") or is_shard_name(name, stem)


def split(tensors: Mapping[str, TensorInfo], shard_bytes: int) -> list[dict[str, TensorInfo]]:
    """The tensors in their order, cut where the next one would make a shard larger than allowed."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards
