"""What a merge has done so far: counted by those who do it, read by whoever shows it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from streammerge.findings import Finding


@dataclass
class Progress:
    """What has been done so far; read by whoever shows it, while the workers add to it.

    `stage` says what is being done where it is not the main thing yet.
    """

    total_bytes: int = 0
    done_bytes: int = 0
    stage: str = ""
    bytes_read: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextlib.contextmanager
    def doing(self, stage: str, total_bytes: int) -> Iterator[None]:
        """For as long as the `with` statement lasts, this is what is done, and there is so much of it."""
        before = self.total_bytes, self.done_bytes
        self.stage, self.total_bytes, self.done_bytes = stage, total_bytes, 0
        try:
            yield
        finally:
            self.stage, (self.total_bytes, self.done_bytes) = "", before

    def advance(self, nbytes: int, *, read: int = 0) -> None:
        """So many bytes of the output are done, for which so many were read."""
        with self.lock:
            self.done_bytes += nbytes
            self.bytes_read += read

    def found(self, name: str, finding: Finding) -> None:
        """Something was found in a block of this tensor."""
        with self.lock:
            self.findings.setdefault(name, Finding()).add(finding)
