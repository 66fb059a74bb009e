"""kohya's sd-scripts, which trains most LoRAs: `networks/sdxl_merge_lora.py` puts them into checkpoints of SDXL.

It is no package: `SD_SCRIPTS` names a checkout.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from benchmarks.tools import CannotRun, Command, Job, Tool

CHECKOUT: Final = "SD_SCRIPTS"
PRECISIONS: Final = {"F16": "fp16", "BF16": "bf16", "F32": "float"}
FULL_BYTES: Final = 6_000_000_000
"""A checkpoint of SDXL in 16 bits is more: the script builds the model in its own widths, which a miniature has not."""


def command(job: Job) -> Command:
    """`sdxl_merge_lora.py --sd_model MODEL --models LORA --ratios WEIGHT --save_to OUTPUT`, in float32."""
    merge = job.case.merge
    if merge.method != "bake":
        raise CannotRun("it merges adapters, into a model or with each other, and no models")
    model, *adapters = (job.models[role] for role in merge.models)
    if job.case.family != "sdxl" or model.stat().st_size < FULL_BYTES:
        raise CannotRun("its script knows SDXL in its own widths only, no other model and no miniature")
    words = [
        *(str(job.python), str(checkout() / "networks" / "sdxl_merge_lora.py"), "--sd_model", str(model)),
        *("--models", *map(str, adapters), "--ratios", *map(str, merge.weights[1:])),
        *("--precision", "float", "--save_precision", PRECISIONS[job.case.dtype]),
        *("--save_to", str(job.output / "merged.safetensors")),
    ]
    paths = os.pathsep.join(filter(None, (str(checkout()), os.environ.get("PYTHONPATH", ""))))
    return Command(tuple(words), "arithmetic in float32, as its help recommends", {"PYTHONPATH": paths})


def checkout() -> Path:
    """Where its scripts are."""
    found = os.environ.get(CHECKOUT)
    if not found or not (Path(found) / "networks").is_dir():
        raise CannotRun(f"{CHECKOUT} names no checkout of github.com/kohya-ss/sd-scripts")
    return Path(found)


KOHYA: Final = Tool(
    "kohya", "kohya's sd-scripts: sdxl_merge_lora.py", command, "kohya.txt", ("torch", "safetensors", "diffusers")
)
