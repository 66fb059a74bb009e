"""Write checkpoints of any size, chunk by chunk: safetensors files, and zips like those of `torch.save`.

`make_models` writes the three files of the project's own example: Stable Diffusion 2's base, its depth model and Waifu
Diffusion, with their true tensors and random values.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from streammerge.errors import OutputError
from streammerge.formats.safetensors import build_header
from streammerge.tensors import DType, TensorInfo, contiguous_strides
from streammerge.tools.demo.layouts import MINIATURE, checkpoint
from streammerge.tools.demo.noise import BLOCK, FineTune, Noise

if TYPE_CHECKING:
    import torch

Fill = Callable[[str, int, int], "torch.Tensor"]
"""Given a tensor's name, start and stop: elements [start, stop) of the flattened tensor, in float32."""

Container = Literal["safetensors", "ckpt"]

CHUNK: Final = BLOCK
"""Elements made, cast and written at a time."""

WORKERS: Final = 2
AHEAD: Final = 4
"""Chunks in the making while another is written: all that is ever held, about a megabyte each."""

ALIGNMENT: Final = 64
"""Storages in a zip start at multiples of so many bytes, so that they can be mapped."""

LOCAL_HEADER: Final = 30
"""Bytes before a zip member's name, extra fields and data."""

STORAGES: Final[Mapping[str, str]] = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
"""What torch calls the storage of each element type, as far as its zips name them."""


class ModelCheckpoint:
    """Stands for Lightning's class of this name, which the original checkpoints mention; see `_pickled`."""


LEFTOVERS: Final[Mapping[str, object]] = {"epoch": 0, "global_step": 875000, "pytorch-lightning_version": "1.4.2"}
"""What training leaves in a checkpoint beside its tensors."""

CALLBACK_LEFTOVERS: Final[Mapping[str, object]] = {
    **LEFTOVERS,
    "callbacks": {ModelCheckpoint: {"monitor": None, "best_model_path": "", "best_model_score": None}},
}
"""The same with the entry of a Lightning callback, as 512-base-ema.ckpt has it: loaders must not need Lightning."""


@dataclass(frozen=True, slots=True)
class DemoModels:
    """Where the three models of the example are."""

    base: Path
    depth: Path
    waifu: Path


def make_models(
    folder: Path,
    *,
    full: bool = False,
    dtype: Literal["F16", "F32"] = "F16",
    container: Container = "safetensors",
    seed: int = 0,
    force: bool = False,
) -> DemoModels:
    """Write the three models of the example: a few megabytes each, or as large as the real ones (`full`).

    Files that are there already are an error, for they may be the real ones; `force` replaces them.
    """
    scale = 1 if full else MINIATURE
    base, depth, waifu = (checkpoint(name, dtype=dtype, scale=scale) for name in ("sd2-base", "sd2-depth", "sd2-waifu"))
    models = DemoModels(
        base=folder / f"512-base-ema.{container}",
        depth=folder / f"512-depth-ema.{container}",
        waifu=folder / f"wd-1-4-anime_e2.{container}",
    )
    noise = Noise(base, seed)
    contents: dict[Path, tuple[Mapping[str, TensorInfo], Fill]] = {
        models.base: (base, noise.values),
        models.depth: (depth, FineTune("depth", depth, noise).values),
        models.waifu: (waifu, FineTune("waifu", waifu, noise).values),
    }
    if not force:
        _check_absent(list(contents))
    _check_room(
        folder, {path: sum(info.nbytes for info in tensors.values()) for path, (tensors, _) in contents.items()}
    )
    write = write_safetensors if container == "safetensors" else write_torch_zip
    for path, (tensors, fill) in contents.items():
        write(path, tensors, fill)
    return models


def write_safetensors(path: Path, tensors: Mapping[str, TensorInfo], fill: Fill) -> None:
    """Write a safetensors file, with the metadata and in the order that the format's library gives it."""
    header = build_header(tensors, {"format": "pt"})
    in_file_order = {name: tensors[name] for name in header.offsets}
    with _appearing_whole(path) as unfinished, unfinished.open("wb") as file:
        file.write(header.encoded)
        for data in _encoded(in_file_order, fill):
            file.write(data)


