"""How a merge went, for its report: what was planned, what the ledger says, and who did it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streammerge.compute.machine import may_have_cards, peak_resident_bytes
from streammerge.models.adapters.kept import told_of_factors
from streammerge.models.adapters.movement import changes_of
from streammerge.plan.plan import Plan
from streammerge.report import Elsewhere, InputFile, Report
from streammerge.storage.hashing import FileHashes, hashes_by_file, stale_sidecar
from streammerge.storage.ledger import Ledger
from streammerge.version import __version__
from streammerge.workers.machine import Machine


def report_of(
    plan: Plan, ledger: Ledger, machine: Machine | None, seconds: Mapping[str, float], hashes: Sequence[FileHashes]
) -> Report:
    """How it went; no machine if there was nothing to be done any more."""
    return Report(
        output=[str(path) for path in plan.output.weights],
        companions=[str(plan.output.path_of(companion)) for companion in plan.output.companions],
        method=plan.method,
        merged=plan.count("merged"),
        copied=plan.count("copied"),
        dropped=plan.count("dropped"),
        left_out=plan.merged.left_out,
        notes=plan.merged.remarks,
        findings=dict(sorted(ledger.findings.items())),
        on_nonfinite=plan.options.on_nonfinite,
        bytes_read=ledger.bytes_read,
        bytes_written=plan.output.nbytes,
        seconds=seconds,
        peak_rss_bytes=peak_resident_bytes(),
        baseline_rss_bytes=machine.baseline if machine else peak_resident_bytes(),
        peak_vram_bytes=machine.peak_vram_bytes() if machine else 0,
        device=str(machine.device) if machine else plan.options.device,
        dtype=sorted({kind.info.dtype.name for kind in plan.jobs.kinds}),
        threads=machine.allotment.threads if machine else 0,
        io=machine.io if machine else plan.options.io,
        loops=machine.loops if machine else "",
        resumed_bytes=ledger.found.spans.nbytes,
        inputs=[InputFile(str(file.path), file.nbytes) for file in plan.inputs],
        hashes=hashes_by_file(plan, hashes),
        stale_hashes="" if hashes else stale_sidecar(plan.output),
        factored=told_of_factors(plan.merged.factored, ledger.factored),
        adapters=[account.to_json() for account in plan.merged.accounts],
        changes={} if ledger.found.spans else changes_of(ledger.changes),
        version=__version__,
        elsewhere=_elsewhere(plan, machine, seconds["total"]),
    )


def _elsewhere(plan: Plan, machine: Machine | None, took: float) -> Elsewhere | None:
    """Where it would have been faster, if there are cards, and it was done here from its beginning to its end."""
    if machine is None or not may_have_cards():
        return None
    from streammerge.plan import estimates

    if machine.device.startswith("cuda"):
        from streammerge.compute.probing import rates_here

        rates_here()  # once and for all, when the output is in place
    found = estimates.elsewhere(plan, machine.device, took)
    return None if found is None else Elsewhere(found.device, found.seconds, found.told())
