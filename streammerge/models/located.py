"""Where a model lies: which files are meant by a path, be it a file, an index, or the folder of either.

A pipeline and a distributed checkpoint of torch are folders with an order of their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from streammerge.errors import CheckpointError
from streammerge.formats.files import read_errors
from streammerge.formats.layout import OutputName, is_file_name
from streammerge.formats.pipelines import INDEX, check_alone, is_pipeline_index, pipeline_weights
from streammerge.formats.shards import find_weights, is_index, read_index
from streammerge.formats.torchzip.archive import is_torch_zip
from streammerge.models.hub import check_there, is_there

DISTRIBUTED: Final = (".metadata", "pytorch_model_fsdp_0")
"""What the folder of a distributed checkpoint of torch has in it, or Accelerate's around one."""


def components_at(path: Path) -> Mapping[str, Path] | None:
    """The weights of a pipeline's components by their names; None if neither its folder nor its index is meant."""
    with read_errors(path):
        if is_pipeline_index(path):
            return pipeline_weights(path.parent)
        if not path.is_dir():
            return None
        check_alone(path)
        return pipeline_weights(path)


def distributed_at(path: Path) -> Path | None:
    """The folder of a distributed checkpoint of torch, if one is meant."""
    with read_errors(path):
        if not any((path / name).exists() for name in DISTRIBUTED):
            return None
        from streammerge.formats.torchzip.distributed import distributed_in  # late: few models are such

        return distributed_in(path)


def weights_file(path: Path) -> Path:
    """The file that is read first: the path's own, or that of the model in the folder; an index if it has shards."""
    if index := index_at(path):
        return index
    check_there(path)
    with read_errors(path):
        return find_weights(path) if path.is_dir() else path


def known_by(path: Path) -> Path:
    """The one path of a model, by whatever folder, file or link it is named: two of the same are the same model.

    Where nothing can be read at a path it is the path itself, with links followed.
    """
    try:
        if components_at(path):
            path = path if is_pipeline_index(path) else path / INDEX
        else:
            path = distributed_at(path) or weights_file(path)
    except CheckpointError:
        pass  # whoever opens it says why
    return Path(os.path.realpath(path))


def index_at(path: Path) -> Path | None:
    """The index of the shards that a merge to `OUT.safetensors` has written, where there is no file of that name."""
    index = OutputName.of(path).index
    with read_errors(path):
        return index if is_file_name(path) and not is_there(path) and index.is_file() else None


def model_files(path: Path) -> list[Path]:
    """Every file that holds tensors of the model at this path."""
    if components := components_at(path):
        return [file for weights in components.values() for file in model_files(weights)]
    if distributed := distributed_at(path):
        from streammerge.formats.torchzip.distributed import chunk_files

        return chunk_files(distributed)
    path = weights_file(path)
    return read_index(path).shards if is_index(path) else [path]


def has_entries(path: Path) -> bool:
    """Whether there are torch files at this path, whose dicts may be chosen by name."""
    if distributed_at(path):
        return True
    heads = []
    for file in model_files(path):
        with read_errors(file), file.open("rb") as opened:
            heads.append(opened.read(4))
    return any(map(is_torch_zip, heads))
