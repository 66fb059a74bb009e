"""Hashes of files: of the output while it is written, of inputs and outputs when they are read.

Workers write windows in no particular order, and a hash wants bytes in theirs. So a thread of its own follows behind
the part of each file that is complete, and reads back what the system still has in its cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

from streammerge.compute.job import Job
from streammerge.errors import CheckpointError, OutputError
from streammerge.formats.files import read_errors
from streammerge.formats.layout import OutputFile, OutputLayout
from streammerge.formats.safetensors import is_safetensors
from streammerge.plan.inputs import OpenInputs
from streammerge.plan.plan import Plan
from streammerge.recipe.metadata import Hashes, stored_names
from streammerge.recipe.recipe import Recipe
from streammerge.storage.copying import CopyRange
from streammerge.storage.placing import name_within
from streammerge.storage.side_files import write_text
from streammerge.storage.writer import OutputWriter

BLOCK: Final = 1 << 20
"""Bytes that are read and hashed at once."""


SUFFIX: Final = ".sha256"


MAX_SIDECAR: Final = 10_000_000
"""The longest file of hashes, in bytes, that is read."""


_LINE: Final = re.compile(r"(?P<escaped>\\?)(?P<hash>[0-9a-fA-F]{64}) [ *](?P<name>.+)")


@dataclass(frozen=True, slots=True)
class FileHashes:
    """The sha256 of a whole file, and of its tensors' bytes alone (what SD tools call AutoV3 or `sshs_model_hash`)."""

    sha256: str
    tensors: str


@dataclass
class _Followed:
    """A file of the output: how far it is complete from its beginning, what is written beyond, how far it is hashed."""

    file: OutputFile
    complete: int
    beyond: list[tuple[int, int]] = field(default_factory=list)
    hashed: int = 0
    whole: hashlib._Hash = field(default_factory=hashlib.sha256)
    tensors: hashlib._Hash = field(default_factory=hashlib.sha256)

    def wrote(self, start: int, nbytes: int) -> None:
        """Bytes [start, start + nbytes) are there now."""
        heapq.heappush(self.beyond, (start, start + nbytes))
        while self.beyond and self.beyond[0][0] <= self.complete:
            self.complete = max(self.complete, heapq.heappop(self.beyond)[1])

    def update(self, data: memoryview) -> None:
        """Hash the next bytes."""
        header = max(0, self.file.header.nbytes - self.hashed)
        self.whole.update(data)
        self.tensors.update(data[header:])
        self.hashed += len(data)


class HashingWriter:
    """A sink that hands everything on to the writer, and hashes the files behind it. Use it in a `with` statement.

    `finish` hashes what is left and gives the hashes, in the order of the output's files.
    """

    def __init__(self, writer: OutputWriter) -> None:
        self.writer = writer
        self._files = [_Followed(file, file.header.nbytes) for file in writer.layout.files]
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> HashingWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def write(self, job: Job, position: int, data: memoryview) -> None:
        """Put the bytes at this position of the job's tensor."""
        self.writer.write(job, position, data)
        self._wrote([(job.file, job.offset + position, len(data))])

    def copy(self, ranges: Sequence[CopyRange]) -> None:
        """Copy these bytes of tensors from where they are stored."""
        self.writer.copy(ranges)
        self._wrote([(part.job.file, part.offset, part.nbytes) for part in ranges])

    def finish(self) -> list[FileHashes]:
        """Everything is written: the hashes."""
        self._wrote([(number, 0, followed.file.nbytes) for number, followed in enumerate(self._files)])
        self._thread.join()
        if self._error is not None:
            raise self._error
        return [FileHashes(file.whole.hexdigest(), file.tensors.hexdigest()) for file in self._files]

    def _wrote(self, parts: Sequence[tuple[int, int, int]]) -> None:
        with self._changed:
            for number, start, nbytes in parts:
                self._files[number].wrote(start, nbytes)
            self._changed.notify()

    def _follow(self) -> None:
        buffer = memoryview(bytearray(BLOCK))
        try:
            while (found := self._next()) is not None:
                number, followed, nbytes = found
                self.writer.read_file(number, followed.hashed, buffer[:nbytes])
                followed.update(buffer[:nbytes])
        except BaseException as error:
            self._error = error

    def _next(self) -> tuple[int, _Followed, int] | None:
        """A file with a block that can be hashed; waits for one. None when all is hashed, or nobody wants it."""
        with self._changed:
            while not self._stopped:
                if all(followed.hashed == followed.file.nbytes for followed in self._files):
                    return None
                for number, followed in enumerate(self._files):
                    ready = min(followed.complete - followed.hashed, BLOCK)
                    if ready == BLOCK or (ready and followed.complete == followed.file.nbytes):
                        return number, followed, ready
                self._changed.wait()
            return None


@contextlib.contextmanager
def hashing(writer: OutputWriter, *, wanted: bool) -> Iterator[OutputWriter | HashingWriter]:
    """Where blocks go: to the writer, followed by a hash if one is wanted."""
    if not wanted:
        yield writer
        return
    with HashingWriter(writer) as followed:
        yield followed


