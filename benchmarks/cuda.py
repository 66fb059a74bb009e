"""Everything that is to be measured on a machine with a card, in one go and in bounded time.

The parts come in the order of their weight. Each one is bounded by what is left of the time and saved when it is
done, so that a run that is cut short keeps what it has; what there was no time for is named with the reason.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import card, inputs, own, results
from benchmarks.agreement import apart
from benchmarks.card import CardResult, CardRun, Checks, Context, Rate, Side, Skipped
from benchmarks.card_merges import ARTICLE, LINEAR, MERGES, TIES, WHOLE
from benchmarks.cases import Case
from benchmarks.environments import last_line
from benchmarks.rates import Request
from benchmarks.running import loop_of, timing
from benchmarks.tools import CannotRun, Job
from streammerge import __version__
from streammerge.errors import MergeError
from streammerge.tools.bench.floor import measure_floor, settle, warm
from streammerge.tools.bench.measuring import Measured, Surroundings, import_torch_rss, measure

Say = Callable[[str], None]

ROOT: Final = Path(__file__).parent.parent
"""The checkout, which need not be installed."""

BUDGET: Final = 430.0
"""Seconds after which nothing new begins; what is under way then ends within a minute."""

LEAST: Final = 5.0
"""Seconds below which no part begins."""

TEST_SECONDS: Final = 150.0
RATE_SECONDS: Final = 75.0
MERGE_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 20.0

FEW_TESTS: Final = "random or limit or copies"
"""What a stand-in runs of the tests that need a card: all of them take it as many minutes."""

MACHINE: Final = """\
import json
from streammerge.tools.bench.benchmark import describe_machine
print(json.dumps(describe_machine()))
"""
"""Asked in a process of its own, since to be told a card's name makes a CUDA context, which takes VRAM."""

THREADS: Final = (1, 2, 4, 8, 16)
ROUNDS: Final = 3
"""Runs of each merge that streams, if there is time; medians are taken."""

TRIED: Final = Request([], "", "cpu", 2**20, 2**16, (1, 2), (1, 2), (2**12, 2**14))
"""What rates are taken of in a miniature."""

CONTEXT: Final = """\
import json, torch
torch.zeros(1, device="cuda").add_(1)
torch.cuda.synchronize()
free, total = torch.cuda.mem_get_info()
print(json.dumps(total - free))
"""
"""What a process with a CUDA context and no merge does; it prints the VRAM that is taken then, by others too."""


@dataclass(frozen=True)
class CudaSettings:
    """Where to measure and for how long, whether to keep the models, which merges, and which by how many threads.

    Of miniatures all is done on the CPU, in place of a card: as the device `cpu`, or as a card for which it
    `stands_in`, by the same words as on one.
    """

    folder: Path
    results: Path
    budget: float = BUDGET
    quick: bool = False
    keep: bool = False
    commit: str = ""
    merges: Sequence[Case] = MERGES
    swept: Sequence[Case] = (LINEAR, TIES)
    threads: Sequence[int] = THREADS
    rounds: int = ROUNDS
    stands_in: bool = False

    @property
    def device(self) -> str:
        """What stands for the card."""
        return "cpu" if self.quick and not self.stands_in else "cuda"


@dataclass(frozen=True)
class Part:
    """A part of the whole: its name, and what is done."""

    name: str
    measure: Callable[[], None]


def measure_card(settings: CudaSettings, say: Say) -> int:
    """Measure everything; 0 where there is no card either, and 1 if a part broke down or anything was found wrong."""
    if not settings.quick and not own.has_cuda():
        say("There is no CUDA device here: nothing was measured, nothing written.")
        return 0
    return CardBench(settings, say).run()


