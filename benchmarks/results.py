"""What was measured, as it is kept: one JSON file for each case."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.checking import Verdict
from benchmarks.limits import Limit
from streammerge.tools.bench.floor import Floor
from streammerge.tools.bench.measuring import Measured, Sample

FOLDER: Final = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One run of one tool: its round, what the process cost, the seconds of the merge loop if it told them (else 0).

    `own` is streammerge's own report of it, as far as the figures are not here already. `failure` says why it failed.
    """

    round: int
    process: Measured
    loop: float = 0.0
    own: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


@dataclass
class ToolResult:
    """Everything about one tool in one case."""

    name: str
    title: str
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    skipped: str = ""
    check: Verdict | None = None
    warm: list[Run] = field(default_factory=list)
    cold: list[Run] = field(default_factory=list)
    limit: Limit | None = None
    limit_note: str = ""

    @property
    def failure(self) -> str:
        """Why it failed, if it did."""
        return next((run.failure for run in (*self.warm, *self.cold) if run.failure), "")

    def good(self, condition: str = "warm") -> list[Run]:
        """The runs that came to their end."""
        return [run for run in (self.warm if condition == "warm" else self.cold) if not run.failure]


@dataclass
class CaseResult:
    """Everything about one case. `floors` has a list for every warm round; `disk_rates` one rate for every cold one.

    `remark` is what whoever measured has to say of it, such as that the machine was busy with other work.
    """

    name: str
    title: str
    date: str
    commit: str
    version: str
    quick: bool
    machine: Mapping[str, str]
    input_bytes: int = 0
    output_bytes: int = 0
    import_torch_rss: int = 0
    disk_write_rate: float = 0.0
    disk_read_rate: float = 0.0
    floors: list[list[Floor]] = field(default_factory=list)
    disk_rates: list[float] = field(default_factory=list)
    cold_note: str = ""
    skipped: str = ""
    took: float = 0.0
    complete: bool = False
    remark: str = ""
    tools: list[ToolResult] = field(default_factory=list)

    def tool(self, name: str) -> ToolResult | None:
        """One tool's results."""
        return next((tool for tool in self.tools if tool.name == name), None)

    def floor(self, number: int) -> float:
        """The seconds of the floor in a round: the mean of all that were measured in it."""
        found = self.floors[number]
        return sum(floor.seconds for floor in found) / len(found)


def save(result: CaseResult, folder: Path = FOLDER) -> Path:
    """Write the file of a case; it is never half there."""
    return write_json(to_json(result), folder / f"{result.name}.json")


def write_json(values: dict[str, Any], path: Path) -> Path:
    """Write a file of JSON that people can read, under another name until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(in_lines(values), encoding="utf-8")
    unfinished.replace(path)
    return path


def to_json(result: CaseResult) -> dict[str, Any]:
    """Plain values; curves are kept of one warm run of each tool, the one in the middle."""
    values = asdict(result)
    for tool, kept in zip(values["tools"], result.tools, strict=True):
        middle = median_run(kept.good())
        for condition in ("warm", "cold"):
            for run, whole in zip(tool[condition], kept.warm if condition == "warm" else kept.cold, strict=True):
                samples = whole.process.curve if whole is middle else ()
                run["process"]["curve"] = [[one.seconds, one.resident, one.anonymous] for one in samples]
    return values


def in_lines(values: dict[str, Any]) -> str:
    """JSON that can be read, with lists of numbers in one line."""
    text = json.dumps(values, indent=1) + "\n"
    lists = re.compile(r"\[\s+(-?\d[-\d.e,\s]*?)\s+\]")
    return lists.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)


def median_run(runs: list[Run]) -> Run | None:
    """The run whose time is in the middle."""
    return sorted(runs, key=lambda run: run.process.wall)[len(runs) // 2] if runs else None


def load(path: Path) -> CaseResult:
    """The results of a case."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["floors"] = [[Floor(**floor) for floor in floors] for floors in values["floors"]]
    values["tools"] = [_tool(tool) for tool in values["tools"]]
    return CaseResult(**values)


def _tool(values: dict[str, Any]) -> ToolResult:
    values["check"] = Verdict(**values["check"]) if values["check"] else None
    values["limit"] = Limit(**values["limit"]) if values["limit"] else None
    for condition in ("warm", "cold"):
        values[condition] = [_run(run) for run in values[condition]]
    return ToolResult(**values)


def _run(values: dict[str, Any]) -> Run:
    process = values["process"]
    process["curve"] = tuple(Sample(*point) for point in process["curve"])
    values["process"] = Measured(**process)
    return Run(**values)


def load_all(names: list[str], folder: Path = FOLDER) -> Iterator[CaseResult]:
    """The results of those cases that there are results of."""
    for name in names:
        if (path := folder / f"{name}.json").exists():
            yield load(path)


def commit() -> str:
    """The commit that is measured, with a + if files were changed since."""
    try:
        words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
