"""What will happen, to every tensor and to the machine: from the recipe and the headers, before anything is read."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from streammerge.architecture import component_of
from streammerge.errors import OutputError, count, plural
from streammerge.formats.files import ByteFile
from streammerge.layout import OutputLayout, lay_out
from streammerge.machine import MIB, Allotment, share_out
from streammerge.magnitudes import check_magnitudes
from streammerge.merged import Action, Decision, Merged
from streammerge.methods.contract import ParameterValue
from streammerge.methods.place import Target
from streammerge.methods.slices import Slicing
from streammerge.nodes import (
    BLOCK,
    PIECE,
    Applied,
    ByBlock,
    ByGram,
    ByWhole,
    Combined,
    Node,
    Stored,
    Together,
    children,
    compute_dtype,
    leaves,
    slots,
    walk,
)
from streammerge.options import Options, format_size
from streammerge.progress import Progress
from streammerge.tensors import DType, TensorInfo

OVERHEAD_BYTES: Final = 16 * MIB
"""What the process takes beside its lanes, above a bare `import torch`: modules, headers, the plan itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One output tensor: its expression, the dtype it is computed in, and where its bytes go.

    `compute` is None where the stored bytes are copied as they are.
    """

    name: str
    info: TensorInfo
    node: Node
    compute: DType | None
    file: int
    offset: int


@dataclass(frozen=True)
class Plan:
    """A merge ready to be run: what becomes of the tensors, where they go, and what it costs."""

    method: str
    merged: Merged
    jobs: tuple[Job, ...]
    output: OutputLayout
    inputs: tuple[ByteFile, ...]
    options: Options
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What becomes of every tensor of the layout."""
        return self.merged.decisions

    def count(self, action: Action) -> int:
        """How many tensors meet this fate."""
        return sum(decision.action == action for decision in self.decisions)

    @property
    def bytes_to_read(self) -> int:
        """What all passes together read, at most."""
        return sum(bytes_read(job.node) for job in self.jobs)

    @property
    def passes(self) -> int:
        """The most passes over one tensor, the one that writes it included."""
        return max((passes(job.node) for job in self.jobs), default=0)

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
                advice=f"Free {format_size(self.output.nbytes - free)}, or write to another disk.",
            )

    def new_progress(self, done_bytes: int = 0) -> Progress:
        """A count of what is done, with so much done already."""
        return Progress(total_bytes=sum(job.info.nbytes for job in self.jobs), done_bytes=done_bytes)

    @property
    def lane_bytes(self) -> int:
        """What a lane takes at the most beside what it maps."""
        return max((lane_bytes(job) for job in self.jobs if job.compute is not None), default=0)

    @property
    def held_bytes(self) -> int:
        """What has to be held beside the lanes' buffers, for the tensor that takes the most of it."""
        return max((held_bytes(job.node) for job in self.jobs), default=0)

    def allot(self, work_limit: int | None = None, vram_limit: int | None = None) -> Allotment:
        """Share `work_limit` bytes out to lanes, as many as fit, and the card's memory, and the machine has cores for.

        Whole tensors are held beside the lanes' buffers: one at a time, and more where the limit leaves room for them.
        """
        held, vram = self.held_bytes, vram_limit or self.options.max_vram
        lanes_limit = None if work_limit is None else work_limit - held
        shared = share_out(self.lane_bytes, self.options.threads, lanes_limit, device_limit=vram)
        if held and work_limit is not None:
            held = max(held, min(work_limit - shared.work_bytes, held * shared.threads))
        return replace(shared, held_bytes=held, work_bytes=shared.work_bytes + held)

    @property
    def together(self) -> Mapping[Together, Mapping[int, DType]]:
        """What has to be measured of the whole model before anything is written."""
        return together_of(self.jobs)

    @property
    def bytes_before_writing(self) -> int:
        """What is read to measure the whole model, at most."""
        return sum(
            member.method.passes * sum(map(_evaluation_bytes, member.inputs))
            for together in self.together
            for member in together.members
        )

    def to_json(self) -> dict[str, Any]:
        """The plan for machines: every tensor with its fate, and the costs."""
        return {
            "method": self.method,
            "output": [str(path) for path in self.output.paths],
            "output_bytes": self.output.nbytes,
            "free_disk_bytes": self.free_disk,
            "bytes_to_read": self.bytes_to_read,
            "passes": self.passes,
            "work_ram_bytes": self.work_bytes,
            "inputs": [{"path": str(file.path), "bytes": file.nbytes} for file in self.inputs],
            "left_out": {model: list(names) for model, names in self.merged.left_out.items()},
            "lacking": {model: list(names) for model, names in self.merged.lacking.items()},
            "tensors": [
                {
                    "name": decision.name,
                    "action": decision.action,
                    "why": decision.why,
                    **({"block": decision.block} if decision.block else {}),
                    **({"parameters": plain(decision.parameters)} if decision.parameters else {}),
                    "dtype": decision.info.dtype.name,
                    "shape": list(decision.info.shape),
                }
                for decision in self.decisions
            ],
        }

    @property
    def work_bytes(self) -> int:
        """The RAM that the merge takes above a bare `import torch`, at most."""
        return OVERHEAD_BYTES + self.allot().work_bytes

    def summary(self) -> Counter[str]:
        """How many tensors share an action and its reason, as `merged: linear`."""
        return Counter(f"{decision.action}: {decision.why}" for decision in self.decisions)

    def notes(self) -> list[str]:
        """What the user should know of tensors that not every model has."""
        left_out = [
            f"{by_component(names)} of {model} {plural(names, 'is', 'are')} not in the layout and left out"
            for model, names in self.merged.left_out.items()
        ]
        dropped = {decision.name for decision in self.decisions if decision.action == "dropped"}
        lacking = [
            f"{model} lacks {by_component(names)} of the layout's; {_fate(len(dropped.intersection(names)))}"
            for model, names in self.merged.lacking.items()
        ]
        return [*self.merged.remarks, *left_out, *lacking]


