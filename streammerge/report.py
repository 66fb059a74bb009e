"""What a finished merge has to say: as JSON for machines, as a short table for people."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from streammerge.errors import count, format_size, listed, plural
from streammerge.findings import Finding, warnings

PARTS: Final = ("plan", "merge", "sync")
"""The parts of a merge's time, in their order."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that was read, and how long it is."""

    path: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A device on which it would have been faster: so many seconds, about; and that in words."""

    device: str
    seconds: float
    words: str

    def to_json(self) -> dict[str, str | float]:
        """For machines."""
        return {"device": self.device, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a merge. Sizes are in bytes, times in seconds; `findings` are what is wrong, by tensor, `adapters`
    what became of each of them.
    `stale_hashes` is a file of hashes that is not of this output, `resumed_bytes` what an interrupted run had put on
    the disk; no `threads` were at work if that was all. `companions` are the files that lie beside the weights.
    `notes` are what was told of the models before the merge, `factored` how much of each matrix an adapter holds.

    `loops` says what computed: compiled loops, torch, or both. `baseline_rss_bytes` is what a bare `import torch`
    takes, 0 where torch was not imported.

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
    loops: str
    inputs: Sequence[InputFile]
    version: str
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    on_nonfinite: NonfinitePolicy = "warn"
    hashes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    stale_hashes: str = ""
    resumed_bytes: int = 0
    adapters: Sequence[Mapping[str, Any]] = ()
    changes: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    factored: Mapping[str, Any] = field(default_factory=dict)
    companions: Sequence[str] = ()
    notes: Sequence[str] = ()
    elsewhere: Elsewhere | None = None

    @property
    def nonfinite(self) -> Mapping[str, int]:
        """How many values are infinite or not numbers, by tensor of the output, where there are any."""
        return {name: finding.nonfinite for name, finding in self.findings.items() if finding.nonfinite}

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the documentation."""
        return {
            "output": self.output[0] if len(self.output) == 1 else list(self.output),
            "companions": list(self.companions),
            "method": self.method,
            "tensors": {
                "merged": self.merged,
                "copied": self.copied,
                "dropped": self.dropped,
                "total": self.merged + self.copied,
            },
            "left_out": {model: len(names) for model, names in self.left_out.items()},
            "notes": list(self.notes),
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
            "loops": self.loops,
            **({"adapters": list(self.adapters)} if self.adapters else {}),
            **({"factored": dict(self.factored)} if self.factored else {}),
            **({"elsewhere": self.elsewhere.to_json()} if self.elsewhere else {}),
            **({"changes": {part: dict(found) for part, found in self.changes.items()}} if self.changes else {}),
            "inputs": [{"path": file.path, "bytes": file.nbytes} for file in self.inputs],
            "hashes": {path: dict(found) for path, found in self.hashes.items()},
            "version": self.version,
        }

    def _rows_of_factors(self) -> list[tuple[str, str]]:
        """How far the factors are from what they stand for, as far as that is known."""
        error, worst = self.factored.get("error"), self.factored.get("worst")
        known = f"{self.factored['known']:,} of {len(self.factored['modules']):,}" if worst else ""
        return [("factors", f"relative error {error:.3g} in {known} modules, {worst}")] if worst else []

    def rows(self) -> list[tuple[str, str]]:
        """The short table: what was made, from how much, how fast, in how much memory."""
        more = f" … ({len(self.output)} files)" if len(self.output) > 2 else ""
        rows = [
            ("output", ", ".join(self.output[:2]) + more),
            *([("beside it", listed(_inner_names(self.companions)))] if self.companions else []),
            ("tensors", f"{self.merged:,} merged, {self.copied:,} copied, {self.dropped:,} dropped"),
            *self._rows_of_factors(),
            *((f"adapter {one['adapter']}", self._adapted(one)) for one in self.adapters),
            *([("changed by", self._changed())] if self.changes else []),
            *(self._rows_of_work() if self.threads else [("time", f"{self.seconds['total']:.1f} s")]),
        ]
        for found in self.hashes.values() if len(self.hashes) == 1 else ():
            rows += [("sha256", found["sha256"]), ("short", short_hashes(found["sha256"], found["tensors"]))]
        if self.peak_vram_bytes:
            rows.append(("peak VRAM", format_size(self.peak_vram_bytes) + " on one card" * ("," in self.device)))
        if self.elsewhere:
            rows.append(("faster", self.elsewhere.words))
        return rows

    def _rows_of_work(self) -> list[tuple[str, str]]:
        """What can be said only where something had to be done."""
        seconds = self.seconds
        moved = self.bytes_read + self.bytes_written
        moving = seconds["merge"] + seconds.get("ahead", 0.0)
        rate = moved / moving / 1e9 if moving else 0.0
        work = (*self.device.split(","), f"{self.threads} threads", self.io, self.loops)
        return [
            ("bytes", f"{format_size(self.bytes_read)} read, {format_size(self.bytes_written)} written"),
            ("time", f"{seconds['total']:.1f} s: " + ", ".join(f"{seconds[part]:.1f} {part}" for part in PARTS)),
            ("rate", f"{rate:.1f} GB/s while merging"),
            ("peak RAM", f"{format_size(self.peak_rss_bytes)}, {self._above}"),
            ("run on", ", ".join(filter(None, work))),
        ]

    def _changed(self) -> str:
        """How far each component was moved: ‖Δ‖ / ‖W‖ of the tensors that were changed."""
        return ", ".join(f"{part} {_share(found['relative'])}" for part, found in self.changes.items())

    @staticmethod
    def _adapted(account: Mapping[str, Any]) -> str:
        """How much of an adapter is in the output."""
        return f"{account['applied']:,} of {account['modules']:,} modules applied to {account['model']}"

    @property
    def _above(self) -> str:
        """How much of the peak is the merge's own."""
        if not self.baseline_rss_bytes:
            return "all of it: torch was not imported"
        return f"{format_size(max(self.peak_rss_bytes - self.baseline_rss_bytes, 0))} above import torch"

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


