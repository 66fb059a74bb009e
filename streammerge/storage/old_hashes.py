"""Hashes that tools for Stable Diffusion have known files by: A1111's first, of 64 KiB of a file, and kohya's.

What sites call AutoV2 and AutoV3 is the beginning of other hashes, which `hashing` has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from streammerge.formats.files import read_errors
from streammerge.formats.safetensors import Header, build_header, read_header
from streammerge.storage.hashing import hashes_of

START: Final = 0x100000
LENGTH: Final = 0x10000
"""What of a file is looked at."""


def old_short_hash(path: Path) -> str:
    """A1111's first short hash of a file, 8 digits, which files share that are the same in that place."""
    with read_errors(path), path.open("rb") as file:
        file.seek(START)
        return hashlib.sha256(file.read(LENGTH)).hexdigest()[:8]


def kohya_hashes(path: Path) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a file of safetensors, as kohya's trainers write them into adapters.

    The first is the sha256 of the tensors' bytes. The second is A1111's first short hash of the file as it would be
    with no metadata but what training wrote (`ss_…`), so that others may be changed. (kohya's `train_util.py`.)
    """
    with read_errors(path):
        header = read_header(path, path.stat().st_size)
        legacy = hashlib.sha256(b"".join(_looked_at(path, header))).hexdigest()[:8]
    return {"sshs_model_hash": hashes_of(path).tensors, "sshs_legacy_hash": legacy}


def _looked_at(path: Path, header: Header) -> Iterator[bytes]:
    """What would lie in that place: tensors in the order of the format's library, behind a header of its own."""
    trained = {key: text for key, text in header.metadata.items() if key.startswith("ss_")}
    made = build_header(header.tensors, trained)
    if made.nbytes > START:
        yield made.encoded[START : START + LENGTH]
    with path.open("rb") as file:
        for name, info, start in zip(made.names, made.infos, made.starts, strict=True):
            first, last = max(start, START), min(start + info.nbytes, START + LENGTH)
            if first < last:
                file.seek(header.offsets[name] + first - start)
                yield file.read(last - first)
