"""The job that a script is given, as `benchmarks/peers/description.py` writes it."""

import json
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class DescribedJob:
    """A merge in the words of `benchmarks/cases.py`; `models` has the weights' files of every role, the base too."""

    method: str
    models: dict[str, list[str]]
    merged: list[str]
    base: str
    weights: list[float]
    t: float
    density: float
    takes: list[list[str]]
    layout: str
    dtype: str
    output: str
    timing: str

    @property
    def files(self) -> dict[str, str]:
        """The file of every role, where models are single files."""
        return {role: file for role, (file,) in self.models.items()}

    def taken_from(self, name: str) -> str:
        """The model that a tensor is copied from; "" if it is merged."""
        return next((role for match, role in self.takes if fnmatchcase(name, match)), "")

    def tell_time(self, started: float) -> None:
        """Write down the seconds since then: the job's own, without Python's start and the imports."""
        Path(self.timing).write_text(json.dumps({"loop": time.perf_counter() - started}))


def described_job() -> DescribedJob:
    """The job that the first word of the command line names."""
    return DescribedJob(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
