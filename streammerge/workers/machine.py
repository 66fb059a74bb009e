"""The lanes in which a plan is carried out, with as much memory as is allowed: for writing, and for checking."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streammerge.compute.costs import DECOMPOSING
from streammerge.compute.expressions import ModelStatistics, SharedStatistics, applications
from streammerge.compute.job import Job
from streammerge.compute.kernels.library import filled, kernels
from streammerge.compute.kernels.maker import KernelMaker
from streammerge.compute.machine import OWN_BYTES, import_torch, resident_bytes
from streammerge.compute.makers import Maker
from streammerge.compute.neighbours import neighbours
from streammerge.compute.sharing import sharing, whole_of
from streammerge.findings import refuse_nonfinite
from streammerge.formats.readers import open_reader
from streammerge.methods import METHODS
from streammerge.plan.allotting import allot_memory
from streammerge.plan.plan import Plan
from streammerge.report import Watch
from streammerge.storage.copying import Copying
from streammerge.storage.ledger import Ledger, Sink
from streammerge.workers.checking import Checker, ReadBack, Samples, computed_samples, copied_samples, sample
from streammerge.workers.schedule import run
from streammerge.workers.windows import MergeWork, NeighboursWork, SampledWork, TogetherWork, Work


@dataclass(frozen=True, slots=True)
class Extent:
    """How much was computed again: windows of so many tensors of all, or, if `windows` is None, everything."""

    tensors: int
    of: int
    windows: int | None = None


class Machine:
    """The makers by which a plan is carried out: as many as the memory allows, on the device that was asked for.

    Where compiled loops do all of it, torch is never imported, and `baseline` is 0; else it is what a bare import of
    torch takes of memory. What is measured of the whole model is kept: the check needn't measure it again.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.measured: ModelStatistics = {}
        self.baseline, self.device, self.cards = 0, "cpu", 1
        vram, card_bytes = plan.options.max_vram, 0
        if plan.needs_torch:
            import_torch()
            from streammerge.compute.devices import check_float64, find_devices, vram_limit

            devices = find_devices(plan.options.device)
            check_float64(devices[0], plan.jobs)
            card_bytes = plan.memory.card_bytes if devices[0].type in DECOMPOSING else 0
            self.device, self.cards = ",".join(map(str, devices)), len(devices)
            vram = vram_limit(devices, plan.options.max_vram, card_bytes)
        resident = resident_bytes()
        if "torch" in sys.modules:
            # a bare import of torch would take as much without this package, and without what is kept of the models
            self.baseline = resident - OWN_BYTES - plan.described_bytes
        self.allotment = allot_memory(plan.memory, resident, vram, card_bytes=card_bytes, cards=self.cards)
        self.device = ",".join(self.device.split(",")[: self.allotment.cards])  # others have no lane
        self.io = self._io()

    def _io(self) -> Literal["mmap", "pread"]:
        """How files are read."""
        if self.device.startswith("cuda") and self.plan.options.io == "auto":
            return "pread"  # straight into pinned memory
        if uses_own_methods(self.plan):
            return "pread"  # who writes to what is mapped, is killed
        return self.plan.io

    @property
    def loops(self) -> str:
        """What computes: compiled loops, torch, or both; "" where everything is copied."""
        computed = [kind for kind in self.plan.jobs.kinds if kind.compute is not None]
        by_torch = not all(kind.is_compiled for kind in computed)
        by_loops = any(kind.is_compiled or kind.is_summed for kind in computed)
        return " and ".join(["torch"] * by_torch + ["compiled loops"] * by_loops)

    def _makers(self) -> Sequence[Maker]:
        """As many as were allotted, each with a reader of its own."""
        if self.device == "cpu" and kernels() is not None:
            mapped = self.allotment.mapped_bytes
            return [KernelMaker(open_reader(self.io, mapped, fill=filled)) for _ in range(self.allotment.threads)]
        from streammerge.compute.devices import find_devices, open_lanes
        from streammerge.compute.tensor_maker import TensorMaker

        return [TensorMaker(lane) for lane in open_lanes(find_devices(self.device), self.io, self.allotment)]

    def run(
        self,
        sink: Sink,
        ledger: Ledger,
        watch: Watch | None,
        copying: Copying | None = None,
        samples: Samples | None = None,
    ) -> None:
        """Give every byte of the output that is computed, or only samples, to the sink; finish the copying."""
        jobs = self.plan.jobs if samples is None else samples
        due = (job for job in jobs if job.compute is not None and not ledger.has_all(job))
        makers = self._makers()

        def look() -> None:
            if self.plan.options.on_nonfinite == "error":
                refuse_nonfinite(dict(ledger.findings))
            if watch:
                watch(ledger)

        if first := next(due, None):
            self._measure(makers, ledger, look)
        shared: SharedStatistics = {}  # of this run alone: who checks an output measures again
        waiting = itertools.chain([first] if first else [], due)
        # how far each tensor is moved isn't told by neighbours that are made as one
        groups = ([job] for job in waiting) if ledger.is_weighing else neighbours(waiting)
        works: Iterator[Work] = (
            (SampledWork(job, sink, ledger, self.measured, samples[job]) for job in waiting)
            if samples
            else (self._work(group, sink, ledger, shared) for group in sharing(groups))
        )
        run(works, makers, look, copying, held_bytes=self.allotment.held_bytes)
        look()

    def _work(self, jobs: Sequence[Job], sink: Sink, ledger: Ledger, shared: SharedStatistics) -> Work:
        if len(jobs) > 1 and jobs[0].is_compiled:
            return NeighboursWork(jobs, sink, ledger)
        if whole_of(jobs[0].node) is not None:
            from streammerge.workers.sharing import SharedWork  # late: few merges have factors

            return SharedWork(jobs, sink, ledger, self.measured)
        return MergeWork(jobs[0], sink, ledger, self.measured, shared)

    def _measure(self, makers: Sequence[Maker], ledger: Ledger, look: Callable[[], None]) -> None:
        """Take the statistics of the whole model that are wanted, unless they have been."""
        wanted = self.plan.together.items()
        works = [TogetherWork(together, dtypes, ledger) for together, dtypes in wanted if together not in self.measured]
        if works:
            with ledger.doing("measure the whole model", self.plan.bytes_before_writing):
                run(works, makers, look)
        self.measured.update((work.together, work.measuring.result) for work in works)

    def check(self, read: ReadBack, path: Path, watch: Watch | None) -> None:
        """Compute every byte again and compare it with what is read back."""
        checker, ledger = Checker(read), Ledger(self.plan.jobs.nbytes)
        self.run(checker, ledger, watch, Copying(self.plan.jobs, checker, ledger))
        checker.report(path)

    def check_samples(self, read: ReadBack, path: Path, watch: Watch | None) -> Extent:
        """Compute windows that are spread over the output again and compare them with what is read back."""
        samples, checker = sample(self.plan.jobs), Checker(read)
        copied = copied_samples(samples)
        checker.copy(copied)
        self.run(checker, Ledger(self.plan.jobs.nbytes), watch, samples=samples)
        checker.report(path)
        return Extent(len(samples), len(self.plan.jobs), len(copied) + computed_samples(samples))

    def peak_vram_bytes(self) -> int:
        """The most memory that was taken on a CUDA device; of several, on the one of which most was taken."""
        if not self.device.startswith("cuda"):
            return 0
        import torch

        return max(map(torch.cuda.max_memory_allocated, self.device.split(",")))


def uses_own_methods(plan: Plan) -> bool:
    """Whether something is computed by a method that does not come with the program."""
    if not any(method.is_own for method in METHODS.values()):
        return False  # as nearly always: then large models needn't be gone through
    return any(part.method.is_own for job in plan.jobs for part in applications(job.node))