def make_plan(
    merged: Merged,
    output: Path,
    options: Options,
    *,
    method: str = "",
    inputs: Sequence[ByteFile] = (),
    metadata: Mapping[str, str] | None = None,
    description: Mapping[str, Any] | None = None,
) -> Plan:
    """Lay out the output of a merge and turn every tensor into a job, in the order of the output's bytes.

    `description` is the recipe's, if there is one.
    """
    layout = lay_out(output, merged.tensors, metadata or {}, options.shard_size)
    jobs = tuple(
        _job(merged, name, number, offset, options)
        for number, file in enumerate(layout.files)
        for name, offset in file.header.offsets.items()
    )
    return Plan(method, merged, jobs, layout, tuple(inputs), options, description or {})


def _job(merged: Merged, name: str, file: int, offset: int, options: Options) -> Job:
    node, info = merged.nodes[name], merged.tensors[name]
    if options.on_nonfinite == "error" and info.dtype.mergeable and is_copy(node, info):
        # nobody looks at what the system copies: its bytes go through our memory instead, as they are
        return Job(name, info, copied_from(node), info.dtype, file, offset)
    compute = _compute_dtype(node, info, options)
    if compute is not None:
        check_magnitudes(name, node, compute)
    return Job(name, info, node, compute, file, offset)


def _compute_dtype(node: Node, info: TensorInfo, options: Options) -> DType | None:
    """What a tensor is computed in: nothing if its bytes are copied; the user's choice holds for merged ones."""
    if is_copy(node, info):
        return None
    is_merged = isinstance(node, Combined | Applied)
    return (options.compute_dtype if is_merged else None) or compute_dtype(node, info.dtype)


def is_copy(node: Node, info: TensorInfo) -> bool:
    """Whether the output's bytes are the stored ones."""
    if isinstance(node, Combined) and len(node.terms) == 1 and node.terms[0].coefficient == 1:
        node = node.terms[0].node
    return isinstance(node, Stored) and node.info.dtype == info.dtype


def copied_from(node: Node) -> Stored:
    """The stored tensor that a copy reads."""
    while isinstance(node, Combined):
        node = node.terms[0].node
    assert isinstance(node, Stored)
    return node