def write_torch_zip(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    fill: Fill,
    *,
    wrap: str = "state_dict",
    leftovers: Mapping[str, object] = LEFTOVERS,
) -> None:
    """Write a zip that `torch.load` reads: the tensors in a dict called `wrap`, and the leftovers beside it.

    With `wrap=""` the tensors stand at the top, and there are no leftovers.
    """
    _check_storable(path, tensors)
    state = OrderedDict((name, _Tensor(str(key), info)) for key, (name, info) in enumerate(tensors.items()))
    with (
        _appearing_whole(path) as unfinished,
        unfinished.open("wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _pickled({**leftovers, wrap: state} if wrap else state))
        chunks = _encoded(tensors, fill)
        for tensor in state.values():
            with _member(archive, file.tell(), f"archive/data/{tensor.key}", tensor.info.nbytes) as member:
                for data in islice(chunks, len(_chunks(tensor.info))):
                    member.write(data)
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of which only the description is pickled; its elements are the zip's member `key`."""

    key: str
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class _Storage:
    """The storage of such a tensor."""

    tensor: _Tensor


class _Pickler(pickle.Pickler):
    """Pickles descriptions of tensors as `torch.save` pickles tensors."""

    def persistent_id(self, thing: object) -> tuple[object, ...] | None:
        import torch

        if not isinstance(thing, _Storage):
            return None
        info = thing.tensor.info
        return ("storage", getattr(torch, STORAGES[info.dtype.name]), thing.tensor.key, "cpu", info.elements)

    def reducer_override(self, thing: object) -> Any:  # noqa: ANN401  (what pickle asks for)
        from torch._utils import _rebuild_tensor_v2

        if not isinstance(thing, _Tensor):
            return NotImplemented
        shape = thing.info.shape
        offset, requires_grad = 0, False
        hooks: OrderedDict[int, object] = OrderedDict()
        return _rebuild_tensor_v2, (_Storage(thing), offset, shape, contiguous_strides(shape), requires_grad, hooks)


def _pickled(contents: object) -> bytes:
    """The contents as a pickle of torch's protocol.

    Pickle names a class only where it can import it, and Lightning is not here; so our stand-in is pickled, and its
    name, which protocol 2 spells out between newlines, replaced by that of the class it stands for.
    """
    buffer = BytesIO()
    _Pickler(buffer, protocol=2).dump(contents)
    ours = f"c{ModelCheckpoint.__module__}\nModelCheckpoint\n"
    theirs = "cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    return buffer.getvalue().replace(ours.encode(), theirs.encode())


def _member(archive: zipfile.ZipFile, position: int, name: str, nbytes: int) -> contextlib.AbstractContextManager[Any]:
    """A member of the zip, opened for writing; padding in its header makes its data start at a multiple of 64."""
    huge = nbytes > 2**30  # then its sizes take 20 bytes more of the header
    info = zipfile.ZipInfo(name)
    info.file_size = nbytes
    start = position + LOCAL_HEADER + len(name) + (20 if huge else 0) + 4
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    return archive.open(info, "w", force_zip64=huge)


def _chunks(info: TensorInfo) -> range:
    """Where each chunk of a tensor starts."""
    return range(0, info.elements, CHUNK)


def _encoded(tensors: Mapping[str, TensorInfo], fill: Fill) -> Iterator[bytearray]:
    """Every chunk of every tensor, in order, as it is stored; a few are made ahead by other threads."""

    def encode(name: str, info: TensorInfo, start: int) -> bytearray:
        return _cast(fill(name, start, min(start + CHUNK, info.elements)), info.dtype)

    pending: deque[Future[bytearray]] = deque()
    with ThreadPoolExecutor(WORKERS) as workers:
        for name, info in tensors.items():
            for start in _chunks(info):
                pending.append(workers.submit(encode, name, info, start))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _cast(values: torch.Tensor, dtype: DType) -> bytearray:
    """The bytes of the values in another element type."""
    import torch

    stored = bytearray(values.numel() * dtype.bits // 8)
    torch.frombuffer(stored, dtype=getattr(torch, dtype.torch_name)).copy_(values)
    return stored


@contextlib.contextmanager
def _appearing_whole(path: Path) -> Iterator[Path]:
    """A name to write under; the file takes its own name when it is complete, and is gone if that fails."""
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as problem:
        raise OutputError(f"{path} can't be written", found=[str(problem)]) from problem
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _check_storable(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    strange = [f"{name}   {info}" for name, info in tensors.items() if info.dtype.name not in STORAGES]
    if strange:
        raise OutputError(
            f"{path}: {len(strange)} tensors are of a type that a .ckpt has no storage for",
            found=strange,
            advice=f"Write .safetensors, or use one of {', '.join(STORAGES)}.",
        )


def _check_absent(paths: list[Path]) -> None:
    if present := [str(path) for path in paths if path.exists()]:
        raise OutputError(
            "the example's models would replace files that are there, which may be the real ones",
            found=present,
            advice="Choose another folder, or ask to replace them (force).",
        )


def _check_room(folder: Path, sizes: Mapping[Path, int]) -> None:
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    needed, free = sum(sizes.values()), shutil.disk_usage(existing).free
    if needed > free:
        raise OutputError(
            f"{folder}: the models need {_gigabytes(needed)}, but only {_gigabytes(free)} are free",
            found=[f"{path.name}   {_gigabytes(nbytes)}" for path, nbytes in sizes.items()],
            advice="Make room, choose another folder, or make miniatures.",
        )


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
