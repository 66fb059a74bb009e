"""Merges so small that thousands can be made, which do all that large ones do, and what to make of their ends."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from streammerge.cli.main import main
from tests.make.folders import save_folder
from tests.make.models import make_tensors, save_model, with_integers

SHAPES: Final = {"first": (70, 30), "scalar": (), "empty": (0,), "second": (3000,), "third": (41, 43), "last": (7,)}

FILES: Final = {"tokenizer.json": "{}", "1_Pooling/config.json": "{}", "modeling_x.py": "raise SystemExit"}
"""What lies in a folder beside weights and a config."""

Digests = Mapping[str, str]
"""What lies in a folder: every file by its path in it."""


@dataclass(frozen=True)
class Scenario:
    """A merge by its options, and whether an output lies there already, and of how many shards.

    With `companions` the layout is a folder, whose config and tokenizer go to the output's.
    """

    name: str
    options: tuple[str, ...] = ()
    sharded: bool = False
    old: bool = False
    old_shard_size: str = "16kB"
    companions: bool = False

    @property
    def output(self) -> str:
        """The output's path in the scenario's folder."""
        return "out" if self.sharded or self.companions else "out.safetensors"


SCENARIOS: Final = (
    Scenario("one file"),
    Scenario("one file, mapped, over an old one", ("--io", "mmap"), old=True),
    Scenario("one file of ties, over an old one", ("-m", "ties", "--base", "{base}", "-p", "density=0.5"), old=True),
    Scenario("shards", sharded=True),
    Scenario("shards, mapped, over as many old ones", ("--io", "mmap"), sharded=True, old=True),
    Scenario("shards over fewer old ones", sharded=True, old=True, old_shard_size="30kB"),
    Scenario("a folder", companions=True),
    Scenario("a folder over an old one", old=True, companions=True),
    Scenario("shards and more over fewer old ones", sharded=True, old=True, old_shard_size="30kB", companions=True),
)


@dataclass(frozen=True)
class Ending:
    """How a merge ended: the program's exit code (None if it died of an exception), and what it said on stderr."""

    exit_code: int | None
    said: str


