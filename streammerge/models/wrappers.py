"""What torch's wrappers put into names: `torch.compile` `_orig_mod.`, data parallelism `module.` before all of them.

Checkpoints that were saved through a wrapper have names that no library loads, and share none with those that were not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from streammerge.models.views import Selected
from streammerge.tensors import Model, TensorInfo

COMPILED: Final = "_orig_mod."
"""Stands wherever a module was compiled by itself."""

PARALLEL: Final = "module."
"""Stands before every name, or is something else."""


@dataclass(frozen=True)
class Unwrapped:
    """Models whose names are without wrappers, if they were wrapped otherwise, and what is to be told of that."""

    models: Mapping[str, Model]
    remarks: tuple[str, ...] = ()


def unwrapped(models: Mapping[str, Model], layout: str) -> Unwrapped:
    """The models without what wrappers put into names, where one calls a tensor otherwise than the layout for that."""
    bare = {name: found for name, model in models.items() if (found := bare_names(model.tensors))}
    seen = {name: Selected(model, bare[name]) if name in bare else model for name, model in models.items()}
    if not bare or not any(
        new in seen[layout].tensors and old not in models[layout].tensors
        for name, model in models.items()
        for new, old in zip(seen[name].tensors, model.tensors, strict=True)
    ):
        return Unwrapped(models)
    told = (f"{name}: its names are read without what {_who(models[name].tensors)} put into them" for name in bare)
    return Unwrapped(seen, tuple(told))


def bare_names(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """What the tensors are called, by their names without wrappers; nothing if these are their names, or not theirs
    alone."""
    if not next(iter(tensors), "").startswith(PARALLEL) and not any(COMPILED in name for name in tensors):
        return {}  # as nearly all are: of many names no others are made
    found = {name.replace(COMPILED, ""): name for name in tensors}
    while all(bare.startswith(PARALLEL) for bare in found):
        found = {bare.removeprefix(PARALLEL): name for bare, name in found.items()}
    is_changed = any(bare != name for bare, name in found.items())
    return found if is_changed and len(found) == len(tensors) and "" not in found else {}


def _who(tensors: Mapping[str, TensorInfo]) -> str:
    """Which wrappers have put something into names."""
    compiled = any(COMPILED in name for name in tensors)
    parallel = all(name.replace(COMPILED, "").startswith(PARALLEL) for name in tensors)
    told = [f"torch.compile ({COMPILED})"] * compiled + [f"data parallelism ({PARALLEL})"] * parallel
    return " and ".join(told)
