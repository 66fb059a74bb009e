"""Distributed checkpoints of torch: which tensors a folder has, and of which chunks in which files each is made.

Format: as `torch/distributed/checkpoint/filesystem.py` writes it. `.metadata` is a pickle: for every tensor its size
and its chunks, for every chunk a file and the bytes in it, which are what `torch.save` writes of one tensor. Nothing is
run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.errors import CheckpointError
from streammerge.formats.files import read_errors
from streammerge.formats.shards import PREFERRED, is_plain_name
from streammerge.formats.torchzip.machine import (
    Bounds,
    Inert,
    MalformedPickleError,
    PickledDict,
    PickledObject,
    kind,
)
from streammerge.formats.torchzip.pickles import MAX_DIMENSIONS, PickledTensor, describe_pickle, dtype_of
from streammerge.formats.torchzip.state_dicts import (
    ChoiceError,
    LeftTensors,
    NoStateDictError,
    find_state_dict,
)
from streammerge.tensors import TensorInfo

METADATA: Final = ".metadata"
"""The file that says what the others hold; torch writes it last."""

SUFFIX: Final = ".distcp"

ACCELERATE: Final = "pytorch_model_fsdp_0"
"""The folder in a folder to which Accelerate, and the trainer of transformers, save the model."""

CHUNKS: Final = "Save it again, from the program that trained it. Nothing in it was executed."

Box = tuple[tuple[int, int], ...]
"""From where to where a part of a tensor reaches, in every dimension."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor, and the bytes of a file that hold it."""

    box: Box
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunked:
    """A tensor, and the chunks that are its parts."""

    info: TensorInfo
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Distributed:
    """What a folder holds: its model's tensors by name, and those that are not the model's."""

    tensors: Mapping[str, Chunked]
    left: LeftTensors


def distributed_in(path: Path) -> Path | None:
    """The folder of a distributed checkpoint that a path stands for: itself, or that of Accelerate in it; or none.

    CheckpointError if a folder has plain weights, too: nobody can tell which are meant.
    """
    plain = [name for name in PREFERRED if (path / name).is_file()]
    found = [folder for folder in (path, path / ACCELERATE) if (folder / METADATA).is_file() and _has_chunks(folder)]
    if found and plain:
        raise CheckpointError(
            f"{path}: there are weights of two kinds, a distributed checkpoint and {plain[0]}",
            advice=f"Name the one that is meant: {path / plain[0]}, or move that file elsewhere.",
        )
    return found[0] if found else None


def chunk_files(folder: Path) -> list[Path]:
    """The files in which the ranks have written chunks, the optimizer's among them."""
    return sorted(entry for entry in folder.iterdir() if entry.suffix == SUFFIX)


def _has_chunks(folder: Path) -> bool:
    return any(entry.suffix == SUFFIX for entry in folder.iterdir())


def read_distributed(folder: Path, entry: str = "") -> Distributed:
    """The model in a folder; CheckpointError if it can't be told what it is, or `.metadata` is not what torch writes.

    Keys lead to tensors as they did when they were saved: what is beside the model, as an optimizer is, is left, and
    `entry` says which dict is meant where several could be.
    """
    path = folder / METADATA
    with read_errors(folder):
        most = sum(file.stat().st_size for file in folder.iterdir() if file.suffix == SUFFIX)
        bounds = Bounds.of(most)
        with path.open("rb") as file:
            data = file.read(bounds.nbytes + 1)
    contents = describe_pickle(data, str(path), bounds)
    try:
        return _Reader(path, contents, bounds).model(entry)
    except MalformedPickleError as problem:
        raise CheckpointError(
            f"{path}: it does not describe tensors as torch.distributed.checkpoint does",
            found=[str(problem)],
            advice=CHUNKS,
        ) from None
    except NoStateDictError:
        raise CheckpointError(f"{folder}: it holds no tensors of a model", advice=CHUNKS) from None
    except ChoiceError as problem:
        raise CheckpointError(
            f"{folder}: {problem.what}",
            found=problem.found,
            advice=f"Choose the dict that is the model, as with --entry {problem.example}." if problem.example else "",
        ) from None


