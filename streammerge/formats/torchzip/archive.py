"""Checkpoints that `torch.save` wrote, found to be tensors in place; nothing in them is executed.

Format: a zip of stored members, as `torch/serialization.py` writes it since torch 1.6. `<prefix>/data.pkl` describes
the tensors as strides over storages, `<prefix>/data/<key>` is a storage, `<prefix>/byteorder` its byte order.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedReader, RawIOBase
from os import SEEK_CUR, SEEK_END, SEEK_SET
from pathlib import Path
from typing import Any, BinaryIO, Final

from streammerge.errors import CheckpointError, counted
from streammerge.formats.torchzip.directory import Directory, MalformedZipError, folded, read_at, read_directory
from streammerge.formats.torchzip.machine import Bounds, Inert, MalformedPickleError, PickledDict, kind
from streammerge.formats.torchzip.pickles import PickledStorage, PickledTensor, describe_pickle
from streammerge.formats.torchzip.state_dicts import (
    TENSORS,
    ChoiceError,
    LeftTensors,
    NoStateDictError,
    find_state_dict,
)
from streammerge.tensors import TensorInfo, contiguous_strides

_MAX_NBYTES: Final = 2**63
_NEWEST: Final = 10  # of the versions of the format that torch reads

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # the first thing that torch pickled until 1.5
_DAMAGED: Final = "It is damaged, incomplete, or not written by torch.save. Nothing in it was executed. Fetch it again."


@dataclass(frozen=True, slots=True)
class StoredView:
    """A tensor in place: strides over a storage. `offset` and `stride` count elements, the rest bytes of the file."""

    info: TensorInfo
    storage_start: int
    storage_nbytes: int
    offset: int
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow each other in row-major order, so that they are one range of bytes."""
        shape = self.info.shape
        expected = contiguous_strides(shape)
        return 0 in shape or all(
            size == 1 or step == step_expected
            for size, step, step_expected in zip(shape, self.stride, expected, strict=True)
        )

    @property
    def byte_range(self) -> tuple[int, int]:
        """The absolute start and stop of the elements' bytes, for a contiguous tensor only."""
        if not self.contiguous:
            raise ValueError(f"{self.info} with strides {list(self.stride)} is not one range of bytes")
        start = self.storage_start + self.offset * self.info.dtype.bits // 8
        return start, start + self.info.nbytes


@dataclass(frozen=True)
class TorchZip:
    """What a checkpoint holds: its tensors, in its own order, and those of the file that are not among them."""

    tensors: Mapping[str, StoredView]
    left: LeftTensors


def is_torch_zip(head: bytes) -> bool:
    """Whether a file that starts with these bytes (four or more) claims to be a zip."""
    return head.startswith(b"PK\3\4")


def legacy_torch_reason(head: bytes) -> str | None:
    """Why a file that starts with these bytes (512 or more) can't be read, if torch wrote it before 1.6, or that way.

    The answer completes a sentence that starts with the file's name.
    """
    if head.startswith(b"\x80") and _LEGACY_MAGIC in head[:32]:
        written = "in the format from before torch 1.6 (a bare pickle)"
    elif head[257:262] == b"ustar" or head.startswith(b"sys_info\0"):
        written = "in the format from before torch 0.2 (a tar)"
    else:
        return None
    return (
        f"it was saved {written}, which can't be read in ranges. Convert it in an environment that you trust: "
        'torch.save(torch.load(PATH, map_location="cpu", weights_only=True), NEW). Nothing in it was executed.'
    )


def read_torch_zip(path: Path, entry: str = "") -> TorchZip:
    """Find the tensors of a checkpoint without executing any of it; whatever can't be trusted is a CheckpointError.

    `entry` names the dict of tensors that is meant, where several could be.
    """
    try:
        with path.open("rb") as file:
            archive = _Archive(path, file)
            contents = archive.contents()
            state_dict, left = find_state_dict(contents, archive.bounds, entry)
            tensors = _tensors(state_dict, path)
            views = {name: archive.view(name, tensor) for name, tensor in tensors.items()}
    except NoStateDictError:
        raise _no_tensors(contents, path) from None
    except ChoiceError as problem:
        raise _undecided(problem, path) from None
    except MalformedPickleError as problem:
        raise CheckpointError(
            f"{path}: it holds far more than tensors", found=[str(problem)], advice="Save the state dict alone."
        ) from None
    except MalformedZipError as problem:
        raise CheckpointError(f"{path}: not a readable torch zip", found=[str(problem)], advice=_DAMAGED) from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
    if not views:
        raise _no_tensors(contents, path)
    return TorchZip(views, left)


