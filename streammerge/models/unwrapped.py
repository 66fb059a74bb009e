"""Models that are wrapped beside such as are not, seen under the names that they have without wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streammerge.models.views import Selected
from streammerge.models.wrappers import bare_names, wrappers_of
from streammerge.tensors import Model


@dataclass(frozen=True)
class Unwrapped:
    """Models whose names are without wrappers, if they were wrapped otherwise, and what is to be told of that."""

    models: Mapping[str, Model]
    remarks: tuple[str, ...] = ()


def unwrapped(models: Mapping[str, Model], layout: str, *, anyway: bool = False) -> Unwrapped:
    """The models without what wrappers put into names, where one calls a tensor otherwise than the layout for that; or
    `anyway`."""
    bare = {name: found for name, model in models.items() if (found := bare_names(model.tensors))}
    seen = {name: Selected(model, bare[name]) if name in bare else model for name, model in models.items()}
    differ = bare and any(
        new in seen[layout].tensors and old not in models[layout].tensors
        for name, model in models.items()
        for new, old in zip(seen[name].tensors, model.tensors, strict=True)
    )
    if not bare or not (differ or anyway):
        return Unwrapped(models)
    told = (
        f"{name}: its names are read without what {wrappers_of(models[name].tensors)} put into them" for name in bare
    )
    return Unwrapped(seen, tuple(told))