class _Reader:
    """The pickle's contents as tensors with chunks."""

    def __init__(self, path: Path, contents: object, bounds: Bounds) -> None:
        self.path, self.bounds = path, bounds
        state = _state(contents, "Metadata")
        self.described = _dict(state.get("state_dict_metadata"), "state_dict_metadata")
        self.keys = state.get("planner_data")
        self.stored = dict(_stored(_dict(state.get("storage_data"), "storage_data")))

    def model(self, entry: str) -> Distributed:
        """The tensors of the dict that is the model."""
        root, names = PickledDict(), dict[int, str]()
        for name, found in self.described.items():
            if isinstance(name, str) and kind(found).endswith(".TensorStorageMetadata"):
                standing = _standing(_info(found))
                names[id(standing)] = name
                _put(root, self._path(name), standing)
        chosen, left = find_state_dict(root, self.bounds, entry)
        own = {key: names[id(value)] for key, value in chosen.items() if isinstance(key, str) and id(value) in names}
        return Distributed({key: self._chunked(name) for key, name in own.items()}, left)

    def _path(self, name: str) -> tuple[str, ...]:
        """The keys that led to a tensor; where nobody wrote them down, its name is taken for one key."""
        keys = self.keys.get(name) if isinstance(self.keys, PickledDict) else None
        if isinstance(keys, tuple) and keys and all(type(key) in (str, int) for key in keys):
            return tuple(map(str, keys))
        first, dot, rest = name.partition(".")
        return (first, rest) if dot and first.lower().startswith("optim") else (name,)

    def _chunked(self, name: str) -> Chunked:
        """A tensor with its chunks, each of which has a place in a file."""
        info, found = _info(self.described[name]), self.described[name]
        chunks = dict[Box, Chunk]()
        for each in _items(_state(found, "TensorStorageMetadata").get("chunks")):
            state = _state(each, "ChunkStorageMetadata")
            offsets, sizes = _sizes(state.get("offsets")), _sizes(state.get("sizes"))
            box = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=False))
            if not len(offsets) == len(sizes) == len(info.shape):
                raise MalformedPickleError(f"{name}: a chunk of {len(sizes)} dimensions of {info}")
            if info.elements and not all(sizes):
                continue  # ranks beyond a small tensor's rows have none of it
            place = self.stored.get((name, offsets)) or self.stored.get((name, None))
            if place is None:
                raise MalformedPickleError(f"{name}: its chunk at {list(offsets)} is in no file")
            chunks[box] = Chunk(box, *place)
        if not chunks:
            raise MalformedPickleError(f"{name}: it has no chunks")
        return Chunked(info, tuple(chunks.values()))


def _stored(places: PickledDict) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]]:
    """For the name and the offsets of a chunk the file, the first byte and the number of bytes."""
    for key, found in places.items():
        index = _state(key.parts[0] if isinstance(key, PickledObject) and key.parts else key, "MetadataIndex")
        info = _state(found, "_StorageInfo")
        name, offsets = index.get("fqn"), index.get("offset")
        file, start, nbytes = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(name, str) or not is_plain_name(file) or not isinstance(file, str):
            raise MalformedPickleError(f"a chunk in {str(file)[:80]!r}, which is no file beside it")
        if type(start) is not int or type(nbytes) is not int or start < 0 or nbytes < 0:
            raise MalformedPickleError(f"{name}: a chunk in no range of bytes")
        if _items(info.get("transform_descriptors")):
            raise MalformedPickleError(f"{name}: a chunk that is compressed, or stored in another form")
        yield (name, None if offsets is None else _sizes(offsets)), (file, start, nbytes)


def _put(root: PickledDict, path: tuple[str, ...], value: PickledTensor) -> None:
    """Put a tensor where keys lead to."""
    here = root
    for key in path[:-1]:
        inner = here.setdefault(key, PickledDict())
        if not isinstance(inner, PickledDict):
            raise MalformedPickleError(f"{'.'.join(path)}: its keys lead through another tensor")
        here = inner
    if path[-1] in here:
        raise MalformedPickleError(f"{'.'.join(path)}: two tensors of one name")
    here[path[-1]] = value


def _standing(info: TensorInfo) -> PickledTensor:
    """What stands for a tensor of which only the name and the description are looked at."""
    return PickledTensor(info.dtype, "", info.dtype, 0, 0, info.shape, info.shape)


def _info(found: object) -> TensorInfo:
    """What a tensor looks like."""
    state = _state(found, "TensorStorageMetadata")
    properties = state.get("properties")
    parts = properties.parts if isinstance(properties, PickledObject) else []
    values = parts[0] if parts and isinstance(parts[0], tuple) else ()
    inner = parts[0].get("dtype") if parts and isinstance(parts[0], PickledDict) else None
    dtype = dtype_of(kind(values[0] if values else inner))
    if dtype is None:
        raise MalformedPickleError(f"a tensor of {kind(values[0] if values else inner)}")
    return TensorInfo(dtype, _sizes(state.get("size")))


def _state(found: object, name: str) -> Mapping[str | Inert, object]:
    """What an object of the class of this name was given."""
    if isinstance(found, PickledObject) and found.name.rpartition(".")[2] == name:
        states = [part for part in found.parts if isinstance(part, PickledDict)]
        if len(states) == 1:
            return states[0]
    raise MalformedPickleError(f"{kind(found)}, expected {name}")


def _dict(found: object, name: str) -> PickledDict:
    if not isinstance(found, PickledDict):
        raise MalformedPickleError(f"its {name} is {kind(found)}, expected a dict")
    return found


def _items(found: object) -> Iterable[object]:
    """The items of a list."""
    if isinstance(found, tuple):
        return found
    return found.parts if isinstance(found, PickledObject) and found.name == "list" else ()


def _sizes(found: object) -> tuple[int, ...]:
    """Sizes or offsets, one for each dimension."""
    if not isinstance(found, tuple) or len(found) > MAX_DIMENSIONS or not all(type(n) is int for n in found):
        raise MalformedPickleError(f"sizes that are {kind(found)}")
    if any(n < 0 for n in found):
        raise MalformedPickleError("sizes below zero")
    return found
