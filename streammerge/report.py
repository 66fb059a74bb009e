"""What a finished merge has to say: as JSON for machines, as a short table for people."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from streammerge.errors import OutputError, count, format_size, listed, plural

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


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a merge. Sizes are in bytes, times in seconds; `findings` are what is wrong, by tensor, `adapters`
    what became of each of them.
    `stale_hashes` is a file of hashes that is not of this output, `resumed_bytes` what an interrupted run had put on
    the disk; no `threads` were at work if that was all. `companions` are the files that lie beside the weights.
    `notes` are what was told of the models before the merge.

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
            **({"elsewhere": self._elsewhere} if self.elsewhere else {}),
            "inputs": [{"path": file.path, "bytes": file.nbytes} for file in self.inputs],
            "hashes": {path: dict(found) for path, found in self.hashes.items()},
            "version": self.version,
        }

    def rows(self) -> list[tuple[str, str]]:
        """The short table: what was made, from how much, how fast, in how much memory."""
        more = f" … ({len(self.output)} files)" if len(self.output) > 2 else ""
        rows = [
            ("output", ", ".join(self.output[:2]) + more),
            *([("beside it", listed(_inner_names(self.companions)))] if self.companions else []),
            ("tensors", f"{self.merged:,} merged, {self.copied:,} copied, {self.dropped:,} dropped"),
            *((f"adapter {one['adapter']}", self._adapted(one)) for one in self.adapters),
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
        return [
            ("bytes", f"{format_size(self.bytes_read)} read, {format_size(self.bytes_written)} written"),
            ("time", f"{seconds['total']:.1f} s: " + ", ".join(f"{seconds[part]:.1f} {part}" for part in PARTS)),
            ("rate", f"{rate:.1f} GB/s while merging"),
            ("peak RAM", f"{format_size(self.peak_rss_bytes)}, {self._above}"),
            ("run on", ", ".join(filter(None, (self._cards, f"{self.threads} threads", self.io, self.loops)))),
        ]

    @property
    def _elsewhere(self) -> dict[str, str | float]:
        assert self.elsewhere is not None
        return {"device": self.elsewhere.device, "seconds": round(self.elsewhere.seconds, 3)}

    @property
    def _cards(self) -> str:
        """The device, or several of them: `cuda:0 + cuda:1`."""
        return self.device.replace(",", " + ")

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


NAMED: Final = 3
"""How many tensors a warning names."""


@dataclass
class Finding:
    """What was found in one tensor of the output.

    `nonfinite` elements are stored as infinite or not a number. `overflowed` ones of them were finite until they were
    rounded to `dtype`, whose greatest value is `limit`; `saturated` ones lay beyond it too, and became it. `largest` is
    the greatest finite magnitude before rounding. `inputs` counts, by file, what was infinite or no number already.
    Of weights that had scales, and are stored without, `vanished` counts what became 0 though it was not; `elements` is
    how many the tensor has.
    """

    nonfinite: int = 0
    overflowed: int = 0
    saturated: int = 0
    vanished: int = 0
    elements: int = 0
    largest: float = 0.0
    dtype: str = ""
    limit: float = 0.0
    inputs: dict[str, int] = field(default_factory=dict)

    def add(self, other: Finding) -> None:
        """Take in what was found in another block of the tensor."""
        self.nonfinite += other.nonfinite
        self.overflowed += other.overflowed
        self.saturated += other.saturated
        self.vanished += other.vanished
        self.elements = max(self.elements, other.elements)
        self.largest = max(self.largest, other.largest)
        self.dtype, self.limit = self.dtype or other.dtype, self.limit or other.limit
        for path, values in other.inputs.items():
            self.inputs[path] = self.inputs.get(path, 0) + values

    @property
    def is_refused(self) -> bool:
        """Whether there are values, in the output or in an input, that are no finite numbers."""
        return bool(self.nonfinite or self.inputs)

    @property
    def is_any(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.nonfinite or self.saturated or self.vanished or self.inputs)

    @property
    def lost(self) -> int:
        """How many values of weights that had scales are none that the dtype has near them."""
        return self.vanished + self.saturated + self.overflowed if self.elements else 0

    @property
    def made(self) -> int:
        """How many non-finite values the arithmetic made of finite inputs."""
        return 0 if self.inputs else self.nonfinite - self.overflowed

    def __str__(self) -> str:
        causes = [f"{values:,} in {path}" for path, values in sorted(self.inputs.items())]
        if self.overflowed:
            causes.append(
                f"{self.overflowed:,} overflowed {self.dtype}: up to {self.largest:.6g}, it holds {self.limit:.6g}"
            )
        if self.made:
            causes.append(f"{self.made:,} made by the merge of finite values")
        return f"{self.nonfinite:,} in the output ({'; '.join(causes)})"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "nonfinite": self.nonfinite,
            "overflowed": self.overflowed,
            "saturated": self.saturated,
            "vanished": self.vanished,
            "elements": self.elements,
            "largest": float(self.largest),
            "dtype": self.dtype,
            "limit": float(self.limit),
            "inputs": dict(sorted(self.inputs.items())),
        }


def refuse_nonfinite(findings: Mapping[str, Finding]) -> None:
    """OutputError that names the tensors with values that are no finite numbers, and says why, if there are any."""
    refused = {name: finding for name, finding in sorted(findings.items()) if finding.is_refused}
    if refused:
        raise OutputError(
            f"{_tensors(refused)} values that are infinite or not numbers",
            found=[f"{name}   {finding}" for name, finding in refused.items()],
            advice=_advice(refused.values()),
        )


def _tensors(refused: Mapping[str, Finding]) -> str:
    return "1 tensor has" if len(refused) == 1 else f"{len(refused):,} tensors have"


def _advice(refused: Iterable[Finding]) -> str:
    ways = ["Use --on-nonfinite warn to write them all the same."]
    if any(finding.overflowed for finding in refused):
        ways.insert(0, "Store what overflowed as bf16 or fp32 (--dtype).")
    return " ".join(ways)


def warnings(findings: Mapping[str, Finding]) -> list[str]:
    """One sentence for each thing that the user should look at, with the tensors' names."""
    found = dict(sorted(findings.items()))
    shown = []
    if bad := _counts(found, "nonfinite"):
        shown.append(f"{_values(bad)} infinite or not numbers: {named(bad)}")
    shown += [f"{path} holds {_plain(bad)} infinite or not numbers: {named(bad)}" for path, bad in _by_input(found)]
    if made := _counts(found, "made"):
        shown.append(f"{_values(made)} made so by the merge itself, of finite ones: {named(made)}")
    for dtype in sorted({finding.dtype for finding in found.values() if finding.dtype}):
        shown += _beyond(dtype, {name: finding for name, finding in found.items() if finding.dtype == dtype})
    return shown


