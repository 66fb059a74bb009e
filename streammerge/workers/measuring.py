"""What has to be known of differences before an adapter's header can be written: a merge whose outputs are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from streammerge.compute.job import Job
from streammerge.methods.factoring import BEFORE
from streammerge.models.adapters.ranks import Spectrum
from streammerge.models.merged import Merged
from streammerge.plan.inputs import OpenInputs
from streammerge.plan.plan import Plan, plan_merge
from streammerge.recipe.options import Options
from streammerge.report import Watch
from streammerge.storage.ledger import Ledger
from streammerge.workers.machine import Machine

STAGE: Final = "measure"


class Collected:
    """Where outputs go that are few numbers: they are kept."""

    def __init__(self) -> None:
        self.data: dict[str, bytearray] = {}

    def write(self, job: Job, position: int, data: memoryview) -> None:
        """Keep the bytes that belong at this position of the job's tensor."""
        kept = self.data.setdefault(job.name, bytearray(job.info.nbytes))
        kept[position : position + data.nbytes] = data.cast("B")


def with_measured_ranks(
    merged: Merged, output: Path, options: Options, opened: OpenInputs, watch: Watch | None
) -> Merged:
    """An adapter with the ranks that follow from what is measured of the differences that it is made of."""
    assert merged.factored is not None
    assert merged.settle is not None
    measures = Merged(merged.factored.measures(), kept_bytes=merged.kept_bytes)
    once = replace(options, shard_size=None, on_nonfinite="ignore")
    plan = plan_merge(measures, output, once, opened.sources(measures))
    return merged.settle(measured(plan, watch))


def measured(plan: Plan, watch: Watch | None) -> Mapping[str, Spectrum]:
    """What a plan of measures comes to, by the names of what is measured."""
    ledger, collected = Ledger(plan.jobs.nbytes), Collected()
    ledger.stage = STAGE
    Machine(plan).run(collected, ledger, watch)
    found = {name: memoryview(data).cast("f").tolist() for name, data in collected.data.items()}
    return {name: Spectrum(values[0], values[1], tuple(values[BEFORE:])) for name, values in found.items()}
