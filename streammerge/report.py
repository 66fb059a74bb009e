"""What a finished merge has to say: as JSON for machines, as a short table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from streammerge.formats.files import ByteFile
from streammerge.options import format_size

PARTS: Final = ("plan", "merge", "sync")
"""The parts of a merge's time, in their order."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a merge. Sizes are in bytes, times in seconds; `nonfinite` counts bad values per merged tensor.
    `resumed_bytes` is what an interrupted run had put on the disk.

    Of the seconds, `plan` is all before the workers begin, `import torch` included, and `ahead` is how long of it
    tensors were being copied already.
    """

    output: Sequence[str]
    method: str
    merged: int
    copied: int
    dropped: int
    nonfinite: Mapping[str, int]
    bytes_read: int
    bytes_written: int
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    baseline_rss_bytes: int
    peak_vram_bytes: int
    device: str
    dtype: Sequence[str]
    threads: int
    io: str
    inputs: Sequence[ByteFile]
    version: str
    left_out: Mapping[str, int] = field(default_factory=dict)
    resumed_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the documentation."""
        return {
            "output": self.output[0] if len(self.output) == 1 else list(self.output),
            "method": self.method,
            "tensors": {
                "merged": self.merged,
                "copied": self.copied,
                "dropped": self.dropped,
                "total": self.merged + self.copied,
            },
            "left_out": dict(self.left_out),
            "nonfinite": sum(self.nonfinite.values()),
            "nonfinite_tensors": dict(self.nonfinite),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "resumed_bytes": self.resumed_bytes,
            "seconds": {name: round(value, 6) for name, value in self.seconds.items()},
            "peak_rss_bytes": self.peak_rss_bytes,
            "baseline_rss_bytes": self.baseline_rss_bytes,
            "peak_vram_bytes": self.peak_vram_bytes,
            "device": self.device,
            "dtype": "+".join(self.dtype),
            "threads": self.threads,
            "io": self.io,
            "inputs": [{"path": str(file.path), "bytes": file.nbytes} for file in self.inputs],
            "version": self.version,
        }

    def rows(self) -> list[tuple[str, str]]:
        """The short table: what was made, from how much, how fast, in how much memory."""
        seconds = self.seconds
        moved = self.bytes_read + self.bytes_written
        moving = seconds["merge"] + seconds.get("ahead", 0.0)
        rate = moved / moving / 1e9 if moving else 0.0
        above = self.peak_rss_bytes - self.baseline_rss_bytes
        rows = [
            ("output", ", ".join(self.output[:2]) + (f" … ({len(self.output)} files)" if len(self.output) > 2 else "")),
            ("tensors", f"{self.merged:,} merged, {self.copied:,} copied, {self.dropped:,} dropped"),
            ("bytes", f"{format_size(self.bytes_read)} read, {format_size(self.bytes_written)} written"),
            ("time", f"{seconds['total']:.1f} s: " + ", ".join(f"{seconds[part]:.1f} {part}" for part in PARTS)),
            ("rate", f"{rate:.1f} GB/s while merging"),
            ("peak RAM", f"{format_size(self.peak_rss_bytes)}, {format_size(max(above, 0))} above import torch"),
            ("run on", f"{self.device}, {self.threads} threads, {self.io}"),
        ]
        if self.peak_vram_bytes:
            rows.append(("peak VRAM", format_size(self.peak_vram_bytes)))
        return rows

    def warnings(self) -> list[str]:
        """What the user should look at."""
        found = [
            f"{model}: {count:,} tensors that the layout does not have were left out"
            for model, count in self.left_out.items()
        ]
        if self.nonfinite:
            worst = ", ".join(f"{name} ({count:,})" for name, count in list(self.nonfinite.items())[:3])
            values, more = sum(self.nonfinite.values()), " …" if len(self.nonfinite) > 3 else ""
            found.append(f"{values:,} values are infinite or not numbers: {worst}{more}")
        return found