def _beyond(dtype: str, found: Mapping[str, Finding]) -> list[str]:
    """What lay beyond the range of the dtype in which it is stored, or was too small for it."""
    limit, largest = (max(getattr(finding, name) for finding in found.values()) for name in ("limit", "largest"))
    reason = f"it holds {limit:,.6g} at the most, the largest value is {largest:,.6g}"
    shown = []
    if overflowed := _counts(found, "overflowed"):
        ways = "bf16 or fp32" if limit < 1e38 else "a wider dtype"
        shown.append(f"{_values(overflowed)} overflow of {dtype} ({reason}); store them as {ways}: {named(overflowed)}")
    if saturated := _counts(found, "saturated"):
        shown.append(f"{_values(saturated)} cut to the range of {dtype} ({reason}): {named(saturated)}")
    if lost := _counts(found, "lost"):
        elements = sum(found[name].elements for name in lost)
        shown.append(
            f"{sum(lost.values()):,} of {elements:,} values ({sum(lost.values()) / elements:.1%}) of weights that had "
            f"scales became 0 or were cut in {dtype}, which is stored without; store them as bf16: {named(lost)}"
        )
    return shown


def _by_input(found: Mapping[str, Finding]) -> list[tuple[str, dict[str, int]]]:
    """Every input file that had non-finite values, and how many by tensor."""
    paths = sorted({path for finding in found.values() for path in finding.inputs})
    return [
        (path, {name: finding.inputs[path] for name, finding in found.items() if path in finding.inputs})
        for path in paths
    ]


def _counts(found: Mapping[str, Finding], what: str) -> dict[str, int]:
    return {name: number for name, finding in found.items() if (number := getattr(finding, what))}


def _plain(counts: Mapping[str, int]) -> str:
    values = sum(counts.values())
    return f"{values:,} value that is" if values == 1 else f"{values:,} values that are"


def _values(counts: Mapping[str, int]) -> str:
    values = sum(counts.values())
    return f"{values:,} value is" if values == 1 else f"{values:,} values are"


def named(counts: Mapping[str, int]) -> str:
    """`x (2), y (1)`: the first few tensors, with how many values of each."""
    first = ", ".join(f"{name} ({number:,})" for name, number in list(counts.items())[:NAMED])
    return first + (f" and {len(counts) - NAMED:,} more tensors" if len(counts) > NAMED else "")


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


Watch = Callable[[Progress], None]
"""Called from time to time, with what has been done so far."""
