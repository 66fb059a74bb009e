"""Sharded checkpoints: which files a folder or an index file stands for.

An index is JSON with a `weight_map` from tensor name to the name of the shard beside it, as transformers and diffusers
write it. A shard's name must be a plain file name: an index from a stranger must not point elsewhere. The file of that
name may be a symbolic link, as it is in the cache of Hugging Face's hub: whoever made the folder made the link.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Final

from streammerge.errors import CheckpointError
from streammerge.formats.bounds import PICKLE_BYTES, bound
from streammerge.formats.objects import UnreadableError, object_of
from streammerge.formats.safetensors import MAX_HEADER, is_safetensors

MAX_INDEX: Final = 24 * 2**20
"""The longest index, in bytes, that is read beside small files. A tensor takes about 100; characters beyond ASCII count
fourfold."""

MAX_INDEXED: Final = 2**18
"""The most values in an index beside small files."""

HEADER_ENTRY: Final = 50
"""The bytes that a tensor takes of a shard's own header, at least: so many names can't be in it that aren't there."""

PREFERRED: Final = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    *("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"),
    *("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
)
"""What a folder's weights are called, the first that exists being meant; safetensors before pickles."""

SAFETENSORS: Final = (".safetensors", ".sft")
"""The endings of safetensors files; in capitals, they mean the same."""

TORCH: Final = (".ckpt", ".pt", ".pth", ".bin")
"""The endings of torch files."""

_INDEX: Final = re.compile(r".*\.index(?:\.[A-Za-z0-9_]+)?\.json", re.DOTALL)

