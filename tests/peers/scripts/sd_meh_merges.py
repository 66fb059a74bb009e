"""Runs in sd-meh's environment: `python sd_meh_merges.py JOB.json` makes every case's merge with its functions."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sd_meh import merge_methods

NAMES = {"width": "alpha", "offset": "beta"}


def main():
    """Merge every tensor of every case; sd-meh's models are a, b and c, of which c is the base where there is one."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    models = [load_file(path) for path in job["models"]]
    for number, case in enumerate(job["cases"]):
        base, *others = models[: case["models"] + 1]
        inputs = [*others, base] if case["base"] else others
        merge = getattr(merge_methods, case["method"])
        parameters = {NAMES.get(key, key): value for key, value in case["parameters"].items()}
        merged = {  # of copies, because tensor_sum writes into its inputs
            name: merge(**dict(zip("abc", (model[name].clone() for model in inputs), strict=False)), **parameters)
            for name in base
        }
        save_file(
            {name: values.float().contiguous().clone() for name, values in merged.items()},
            Path(job["output"]) / f"out-{number}.safetensors",
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
