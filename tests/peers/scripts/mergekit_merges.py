"""Runs in mergekit's environment: `python mergekit_merges.py JOB.json` makes every merge with mergekit-pytorch."""

import json
import sys
from pathlib import Path

import yaml
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from safetensors.torch import load_file, save_file

PER_MODEL = ("weight", "density", "gamma", "epsilon")


def recipe_of(case, paths):
    """The case in mergekit's YAML; every model has all of its parameters, for mergekit fails on the ones left out."""
    used = paths[1 : case["models"] + 1]
    shared, own = {}, [{} for _ in used]
    for name, value in case["parameters"].items():
        if name in PER_MODEL and case["per_model"]:
            values = value if isinstance(value, list) else [value] * len(used)
            for parameters, each in zip(own, values, strict=True):
                parameters[name] = each
        else:
            shared[name] = value
    recipe = {
        "merge_method": case["method"],
        "models": [{"model": path, "parameters": each} for path, each in zip(used, own, strict=True)],
        "parameters": shared,
        "dtype": "float32",
    }
    if case["base"]:
        recipe["base_model"] = paths[0]
        recipe["models"].append({"model": paths[0], "parameters": own[0]})
    return recipe


def main():
    """Make every merge in a folder of its own."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    output = Path(job["output"])
    for number, case in enumerate(job["cases"]):
        recipe, folder = output / f"{number}.yaml", output / f"merged-{number}"
        recipe.write_text(yaml.safe_dump(recipe_of(case, job["models"])), encoding="utf-8")
        try:
            mergekit_pytorch.main([str(recipe), str(folder)], standalone_mode=False)
        except Exception as error:
            raise RuntimeError(f"case {number}: {case}") from error
        merged = {name: values for part in folder.glob("*.safetensors") for name, values in load_file(part).items()}
        save_file(merged, output / f"out-{number}.safetensors")


if __name__ == "__main__":
    main()
