"""Runs one case: rounds in which the floor and every tool take turns, warm and cold, then the smallest memory."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks import environments, inputs, own, results
from benchmarks.cases import Case
from benchmarks.checking import Request, Verdict
from benchmarks.groups import memory_group
from benchmarks.limits import Limit, Search
from benchmarks.results import CaseResult, Run, ToolResult
from benchmarks.tools import CannotRun, Command, Job, Tool
from streammerge import __version__
from streammerge.compute.machine import MIB
from streammerge.tools.bench.benchmark import describe_machine
from streammerge.tools.bench.floor import Floor, chill, measure_floor, probe_disk, read_rate_uncached, settle, warm
from streammerge.tools.bench.measuring import Measured, Surroundings, import_torch_rss, measure

Condition = Literal["warm", "cold"]
Say = Callable[[str], None]

CHECKED: Final = ("linear", "task_arithmetic", "slerp", "ties", "bake")
"""The methods that the checker knows a reference for."""

PATIENCE: Final = 4.0
"""How many times as long as without a limit a run may take in little memory; and some seconds more."""

CHECK_SECONDS: Final = 300.0


@dataclass(frozen=True)
class Settings:
    """How to measure. Seconds: `budget` for one tool's warm runs of a case, a part of it for cold ones and for the
    search of the smallest memory; `timeout` for one run."""

    folder: Path
    runs: int = 5
    budget: float = 90.0
    timeout: float = 600.0
    quick: bool = False
    cold: bool = True
    limits: bool = True
    install: bool = True
    keep: bool = False
    remark: str = ""
    results: Path = results.FOLDER


@dataclass
class Contestant:
    """A tool that runs a case: its interpreter, its results so far, the seconds it has used."""

    tool: Tool
    python: Path
    result: ToolResult
    variant: str = ""
    used: dict[Condition, float] = field(default_factory=lambda: {"warm": 0.0, "cold": 0.0})
    last: dict[Condition, float] = field(default_factory=lambda: {"warm": 0.0, "cold": 0.0})

    @property
    def is_own(self) -> bool:
        """Whether it is streammerge."""
        return self.tool.name.startswith(own.NAME)

    def may_run(self, condition: Condition, budget: float) -> bool:
        """Whether there is time for one more run, and a point in it: it has not failed. The first is always allowed."""
        if self.result.skipped or self.result.failure:
            return False
        return not self.used[condition] or self.used[condition] + self.last[condition] <= budget


class CaseRunner:
    """Measures one case, and saves what it has after every part."""

    def __init__(self, case: Case, tools: Sequence[Tool], settings: Settings, say: Say) -> None:
        self.case, self.tools, self.settings, self.say = case, tools, settings, say
        self.work = settings.folder / "work"
        self.started = time.monotonic()
        self.contestants: list[Contestant] = []
        self.models: dict[str, Path] = {}
        self.result = CaseResult(
            case.name,
            case.title,
            date.today().isoformat(),
            results.commit(),
            __version__,
            settings.quick,
            describe_machine(),
            remark=settings.remark,
        )

    def run(self) -> CaseResult:
        """Everything, in order. What fails in one tool does not stop the others."""
        try:
            self.prepare()
            self.warm_rounds()
            self.save()
            if self.settings.cold:
                self.cold_rounds()
                self.save()
            if self.settings.limits:
                self.smallest_memory()
            self.result.complete = True
        except CannotRun as reason:
            self.result.skipped = str(reason)
            self.result.complete = True
        finally:
            self.save()
            shutil.rmtree(self.work, ignore_errors=True)
        return self.result

    def save(self) -> None:
        """Keep what there is."""
        self.result.took = time.monotonic() - self.started
        results.save(self.result, self.settings.results)

    def prepare(self) -> None:
        """Inputs and environments."""
        self.check_room()
        self.say("making the inputs")
        self.models = inputs.find_or_make(self.case, self.settings.folder, quick=self.settings.quick)
        self.result.input_bytes = size(self.inputs)
        self.result.output_bytes = size(self.like_output)
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.result.import_torch_rss = import_torch_rss()
        probe = probe_disk(self.work, 8 * MIB if self.settings.quick else 512 * MIB)
        self.result.disk_write_rate, self.result.disk_read_rate = probe.write, probe.read
        self.contestants = [self.contestant(tool) for tool in self.tools]
        if not self.settings.quick:
            for python in {contestant.python for contestant in self.contestants}:
                environments.warm_libraries(python)
        self.result.tools = [contestant.result for contestant in self.contestants]

    def check_room(self) -> None:
        """CannotRun unless inputs and two outputs fit the disk: the floor's copy, and what a tool leaves behind."""
        chosen = inputs.SETS[self.case.input_set]
        made = inputs.set_folder(self.case, self.settings.folder, quick=self.settings.quick)
        total = chosen.nbytes(quick=self.settings.quick)
        each = total // len(chosen.tensors(self.settings.quick))
        needed = 3 * each + (0 if (made / inputs.COMPLETE).exists() else total)
        self.settings.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.settings.folder).free
        if needed > free:
            raise CannotRun(f"it takes {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")

    def contestant(self, tool: Tool) -> Contestant:
        """The tool in its environment; if it can't run, the reason is its result."""
        result = ToolResult(tool.name, tool.title)
        variant = tool.name.partition(":")[2]
        try:
            self.say(f"environment of {tool.name}")
            python = environments.python_of(tool, self.settings.folder, install=self.settings.install)
            with self.job(tool, python) as job:
                result.note = tool.command(job).note
            result.versions = environments.versions(python, tool.packages)
        except CannotRun as reason:
            python, result.skipped = Path(sys.executable), str(reason)
        return Contestant(tool, python, result, variant)

    @property
    def inputs(self) -> list[Path]:
        """Every file that the case's merge has to do with."""
        return [file for role in self.case.merge.roles for file in inputs.files_of(self.models[role])]

    @property
    def like_output(self) -> list[Path]:
        """Files as large as the output's: those of the model that gives the layout."""
        return inputs.files_of(self.models[self.case.layout])

    @property
    def rounds(self) -> int:
        """How many rounds there are, where every tool has the time."""
        return min(self.settings.runs, self.case.rounds or self.settings.runs)

    def warm_rounds(self) -> None:
        """Rounds of floor, streammerge and its variants, floor, and the peers."""
        ours = [contestant for contestant in self.contestants if contestant.is_own]
        peers = [contestant for contestant in self.contestants if not contestant.is_own]
        for number in range(self.rounds):
            running = [one for one in (*ours, *peers) if one.may_run("warm", self.settings.budget)]
            if not running:
                break
            self.result.floors.append([self.floor()])
            self.turns("warm", [one for one in running if one.is_own], number)
            self.result.floors[-1].append(self.floor())
            self.turns("warm", [one for one in running if not one.is_own], number)

    def cold_rounds(self) -> None:
        """The same with the inputs out of the page cache, between readings of the disk's own rate."""
        names = {own.NAME} if not self.case.thorough else {tool.name for tool in self.tools if ":" not in tool.name}
        names -= {own.SYNCED.name, own.CUDA.name}
        for number in range(self.rounds):
            budget = self.settings.budget / 2
            running = [one for one in self.contestants if one.tool.name in names and one.may_run("cold", budget)]
            if not running:
                break
            rate = read_rate_uncached(self.inputs)
            if not rate:
                self.result.cold_note = "the page cache can't be dropped on this system"
                break
            self.result.disk_rates.append(rate)
            self.turns("cold", running, number)

    def turns(self, condition: Condition, contestants: Sequence[Contestant], number: int) -> None:
        """One run of each."""
        for contestant in contestants:
            run = self.measured(contestant, condition, number)
            (contestant.result.warm if condition == "warm" else contestant.result.cold).append(run)
            contestant.used[condition] += run.process.wall
            contestant.last[condition] = run.process.wall
            peak = run.process.peak_rss / 1e6
            told = run.failure or f"{run.process.wall:.2f} s, {run.loop:.2f} s of it the loop, peak {peak:,.0f} MB"
            self.say(f"{condition} {number + 1}: {contestant.tool.name}: {told}")

    def floor(self) -> Floor:
        """The floor of the case."""
        warm(self.inputs)
        return measure_floor(self.inputs, self.like_output, self.work)

    def measured(self, contestant: Contestant, condition: Condition, number: int) -> Run:
        """One run, checked if it is the first that came to its end."""
        with self.job(contestant.tool, contestant.python) as job:
            try:
                command = contestant.tool.command(job)
            except CannotRun as reason:
                return Run(number, NOTHING, failure=str(reason))
            log = job.scratch / "log.txt"
            set_up = [path for path in job.scratch.rglob("*") if path.is_file()]
            warm(self.inputs) if condition == "warm" else chill([*self.inputs, *set_up])
            settle()
            process = self.process(command, job, timeout=self.settings.timeout)
            told = timing(job.timing)
            run = Run(number, process, loop=loop_of(told), own=own_figures(told), failure=self.why(process, log))
            if run.failure:
                self.keep_log(log, contestant)
            elif contestant.result.check is None:
                contestant.result.check = self.verdict(contestant, job)
            return run

    def process(self, command: Command, job: Job, *, timeout: float, group: Path | None = None) -> Measured:
        """The process, run to its end."""
        around = Surroundings(job.scratch, command.environment, job.scratch / "log.txt", group, timeout)
        return measure(command.words, around)

    def why(self, process: Measured, log: Path) -> str:
        """Why a run failed, "" if it didn't."""
        if process.ok:
            return ""
        if process.ending == "timeout":
            return f"stopped after {self.settings.timeout:.0f} s"
        if process.ending == "killed":
            return f"killed for want of memory, at {process.peak_rss / 1e9:.1f} GB"
        return f"failed: {environments.last_line(log) or f'exit code {process.exit_code}'}"

    def keep_log(self, log: Path, contestant: Contestant) -> None:
        """Keep the log of a run that failed."""
        kept = self.settings.folder / "logs"
        kept.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):
            shutil.copyfile(log, kept / f"{self.case.name}-{contestant.tool.name.replace(':', '-')}.log")

    def verdict(self, contestant: Contestant, job: Job) -> Verdict | None:
        """Whether the output is right, found in another process; None for methods that are tested elsewhere."""
        merge = self.case.variants[contestant.variant] if contestant.variant else self.case.merge
        if merge.method not in CHECKED or (merge.parameters and contestant.variant):
            return None
        asked = job.scratch / "request.json"
        models = {role: str(path) for role, path in self.models.items()}
        request = Request(self.case.name, contestant.variant, models, str(job.output))
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        words = [sys.executable, "-m", "benchmarks.checking", str(asked)]
        root = Path(__file__).parent.parent
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=CHECK_SECONDS, cwd=root, check=False)
        except subprocess.TimeoutExpired:
            return Verdict(False, "could not be checked in time")
        if done.returncode:
            return Verdict(False, f"can't be read: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
        return Verdict(**json.loads(done.stdout))

    @contextlib.contextmanager
    def job(self, tool: Tool, python: Path) -> Iterator[Job]:
        """The case as a job, its folders empty; they are removed afterwards."""
        with contextlib.ExitStack() as stack:
            folders = []
            for name in ("output", "scratch"):
                folder = (self.work / name).absolute()
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                folders.append(folder)
            models = {role: path.absolute() for role, path in self.models.items()}
            yield Job(self.case, models, folders[0], folders[1], python)

    def smallest_memory(self) -> None:
        """The smallest control group in which each finishes: of streammerge, and of peers where the case says so."""
        for contestant in self.contestants:
            is_peer = not contestant.is_own and self.case.thorough
            if contestant.tool.name != own.NAME and not is_peer:
                continue
            if runs := contestant.result.good():
                self.say(f"smallest memory of {contestant.tool.name}")
                try:
                    contestant.result.limit = self.limit_of(contestant, runs)
                except CannotRun as reason:
                    contestant.result.limit_note = str(reason)

    def limit_of(self, contestant: Contestant, runs: Sequence[Run]) -> Limit:
        """Bisection, from the anonymous memory on: what is mapped can be dropped and read again."""
        usual = max(run.process.wall for run in runs)
        timeout = min(PATIENCE * usual + 10, self.settings.timeout)

        def works(limit: int) -> bool:
            with self.job(contestant.tool, contestant.python) as job, memory_group(limit) as group:
                command = contestant.tool.command(job)
                done = self.process(command, job, timeout=timeout, group=group)
                self.say(f"  {limit / MIB:,.0f} MiB: {done.ending} after {done.wall:.1f} s")
                return done.ok

        guess = max((run.process.peak_anonymous or run.process.peak_rss for run in runs), default=0)
        return Search(works, budget=self.settings.budget).run(round(guess / MIB) * MIB + 16 * MIB)


NOTHING: Final = Measured("failed", -1, 0.0, 0.0, 0, 0)
"""What a process cost that never started."""


def size(paths: Sequence[Path]) -> int:
    """The size of files together."""
    return sum(path.stat().st_size for path in paths)


def timing(path: Path) -> Mapping[str, Any]:
    """What a tool told of its own time; nothing if it told nothing, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def loop_of(told: Mapping[str, Any]) -> float:
    """The seconds of the merge loop, from `{"loop": seconds}` or streammerge's report.

    What streammerge copies ahead of the loop, while torch is imported, counts as if it had been done in it.
    """
    seconds = told.get("seconds", {})
    return float(told.get("loop", seconds.get("merge", 0.0) + seconds.get("ahead", 0.0)))


def own_figures(told: Mapping[str, Any]) -> dict[str, Any]:
    """What streammerge's report adds to what was measured from outside."""
    names = (
        "seconds",
        "bytes_read",
        "bytes_written",
        "baseline_rss_bytes",
        "peak_vram_bytes",
        "device",
        "threads",
        "io",
    )
    return {name: told[name] for name in names if name in told}


def all_tools(case: Case, peers: Sequence[Tool], wanted: Sequence[str] = ()) -> list[Tool]:
    """The tools of a case: streammerge and its variants, and the peers; of those that are wanted, if any are named.

    A tool's name stands for its variants too, unless some of these are named.
    """
    tools = [*own.own_tools(case), *(peers if case.peers else [])]
    named = {name.partition(":")[0] for name in wanted if ":" in name}
    with_variants = set(wanted) - named
    return [tool for tool in tools if not wanted or tool.name in wanted or tool.name.partition(":")[0] in with_variants]


def quickly(settings: Settings) -> Settings:
    """Settings for miniatures: few runs, no long waits."""
    return replace(settings, quick=True, runs=min(settings.runs, 2), timeout=min(settings.timeout, 60.0))
