"""Merge model checkpoints of any size in a small, stated amount of RAM.

    import streammerge

    streammerge.merge("recipe.yaml", output="merged.safetensors")

    with streammerge.open_model("a.safetensors") as a, streammerge.open_model("b.ckpt") as b:
        streammerge.merge(streammerge.slerp(a, b, t=0.3), output="merged.safetensors", max_ram="400MB")

Every merge method is a function of this module that takes models and returns a model. Importing this module imports
neither torch nor anything else that is slow; what computes does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from streammerge.errors import (
    CheckpointError,
    DeviceError,
    MergeError,
    MethodError,
    OutputError,
    PlanError,
    RecipeError,
)
from streammerge.version import __version__ as __version__

if TYPE_CHECKING:
    from streammerge.engine import make_plan, merge
    from streammerge.methods.loading import load_methods
    from streammerge.models.checkpoints import Checkpoint, open_model
    from streammerge.models.views import Cast, Decoded, Renamed, View
    from streammerge.tensors import Model, TensorInfo

__all__ = [
    "Cast",
    "Checkpoint",
    "CheckpointError",
    "Decoded",
    "DeviceError",
    "MergeError",
    "MethodError",
    "Model",
    "OutputError",
    "PlanError",
    "RecipeError",
    "Renamed",
    "TensorInfo",
    "View",
    "load_methods",
    "make_plan",
    "merge",
    "open_model",
]

_HOMES = {
    "Cast": "models.views",
    "Checkpoint": "models.checkpoints",
    "Decoded": "models.views",
    "Model": "tensors",
    "Renamed": "models.views",
    "TensorInfo": "tensors",
    "View": "models.views",
    "load_methods": "methods.loading",
    "make_plan": "engine",
    "merge": "engine",
    "open_model": "models.checkpoints",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what is asked for when it is asked for; a merge method's name gives its function."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"streammerge.{_HOMES[name]}"), name)
    if not name.startswith("_"):
        from streammerge.methods import METHODS

        if name in METHODS:
            from streammerge.plan.functions import merge_function

            return merge_function(name)
    raise AttributeError(f"module 'streammerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names and the merge methods."""
    from streammerge.methods import METHODS

    return sorted({*__all__, *METHODS})
