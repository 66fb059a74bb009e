"""What was measured on a machine with a card, as it is kept: one JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks.results import write_json
from streammerge.tools.bench.benchmark import Spread
from streammerge.tools.bench.floor import Floor

FILE: Final = "cuda.json"

TAIL: Final = 4000
"""Characters kept of what the tests print."""

PROGRESS: Final = re.compile(r"^([.sFExX]+)(?:\s+\[[ \d]+%\])?$", re.MULTILINE)
"""A line of pytest's in which each test has a letter."""

Side = Literal["card", "cpu"]
Step = Literal["to the card", "from the card", "reading", "writing", "loop"]


@dataclass(frozen=True)
class Rate:
    """What card and host allow in one step: `nbytes` moved in so many seconds.

    A loop moves what it reads and what it writes, in ranges of `elements`, and holds `vram` bytes on the card.
    """

    step: Step
    seconds: float
    nbytes: int
    threads: int = 1
    elements: int = 0
    vram: int = 0


@dataclass(frozen=True)
class Context:
    """What a process takes that only makes a CUDA context: the peak of its RAM, and VRAM. `torch_rss`: without one."""

    rss: int
    vram: int
    torch_rss: int


@dataclass(frozen=True)
class Checks:
    """A run of the tests that need a card: whether all passed, the seconds, and the end of what was printed."""

    ok: bool
    seconds: float
    tail: str

    @classmethod
    def told(cls, said: str, seconds: float, *, ok: bool, cut_short: bool) -> Checks:
        """By what pytest printed. A run that was cut short has no last line, and is right if nothing had failed."""
        if cut_short:
            each = "".join(match[1] for match in re.finditer(PROGRESS, said))
            passed, failed = each.count("."), each.count("F") + each.count("E")
            said += f"\n{passed} passed, {failed} failed, then stopped after {seconds:.0f} s"
            ok = passed > 0 and not failed
        return cls(ok, seconds, said[-TAIL:])

    @property
    def summary(self) -> str:
        """Their last line, which counts them."""
        lines = [line.strip(" =") for line in self.tail.splitlines() if line.strip(" =")]
        return lines[-1] if lines else "nothing was printed"


@dataclass(frozen=True)
class CardRun:
    """One merge in a process of its own. Seconds and bytes; `asked` threads were asked for (0: its own choice).

    `baseline` is what `import torch` takes, 0 where it was not imported; `loops` says what computed.
    """

    merge: str
    side: Side
    asked: int = 0
    failure: str = ""
    wall: float = 0.0
    loop: float = 0.0
    cpu: float = 0.0
    peak_rss: int = 0
    vram: int = 0
    baseline: int = 0
    threads: int = 0
    loops: str = ""


@dataclass(frozen=True)
class Difference:
    """Two outputs of one merge: elements that were compared, of how many; whose bits differ, in how many tensors; the
    greatest distance in units of the last place, and the tensor that has it. `unlike` tensors are not in both, or not
    of one shape and dtype."""

    merge: str
    elements: int
    compared: int
    differing: int
    tensors: int
    ulps: int
    worst: str = ""
    unlike: int = 0

    @property
    def ok(self) -> bool:
        """Whether all that was compared is equal, or one unit in the last place apart."""
        return self.compared > 0 and self.ulps <= 1 and not self.unlike


@dataclass(frozen=True)
class Skipped:
    """A part that was not measured, and why."""

    part: str
    reason: str


@dataclass
class CardResult:
    """Everything that was measured in one go. `floors` are of reading the SD 2 models and writing one."""

    card: str
    driver: str
    date: str
    commit: str
    version: str
    quick: bool
    machine: Mapping[str, str]
    took: float = 0.0
    complete: bool = False
    context: Context | None = None
    tests: Checks | None = None
    floors: list[Floor] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)
    runs: list[CardRun] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def good(self, merge: str, side: Side, asked: int = 0) -> list[CardRun]:
        """The runs of a merge that came to their end."""
        return [run for run in self.all_runs(merge, side, asked) if not run.failure]

    def all_runs(self, merge: str, side: Side, asked: int = 0) -> Iterator[CardRun]:
        """The runs of a merge, failed ones too."""
        return (run for run in self.runs if (run.merge, run.side, run.asked) == (merge, side, asked))

    def loop(self, merge: str, side: Side, asked: int = 0) -> Spread | None:
        """The seconds of its loop; None if no run came to its end."""
        found = [run.loop for run in self.good(merge, side, asked)]
        return Spread.of(found) if found else None


def save(result: CardResult, folder: Path) -> Path:
    """Write the file; it is never half there."""
    return write_json(asdict(result), folder / FILE)


def load(folder: Path) -> CardResult | None:
    """What was measured; None where nothing was."""
    path = folder / FILE
    if not path.exists():
        return None
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    values["context"] = Context(**values["context"]) if values["context"] else None
    values["tests"] = Checks(**values["tests"]) if values["tests"] else None
    kinds = {"floors": Floor, "rates": Rate, "runs": CardRun, "differences": Difference, "skipped": Skipped}
    for name, kind in kinds.items():
        values[name] = [kind(**one) for one in values[name]]
    return CardResult(**values)