def lane_bytes(job: Job) -> int:
    """What a lane needs for this tensor beside its mapped windows: slots, stored blocks, a method's temporaries."""
    assert job.compute is not None
    by_piece = isinstance(job.node, ByBlock) and not job.node.method.rows
    elements = min(PIECE if by_piece else BLOCK, job.info.elements)
    size = job.compute.bits // 8
    blocks = slots(job.node) * elements
    for part in walk(job.node):
        if isinstance(part, ByBlock):
            # rows are given beside the blocks that they are cut from and cut into, and may be longer than these
            rows = row_elements(part)
            temporaries = part.method.temporaries + part.method.temporaries_each * len(part.inputs)
            blocks += temporaries * max(min(PIECE, elements), rows) + (len(part.inputs) + 2) * rows
            blocks += 0 if part is job.node else elements
        elif isinstance(part, ByGram):
            blocks += len(part.inputs) * elements * (1 if part.slices is None else 4)  # of slices as float64, at once
    widest = max((leaf.info.dtype.bits // 8 for leaf in leaves(job.node)), default=0)
    return blocks * size + elements * (slots(job.node) * widest + job.info.dtype.bits // 8)


def row_elements(node: ByBlock) -> int:
    """How many elements of whole rows a method is given at once, its halo's too; 0 if it takes blocks as they come."""
    if node.method.rows is None or not node.info.elements:
        return 0
    width, halo = Slicing.of(node.info.shape, node.method.rows).width, node.method.halo
    own = max(min(BLOCK if halo else PIECE, node.info.elements), width)
    return min(own + 2 * halo * width, max(node.info.elements, own))


def held_bytes(node: Node) -> int:
    """What is held for as long as the tensor is under way: whole tensors, and statistics of rows."""
    return sum(_held_by(part) for part in walk(node) if isinstance(part, Applied))


def _held_by(node: Applied) -> int:
    target = Target(node.name, node.info.shape, len(node.inputs))
    match node:
        case ByWhole():
            widest = 8 if any(leaf.info.dtype.bits == 64 for leaf in leaves(node)) else 4
            beside = node.method.held(target, node.parameters) if node.method.held else 0
            return node.info.elements * widest * (len(node.inputs) + node.method.temporaries + 1) + beside
        case ByGram():
            slices, inputs = node.slices, len(node.inputs)
            # products, as many on their way at the most, and coefficients
            return 0 if slices is None else Slicing.of(node.info.shape, slices).count * 8 * inputs * (2 * inputs + 1)
        case ByBlock():
            return node.method.held(_measured(node), node.parameters) if node.method.held else 0


def _measured(node: ByBlock) -> Target:
    """What the node's statistics are taken of: its tensor; those of a whole model count with its first tensor."""
    if node.together is None:
        return Target(node.name, node.info.shape, len(node.inputs))
    members = node.together.members
    if node is not members[0]:
        return Target(node.name, (0,), len(node.inputs))
    parts = tuple(Target(member.name, member.info.shape, len(member.inputs)) for member in members)
    return Target("", (sum(part.elements for part in parts),), len(node.inputs), parts=parts)


def bytes_read(node: Node) -> int:
    """What evaluating a whole tensor reads, the passes of its methods included."""
    return _evaluation_bytes(node) + sum(
        own_passes(part) * sum(map(_evaluation_bytes, part.inputs)) for part in walk(node) if isinstance(part, Applied)
    )


def _evaluation_bytes(node: Node) -> int:
    """What is read to compute every block once: nothing of what a whole method has made already."""
    if isinstance(node, ByWhole):
        return 0
    return sum(map(_evaluation_bytes, children(node))) if children(node) else node.info.nbytes


def passes(node: Node) -> int:
    """How often the tensor's inputs are gone over, at most: nested methods' passes follow each other."""
    if isinstance(node, ByWhole):
        return max(map(passes, node.inputs))
    below = max((passes(child) - 1 for child in children(node)), default=0)
    return 1 + below + (own_passes(node) if isinstance(node, Applied) else 0)


def own_passes(node: Applied) -> int:
    """The passes over its inputs that the node itself makes before it can be computed."""
    return node.method.passes if isinstance(node, ByBlock) else 1


def together_of(jobs: Iterable[Job]) -> Mapping[Together, Mapping[int, DType]]:
    """What has to be measured of the whole model before anything is written, and what its tensors are computed in."""
    dtypes: dict[int, DType] = {}
    found: dict[int, Together] = {}
    for job in jobs:
        for part in walk(job.node):
            if isinstance(part, ByBlock) and part.together is not None and job.compute is not None:
                found[id(part.together)] = part.together
                dtypes.setdefault(id(part), job.compute)
    return {
        together: {id(member): dtypes[id(member)] for member in together.members if id(member) in dtypes}
        for together in found.values()
    }


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


def dump_json(value: Any) -> str:  # noqa: ANN401
    """JSON as people like to read it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
