"""What can be checked of an output beside its values: the index of its shards, the hashes of its files and inputs."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from streammerge.errors import CheckpointError
from streammerge.formats.companions import is_companion_name
from streammerge.formats.pipelines import INDEX
from streammerge.formats.safetensors import read_header
from streammerge.formats.shards import SAFETENSORS, is_index
from streammerge.models.checkpoints import Checkpoint, open_model
from streammerge.models.located import model_files
from streammerge.recipe.metadata import Recorded
from streammerge.storage.hashing import file_sha256, read_sidecar, sidecar_beside
from streammerge.storage.placing import name_within


def check_files(model: Checkpoint) -> Iterator[str]:
    """A line for each index and one for the hashes: what was checked, or why not. CheckpointError if one is wrong."""
    indexes = [path for path in model.components.values() or (model.path,) if is_index(path)]
    for index in indexes:
        with open_model(index) if model.is_pipeline else contextlib.nullcontext(model) as part:
            shards = check_index(part)
        name = f" of {index.parent.name}" if model.is_pipeline else ""
        yield f"index{name}: right for {shards:,} shards, and no other shard lies beside them"
    path = _sidecar_of(model)
    if not path.exists():
        yield f"hashes: not checked: there is no {path.name}"
        return
    _check_hashes(path, [*indexes, *(file.path for file in model.files)])
    yield f"hashes: the sha256 of every file is as in {path.name}"


def _sidecar_of(model: Checkpoint) -> Path:
    """Where a model's hashes would lie."""
    if model.is_pipeline:
        return sidecar_beside(model.path / INDEX)
    return sidecar_beside(model.path.with_suffix("").with_suffix("") if is_index(model.path) else model.path)


def _check_hashes(sidecar: Path, files: list[Path]) -> None:
    stated = read_sidecar(sidecar)
    named = {name_within(sidecar.parent, path): path for path in files}
    beside = {name: sidecar.parent / name for name in stated if name not in named and is_companion_name(name)}
    problems = [f"{name}: not listed" for name in named if name not in stated]
    for name, path in {**named, **beside}.items():
        if name in stated and (found := file_sha256(path)) != stated[name]:
            problems.append(f"{name}: {found}, expected {stated[name]}")
    if problems:
        raise CheckpointError(
            f"{sidecar}: the files are not those whose hashes it holds",
            found=problems,
            advice="They were damaged or replaced after they were written. Merge, or fetch, them again.",
        )


def check_inputs(recorded: Recorded) -> str:
    """What was checked of the inputs' hashes, or why not; CheckpointError if an input is another than then."""
    if not recorded.hashes:
        return "inputs: not checked: their hashes were not recorded (--hash-inputs)"
    problems = []
    for stored, files in recorded.hashes.items():
        path = recorded.paths.get(stored)
        if path is None:
            problems.append(f"{stored}: not a model of the recipe")
            continue
        found = sorted(map(file_sha256, model_files(path)))
        if found != sorted(files.values()):
            problems.append(f"{path}: not the {stored} that was merged")
    if problems:
        raise CheckpointError(
            f"{recorded.output}: inputs are not those that it was made of",
            found=problems,
            advice="Name the right ones as NAME=PATH, or leave out what asks for them.",
        )
    return f"inputs: the sha256 of every file of {len(recorded.hashes):,} models is as recorded"


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
