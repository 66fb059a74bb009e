"""Where every tensor of the output will lie: file names, headers, offsets, the index of shards. Pure arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from streammerge.errors import OutputError
from streammerge.formats.companions import Companion, is_companion_name
from streammerge.formats.files import ByteFile
from streammerge.formats.header_entries import Bounds
from streammerge.formats.safetensors import MAX_HEADER, NewHeader, build_header
from streammerge.formats.shards import SAFETENSORS, TORCH
from streammerge.tensors import TensorInfo

SUFFIX = ".safetensors"

FOLDER_STEMS: Final = ("model", "adapter_model", "diffusion_pytorch_model", "pytorch_lora_weights")
"""What weights in a folder are called by the libraries that load it, the shards' numbers and the ending left out."""

METADATA = "__metadata__"
"""The one name in a header that is no tensor's."""


@dataclass(frozen=True, slots=True)
class OutputName:
    """The names of an output's files: their folder, what they begin with, and how they end."""

    folder: Path
    stem: str
    suffix: str

    @classmethod
    def of(cls, path: Path, stem: str = "model") -> OutputName:
        """`OUT.safetensors` and `OUT.sft` are files; any other path is a folder that gets `model.safetensors`, or what
        its `stem` is."""
        if is_file_name(path):
            return cls(path.parent, path.stem, path.suffix)
        return cls(path, stem, SUFFIX)

    @property
    def single(self) -> Path:
        """The output, if it is one file."""
        return self.folder / f"{self.stem}{self.suffix}"

    @property
    def index(self) -> Path:
        """The index, if there are shards."""
        return self.folder / f"{self.stem}{self.suffix}.index.json"

    def shard(self, number: int, count: int) -> Path:
        """One of so many shards."""
        return self.folder / f"{self.stem}-{number:05}-of-{count:05}{self.suffix}"

    def is_shard(self, name: str) -> bool:
        """Whether a shard of an output of this name is called so, whatever the number of shards."""
        pattern = re.escape(self.stem) + r"-[0-9]{5,}-of-[0-9]{5,}" + re.escape(self.suffix)
        return re.fullmatch(pattern, name) is not None

    def has(self, name: str) -> bool:
        """Whether a file of an output of this name is called so: the only one, a shard, or the index of shards."""
        return name in (self.single.name, self.index.name) or self.is_shard(name)

    def may_be_beside(self, name: str) -> bool:
        """Whether an output of this name may have a companion that is called so, which only folders have."""
        return self.stem in FOLDER_STEMS and self.suffix == SUFFIX and is_companion_name(name)


def is_file_name(path: Path) -> bool:
    """Whether an output of this name is a file; else it is a folder."""
    return path.suffix.lower() in SAFETENSORS


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
class OutputIndex:
    """The index of shards: which of them each tensor is in. Its text is made when it is needed, a piece at a time."""

    path: Path
    files: tuple[OutputFile, ...]
    total_bytes: int
    nbytes: int = 0

    def pieces(self) -> Iterator[bytes]:
        """Its bytes."""
        names = {name: file.path.name for file in self.files for name in file.header.names}
        whole = {"metadata": {"total_size": self.total_bytes}, "weight_map": names}
        for piece in json.JSONEncoder(indent=2, sort_keys=True).iterencode(whole):
            yield piece.encode()
        yield b"\n"


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """All files of the output, with their index if they are shards, and what belongs to the model beside weights."""

    path: Path
    files: tuple[OutputFile, ...]
    index: OutputIndex | None = None
    companions: tuple[Companion, ...] = ()
    stem: str = "model"

    @property
    def named(self) -> OutputName:
        """How the files of weights are called."""
        return OutputName.of(self.path, self.stem)

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.named.folder

    @property
    def paths(self) -> list[Path]:
        """Every path at which something will be put: of weights, of companions, and of the index."""
        beside = (self.path_of(companion) for companion in self.companions)
        return [*(file.path for file in self.files), *beside, *([self.index.path] if self.index else [])]

    @property
    def weights(self) -> list[Path]:
        """The paths of what holds tensors, and of the index."""
        return [*(file.path for file in self.files), *([self.index.path] if self.index else [])]

    def path_of(self, companion: Companion) -> Path:
        """Where a companion goes."""
        return self.folder / companion.name

    @property
    def copied(self) -> list[ByteFile]:
        """The files that companions are copies of."""
        return [companion.source for companion in self.companions if companion.source is not None]

    @property
    def last(self) -> Path:
        """What is put in place when all else is, so that nothing can be loaded before: the index, or the weights."""
        return self.index.path if self.index else self.files[-1].path

    @property
    def nbytes(self) -> int:
        """The size of all files together."""
        beside = sum(companion.nbytes for companion in self.companions)
        return sum(file.nbytes for file in self.files) + beside + (self.index.nbytes if self.index else 0)


def lay_out(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    shard_bytes: int | None = None,
    companions: Sequence[Companion] = (),
    stem: str = "model",
) -> OutputLayout:
    """The output's files: one, or shards of at most `shard_bytes` (or of one tensor that is larger) and their index.

    `OUT.safetensors` is written there, any other path is a folder that gets `model.safetensors` (or another `stem`) and
    the companions. OutputError if the path's suffix asks for another format or is all of its name, a tensor has a name
    that the format does not allow, or a file would hold more tensors than are read back.
    """
    if path.name.lower() in SAFETENSORS:
        raise OutputError(
            f"{path}: the output has no name before its ending", advice=f"Name it OUT{path.name.lower()}."
        )
    if path.suffix.lower() in (*TORCH, ".gguf"):
        raise OutputError(
            f"{path}: streammerge writes safetensors only, not {path.suffix}",
            advice=f"Name the output {path.with_suffix(SUFFIX).name}.",
        )
    if METADATA in tensors:
        raise OutputError(
            f"{path}: safetensors can't hold a tensor called {METADATA}", advice="Leave it out with --drop or a rule."
        )
    named, beside = OutputName.of(path, stem), tuple(companions)
    shards = split(tensors, shard_bytes) if shard_bytes else [tensors]
    if len(shards) == 1:
        return OutputLayout(path, (_output_file(named.single, tensors, metadata),), None, beside, stem)
    paths = [named.shard(number, len(shards)) for number in range(1, len(shards) + 1)]
    files = tuple(_output_file(shard_path, shard, metadata) for shard_path, shard in zip(paths, shards, strict=True))
    index = OutputIndex(named.index, files, sum(info.nbytes for info in tensors.values()))
    return OutputLayout(path, files, replace(index, nbytes=sum(map(len, index.pieces()))), beside, stem)


def _output_file(path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> OutputFile:
    """The file of these tensors; OutputError if we, or the format's library, would not read it back."""
    most = Bounds.of(sum(info.nbytes for info in tensors.values())).tensors
    if len(tensors) <= most:
        header = build_header(tensors, metadata)
        if header.nbytes - 8 <= MAX_HEADER:
            return OutputFile(path, header)
        found = f"a header would have {header.nbytes - 8:,} bytes; {MAX_HEADER:,} are allowed"
    else:
        found = f"a file would hold {len(tensors):,} tensors; {most:,} are allowed in one of its size"
    raise OutputError(f"{path}: {found}", advice="Use --shard-size, or a smaller one, to write several files.")


def split(tensors: Mapping[str, TensorInfo], shard_bytes: int) -> Sequence[Mapping[str, TensorInfo]]:
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
