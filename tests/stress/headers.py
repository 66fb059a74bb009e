"""Safetensors headers by the million, read by us and by the format's own library: one verdict, or a stricter one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, deserialize

from streammerge.errors import CheckpointError
from streammerge.formats.safetensors import Header, read_header
from streammerge.models.checkpoints import open_model
from streammerge.tools.inspection import inspect_model, render
from tests.stress.campaign import Campaign, Effort, Figure
from tests.stress.fuzzing import Fuzzer, WrongAnswerError, fuzz, is_printable
from tests.stress.header_inputs import header_files

STRICTER: Final = (
    "is not a JSON object",  # space before it: the format says that a header starts with {
    "twice",  # a name, or a key of the metadata: which of the two is meant?
    "__metadata__ is not a map",  # null
    "and nothing else",  # keys that mean nothing, an entry that is a list
    "unknown dtype",  # a map where the name should be
    "not a list of sizes",  # a size past 2**63 beside one of 0
    "no size",  # more than 20 digits in what means nothing
    "are read at most",  # a name, an entry or the header is longer than any writer makes it
    "which is no JSON number",
)
"""Why we refuse what the library takes: each is no file that any writer makes, and most mean two things."""


def read(path: Path, data: bytes) -> str:
    """Our verdict and the library's, which must agree, or ours be stricter for a reason that is listed."""
    theirs = _library(data)
    try:
        header = read_header(path, len(data))
    except CheckpointError as error:
        if theirs is not None and not (any(reason in error.what for reason in STRICTER) or _says_twice(data)):
            raise WrongAnswerError(f"the library accepts it, and we don't: {error.what}") from None
        if theirs is not None and not is_printable(str(error)):
            raise WrongAnswerError("the error holds terminal codes") from None
        if theirs is None:
            raise
        return "refused though the library takes it"
    if theirs is None:
        raise WrongAnswerError("the library refuses it, and we don't")
    _compare(header, theirs, data)
    if data[8:9] == b"{":
        _show(path)
    return "accepted"


def _says_twice(data: bytes) -> bool:
    """Whether some name stands twice, of which the library reads the last, and may never look at the first."""
    twice = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        twice = twice or len(dict(pairs)) < len(pairs)
        return dict(pairs)

    length = int.from_bytes(data[:8], "little")
    json.loads(data[8 : 8 + length], object_pairs_hook=look)
    return twice


def _library(data: bytes) -> dict[str, Any] | None:
    """What the library finds, None if it refuses."""
    try:
        found = deserialize(data)
    except SafetensorError:
        return None
    return dict(found)


def _compare(header: Header, theirs: dict[str, Any], data: bytes) -> None:
    if header.tensors.keys() != theirs.keys():
        raise WrongAnswerError(f"the library finds {sorted(theirs)}, we find {sorted(header.tensors)}")
    for name, info in header.tensors.items():
        start = header.offsets[name]
        ours = (info.dtype.name, list(info.shape), data[start : start + info.nbytes])
        if ours != (theirs[name]["dtype"], list(theirs[name]["shape"]), bytes(theirs[name]["data"])):
            raise WrongAnswerError(f"the library reads {name!r} otherwise")


def _show(path: Path) -> None:
    """`inspect` shows it, and no terminal is led astray."""
    with open_model(path) as model:
        inspection = inspect_model(
            model.tensors, path=path, nbytes=model.nbytes, metadata=model.metadata, container=model.container
        )
    if not is_printable(render(inspection, tensors=True)):
        raise WrongAnswerError("inspect shows terminal codes")


HEADERS: Final = Fuzzer("x.safetensors", header_files, read)


def run(effort: Effort) -> list[Figure]:
    """A million headers."""
    return [fuzz(__name__, "HEADERS", "fuzzed safetensors headers", 1_000_000, effort)]


CAMPAIGN: Final = Campaign("headers", "A million safetensors headers, against the format's own library", run)
