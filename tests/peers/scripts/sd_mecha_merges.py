"""Runs in sd-mecha's environment: `python sd_mecha_merges.py JOB.json` makes every case's merge with its functions."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sd_mecha.extensions.merge_methods import resolve


def call(name, *tensors, **parameters):
    """The plain function behind a merge method; its numbers are tensors."""
    return resolve(name).__wrapped__(
        *tensors,
        **{key: torch.tensor(value) if isinstance(value, float) else value for key, value in parameters.items()},
    )


def masked(name):
    """A difference that is added by a mask."""
    return lambda base, a, b, alpha=1.0: a + call(name, a, b, base, alpha=alpha) * (b - base)


MERGES = {
    "weighted_sum": lambda _, a, b, **p: call("weighted_sum", {"": a}, {"": b}, key="", **p),
    "n_average": lambda _, *models: call("n_average", *({"": model} for model in models), key=""),
    "slerp": lambda _, a, b, t, lerp_norm: call("slerp", a, b, alpha=t),
    "perpendicular_component": lambda _, a, b: call("perpendicular_component", a, b),
    "add_perpendicular": lambda base, a, b, alpha: a + alpha * call("perpendicular_component", a - base, b - base),
    "train_difference": masked("train_difference_mask"),
    "add_opposite": masked("add_opposite_mask"),
    "add_strict_opposite": masked("add_strict_opposite_mask"),
    "geometric_sum": lambda _, a, b, **p: call("geometric_sum", a, b, **p),
    "multiply_quotient": lambda base, a, b, **p: call("multiply_quotient", a, b, base, **p),
    "add_cosine_a": lambda _, a, b, **p: call("add_cosine_a", a, b, **p),
    "add_cosine_b": lambda _, a, b, **p: call("add_cosine_b", a, b, **p),
    "clamp": lambda _, a, *bounds, **p: call("clamp", a, *bounds, **p),
    "tensor_sum": lambda _, a, b, **p: resolve("tensor_sum").__wrapped__(a, b, **p),
    "crossover": lambda _, a, b, **p: resolve("crossover").__wrapped__(a, b, **p),
    "top_k_tensor_sum": lambda _, a, b, **p: resolve("top_k_tensor_sum").__wrapped__(a, b, **p),
    "geometric_median": lambda _, *models, max_iter=100: call(
        "geometric_median", *models, eps=1e-6, maxiter=torch.tensor(max_iter), ftol=1e-20
    ),
    "truncate_rank": lambda base, a, rank: (
        base + call("truncate_rank", a - base, rank=rank, use_approximate_basis=False)
    ),
    "rotate": lambda _, a, b, alpha=0.0, **p: resolve("rotate").__wrapped__(
        {"": a}, {"": b}, alpha=torch.tensor(alpha), key="", **p
    ),
    "model_stock": lambda base, *models, **_: base + call("model_stock", *(model - base for model in models)),
}


def main():
    """Merge every tensor of every case: of copies, because tensor_sum writes into its inputs."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    models = [load_file(path) for path in job["models"]]
    for number, case in enumerate(job["cases"]):
        used = models[: case["models"] + 1]
        merged = {
            name: MERGES[case["method"]](*(model[name].clone() for model in used), **case["parameters"])
            .contiguous()
            .clone()
            for name in used[0]
        }
        save_file(merged, Path(job["output"]) / f"out-{number}.safetensors")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
