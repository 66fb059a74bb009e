"""What a finished merge has to say: as JSON for machines, as a short table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from streammerge.errors import count, listed, plural
from streammerge.findings import Finding, NonfinitePolicy, warnings
from streammerge.formats.files import ByteFile
from streammerge.recipe.options import format_size

PARTS: Final = ("plan", "merge", "sync")
"""The parts of a merge's time, in their order."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a merge. Sizes are in bytes, times in seconds; `findings` are what is wrong, by tensor.
    `stale_hashes` is a file of hashes that is not of this output, `resumed_bytes` what an interrupted run had put on
    the disk.

    Of the seconds, `plan` is all before the workers begin, `import torch` included, and `ahead` is how long of it
    tensors were being copied already.
    """

    output: Sequence[str]
    method: str
    merged: int
    copied: int
    dropped: int
    findings: Mapping[str, Finding]
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
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    on_nonfinite: NonfinitePolicy = "warn"
    hashes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    stale_hashes: str = ""
    resumed_bytes: int = 0

    @property
    def nonfinite(self) -> Mapping[str, int]:
        """How many values are infinite or not numbers, by tensor of the output, where there are any."""
        return {name: finding.nonfinite for name, finding in self.findings.items() if finding.nonfinite}

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
            "left_out": {model: len(names) for model, names in self.left_out.items()},
            "nonfinite": sum(self.nonfinite.values()),
            "nonfinite_tensors": dict(self.nonfinite),
            "findings": {name: finding.to_json() for name, finding in self.findings.items()},
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
            "hashes": {path: dict(found) for path, found in self.hashes.items()},
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
        rows += [("sha256", found["sha256"]) for found in list(self.hashes.values())[:1] if len(self.hashes) == 1]
        if self.peak_vram_bytes:
            rows.append(("peak VRAM", format_size(self.peak_vram_bytes)))
        return rows

    def warnings(self) -> list[str]:
        """What the user should look at."""
        found = [
            f"{model}: {count(names, 'tensor')} that the layout does not have {plural(names, 'was', 'were')} left out: "
            f"{listed(names)}"
            for model, names in self.left_out.items()
        ]
        if self.stale_hashes:
            found.append(
                f"{self.stale_hashes} holds the hashes of the output that was replaced; --hash replaces it too"
            )
        return found if self.on_nonfinite == "ignore" else [*found, *warnings(self.findings)]
