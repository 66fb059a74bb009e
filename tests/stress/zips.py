"""Torch zips and pickles by the hundred thousand: read without being run, or refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

from streammerge.formats.torchzip.archive import read_torch_zip
from streammerge.formats.torchzip.pickles import describe_pickle
from tests.stress.campaign import Campaign, Effort, Figure
from tests.stress.fuzzing import Fuzzer, WrongAnswerError, fuzz
from tests.stress.zip_inputs import pickles, torch_zips

_LOCAL_HEADER: Final = 30


def read_zip(path: Path, data: bytes) -> str:
    """What is found lies in the storage where Python's `zipfile` finds it, too."""
    found = read_torch_zip(path)
    if any(name.encode("utf-8", "replace").decode() != name for name in found.tensors):
        raise WrongAnswerError("a tensor has a name that is no text")
    stored = _places(path, data)
    for name, view in found.tensors.items():
        start, stop = view.storage_start, view.storage_start + view.storage_nbytes
        if not any(first <= start <= stop <= last for first, last in stored):
            raise WrongAnswerError(f"{name!r} lies at {start} to {stop}, and no storage does")
    return "accepted"


def _places(path: Path, data: bytes) -> list[tuple[int, int]]:
    """The first and last byte of every storage by the library's account."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if "/data/" in member.filename]
    places = []
    for member in members:
        at = member.header_offset
        lengths = int.from_bytes(data[at + 26 : at + 28], "little") + int.from_bytes(data[at + 28 : at + 30], "little")
        start = at + _LOCAL_HEADER + lengths
        places.append((start, start + member.file_size))
    return places


def read_pickle(path: Path, data: bytes) -> str:
    """It is described; nothing of it is run."""
    return "described as " + type(describe_pickle(data, str(path))).__name__


ZIPS: Final = Fuzzer("x.ckpt", torch_zips, read_zip)
PICKLES: Final = Fuzzer("x.pkl", pickles, read_pickle)


def run(effort: Effort) -> list[Figure]:
    """A hundred thousand of each."""
    return [
        fuzz(__name__, "ZIPS", "fuzzed torch zips", 100_000, effort),
        fuzz(__name__, "PICKLES", "fuzzed pickles", 100_000, effort),
    ]


CAMPAIGN: Final = Campaign("zips", "Torch zips and pickles made to do harm", run)
