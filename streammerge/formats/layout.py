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
from streammerge.formats.pipelines import INDEX
from streammerge.formats.safetensors import MAX_HEADER, NewHeader, build_header
from streammerge.formats.shards import SAFETENSORS, TORCH
from streammerge.tensors import TensorInfo

SUFFIX = ".safetensors"

INDEX_SUFFIX: Final = ".index.json"
"""What an index of shards has more at the end of its name than the file that it stands for."""

FOLDER_STEMS: Final = ("model", "adapter_model", "diffusion_pytorch_model", "pytorch_lora_weights")
"""What weights in a folder are called by the libraries that load it, the shards' numbers and the ending left out."""

SINGLE_STEMS: Final = ("adapter_model", "pytorch_lora_weights")
"""Those of which the libraries read one file only."""

SHARDED_FROM: Final = 10 * 10**9
SHARD_BYTES: Final = 5 * 10**9
"""The size above which a folder gets shards if nobody says it, and that of the shards."""

METADATA = "__metadata__"
"""The one name in a header that is no tensor's."""

COMPONENT_STEMS: Final = FOLDER_STEMS[0], FOLDER_STEMS[2]
"""What the weights of a pipeline's component are called, but for their ending: by transformers, and by diffusers."""

COMPONENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
"""What components of pipelines may be called, which are arguments of Python's functions to the library."""


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
        return self.folder / f"{self.stem}{self.suffix}{INDEX_SUFFIX}"

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

    def has_within(self, name: str) -> bool:
        """Whether files of weights of an output of this name may be called so, which is a folder of components."""
        component, _, own = name.rpartition("/")
        if self.stem not in COMPONENT_STEMS or self.suffix != SUFFIX or not COMPONENT.fullmatch(component):
            return False
        return any(each.has(own) for each in component_names(self.folder / component))


def component_names(folder: Path) -> list[OutputName]:
    """What the weights of a pipeline's component may be called in its folder."""
    return [OutputName(folder, stem, SUFFIX) for stem in COMPONENT_STEMS]


@dataclass(frozen=True, slots=True)
class Component:
    """A component of a pipeline, which has a folder of its own: what its weights are called, how large shards get."""

    name: str
    stem: str
    shard_bytes: int | None = None

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with in the pipeline, and not in its files."""
        return f"{self.name}."


def is_file_name(path: Path) -> bool:
    """Whether an output of this name is a file; else it is a folder."""
    return path.suffix.lower() in SAFETENSORS


def output_of(named: Path, weights: Path) -> Path:
    """The output that is meant by a name and the weights found there: the file of this name, or that, or the folder of
    which the shards of an index are."""
    own = weights.with_name(weights.name.removesuffix(INDEX_SUFFIX))
    if own == weights == named:
        return named
    return own if is_file_name(own) and own.stem not in FOLDER_STEMS else own.parent


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to be written: its final path, its header, and the tensors in it in file order.

    `prefix` is what the names of its tensors begin with in the merge, and not in the file.
    """

    path: Path
    header: NewHeader
    prefix: str = ""

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
    """All files of the output, with their indexes if they are shards, and what belongs to the model beside weights.

    The `components` of a pipeline have folders of their own, each with its files; any other output has none.
    """

    path: Path
    files: tuple[OutputFile, ...]
    indexes: tuple[OutputIndex, ...] = ()
    companions: tuple[Companion, ...] = ()
    stem: str = "model"
    components: tuple[Component, ...] = ()

    @property
    def named(self) -> OutputName:
        """How the files of weights are called; of a pipeline, those that would be in its place."""
        return OutputName.of(self.path, self.stem)

    @property
    def all_named(self) -> list[OutputName]:
        """How all files are called that an output in this one's place may have had."""
        within = (name for component in self.components for name in component_names(self.folder / component.name))
        return [self.named, *within]

    @property
    def index(self) -> OutputIndex | None:
        """The index of an output that is shards, and no pipeline."""
        return self.indexes[0] if self.indexes and not self.components else None

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.named.folder

    @property
    def paths(self) -> list[Path]:
        """Every path at which something will be put: of weights, of companions, and of indexes."""
        beside = (self.path_of(companion) for companion in self.companions)
        return [*(file.path for file in self.files), *beside, *(index.path for index in self.indexes)]

    @property
    def weights(self) -> list[Path]:
        """The paths of what holds tensors, and of indexes."""
        return [*(file.path for file in self.files), *(index.path for index in self.indexes)]

    def path_of(self, companion: Companion) -> Path:
        """Where a companion goes."""
        return self.folder / companion.name

    @property
    def copied(self) -> list[ByteFile]:
        """The files that companions are copies of."""
        return [companion.source for companion in self.companions if companion.source is not None]

    @property
    def heads(self) -> list[Path]:
        """What is put in place when all else is, in this order, so that nothing can be loaded before it is whole.

        That is the index, or the weights if they are one file; of every component of a pipeline, and then its own
        index, which is the one companion that nothing is loaded without.
        """
        sharded = {index.path.parent: index.path for index in self.indexes}
        heads = list({file.path.parent: sharded.get(file.path.parent, file.path) for file in self.files}.values())
        return [*heads, self.folder / INDEX] if self.components else heads

    @property
    def last(self) -> Path:
        """What is put in place last of all."""
        return self.heads[-1]

    @property
    def nbytes(self) -> int:
        """The size of all files together."""
        beside = sum(companion.nbytes for companion in self.companions)
        return sum(file.nbytes for file in self.files) + beside + sum(index.nbytes for index in self.indexes)


