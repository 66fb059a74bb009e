"""Whether an index of shards tells the truth about what lies beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from streammerge.errors import CheckpointError
from streammerge.formats.safetensors import read_header
from streammerge.formats.shards import SAFETENSORS, is_index
from streammerge.models.checkpoints import Checkpoint

_SHARD: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<suffix>\.\w+)")


def check_index(model: Checkpoint) -> int:
    """The number of shards of an index that is right, 0 for a model without one; CheckpointError for every difference.

    `total_size` must be that of the tensors, every tensor of every shard must be in the `weight_map`, and no shard of
    the same name but another count may lie beside them: a loader that looks for files by name would find it.
    """
    if not is_index(model.path):
        return 0
    problems = [*_problems(model), *stale_shards(model.path, {file.path.name for file in model.files})]
    if problems:
        raise CheckpointError(
            f"{model.path}: the index and what lies beside it don't agree",
            found=problems,
            advice="Remove shards of another merge; else merge, or fetch, the model again.",
        )
    return len(model.files)


def _problems(model: Checkpoint) -> Iterator[str]:
    index = json.loads(model.path.read_bytes())  # it was read and checked when the model was opened
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(info.nbytes for info in model.tensors.values())
    if stated is not None and stated != total:
        yield f"total_size is {stated}, the tensors have {total} bytes"
    for file in model.files:
        if file.path.suffix.lower() in SAFETENSORS:
            for name in read_header(file.path, file.nbytes).tensors:
                if index["weight_map"].get(name) != file.path.name:
                    yield f"{name}: in {file.path.name}, but not so in the weight_map"


def stale_shards(index: Path, named: set[str]) -> Iterator[str]:
    """The shards beside an index that are called like its own, and are not."""
    stems = {match["stem"] for name in named if (match := _SHARD.fullmatch(name))}
    for path in sorted(index.parent.iterdir()):
        match = _SHARD.fullmatch(path.name)
        if match and match["stem"] in stems and path.name not in named:
            yield f"{path.name}: a shard that the index does not name"