class Section(RawIOBase):
    """Bytes of a file as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, nbytes: int) -> None:
        self.file, self.start, self.nbytes, self.at = file, start, nbytes, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        """Go to a byte, counted from the start, from here or from the end."""
        self.at = max(0, offset + {SEEK_SET: 0, SEEK_CUR: self.at, SEEK_END: self.nbytes}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  (whatever is a buffer)
        """Fill the buffer with what follows, as far as there is something."""
        room = memoryview(buffer)[: max(0, self.nbytes - self.at)]
        self.file.seek(self.start + self.at)
        data = self.file.read(len(room))
        room[: len(data)] = data
        self.at += len(data)
        return len(data)


def read_torch_tensor(path: Path, file: BinaryIO, start: int, nbytes: int) -> StoredView:
    """The one tensor that `torch.save` wrote to these bytes of a file that is open, none of which are executed."""
    called = f"{path}, bytes {start:,} to {start + nbytes:,}"
    try:
        with BufferedReader(Section(file, start, nbytes), 4096) as section:
            archive = _Archive(Path(called), section)
            contents = archive.contents()
            if not isinstance(contents, PickledTensor):
                raise CheckpointError(f"{called}: {_kind(contents)}, expected a tensor", advice=_DAMAGED)
            view = archive.view("a chunk", contents)
    except MalformedZipError as problem:
        raise CheckpointError(f"{called}: no readable torch zip", found=[str(problem)], advice=_DAMAGED) from None
    return replace(view, storage_start=start + view.storage_start)


class _Archive:
    """A zip as `torch.save` writes it: its directory, and the storages that were looked up."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        file_bytes = file.seek(0, SEEK_END)
        self.bounds = Bounds.of(file_bytes)
        self.directory: Directory = read_directory(file, file_bytes)
        self.prefix = _prefix(self.directory.members, path)
        self.starts: dict[str, int] = {}
        for member in self.directory.members.values():
            member.check_stored()
        for name, check in _RECORDS.items():
            if self.directory.find(self.prefix + name):
                check(self.read(name, most=16), path)

    def read(self, name: str, most: int) -> bytes:
        """A member that is small."""
        name = self.prefix + name
        member = self.directory.members[folded(name)]
        if member.nbytes > most:
            raise MalformedZipError(f"{name}: it has {member.nbytes} bytes; {most} are read at most")
        data = read_at(self.file, self.directory.locate(self.file, name), member.nbytes)
        if member.crc not in (0, zlib.crc32(data)):
            raise MalformedZipError(f"{name}: its bytes don't have the checksum that the directory gives")
        return data

    def contents(self) -> object:
        """What was saved, described."""
        data = self.read("data.pkl", most=self.bounds.nbytes)
        return describe_pickle(data, f"{self.path}: {self.prefix}data.pkl", self.bounds)

    def view(self, name: str, tensor: PickledTensor) -> StoredView:
        """The tensor in place, lying within its storage."""
        info = TensorInfo(tensor.dtype, tensor.shape)
        start, nbytes = self.storage(name, tensor)
        if info.nbytes >= _MAX_NBYTES:
            raise self.refusal(name, tensor, f"it would have {info.nbytes} bytes")
        if info.elements == 0:
            return StoredView(info, start, nbytes, 0, tensor.stride)
        span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True)) + 1
        needed = (tensor.storage_offset + span) * tensor.dtype.bits // 8
        if needed > nbytes:
            raise self.refusal(name, tensor, f"it needs {needed} bytes of a storage of {nbytes}")
        return StoredView(info, start, nbytes, tensor.storage_offset, tensor.stride)

    def storage(self, name: str, tensor: PickledTensor) -> tuple[int, int]:
        """The start and size of the tensor's storage, whose size in the zip and in the pickle must agree."""
        member_name = f"{self.prefix}data/{tensor.storage_key}"
        member = self.directory.find(member_name)
        if member is None:
            raise self.refusal(name, tensor, f"its storage {member_name} is not in the file")
        size = tensor.storage_dtype.bits // 8
        nbytes = tensor.storage_elements * size
        if not nbytes <= member.nbytes < nbytes + size:  # torch counts whole elements
            raise self.refusal(name, tensor, f"its storage {member_name} has {member.nbytes} bytes, expected {nbytes}")
        if member_name not in self.starts:
            self.starts[member_name] = self.directory.locate(self.file, member_name)
        return self.starts[member_name], nbytes

    def refusal(self, name: str, tensor: PickledTensor, reason: str) -> CheckpointError:
        """The error that a tensor can't be where it is said to be."""
        where = f"{tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride)}, offset {tensor.storage_offset}"
        return CheckpointError(
            f"{self.path}: a tensor does not fit its storage", found=[f"{name}   {where}: {reason}"], advice=_DAMAGED
        )


