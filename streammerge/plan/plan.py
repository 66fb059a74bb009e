"""What will happen, to every tensor and to the machine: from the recipe and the headers, before anything is read."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from streammerge.compute import costs
from streammerge.compute.expressions import Together
from streammerge.compute.machine import Allotment, choose_device, choose_io
from streammerge.errors import OutputError, PlanError, count, format_size, listed, plural
from streammerge.formats.files import ByteFile
from streammerge.formats.layout import OutputLayout, default_shards, lay_out
from streammerge.formats.tables import names_bytes
from streammerge.formats.torchzip.state_dicts import LeftTensors
from streammerge.methods.contract import ParameterValue
from streammerge.models.architecture import component_of
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.decisions import Action, Decisions
from streammerge.models.merged import Merged
from streammerge.models.views import beneath
from streammerge.plan.beside import Beside
from streammerge.plan.jobs import Jobs, together_of
from streammerge.plan.memory import Memory
from streammerge.plan.sources import Sources
from streammerge.recipe.description import describe
from streammerge.recipe.options import Options
from streammerge.recipe.recipe import Recipe
from streammerge.tensors import DType

TENSOR_BYTES: Final = 40
"""What a plan keeps of a tensor beside the tables of the models: its fate, its place in the output."""


MEMBER_BYTES: Final = 540
"""What is kept of a tensor that is measured with others: its expression, which is not made again."""


@dataclass(frozen=True)
class Plan:
    """A merge ready to be run: what becomes of the tensors, where they go, and what it costs.

    `described_bytes` is what is kept in memory of headers and decisions, `reading_bytes` what reading them leaves,
    and `allotted` the memory that workers get under a bound for the whole process, where that has been measured.
    """

    method: str
    merged: Merged
    jobs: Jobs
    output: OutputLayout
    inputs: tuple[ByteFile, ...]
    options: Options
    description: Mapping[str, Any] = field(default_factory=dict)
    described_bytes: int = 0
    reading_bytes: int = 0
    left: Mapping[Path, LeftTensors] = field(default_factory=dict)
    beside: Beside = field(default_factory=Beside)
    allotted: Allotment | None = None

    @property
    def decisions(self) -> Decisions:
        """What becomes of every tensor of the layout."""
        return self.merged.decisions

    @property
    def is_baked(self) -> bool:
        """Whether it is one model with adapters in it, and nothing else."""
        return bool(self.merged.accounts) and len(self.description.get("models", ())) == 1

    @property
    def layout_files(self) -> Sequence[ByteFile]:
        """The files of the model whose tensors the output has; none where it is no checkpoint."""
        root = beneath(self.merged.layout) if self.merged.layout is not None else None
        return root.files if isinstance(root, Checkpoint) else ()

    def count(self, action: Action) -> int:
        """How many tensors meet this fate."""
        return sum(fate.tensors for fate in self.decisions.fates if fate.action == action)

    @property
    def bytes_to_read(self) -> int:
        """What all passes together read, at most."""
        return sum(kind.count * kind.bytes_read for kind in self.jobs.kinds)

    @property
    def passes(self) -> int:
        """The most passes over one tensor, the one that writes it included."""
        return max((kind.passes for kind in self.jobs.kinds), default=0)

    @property
    def free_disk(self) -> int:
        """Free bytes where the output goes."""
        return shutil.disk_usage(existing_folder(self.output.files[0].path)).free

    def check_disk(self, present: int = 0) -> None:
        """OutputError unless the output fits the free disk, beside what is present of it already."""
        free = self.free_disk
        if free + present < self.output.nbytes:
            raise OutputError(
                f"{self.output.path}: not enough disk: the output takes {format_size(self.output.nbytes)}, "
                f"{format_size(free)} are free",
                advice=f"Free {format_size(self.output.nbytes - free - present)}, or write to another disk.",
            )

    @functools.cached_property
    def needs_torch(self) -> bool:
        """Whether something is not done by compiled loops, or not on the CPU."""
        return self.options.device != "cpu" or not all(
            kind.is_compiled for kind in self.jobs.kinds if kind.compute is not None
        )

    @functools.cached_property
    def memory(self) -> Memory:
        """What the work takes of memory."""
        jobs, is_mapped = self.jobs, self.io == "mmap"
        return Memory(jobs.kinds, jobs.together, self.options, self.described_bytes, self.needs_torch, is_mapped)

    @functools.cached_property
    def together(self) -> Mapping[Together, Mapping[int, DType]]:
        """What has to be measured of the whole model before anything is written."""
        return together_of(self.jobs.where(lambda kind: kind.is_together))

    @property
    def bytes_before_writing(self) -> int:
        """What is read to measure the whole model, at most."""
        return sum(
            member.method.passes * sum(map(costs.evaluation_bytes, member.inputs))
            for together in self.together
            for member in together.members
        )

    def to_json(self) -> dict[str, Any]:
        """The plan for machines: every tensor with its fate, and the costs."""
        return {
            "method": self.method,
            "output": [str(path) for path in self.output.weights],
            "output_bytes": self.output.nbytes,
            "free_disk_bytes": self.free_disk,
            "bytes_to_read": self.bytes_to_read,
            "passes": self.passes,
            "work_ram_bytes": self.work_bytes,
            "inputs": [{"path": str(file.path), "bytes": file.nbytes} for file in self.inputs],
            **self.beside.to_json(),
            "left_out": {model: list(names) for model, names in self.merged.left_out.items()},
            "lacking": {model: list(names) for model, names in self.merged.lacking.items()},
            **({"adapters": adapters} if (adapters := [one.to_json() for one in self.merged.accounts]) else {}),
            "beside_models": {str(path): left.to_json() for path, left in self.left.items()},
            "tensors": [
                {
                    "name": name,
                    "action": fate.action,
                    "why": fate.why,
                    **({"block": fate.block} if fate.block else {}),
                    **({"parameters": plain(fate.parameters)} if fate.parameters else {}),
                    "dtype": fate.info.dtype.name,
                    "shape": list(fate.info.shape),
                }
                for name, fate in self.decisions.told()
            ],
        }

    @property
    def work_bytes(self) -> int:
        """The RAM that the merge takes at most, above a bare `import torch` if it needs torch, else in all."""
        memory = self.memory
        own = memory.fixed_bytes + self.described_bytes + self.reading_bytes
        work = own + (self.allotted or memory.allot()).work_bytes
        if self.allotted is None or self.needs_torch:
            return work
        return min(work, self.options.max_ram or work)  # the bound is kept, whatever Python usually takes

    @functools.cached_property
    def io(self) -> Literal["mmap", "pread"]:
        """How files are read."""
        return choose_io(self.options.io, [file.path for file in self.inputs])

    def summary(self) -> Counter[str]:
        """How many tensors share an action and its reason, as `merged: linear`."""
        counts: Counter[str] = Counter()
        for fate in self.decisions.fates:
            counts[f"{fate.action}: {fate.why}"] += fate.tensors
        return counts

    def notes(self) -> list[str]:
        """What the user should know of tensors that not every model has."""
        left_out = [
            f"{by_component(names)} of {model} {plural(names, 'is', 'are')} not in the layout and left out: "
            f"{listed(names)}"
            for model, names in self.merged.left_out.items()
        ]
        dropped = {name for name, fate in self.decisions.told() if fate.action == "dropped"}
        lacking = [
            f"{model} lacks {by_component(names)} of the layout's; {_fate(len(dropped.intersection(names)))}: "
            f"{listed(names)}"
            for model, names in self.merged.lacking.items()
        ]
        return [*self.merged.remarks, *left_out, *lacking, *self.left_notes(), *self.beside.told()]

    def left_notes(self) -> list[str]:
        """What torch files hold beside their models, and what the output has not beside it."""
        return [*(f"{path.name} holds {left}" for path, left in self.left.items()), *self.beside.notes]


def plan_merge(
    merged: Merged,
    output: Path,
    options: Options,
    sources: Sources,
    *,
    recipe: Recipe | None = None,
    metadata: Mapping[str, str] | None = None,
    beside: Beside | None = None,
) -> Plan:
    """Lay out the output of a merge and turn every tensor into a job, in the order of the output's bytes.

    The recipe is for what is told, `metadata` and what is `beside` the weights are for the output. PlanError if no
    tensor is left of those that there are.
    """
    if len(merged.decisions) and not merged.tensors:
        raise PlanError(
            f"nothing is left to be written: all {len(merged.decisions):,} tensors are left out",
            advice="Leave out fewer of them: see --drop, --only, --on-missing and the recipe's rules.",
        )
    beside = beside or Beside()
    named = beside.stem, beside.components
    usual = None if beside.components else default_shards(output, merged.tensors, beside.stem)
    options = replace(options, device=choose_device(options.device), shard_size=options.shard_size or usual)
    layout = lay_out(output, merged.tensors, metadata or {}, options.shard_size, beside.companions, *named)
    jobs = Jobs(merged, layout, options)
    own = {merged.tensors.names} - ({merged.decisions.names} if sources.described_bytes else set())
    kept_bytes = names_bytes(own) + TENSOR_BYTES * len(merged.decisions) + merged.kept_bytes
    described_bytes = sources.described_bytes + kept_bytes + MEMBER_BYTES * jobs.together
    method, description = ("", {}) if recipe is None else (recipe.called, describe(recipe))
    kept = described_bytes, sources.reading_bytes, sources.left
    return Plan(method, merged, jobs, layout, sources.files, options, description, *kept, beside)


def existing_folder(path: Path) -> Path:
    """The nearest folder above the path that exists."""
    for folder in path.absolute().parents:
        if folder.is_dir():
            return folder
    return Path(path.anchor)


def _fate(dropped: int) -> str:
    return f"{dropped:,} of them are dropped" if dropped else "all come from other models"


def by_component(names: Sequence[str]) -> str:
    """`382 tensors (368 depth model, 14 text encoder)`"""
    counts = Counter(component_of(name) for name in names)
    return f"{count(names, 'tensor')} ({', '.join(f'{number:,} {name}' for name, number in counts.items())})"


def plain(parameters: Mapping[str, ParameterValue]) -> dict[str, Any]:
    """Parameters' values for JSON: of one that every model has, a list in the order of the models."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}
