"""A merge by sd-mecha: `python merge_with_sd_mecha.py JOB.json`."""

import time
from functools import reduce
from itertools import accumulate

import sd_mecha
import torch
from described import DescribedJob, described_job
from sd_mecha import Parameter, RecipeNode, Return, StateDict, StateDictKeyError
from torch import Tensor

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

COMPONENTS = {"first_stage_model.*": "vae", "cond_stage_model.*": "clip_l"}
"""What sd-mecha calls the parts of a checkpoint."""


def main() -> None:
    """Build the recipe, and run it with sd-mecha's own defaults."""
    job = described_job()
    started = time.perf_counter()
    models = {role: sd_mecha.model(file) for role, file in job.files.items()}
    sd_mecha.merge(with_taken_parts(job, models), output=job.output, output_dtype=DTYPES[job.dtype])
    job.tell_time(started)


def with_taken_parts(job: DescribedJob, models: dict[str, RecipeNode]) -> RecipeNode:
    """The merge; parts taken from one model replaced by it; what could not be merged from the layout's model."""
    recipe = merged(job, models)
    if not job.takes:
        return recipe
    for match, role in job.takes:
        if match in COMPONENTS and role != job.layout:
            part = COMPONENTS[match]
            recipe = sd_mecha.omit_component(recipe, part) | sd_mecha.pick_component(models[role], part)
    return recipe | models[job.layout]


def merged(job: DescribedJob, models: dict[str, RecipeNode]) -> RecipeNode:
    """The merge itself."""
    inputs = [models[role] for role in job.merged]
    if job.method == "slerp":
        return sd_mecha.slerp(*inputs, alpha=job.t)
    if job.method == "linear":
        return weighted_mean(inputs, job.weights)
    if job.method == "ties":
        base = models[job.base]
        return base + sd_mecha.ties_sum(*(model - base for model in inputs), k=job.density, vote_sgn=True)
    base = models[job.base]
    changes = (task_vector(model, base) * weight for model, weight in zip(inputs, job.weights, strict=True))
    return reduce(lambda recipe, change: recipe + change, changes, base)


def weighted_mean(inputs: list[RecipeNode], weights: list[float]) -> RecipeNode:
    """Σ wᵢ θᵢ / Σ wᵢ as a chain of weighted sums of two."""
    recipe, *others = inputs
    for model, weight, total in zip(others, weights[1:], list(accumulate(weights))[1:], strict=True):
        recipe = sd_mecha.weighted_sum(recipe, model, alpha=weight / total)
    return recipe


@sd_mecha.merge_method
def task_vector(
    a: Parameter(StateDict[Tensor], "weight"),
    b: Parameter(StateDict[Tensor], "weight"),
    **kwargs,  # noqa: ANN003  (sd-mecha reads annotations, and knows none for this)
) -> Return(Tensor, "delta"):
    """a − b; a tensor whose shapes differ counts as missing, so that `|` can supply it."""
    key = kwargs["key"]
    if a[key].shape != b[key].shape:
        raise StateDictKeyError(key)
    return a[key] - b[key]


if __name__ == "__main__":
    main()
