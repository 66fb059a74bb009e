"""A merge by sd-meh: `python merge_with_sd_meh.py JOB.json`."""

import time
from pathlib import Path

from described import DescribedJob, described_job
from sd_meh.merge import NUM_TOTAL_BLOCKS, load_sd_model, merge_models, save_model


def main() -> None:
    """Merge as its command line does, copy what is to be taken from one model, save."""
    job = described_job()
    started = time.perf_counter()
    mode, models, values = arguments(job)
    merged = merge_models(
        models,
        weights={letter: [value] * NUM_TOTAL_BLOCKS for letter, value in values.items()},
        bases=values,
        merge_mode=mode,
        precision=16 if job.dtype == "F16" else 32,
    )
    for role in {role for _, role in job.takes}:
        copied = {
            name: values for name, values in load_sd_model(job.files[role]).items() if job.taken_from(name) == role
        }
        merged.update(copied)
    save_model(merged, str(Path(job.output).with_suffix("")), "safetensors")
    job.tell_time(started)


def arguments(job: DescribedJob) -> tuple[str, dict[str, str], dict[str, float]]:
    """The merge mode, the models by letter, and alpha and beta; all three as sd-meh calls them."""
    a, b = (job.files[role] for role in job.merged)
    if job.method == "ties":
        return (
            "ties_add_difference",
            {"model_a": a, "model_b": b, "model_c": job.files[job.base]},
            {
                "alpha": 1.0,
                "beta": job.density,
            },
        )
    return "weighted_sum", {"model_a": a, "model_b": b}, {"alpha": job.weights[1] / sum(job.weights)}


if __name__ == "__main__":
    main()