class CardBench:
    """Measures part after part."""

    def __init__(self, settings: CudaSettings, say: Say) -> None:
        self.settings, self.say = settings, say
        self.started = time.monotonic()
        self.work = settings.folder / "work"
        self.models: dict[str, dict[str, Path]] = {}
        self.made: list[Path] = []
        self.broken = False
        self.result = self.begun()

    def begun(self) -> CardResult:
        """The result before anything was measured: the card, the machine, what is measured."""
        with self.scratch() as folder:
            log = folder / "log.txt"
            done = self.process(["-c", MACHINE], log, MERGE_SECONDS)
            if not done.ok:
                raise MergeError(f"the machine can't be described: {last_line(log)}")
            machine: dict[str, str] = json.loads(last_line(log))
        name, today = machine["cuda"] or "no card", date.today().isoformat()
        commit = self.settings.commit or results.commit()
        return CardResult(name, driver(), today, commit, __version__, self.settings.quick, machine)

    def run(self) -> int:
        """Everything, in order; the exit code."""
        try:
            for part in self.parts():
                self.measure(part)
            self.result.complete = True
        finally:
            self.save()
            shutil.rmtree(self.work, ignore_errors=True)
            if not self.settings.keep:
                self.remove_models()
        wrong = [one.merge for one in self.result.differences if not one.ok]
        if wrong:
            self.say(f"card and CPU are too far apart: {', '.join(wrong)}")
        return 1 if self.broken or wrong or (self.result.tests and not self.result.tests.ok) else 0

    def remove_models(self) -> None:
        """Remove the models that were made, not those that were there."""
        for folder in self.made:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others lie beside it
                folder.parent.rmdir()

    def parts(self) -> Iterator[Part]:
        """What is measured, the most important first."""
        yield Part("the CUDA context", self.context)
        yield Part("tests that need a card", self.tests)
        yield Part("SD 2's models", partial(self.make, LINEAR))
        yield Part("floor", self.floor)
        yield Part("limits of card and host", self.rates)
        for case in self.settings.merges:
            if case is ARTICLE:
                yield Part("the article's models", partial(self.make, ARTICLE))
            yield Part(case.name, partial(self.both, case))
        for threads, case in itertools.product(self.settings.threads, self.settings.swept):
            yield Part(f"{case.name} by {threads} threads", partial(self.sides, case, threads))
        yield Part("floor again", self.floor)
        for number in range(2, self.settings.rounds + 1):
            for case in (one for one in self.settings.merges if one not in WHOLE):
                yield Part(f"{case.name}, run {number}", partial(self.sides, case))

    def measure(self, part: Part) -> None:
        """One part; what it can't do, and what breaks down in it, stops no other."""
        if self.left() < LEAST:
            self.skip(part.name, f"the {self.settings.budget:.0f} s were spent")
            return
        self.say(f"{time.monotonic() - self.started:6.0f} s  {part.name}")
        try:
            part.measure()
        except CannotRun as reason:
            self.skip(part.name, str(reason))
        except Exception as error:  # noqa: BLE001, RUF100  (whatever happens in one part, the others are measured)
            traceback.print_exc()
            self.broken = True
            self.skip(part.name, f"broke down: {error!r}"[:300])
        self.save()

    def left(self) -> float:
        """The seconds that are left."""
        return self.settings.budget - (time.monotonic() - self.started)

    def skip(self, part: str, reason: str) -> None:
        """Note what was not measured."""
        self.say(f"        {part}: skipped: {reason}")
        self.result.skipped.append(Skipped(part, reason))

    def save(self) -> None:
        """Keep what there is."""
        self.result.took = time.monotonic() - self.started
        card.save(self.result, self.settings.results)

    def process(
        self, words: Sequence[str], log: Path, seconds: float, folder: Path = ROOT, **environment: str
    ) -> Measured:
        """A process of our own modules, for so many seconds at most, and no longer than there is time."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
        around = Surroundings(
            folder,
            {"PYTHONPATH": os.pathsep.join(paths), **environment},
            log,
            timeout=min(seconds, max(self.left(), LEAST)),
        )
        stand_in = ("-m", "benchmarks.standin", "1") if self.settings.stands_in else ()
        return measure([sys.executable, *stand_in, *words], around)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder for one part, removed afterwards."""
        self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.work) as made:
            yield Path(made).absolute()

    def context(self) -> None:
        """What a process takes that has a CUDA context and does nothing."""
        torch_rss = import_torch_rss()
        if self.settings.device == "cpu":
            self.result.context = Context(torch_rss, 0, torch_rss)
            return
        with self.scratch() as folder:
            done = self.process(["-c", CONTEXT], folder / "log.txt", MERGE_SECONDS)
            if not done.ok:
                raise CannotRun(f"a CUDA context can't be made: {last_line(folder / 'log.txt')}")
            vram = int(last_line(folder / "log.txt"))
        self.result.context = Context(done.peak_rss, vram, torch_rss)

    def tests(self) -> None:
        """The tests that are marked `cuda`, without the plugins that others have installed."""
        files = [str(path) for path in marked_tests()]
        if not files:
            raise CannotRun("there are no tests in this checkout")
        with self.scratch() as folder:
            log = folder / "log.txt"
            words = ["-m", "pytest", "-q", "-m", "cuda", "-p", "no:benchmark", "-p", "no:cacheprovider"]
            words += ["-k", FEW_TESTS] if self.settings.stands_in else []
            done = self.process([*words, *files], log, TEST_SECONDS, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
            said = log.read_text(encoding="utf-8", errors="replace")
        self.result.tests = Checks.told(said, done.wall, ok=done.ok, cut_short=done.ending == "timeout")
        self.say(f"        {self.result.tests.summary}")

    def make(self, case: Case) -> None:
        """A case's models, in the page cache."""
        folder = inputs.set_folder(case, self.settings.folder, quick=self.settings.quick)
        there = (folder / inputs.COMPLETE).exists()
        self.check_room(case, there)
        self.made += [] if there else [folder]
        self.models[case.input_set] = inputs.find_or_make(case, self.settings.folder, quick=self.settings.quick)
        settling = threading.Thread(target=settle, daemon=True)  # a slow disk may take as long as all the rest
        settling.start()
        settling.join(SETTLE_SECONDS)
        warm([*self.models[case.input_set].values()])

    def check_room(self, case: Case, there: bool) -> None:
        """CannotRun unless the models, and beside them two outputs and a copy, fit the disk."""
        total = inputs.SETS[case.input_set].nbytes(quick=self.settings.quick)
        self.settings.folder.mkdir(parents=True, exist_ok=True)
        needed, free = (total if there else 2 * total), shutil.disk_usage(self.settings.folder).free
        if needed > free:
            raise CannotRun(f"it takes {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")

    def paths(self, case: Case) -> dict[str, Path]:
        """A case's models by role."""
        if case.input_set not in self.models:
            raise CannotRun("its models were not made")
        found = self.models[case.input_set]
        return {role: found[role].absolute() for role in case.merge.roles}

    def floor(self) -> None:
        """`cat` of the linear merge's inputs and `cp` of one."""
        models = [*self.paths(LINEAR).values()]
        with self.scratch() as folder:
            self.result.floors.append(measure_floor(models, models[:1], folder))

    def rates(self) -> None:
        """The rates of each step, and of a bare loop, of the linear merge's inputs."""
        files = [str(path) for path in self.paths(LINEAR).values()]
        with self.scratch() as folder:
            plain = TRIED if self.settings.quick else Request([], "", self.settings.device)
            asked = replace(plain, files=files, folder=str(folder), device=self.settings.device)
            request, log = folder / "request.json", folder / "log.txt"
            request.write_text(json.dumps(asdict(asked)), encoding="utf-8")
            done = self.process(["-m", "benchmarks.rates", str(request)], log, RATE_SECONDS)
            self.result.rates = rates_in(log)
            if not done.ok:
                raise CannotRun(f"cut short after {done.wall:.0f} s: {done.ending}: {last_line(log)}"[:300])

    def both(self, case: Case) -> None:
        """A merge on card and CPU, and how far their outputs are apart."""
        with self.scratch() as folder:
            outputs = [self.merge(case, side, folder / side) for side in ("card", "cpu")]
            if None in outputs:
                raise CannotRun("its outputs were not compared: one is missing")
            one, other = [path for path in outputs if path]
            found = apart(case.name, one, other, time.monotonic() + max(self.left(), LEAST))
            self.result.differences.append(found)
            self.say(f"        {found.differing:,} of {found.compared:,} elements differ, by {found.ulps} at most")

    def sides(self, case: Case, threads: int = 0) -> None:
        """A merge on card and CPU, whose outputs are dropped."""
        for side in SIDES:
            with self.scratch() as folder:
                self.merge(case, side, folder, threads)

    def merge(self, case: Case, side: Side, folder: Path, threads: int = 0) -> Path | None:
        """One merge, as a user types it; its output, None if it failed."""
        models = self.paths(case)
        for name in ("output", "scratch"):
            (folder / name).mkdir(parents=True)
        job = Job(case, models, folder / "output", folder / "scratch", Path(sys.executable))
        device = self.settings.device if side == "card" else "cpu"
        options = ["--no-sync", "--device", device, *(["--threads", str(threads)] if threads else [])]
        command, log = own.command(job, case.merge, case.layout, *options), folder / "log.txt"
        done = self.process(command.words[1:], log, MERGE_SECONDS, folder)
        run = run_of(case.name, side, threads, done, timing(job.timing), log)
        self.result.runs.append(run)
        asked = f" by {threads} threads" if threads else ""
        self.say(f"        {side}{asked}: {run.failure or f'{run.wall:.2f} s, {run.loop:.2f} s of it the loop'}")
        return None if run.failure else job.output / "merged.safetensors"


SIDES: Final[tuple[Side, Side]] = ("card", "cpu")


def run_of(merge: str, side: Side, asked: int, done: Measured, told: Mapping[str, Any], log: Path) -> CardRun:
    """What a merge's process cost, and what it told of itself."""
    if not done.ok:
        why = f"stopped after {done.wall:.0f} s" if done.ending == "timeout" else f"{done.ending}: {last_line(log)}"
        return CardRun(merge, side, asked, failure=why[:300], wall=done.wall)
    return CardRun(
        merge,
        side,
        asked,
        wall=done.wall,
        loop=loop_of(told),
        cpu=done.cpu,
        peak_rss=done.peak_rss,
        vram=int(told.get("peak_vram_bytes", 0)),
        baseline=int(told.get("baseline_rss_bytes", 0)),
        threads=int(told.get("threads", 0)),
        loops=str(told.get("loops", "")),
    )


def rates_in(log: Path) -> list[Rate]:
    """The figures that were printed, whatever was printed beside them."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            found.append(Rate(**json.loads(line)))
    return found


def marked_tests() -> list[Path]:
    """The files of tests that have any that need a card."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in files if "pytest.mark.cuda" in path.read_text(encoding="utf-8")]


def driver() -> str:
    """The version of NVIDIA's driver, "" where its program doesn't tell."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.strip().partition("\n")[0]
