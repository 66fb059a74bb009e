"""A job as JSON, for the scripts that run where nothing of this project is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from benchmarks.tools import PEERS_FOLDER, Command, Job

SCRIPTS: Final = PEERS_FOLDER / "scripts"


def script_command(job: Job, script: str, note: str = "", output: str = "merged.safetensors") -> Command:
    """The process that runs one of our scripts in the tool's environment, on a description of the job."""
    return Command((str(job.python), str(SCRIPTS / script), str(written_description(job, output))), note)


def written_description(job: Job, output: str) -> Path:
    """A file with the job's description; `scripts/described.py` reads it."""
    merge = job.case.merge
    description = {
        "method": merge.method,
        "models": {role: [str(file) for file in weights_of(job.models[role])] for role in merge.roles},
        "merged": merge.models,
        "base": merge.base,
        "weights": merge.weights,
        "t": merge.t,
        "density": merge.density,
        "takes": [[take.match, take.model] for take in merge.takes],
        "layout": job.case.layout,
        "dtype": job.case.dtype,
        "output": str(job.output / output),
        "timing": str(job.timing),
    }
    path = job.scratch / "job.json"
    path.write_text(json.dumps(description, indent=2), encoding="utf-8")
    return path


def weights_of(model: Path) -> list[Path]:
    """The files that hold a model's tensors."""
    return sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
