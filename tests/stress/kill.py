"""Merges are killed (SIGKILL) at random moments and resumed, until they are done: the bytes must be those of a merge
that nobody disturbed, and at no moment may there be anything under the final names that could be taken for a model and
is neither the old output, whole, nor the new one."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save_file

from tests.stress.campaign import Campaign, Effort, Figure
from tests.stress.mortal import Mortals, Outcome

KILLS: Final = 200

RESUMES: Final = 30
"""Runs after which a merge should be done, however often it is killed."""

METHODS: Final[Mapping[str, tuple[str, ...]]] = {
    "linear": (),
    "slerp": ("-p", "t=0.3"),
    "ties": ("--base", "base.safetensors", "-p", "density=0.5"),
    "dare_linear": ("--base", "base.safetensors", "-p", "density=0.5", "--seed", "7"),
    "pcb": ("--base", "base.safetensors", "-p", "ratio=0.3"),
}
"""One of each kind: linear, gram, with statistics of a tensor, at random, with statistics of the whole model."""

OLDER: Final = ("none", "single", "as many shards", "fewer shards")
"""What lies at the output before the merge."""

SHARD: Final = "6MB"


@dataclass(frozen=True)
class Case:
    """A merge to be killed."""

    method: str
    sharded: bool
    older: str

    def words(self, models: Path, output: Path) -> list[str]:
        """The command line."""
        words = [str(models / "a.safetensors"), str(models / "b.safetensors"), "-o", str(output), "-m", self.method]
        words += [str(models / word) if word.endswith(".safetensors") else word for word in METHODS[self.method]]
        words += ["--shard-size", SHARD] if self.sharded else []
        words += ["--force"] if self.older != "none" else []
        return [*words, "--threads", "2", "--journal", "0.01", "-q"]


class Arena:
    """The models, what undisturbed merges make of them, and the folder in which merges are killed."""

    def __init__(self, folder: Path, mortals: Mortals) -> None:
        self.mortals = mortals
        self.models, self.right, self.older = folder / "models", folder / "right", folder / "older"
        self.place, self.log = folder / "place", folder / "log"
        self.undisturbed: dict[tuple[str, bool], Outcome] = {}
        self.models.mkdir()
        for seed, name in enumerate(("a", "b", "base")):
            make_model(self.models / f"{name}.safetensors", seed)
        self.inputs = contents(self.models)
        for older, words in {
            "single": [],
            "as many shards": ["--shard-size", SHARD],
            "fewer shards": ["--shard-size", "15MB"],
        }.items():
            base = str(self.models / "base.safetensors")
            output = str(self.older / older / "out.safetensors")
            assert mortals.run([base, "-o", output, "-q", *words], log=self.log).code == 0

    def prepare(self, case: Case) -> dict[str, str]:
        """Lay out what is there before the merge, and see that the merge itself has been made once; the right bytes."""
        shutil.rmtree(self.place, ignore_errors=True)
        if case.older != "none":
            shutil.copytree(self.older / case.older, self.place)
        key = case.method, case.sharded
        folder = self.right / f"{case.method}-{case.sharded}"
        if key not in self.undisturbed:
            words = Case(case.method, case.sharded, "none").words(self.models, folder / "out.safetensors")
            self.undisturbed[key] = self.mortals.run(words, log=self.log)
            assert self.undisturbed[key].code == 0, self.log.read_text()
        return contents(folder)

    def problem(self, case: Case, right: Mapping[str, str]) -> str:
        """What is wrong with what lies under final names now, "" if nothing is."""
        before = contents(self.older / case.older) if case.older != "none" else {}
        found = contents(self.place)
        for name, digest in found.items():
            if not name.startswith(".") and digest not in (before.get(name), right.get(name)):
                return f"{name} is neither the old nor the new file"
        index = self.place / "out.safetensors.index.json"
        if index.exists():
            named = {index.name, *json.loads(index.read_text())["weight_map"].values()}
            if not any(
                all(name in found and found[name] == whole.get(name) for name in named) for whole in (before, right)
            ):
                return "the index names shards of two outputs, or some that are not there"
        return "" if contents(self.models) == self.inputs else "an input has changed"


def run_campaign(effort: Effort) -> list[Figure]:
    """Kill merges of every kind."""
    chance = random.Random(effort.seed)
    cases = [Case(method, sharded, older) for method in METHODS for sharded in (False, True) for older in OLDER]
    chance.shuffle(cases)
    wanted, killed, resumed, problems = effort.trials(KILLS), 0, 0, []
    with Mortals() as mortals:
        arena = Arena(effort.folder, mortals)
        merges = 0
        while killed < wanted:
            case = cases[merges % len(cases)]
            merges += 1
            kills, found = kill_and_resume(arena, case, chance, wanted - killed)
            killed, resumed = killed + kills, resumed + kills
            problems += [f"{case}: {found}"] * bool(found)
    for problem in problems:
        print(f"  {problem}")
    outcome = f"{merges} merges of {len(METHODS)} methods, byte-identical after up to {RESUMES} resumptions"
    return [Figure("kill -9 at a random point, resumed", killed, len(problems), problems[0] if problems else outcome)]


def kill_and_resume(arena: Arena, case: Case, chance: random.Random, most: int) -> tuple[int, str]:
    """Kill one merge once or more, resume it, and compare; how often it was killed, and what went wrong."""
    right = arena.prepare(case)
    words = case.words(arena.models, arena.place / "out.safetensors")
    usual = arena.undisturbed[case.method, case.sharded]
    kills = 0
    for number in range(RESUMES):
        wanted = kills < most and (not kills or chance.random() < 0.4)
        at = chance.randint(1, usual.calls + 5) if wanted and chance.random() < 0.5 else None
        after = chance.uniform(0, usual.seconds) if wanted and at is None else None
        resume = ["--resume"] if number else []
        outcome = arena.mortals.run([*words, *resume], at=at, after=after, log=arena.log)
        if problem := arena.problem(case, right):
            return max(kills, 1), f"{problem} (killed at {at} {after})"
        if outcome.code is None:
            kills += 1
        elif outcome.code:
            return max(kills, 1), f"exit code {outcome.code}: {last_line(arena.log)}"
        elif kills:
            left = contents(arena.place)
            return kills, "" if left == right else f"differs in {sorted(set(left.items()) ^ set(right.items()))[:2]}"
        else:  # it was done before it was to be killed
            arena.prepare(case)
    return max(kills, 1), "was not done after so many resumptions" if kills else ""


def make_model(path: Path, seed: int) -> None:
    """A model of 24 MB: some large tensors, and a few of odd sizes."""
    random_numbers = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        f"layers.{number}.weight": (1024, 1024 if number % 2 else 512) for number in range(8)
    }
    shapes |= {f"layers.{number}.bias": (63 + number,) for number in range(8)}
    tensors: dict[str, np.ndarray] = {
        name: random_numbers.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    tensors["positions"] = np.arange(77)
    save_file(tensors, path, {"format": "pt"})


def contents(folder: Path) -> dict[str, str]:
    """Every file with a digest of what is in it."""
    if not folder.is_dir():
        return {}
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def last_line(path: Path) -> str:
    """The end of a log."""
    return path.read_text().strip().rpartition("\n")[2]


KILL = Campaign("kill", "Killed and resumed", run_campaign)