_ONE_OF_SEVERAL: Final = re.compile(r".*-[0-9]{1,9}-of-0*([2-9]|[1-9][0-9]{1,8})", re.DOTALL)
"""What a shard is called, but for its ending, where it is not the only one."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """An index: for every tensor the name of the shard that holds it, and the shards in the order of their names."""

    folder: Path
    weight_map: dict[str, str]

    @property
    def shards(self) -> list[Path]:
        """The files that the index names."""
        return [self.folder / name for name in sorted(set(self.weight_map.values()))]


def is_model(path: Path) -> bool:
    """Whether a file is named as a model is."""
    return path.suffix.lower() in (*SAFETENSORS, *TORCH)


def is_index(path: Path) -> bool:
    """Whether the path is named as an index of shards is: `….index.json`, or `….index.fp16.json` of a variant."""
    return _INDEX.fullmatch(path.name) is not None


def find_weights(folder: Path) -> Path:
    """The weights file or index that a folder stands for; CheckpointError if there is none, or more than one."""
    for name in PREFERRED:
        if (folder / name).is_file():
            _refuse_two(folder / name)
            return folder / name
    found = sorted(entry for entry in folder.iterdir() if entry.is_file() and is_index(entry))
    found = found or sorted(entry for entry in folder.iterdir() if entry.is_file() and is_model(entry))
    shards = [entry for entry in found if _ONE_OF_SEVERAL.fullmatch(entry.stem)]
    if shards and shards == found:  # one alone would pass for the whole model
        raise CheckpointError(
            f"{folder}: the folder holds shards of a model, and no index of them",
            found=[entry.name for entry in shards],
            advice=f"Fetch the index, such as {PREFERRED[0]}, and all the shards; or name a shard itself, to have it "
            "alone.",
        )
    if len(found) == 1:
        return found[0]
    if any(entry.suffix == ".distcp" for entry in folder.iterdir()):
        raise CheckpointError(
            f"{folder}: a distributed checkpoint of torch without .metadata, which says what its files hold",
            advice="torch writes that file last: it is hidden, and was not copied, or the checkpoint is incomplete.",
        )
    if not found and any(entry.suffix.lower() == ".gguf" for entry in folder.iterdir()):
        raise CheckpointError(
            f"{folder}: the folder holds GGUF files, whose tensors are quantised in blocks that streammerge does not "
            "decode",
            advice="Merge the safetensors that they were made from.",
        )
    entries = [] if found else folder.iterdir()
    if inner := sorted(entry.name for entry in entries if entry.name.startswith("checkpoint-") and entry.is_dir()):
        raise CheckpointError(
            f"{folder}: the folder holds no model, but checkpoints of a training",
            found=inner,
            advice="Name one of them.",
        )
    what = "holds no model" if not found else f"holds {len(found)} files that could be the model"
    raise CheckpointError(
        f"{folder}: the folder {what}",
        found=[entry.name for entry in found],
        advice=f"Name the file itself, or call it {PREFERRED[2]}.",
    )


def single_of(index: str) -> str:
    """What the file is called that holds what an index of this name is about, where that is in one file."""
    return index.removesuffix(".index.json")


def _refuse_two(path: Path) -> None:
    """CheckpointError for an index of shards beside a file that is a model: libraries differ in which they load."""
    whole = path.with_name(single_of(path.name))
    if whole != path and whole.is_file() and whole.name not in read_index(path).weight_map.values():
        raise CheckpointError(
            f"{path.parent}: the folder holds two models, one in shards and one in a single file",
            found=[path.name, whole.name],
            advice="Name the one that is meant, or remove the other; transformers loads the single file.",
        )


def read_index(path: Path) -> ShardIndex:
    """Read and check an index of shards."""
    try:
        weight_map = object_of(_index_bytes(path), parse_int=_any_number).get("weight_map")
    except _TooLongError as problem:
        raise CheckpointError(
            f"{path}: {problem}", advice="Fetch index and shards again: the shards may be incomplete."
        ) from None
    except (OSError, UnreadableError) as error:
        raise CheckpointError(
            f"{path}: can't be read as an index of shards: {error}", advice="Fetch the index again."
        ) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: the index has no weight_map", advice="Fetch the index again.")
    names = {name: name for name in weight_map.values() if isinstance(name, str)}
    outside = sorted({str(name) for name in names if not is_plain_name(name)})
    outside += [str(name) for name in weight_map.values() if not isinstance(name, str)]
    if outside:
        raise CheckpointError(
            f"{path}: the index points outside its folder",
            found=outside,
            advice="A shard must be a file beside its index. Do not trust this download.",
        )
    for name, shard in weight_map.items():
        weight_map[name] = names[shard]
    return ShardIndex(path.parent, weight_map)


class _TooLongError(Exception):
    """The index is longer than any index of what lies beside it."""


def _index_bytes(path: Path) -> bytes:
    """The index, if parsing it takes no more time and memory than the shards beside it give reason for."""
    described = sum(map(_described_bytes, (entry for entry in path.parent.iterdir() if is_model(entry))))
    most_bytes, most_values = max(MAX_INDEX, 2 * described), max(MAX_INDEXED, described // HEADER_ENTRY)
    with path.open("rb") as file:
        encoded = file.read(most_bytes + 1)
    if len(encoded) * (1 if encoded.isascii() else 4) > most_bytes:
        raise _TooLongError(f"the index is longer than {most_bytes} bytes, the most beside these shards")
    if (values := sum(map(encoded.count, (b",", b"[", b"{")))) > most_values:
        raise _TooLongError(f"the index has up to {values} values; {most_values} are read at most beside these shards")
    return encoded


def _described_bytes(path: Path) -> int:
    """How long a shard's description of its tensors is: a safetensors file says so, of another it is a guess."""
    try:
        nbytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(9)
    except OSError:
        return 0
    if is_safetensors(head):
        return min(nbytes, int.from_bytes(head[:8], "little"), MAX_HEADER)
    return bound(0, nbytes, PICKLE_BYTES)


def _any_number(digits: str) -> int:
    """The number; of one so long that it is no size, only its start."""
    return int(digits[:20])


def is_plain_name(name: object) -> bool:
    """Whether this is the name of a file in the same folder, on any system."""
    return (
        isinstance(name, str)
        and not any("\ud800" <= character <= "\udfff" for character in name)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
        and not PureWindowsPath(name).drive
    )
