"""What a file's metadata tell ComfyUI of its quantised layers, for those that stay as they are stored.

`_quantization_metadata` is JSON: `{"format_version": "1.0", "layers": {"blocks.0.ffn.0": {"format": …}}}`. A layer that
is decoded must not be in it, and one that is copied must, unless a tensor beside it tells the same.
(ComfyUI's QUANTIZATION.md.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from streammerge.models.merged import Merged
from streammerge.models.views import Assembled, Renamed, Selected, View
from streammerge.plan.meaning import metadata_of
from streammerge.recipe.inherited import QUANTISATION
from streammerge.tensors import Model

VERSION: Final = "1.0"

WEIGHT: Final = ".weight"
"""How the codes of a layer end."""


def stated_layers(codes_of: Mapping[str, str], models: Mapping[str, Model]) -> dict[str, str]:
    """The metadata for codes that are copied, by name, each from this model; nothing if they need none."""
    layers = dict(_layers(codes_of, models))
    return {QUANTISATION: json.dumps({"format_version": VERSION, "layers": layers})} if layers else {}


def _layers(codes_of: Mapping[str, str], models: Mapping[str, Model]) -> Iterator[tuple[str, Any]]:
    known: dict[int, Mapping[str, Any]] = {}
    for name, giver in codes_of.items():
        model, own = _origin(models[giver], name)
        if id(model) not in known:
            known[id(model)] = _told(model)
        if name.endswith(WEIGHT) and own.removesuffix(WEIGHT) in known[id(model)]:
            yield name.removesuffix(WEIGHT), known[id(model)][own.removesuffix(WEIGHT)]


def _origin(model: Model, name: str) -> tuple[Model, str]:
    """The model that has a tensor under all views, and what it calls it."""
    while isinstance(model, View):
        if isinstance(model, Selected | Renamed):
            name = model.names[name]
        model = _part(model, name) if isinstance(model, Assembled) else model.model
    return model, name


def _part(model: Assembled, name: str) -> Model:
    return next(one for one in (model.model, *model.parts) if name in one.tensors)


def _told(model: Model) -> Mapping[str, Any]:
    """The layers that a model's metadata tell of; none if they are none that anybody could read."""
    metadata = model.stated if isinstance(model, Merged) else metadata_of(model)
    try:
        layers = json.loads(metadata.get(QUANTISATION, "{}")).get("layers", {})
    except (ValueError, AttributeError, RecursionError):
        return {}
    return layers if isinstance(layers, dict) else {}