def _check_order(order: bytes, path: Path) -> None:
    if order != b"little":
        raise CheckpointError(
            f"{path}: its bytes are in another order",
            found=[f"byteorder {order!r}, expected b'little'"],
            advice="Load it with torch.load and save it again, on a little-endian machine.",
        )


def _check_version(version: bytes, path: Path) -> None:
    if not version.strip().isdigit() or not 1 <= int(version) <= _NEWEST:
        raise CheckpointError(
            f"{path}: it is of an unknown version of torch's format",
            found=[f"version {version!r}, known are 1 to {_NEWEST}"],
            advice="Load it with the program that wrote it, and save it again as safetensors.",
        )


_RECORDS: Final = {"byteorder": _check_order, "version": _check_version, ".data/version": _check_version}
"""Small members that say how the others are to be read, each with what checks it."""


def _prefix(members: Mapping[str, object], path: Path) -> str:
    """The folder in the zip that holds the checkpoint, with its slash: the first member's, where torch looks."""
    prefixes = [
        name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1
    ]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{path}: a zip, but with {len(prefixes)} descriptions of tensors (<folder>/data.pkl), expected 1",
            found=list(members) or ["the zip is empty"],
            advice="Check that it is a checkpoint; a model that was packed into a zip must be unpacked first.",
        )
    (prefix,) = prefixes
    if prefix + "constants.pkl" in members or any(name.startswith(prefix + "code/") for name in members):
        raise CheckpointError(
            f"{path}: a TorchScript program, not a checkpoint",
            advice="Load it with torch.jit.load where you trust it, and save its state_dict(). Nothing was executed.",
        )
    if not next(iter(members)).startswith(prefix):
        raise CheckpointError(
            f"{path}: a zip whose first member is not in the folder {prefix} of its tensors, where torch looks for it",
            found=list(members),
            advice=_DAMAGED,
        )
    return prefix


def _tensors(state_dict: PickledDict, path: Path) -> dict[str, PickledTensor]:
    """The tensors that have names; one that can't be read is an error, never left over."""
    tensors: dict[str, PickledTensor] = {}
    unreadable: list[str] = []
    for key, value in state_dict.items():
        if not isinstance(value, TENSORS):
            continue
        if not isinstance(value, PickledTensor):
            unreadable.append(f"{_name(key)}   {_kind(value)}")
        elif isinstance(key, str) and _encodable(key):
            tensors[key] = value
        elif isinstance(key, str):
            unreadable.append(f"{key!r}   its name is not text")
    if unreadable:
        raise CheckpointError(
            f"{path}: {counted(unreadable, 'tensor', 'is', 'are')} of a kind that can't be read",
            found=unreadable,
            advice="Make them plain, dense tensors with proper names (or take them out), and save again.",
        )
    return tensors


def _undecided(problem: ChoiceError, path: Path) -> CheckpointError:
    """The error that it can't be told which tensors are the model, or that some would be lost; and how to choose."""
    key = problem.example
    advice = "Save the state dict that you mean alone, with torch.save."
    if key:
        advice = (
            f"Choose the dict that is the model, as with --entry {key} (for one of several models: --entry NAME={key}; "
            f"in a recipe: `entry: {key}` beside `model:`). Tensors outside of it, or deeper in it, are then left."
        )
    return CheckpointError(f"{path}: {problem.what}", found=problem.found, advice=advice)


def _no_tensors(contents: object, path: Path) -> CheckpointError:
    """The error that nothing saved is a tensor with a name, and what was found instead."""
    if isinstance(contents, PickledDict):
        found = [f"{_name(key)}   {_kind(value)}" for key, value in contents.items()] or ["an empty dict"]
    else:
        found = [_kind(contents)]
    return CheckpointError(
        f"{path}: it holds no dict of tensors; found at its top level:",
        found=found,
        advice="Save a model's state_dict() with torch.save. Nothing in the file was executed.",
    )


def _name(key: str | Inert) -> str:
    return key if isinstance(key, str) else key.name


def _kind(value: object) -> str:
    """A word for a value, for people."""
    if isinstance(value, PickledTensor):
        return f"a tensor {value.dtype} {list(value.shape)}"
    return f"a storage ({value.type_name})" if isinstance(value, PickledStorage) else kind(value)


def _encodable(name: str) -> bool:
    """Whether a name can be written as UTF-8: a pickle may hold halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
