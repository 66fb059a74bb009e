"""sd-meh: a library whose command line is not in its package, so a script of our own calls it as its README does."""

from __future__ import annotations

import math
from typing import Final

from benchmarks.cases import Case
from benchmarks.peers.description import script_command
from benchmarks.tools import CannotRun, Command, Job, Tool

MOST_MODELS: Final = 3


def command(job: Job) -> Command:
    """The script with the job's description."""
    if reason := why_not(job.case):
        raise CannotRun(reason)
    notes = ["arithmetic in float16"] if job.case.dtype == "F16" else []
    if job.case.merge.method == "ties":
        notes.append("signs are elected by count, not by the weighted sum, so where two models disagree none counts")
    if job.case.merge.takes:
        notes.append("put as a weighted sum of depth and waifu, the rest copied over")
    return script_command(job, "merge_with_sd_meh.py", "; ".join(notes))


def why_not(case: Case) -> str:
    """Why it can't run a case; "" if it can."""
    merge = case.merge
    if case.container == "shards":
        return "it reads single files of Stable Diffusion only"
    if case.family == "other":
        return "it merges no tensor without `model` in its name"
    if merge.method in ("slerp", "bake"):
        return f"it has no {merge.method}"
    if len(merge.models) > MOST_MODELS - 1:
        return f"it takes no more than {MOST_MODELS} models"
    if merge.method == "task_arithmetic" and not math.isclose(sum(merge.weights), 1):
        return "it adds one task vector at a time"
    return ""


SD_MEH: Final = Tool("sd-meh", "sd-meh", command, "sd-meh.txt", ("sd-meh", "torch", "safetensors", "tensordict"))