def lay_out(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    shard_bytes: int | None = None,
    companions: Sequence[Companion] = (),
    stem: str = "model",
    components: Sequence[Component] = (),
) -> OutputLayout:
    """The output's files: one, or shards of at most `shard_bytes` (or of one tensor that is larger) and their index.

    `OUT.safetensors` is written there, any other path is a folder that gets `model.safetensors` (or another `stem`) and
    the companions. With `components`, to which all tensors belong, each of them gets that in a folder of its own.
    OutputError if the path's suffix asks for another format or is all of its name, a tensor has a name that the format
    does not allow, or a file would hold more tensors than are read back.
    """
    _check_path(path)
    files, indexes = list[OutputFile](), list[OutputIndex]()
    for folder in _folders(path, tensors, shard_bytes, stem, components):
        if METADATA in folder.tensors:
            raise OutputError(
                f"{path}: safetensors can't hold a tensor called {METADATA}",
                advice="Leave it out with --drop or a rule.",
            )
        made = folder.files(metadata)
        files += made
        indexes += [folder.index_of(made)] if len(made) > 1 else []
    return OutputLayout(path, tuple(files), tuple(indexes), tuple(companions), stem, tuple(components))


def _check_path(path: Path) -> None:
    """OutputError for a path that asks for another format, or has no name."""
    if path.name.lower() in SAFETENSORS:
        raise OutputError(
            f"{path}: the output has no name before its ending", advice=f"Name it OUT{path.name.lower()}."
        )
    if path.suffix.lower() in (*TORCH, ".gguf"):
        raise OutputError(
            f"{path}: streammerge writes safetensors only, not {path.suffix}",
            advice=f"Name the output {path.with_suffix(SUFFIX).name}.",
        )


@dataclass(frozen=True, slots=True)
class _Folder:
    """What is written into one folder: the tensors, how their files are called, and how large these get.

    `prefix` is what the names of the tensors begin with in the merge, and not here.
    """

    named: OutputName
    tensors: Mapping[str, TensorInfo]
    shard_bytes: int | None
    prefix: str = ""

    def files(self, metadata: Mapping[str, str]) -> list[OutputFile]:
        """The files: one, or shards."""
        shards = split(self.tensors, self.shard_bytes) if self.shard_bytes else [self.tensors]
        numbers = range(1, len(shards) + 1)
        paths = [self.named.shard(n, len(shards)) for n in numbers] if len(shards) > 1 else [self.named.single]
        return [_output_file(path, shard, metadata, self.prefix) for path, shard in zip(paths, shards, strict=True)]

    def index_of(self, shards: Sequence[OutputFile]) -> OutputIndex:
        """The index that says which shard each tensor is in."""
        index = OutputIndex(self.named.index, tuple(shards), sum(info.nbytes for info in self.tensors.values()))
        return replace(index, nbytes=sum(map(len, index.pieces())))


def _folders(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    shard_bytes: int | None,
    stem: str,
    components: Sequence[Component],
) -> Iterator[_Folder]:
    """The output's folder, or one for each component."""
    if not components:
        yield _Folder(OutputName.of(path, stem), tensors, shard_bytes)
        return
    own: dict[str, dict[str, TensorInfo]] = {component.name: {} for component in components}
    for name, info in tensors.items():
        component, _, inner = name.partition(".")
        own[component][inner] = info
    for each in components:
        named = OutputName(path / each.name, each.stem, SUFFIX)
        yield _Folder(named, own[each.name], shard_bytes or each.shard_bytes, each.prefix)


def default_shards(path: Path, tensors: Mapping[str, TensorInfo], stem: str = "model") -> int | None:
    """How large the shards of an output are if nobody says it; None for one file.

    A folder of more than 10 GB gets shards of 5 GB, as transformers and mergekit write them; adapters are read from one
    file only, and what is called a file is one.
    """
    if is_file_name(path) or stem in SINGLE_STEMS or sum(info.nbytes for info in tensors.values()) <= SHARDED_FROM:
        return None
    return SHARD_BYTES


def _output_file(path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], prefix: str) -> OutputFile:
    """The file of these tensors; OutputError if we, or the format's library, would not read it back."""
    most = Bounds.of(sum(info.nbytes for info in tensors.values())).tensors
    if len(tensors) <= most:
        header = build_header(tensors, metadata)
        if header.nbytes - 8 <= MAX_HEADER:
            return OutputFile(path, header, prefix)
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