def hash_output(layout: OutputLayout) -> list[FileHashes]:
    """The hashes of an output that is in place."""
    found = []
    for file in layout.files:
        followed = _Followed(file, file.nbytes)
        for data in blocks_of(file.path):
            followed.update(data)
        found.append(FileHashes(followed.whole.hexdigest(), followed.tensors.hexdigest()))
    return found


def blocks_of(path: Path) -> Iterator[memoryview]:
    """The file's bytes from the first to the last; a block is only good until the next."""
    buffer = memoryview(bytearray(BLOCK))
    with read_errors(path), path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def file_sha256(path: Path) -> str:
    """The sha256 of a whole file."""
    hasher = hashlib.sha256()
    for data in blocks_of(path):
        hasher.update(data)
    return hasher.hexdigest()


def hashes_of(path: Path) -> FileHashes:
    """The hashes of a file; of one that is no safetensors, no hash of its tensors, which don't lie together."""
    with read_errors(path), path.open("rb") as file:
        head = file.read(9)
    left = 8 + int.from_bytes(head[:8], "little") if is_safetensors(head) else -1
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    for data in blocks_of(path):
        whole.update(data)
        tensors.update(data[max(left, 0) :])
        left -= min(left, len(data)) if left > 0 else 0
    return FileHashes(whole.hexdigest(), "" if left < 0 else tensors.hexdigest())


def sidecar_of(layout: OutputLayout) -> Path:
    """Where the hashes of an output go: beside its file, or its index; of a pipeline, beside its own index."""
    if layout.components:
        return sidecar_beside(layout.last)
    return sidecar_beside(layout.index.path.with_suffix("").with_suffix("") if layout.index else layout.files[0].path)


def sidecar_beside(path: Path) -> Path:
    """The file of hashes that belongs to a model's file, `model.safetensors` of a folder of shards."""
    return path.with_name(path.name + SUFFIX)


def stale_sidecar(layout: OutputLayout) -> str:
    """The file of hashes that lies beside an output without being of it; "" if there is none."""
    path = sidecar_of(layout)
    with contextlib.suppress(OSError):  # its name may be longer than names can be
        return str(path) if path.exists() else ""
    return ""


def check_sidecar(layout: OutputLayout, *, force: bool) -> None:
    """OutputError if the hashes would replace something that the user didn't offer."""
    path = sidecar_of(layout)
    if path.exists() and not (force and path.is_file()):
        raise OutputError(f"{path}: the file of hashes exists", advice="Use --force to replace it, or remove it.")


def write_sidecar(layout: OutputLayout, hashes: Sequence[FileHashes], *, sync: bool) -> Path:
    """Write the hashes as `sha256sum -c` reads them, whole or not at all; those of the tensors alone as comments."""
    path = sidecar_of(layout)
    write_text(path, _sidecar(layout, hashes), sync=sync)
    return path


def is_in_sidecar(layout: OutputLayout, hashes: Sequence[FileHashes]) -> bool:
    """Whether the file of hashes is there, and says just this."""
    path, text = sidecar_of(layout), _sidecar(layout, hashes).encode()
    return path.is_file() and path.stat().st_size == len(text) and path.read_bytes() == text


def _sidecar(layout: OutputLayout, hashes: Sequence[FileHashes]) -> str:
    folder = layout.folder
    files = [name_within(folder, file.path) for file in layout.files]
    lines = [_line(found.sha256, name) for name, found in zip(files, hashes, strict=True)]
    lines += [_line(file_sha256(layout.path_of(companion)), companion.name) for companion in layout.companions]
    for index in layout.indexes:
        whole = hashlib.sha256()
        for piece in index.pieces():
            whole.update(piece)
        lines.append(_line(whole.hexdigest(), name_within(folder, index.path)))
    lines += [f"# tensors alone: {found.tensors}" for found in hashes]
    return "\n".join(lines) + "\n"


def _line(found: str, name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
    return f"{'' if escaped == name else chr(92)}{found}  {escaped}"


def read_sidecar(path: Path) -> Mapping[str, str]:
    """The hashes in a file that `sha256sum` could have written, by file name; comments are passed over."""
    with read_errors(path):
        if path.stat().st_size > MAX_SIDECAR:
            raise CheckpointError(f"{path}: is longer than {MAX_SIDECAR} bytes, so it is no file of hashes")
        text = path.read_bytes().decode("utf-8", errors="replace")
    return dict(_entries(path, text))


def _entries(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(f"{path}: line {number} is no sha256 and a file's name")
        name = match["name"]
        yield re.sub(r"\\(.)", _unescaped, name) if match["escaped"] else name, match["hash"].lower()


def _unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


def input_hashes(recipe: Recipe, opened: OpenInputs) -> Hashes:
    """The sha256 of every file of every model, by the name that the recipe in the metadata has for it."""
    return {
        name: {file.path.name: file_sha256(file.path) for file in opened.opened(path).files}
        for path, name in stored_names(recipe.paths()).items()
    }


def hashes_by_file(plan: Plan, hashes: Sequence[FileHashes]) -> Mapping[str, Mapping[str, str]]:
    """The hashes of the output for its report."""
    return {
        str(file.path): {"sha256": found.sha256, "tensors": found.tensors}
        for file, found in zip(plan.output.files, hashes, strict=False)
    }
