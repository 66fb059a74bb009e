"""How a merge is to be run: everything that is not part of what is merged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypedDict

from streammerge.compute.machine import IoMode
from streammerge.errors import RecipeError
from streammerge.recipe.parse import MissingPolicy, ShapePolicy
from streammerge.report import NonfinitePolicy
from streammerge.tensors import DTYPES, DType

COMPUTE_DTYPES: Final[Mapping[str, DType]] = {
    "fp32": DTYPES["F32"],
    "fp64": DTYPES["F64"],
    "fp16": DTYPES["F16"],
    "bf16": DTYPES["BF16"],
}


_UNITS: Final = {
    "": 1,
    **{prefix + suffix: 1000**power for power, prefix in enumerate("kmgt", 1) for suffix in ("", "b")},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
    "b": 1,
}


_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The bounds and the manner of a run. Sizes are in bytes; None leaves the choice to streammerge.

    Every `journal` seconds what is written is synced and written down, so that `resume` can go on with it; 0: never.
    """

    device: str = "cpu"
    compute_dtype: DType | None = None
    max_ram: int | None = None
    max_vram: int | None = None
    threads: int | None = None
    io: IoMode = "auto"
    shard_size: int | None = None
    force: bool = False
    sync: bool = True
    metadata: bool = True
    verify: bool = False
    on_nonfinite: NonfinitePolicy = "warn"
    hash: bool = False
    hash_inputs: bool = False
    resume: bool = False
    journal: float = 15.0

    @property
    def torch_must_check(self) -> bool:
        """Whether only torch can tell if a device is there, or how much it leaves of a bound on memory."""
        return self.device != "cpu" or self.max_ram is not None or self.max_vram is not None


def parse_size(text: str) -> int:
    """Bytes from `512MB`, `2GiB`, `1.5G` or a plain number; powers of 1000 unless the unit has an i."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise RecipeError(f"{text!r} is no size", advice="Write it like 512MB, 2GiB or 1.5G.")
    return size


class OptionArguments(TypedDict, total=False):
    """The command line's options. Sizes are bytes, or text such as "512MB"; the first five change the recipe's keys."""

    dtype: str
    layout: str
    on_shape_mismatch: ShapePolicy
    on_missing: MissingPolicy
    seed: int
    device: str
    compute_dtype: str
    max_ram: int | str
    max_vram: int | str
    threads: int
    io: IoMode
    shard_size: int | str
    force: bool
    sync: bool
    metadata: bool
    verify: bool
    on_nonfinite: NonfinitePolicy
    hash: bool
    hash_inputs: bool
    resume: bool
    journal: float


RECIPE_KEYS = ("dtype", "layout", "on_shape_mismatch", "on_missing", "seed")
"""Options that change a recipe's own keys."""


def as_options(options: Mapping[str, Any]) -> Options:
    """Options from keywords; TypeError for an unknown one."""
    chosen = {name: value for name, value in options.items() if name not in RECIPE_KEYS}
    for name in ("max_ram", "max_vram", "shard_size"):
        if isinstance(chosen.get(name), str):
            chosen[name] = parse_size(chosen[name])
    if chosen.get("compute_dtype") is not None:
        chosen["compute_dtype"] = COMPUTE_DTYPES[chosen["compute_dtype"]]
    return Options(**chosen)
