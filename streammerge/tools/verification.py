"""What can be checked of an output beside its values: the index of its shards, the hashes of its files and inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from streammerge.errors import CheckpointError
from streammerge.formats.shards import is_index
from streammerge.models.checkpoints import Checkpoint, model_files
from streammerge.recipe.metadata import Recorded
from streammerge.storage.hashing import file_sha256, read_sidecar, sidecar_beside
from streammerge.tools.indexes import check_index


def check_files(model: Checkpoint) -> Iterator[str]:
    """One line for the index and one for the hashes: what was checked, or why not. CheckpointError if one is wrong."""
    if shards := check_index(model):
        yield f"index: right for {shards:,} shards, and no other shard lies beside them"
    path = sidecar_beside(model.path.with_suffix("").with_suffix("") if is_index(model.path) else model.path)
    if not path.exists():
        yield f"hashes: not checked: there is no {path.name}"
        return
    files = [model.path] if is_index(model.path) else []
    _check_hashes(path, [*files, *(file.path for file in model.files)])
    yield f"hashes: the sha256 of every file is as in {path.name}"


def _check_hashes(sidecar: Path, files: list[Path]) -> None:
    stated = read_sidecar(sidecar)
    problems = [f"{path.name}: not listed" for path in files if path.name not in stated]
    for path in files:
        if path.name in stated and (found := file_sha256(path)) != stated[path.name]:
            problems.append(f"{path.name}: {found}, expected {stated[path.name]}")
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
