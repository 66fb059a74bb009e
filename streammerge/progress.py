"""What a merge has done so far: counted by those who do it, read by whoever shows it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass
class Progress:
    """What has been done so far; read by whoever shows it, while the workers add to it."""

    total_bytes: int = 0
    done_bytes: int = 0
    bytes_read: int = 0
    nonfinite: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def advance(self, nbytes: int, *, read: int = 0) -> None:
        """So many bytes of the output are done, for which so many were read."""
        with self.lock:
            self.done_bytes += nbytes
            self.bytes_read += read

    def found_nonfinite(self, name: str, values: int) -> None:
        """A block of this tensor holds values that are infinite or not numbers."""
        with self.lock:
            self.nonfinite[name] = self.nonfinite.get(name, 0) + values
