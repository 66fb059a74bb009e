"""sd-mecha: a library without a command line, so a script of our own calls it as its README does."""

from __future__ import annotations

from typing import Final

from benchmarks.peers.description import script_command
from benchmarks.tools import CannotRun, Command, Job, Tool

NOTES: Final = {
    "sd2": "it takes SD 2 for SD 1, and writes no tensor that SD 1 lacks: the text encoder is missing",
    "slerp": "its slerp joins unit vectors and scales by the mixed norm, which differs where the norms do",
}


def command(job: Job) -> Command:
    """The script with the job's description."""
    if job.case.container == "ckpt":
        raise CannotRun("it reads safetensors only")
    if job.case.merge.method == "bake":
        raise CannotRun("our script for it merges models only")
    if job.case.container == "shards":
        raise CannotRun("it reads single files only, no shards")
    notes = [NOTES[word] for word in (job.case.family, job.case.merge.method) if word in NOTES]
    return script_command(job, "merge_with_sd_mecha.py", "; ".join(notes))


SD_MECHA: Final = Tool("sd-mecha", "sd-mecha", command, "sd-mecha.txt", ("sd-mecha", "torch", "safetensors"))
