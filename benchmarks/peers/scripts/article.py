"""The article's own script: unpickle all three checkpoints, copy one of them, replace its tensors, pickle it again.

Run as `python article.py JOB.json`.
"""

import time
from copy import deepcopy

import torch
from described import described_job


def main() -> None:
    """Merge with everything in memory, and one model twice."""
    job = described_job()
    started = time.perf_counter()
    models = {role: torch.load(file, map_location="cpu")["state_dict"] for role, file in job.files.items()}
    merged = deepcopy(models[job.layout])
    for name in merged:
        if source := job.taken_from(name):
            merged[name] = models[source][name]
        else:
            base = models[job.base][name]
            changes = (
                weight * (models[role][name] - base) for role, weight in zip(job.merged, job.weights, strict=True)
            )
            merged[name] = base + sum(changes)
    torch.save({"state_dict": merged}, job.output)
    job.tell_time(started)


if __name__ == "__main__":
    main()