def _inner_names(files: Sequence[str]) -> list[str]:
    """What files are called in the folder that holds all of them."""
    paths = [Path(file) for file in files]
    folder = min((path.parent for path in paths), key=lambda parent: len(parent.parts))
    return [path.relative_to(folder).as_posix() for path in paths]


def short_hashes(sha256: str, tensors: str) -> str:
    """`AutoV2 0123456789, AutoV3 0123456789ab`: how sites for models call a file, by these hashes of it.

    AutoV2 is the first 10 digits of the whole file's sha256, AutoV3 the first 12 of that of its tensors' bytes, which
    only safetensors have apart.
    """
    return f"AutoV2 {sha256[:10]}" + (f", AutoV3 {tensors[:12]}" if tensors else "")


def dump_json(value: Any) -> str:  # noqa: ANN401
    """JSON as people like to read it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


NonfinitePolicy = Literal["error", "warn", "ignore"]


@dataclass
class Progress:
    """What has been done so far; read by whoever shows it, while the workers add to it.

    `stage` says what is being done where it is not the main thing yet.
    """

    total_bytes: int = 0
    done_bytes: int = 0
    stage: str = ""
    bytes_read: int = 0
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
        """So many bytes are done, for which so many were read. May be called from any thread."""
        with self.lock:
            self.done_bytes += nbytes
            self.bytes_read += read


def _share(share: float | None) -> str:
    return "by values that are no numbers" if share is None else f"{share:.2%}"


Watch = Callable[[Progress], None]
"""Called from time to time, with what has been done so far."""


Measuring = Callable[[], AbstractContextManager[Watch | None]]
"""Shows how far it is with what has to be measured before there is a plan."""
