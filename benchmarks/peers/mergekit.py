"""mergekit: `mergekit-pytorch` for single files, `mergekit-yaml` for folders of transformers.

A case is put in the words that give the right result with the least work: arithmetic in the stored dtype, and weights
per tensor where something is to be copied from one model.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.cases import Merge
from benchmarks.peers.description import SCRIPTS
from benchmarks.tools import CannotRun, Command, Job, Tool
from streammerge import open_model

DTYPES: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

Models = Mapping[str, Path]


def pytorch_command(job: Job) -> Command:
    """`mergekit-pytorch RECIPE OUTPUT`."""
    if job.case.merge.method == "bake":
        raise CannotRun("it puts adapters into folders of transformers models only")
    if job.case.container == "shards":
        raise CannotRun("mergekit-pytorch takes single files; mergekit-yaml runs this case")
    if not job.case.merge.takes:
        return command(job, "mergekit-pytorch", recipe(job, job.models))
    models, prepared = readable(job)
    note = "put as a weighted sum with weights per tensor, for its task arithmetic needs every tensor in every model"
    return command(job, "mergekit-pytorch", summing_recipe(job, models), "--tensor-union", note=note + prepared)


def yaml_command(job: Job) -> Command:
    """`mergekit-yaml RECIPE OUTPUT`."""
    if job.case.container != "shards":
        raise CannotRun("mergekit-yaml takes folders of transformers models; mergekit-pytorch runs this case")
    return command(job, "mergekit-yaml", recipe(job, job.models))


def command(job: Job, program: str, written: Mapping[str, Any], *options: str, note: str = "") -> Command:
    """The process, its recipe written down."""
    path = job.scratch / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(written)), encoding="utf-8")
    return Command((str(job.program(program)), str(path), str(job.output), *options), note)


def recipe(job: Job, models: Models) -> dict[str, Any]:
    """The merge in mergekit's words, which are the field's."""
    merge = job.case.merge
    weights = dict(zip(merge.models, merge.weights, strict=False))
    parameters = {"slerp": {"t": merge.t}, "ties": {"density": merge.density}}.get(merge.method, {})
    written: dict[str, Any] = {
        "merge_method": merge.method,
        "models": [
            {"model": str(models[role]), "parameters": {"weight": weights[role]} if weights else {}}
            for role in merge.models
        ],
        "parameters": parameters,
        "dtype": DTYPES[job.case.dtype],
    }
    base = merge.models[0] if merge.method == "slerp" else merge.base
    if base:
        written["base_model"] = str(models[base])
    return written


def summing_recipe(job: Job, models: Models) -> dict[str, Any]:
    """Task arithmetic as the weighted sum it is, in which a tensor to be copied has weight 1 in one model."""
    merge = job.case.merge
    return {
        "merge_method": "linear",
        "models": [
            {"model": str(models[role]), "parameters": {"weight": weight_per_tensor(merge, role, coefficient)}}
            for role, coefficient in coefficients(merge).items()
        ],
        "dtype": DTYPES[job.case.dtype],
    }


def coefficients(merge: Merge) -> dict[str, float]:
    """What each model is multiplied by; a base that cancels out is left out."""
    found = dict(zip(merge.models, merge.weights, strict=True))
    of_base = 1 - sum(merge.weights)
    return found if abs(of_base) < 1e-9 else {merge.base: of_base, **found}


def weight_per_tensor(merge: Merge, role: str, coefficient: float) -> list[dict[str, Any]]:
    """mergekit's conditional parameter: the first filter that is part of a tensor's name holds."""
    taken = [{"filter": take.match.removesuffix("*"), "value": float(take.model == role)} for take in merge.takes]
    return [*taken, {"value": coefficient}]


def readable(job: Job) -> tuple[Models, str]:
    """Models that it can merge, and a note on those that are copies for its sake: of equal shapes, not wrapped."""
    layout = open_model(job.models[job.case.layout]).tensors
    models, notes = dict(job.models), []
    for role in coefficients(job.case.merge):
        tensors = open_model(job.models[role]).tensors
        strange = [name for name, info in tensors.items() if name in layout and info.shape != layout[name].shape]
        if strange:
            notes.append(f"{role} without {', '.join(strange)}, for it refuses tensors of different shapes")
        if job.case.container == "ckpt":
            notes.append(f"{role} without the dict around its state dict, in which it finds no tensor")
        if strange or job.case.container == "ckpt":
            models[role] = copied(job, role, strange)
    return models, f"; copied beforehand, which is not timed: {'; '.join(notes)}" if notes else ""


def copied(job: Job, role: str, unwanted: list[str]) -> Path:
    """A copy of a model's state dict without some of its tensors."""
    source = job.models[role]
    target = job.scratch / f"{role}{source.suffix}"
    words = [str(job.python), str(SCRIPTS / "state_dict.py"), str(source), str(target), *unwanted]
    subprocess.run(words, check=True, capture_output=True)
    return target


PACKAGES: Final = ("mergekit", "torch", "safetensors", "transformers")
MERGEKIT_PYTORCH: Final = Tool("mergekit-pytorch", "mergekit-pytorch", pytorch_command, "mergekit.txt", PACKAGES)
MERGEKIT_YAML: Final = Tool("mergekit-yaml", "mergekit-yaml", yaml_command, "mergekit.txt", PACKAGES)
