"""Models that are nothing but headers: enough to decide and to plan, with nothing to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from streammerge.compute.expressions import Node, Stored
from streammerge.models.merged import Merged
from streammerge.plan.decide import merge_models
from streammerge.recipe.parse import parse_recipe
from streammerge.tensors import DTYPES, Model, TensorInfo


class Header:
    """A model whose tensors lie in a file that is never opened."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.file = cast(Any, SimpleNamespace(path=Path("nowhere")))
        self.nodes: dict[str, Node] = {}
        start = 0
        for name, info in tensors.items():
            self.nodes[name] = Stored(info, self.file, start)
            start += info.nbytes

    def node(self, name: str) -> Node:
        return self.nodes[name]

    def read(self, name: str, start: int, stop: int) -> Any:
        raise AssertionError(f"{name} is read")


def header(dtype: str = "F16", **shapes: Sequence[int] | str) -> Header:
    """A model of these tensors; a text is a dtype and sizes, such as `I64 1 77`, or `F32` for a 0-d tensor."""
    tensors = {}
    for name, shape in shapes.items():
        own, *sizes = shape.split() if isinstance(shape, str) else (dtype, *map(str, shape))
        tensors[name.replace("__", ".")] = TensorInfo(DTYPES[own], tuple(map(int, sizes)))
    return Header(tensors)


def merged(
    by_name: Mapping[str, Model], method: str = "linear", *, base: str | None = None, beside: str = "", **keys: Any
) -> Merged:
    """The merge of the models but those `beside`, which the recipe calls by their names."""
    names = [name for name in by_name if name not in (base, beside)]
    if base is not None:
        keys["base_model"] = {"model": base, "name": base}
    return merge_models(parse_recipe({"merge_method": method, "models": names, **keys}, Path()), by_name)