class Bench:
    """A scenario's inputs, its old and its new output, and a folder in which to merge again and again."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self.inputs = folder / "inputs"
        self.place = folder / "place"
        self.words = self._make_inputs()
        self.old: Digests = {}
        self.kept_old = folder / "old"
        if scenario.old:
            self._make_old()
        self.input_digests = digests(self.inputs)
        self.reset()
        ending = self.merge()
        assert ending.exit_code == 0, ending.said
        self.new = digests(self.place)
        self.kept_new = folder / "new"
        shutil.copytree(self.place, self.kept_new)

    def _make_inputs(self) -> list[str]:
        tensors = [with_integers(make_tensors(seed, torch.float32, SHAPES)) for seed in (1, 2, 3)]
        a = save_model(self.inputs / "a.safetensors", tensors[0])
        if self.scenario.companions:
            a = save_folder(self.inputs / "a", tensors[0], {"torch_dtype": "float16", "vocab_size": 3}, FILES)
        b = self.inputs / "b.ckpt"
        torch.save(tensors[1], b)
        base = save_model(self.inputs / "base.safetensors", tensors[2])
        options = [word.format(base=base) for word in self.scenario.options]
        shards = ["--shard-size", "16kB"] if self.scenario.sharded else []
        output = str(self.place / self.scenario.output)
        return [str(a), str(b), *options, *shards, "-o", output, "--threads", "1", "-q"]

    def _make_old(self) -> None:
        self.place.mkdir(parents=True)
        words = [*self.words, "--dtype", "fp16" if not self.scenario.sharded else "bf16"]
        if self.scenario.sharded:
            words[words.index("--shard-size") + 1] = self.scenario.old_shard_size
            words = [*words[:-2], "-m", "weighted_sum", "-p", "alpha=0.9"]
        assert main(words) == 0
        self.old = digests(self.place)
        self.place.rename(self.kept_old)

    def reset(self, state: Path | None = None) -> None:
        """Put the place in the state before the merge, or in this state."""
        shutil.rmtree(self.place, ignore_errors=True)
        state = state or self.kept_old
        if state.exists():
            shutil.copytree(state, self.place)
        else:
            self.place.mkdir(parents=True)

    def merge(self, *more: str) -> Ending:
        """Run the program, in this process."""
        return self._run([*self.words, *(["--force"] if self.scenario.old else []), *more])

    @staticmethod
    def _run(words: list[str]) -> Ending:
        said, printed = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            try:
                code: int | None = main(words)
            except SystemExit as leaving:
                code = 2 if leaving.code is None else int(leaving.code)
            except BaseException:
                code = None
                said.write(traceback.format_exc())
        return Ending(code, said.getvalue())

    def problems(self, ending: Ending) -> list[str]:
        """Everything that is wrong after a merge ended so; what an error says, and what lies there now.

        What can't be undone either, because the system refuses everything, may wait for `streammerge clean`, which
        finishes it; until then nothing is to be loadable that is neither the old output nor the new one.
        """
        wrong = ["what can be loaded is mixed"] if self.loadable_and_mixed() else []
        if ending.exit_code == 0:
            wrong += self.wrong_output(complete=True)
        if self.wrong_output() or self.left_over():
            cleaned = self.clean()
            if cleaned.exit_code != 0:
                wrong.append(f"clean fails: {cleaned.said}")
            wrong += self.wrong_output()
        if ending.exit_code not in (0, 1) or "Traceback" in ending.said:
            wrong.append(f"it died: {ending.said.strip().splitlines()[-1:]}")
        elif ending.exit_code == 1 and not ending.said.startswith("error: "):
            wrong.append(f"no error is told: {ending.said!r}")
        if digests(self.inputs) != self.input_digests:
            wrong.append("an input has changed")
        return wrong

    def wrong_output(self, *, complete: bool = False) -> list[str]:
        """What is wrong with what lies under the final names: it must be the old output or the new one, whole."""
        found = {name: digest for name, digest in digests(self.place).items() if not is_temporary(name)}
        if found == self.new:
            return []
        if complete:
            return ["it says that it is done, and it is not"]
        with_old = {**{name: digest for name, digest in self.old.items() if name not in self.new}, **self.new}
        if found in (self.old, with_old):  # an old single file beside a new index could not be removed
            return []
        return [f"neither the old output nor the new one: {sorted(found)}"]

    def is_new(self) -> bool:
        """Whether the new output lies there, whole."""
        return not self.wrong_output(complete=True)

    def clean(self) -> Ending:
        """Run `streammerge clean` where the output goes."""
        is_folder = self.scenario.sharded or self.scenario.companions
        return self._run(["clean", str(self.place / self.scenario.output if is_folder else self.place)])

    def left_over(self) -> list[str]:
        """Temporary files that are still there."""
        return [name for name in digests(self.place) if is_temporary(name)]

    def loadable_and_mixed(self) -> bool:
        """Whether what lies there can be loaded and is neither the old output nor the new one."""
        found = {name: digest for name, digest in digests(self.place).items() if not is_temporary(name)}
        if not self.scenario.sharded and self.scenario.companions:
            return "out/model.safetensors" in found and found not in (self.old, self.new)
        if not self.scenario.sharded:
            return bool(found) and found not in (self.old, self.new)
        index = self.place / "out" / "model.safetensors.index.json"
        if not index.exists():
            return False
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
        except ValueError:
            return True
        names = [*self._of(named), *(name for name in self.new if not name.endswith(".safetensors"))]
        whole = [{name: known.get(name) for name in names} for known in (self.old, self.new)]
        return {name: found.get(name) for name in names} not in whole

    @staticmethod
    def _of(shards: set[str]) -> list[str]:
        return [f"out/{name}" for name in ("model.safetensors.index.json", *sorted(shards))]


def is_temporary(name: str) -> bool:
    """Whether a file is named as streammerge names what is no output."""
    return Path(name).name.startswith(".")


def digests(folder: Path) -> dict[str, str]:
    """What lies in the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
