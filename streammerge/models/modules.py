"""The modules of models, such as a language model and the tower for images before it: which tensors are whose.

mergekit knows its modules by a table of architectures. Here a module is what its name says: one of the words below for
a part of a multimodal model, which follows from the tensors' names, or what the names begin with.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from streammerge.compute.expressions import Node
from streammerge.errors import PlanError, count, counted, listed
from streammerge.formats.tables import Column, Names
from streammerge.models.merged import Merged, as_merged
from streammerge.models.prefixes import beginnings
from streammerge.models.slices import joined
from streammerge.models.views import View, node_of
from streammerge.tensors import Model, TensorInfo

DEFAULT: Final = "default"
"""The module of all that is in no other."""

ROLES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("text_decoder", "language_model", "text_model"), "text"),
    **dict.fromkeys(("vision_tower", "vision_model", "vision_encoder", "visual"), "vision"),
    **dict.fromkeys(("audio_tower", "audio_model", "audio_encoder"), "audio"),
    **dict.fromkeys(("multi_modal_projector", "mm_projector", "projector", "connector"), "projector"),
}
"""Modules' names, and the parts of a multimodal model that they mean."""

_PROJECTOR: Final = re.compile(
    r"(?:multi_?modal|mm|image|vision|audio)_projector|projector|connector|aligner|(?:deepstack_)?merger(?:_list)?|"
    r"image_newline|modality_projection"
)
_TOWERS: Final = (("vision", re.compile(r"(?:vision|visual|image|vit)")), ("audio", re.compile(r"(?:audio|speech)")))
_HEADS: Final = ("lm_head.", "proj_out.")


@dataclass(frozen=True, eq=False)
class Part(View):
    """Those of a model's tensors that belong to one of these modules, codes as they are stored."""

    model: Model
    module: str | None
    modules: tuple[str, ...]

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The module's tensors, in their order."""
        kept = [(name, info) for name, info in self.model.tensors.items() if self._has(name)]
        return Column(Names.of(name for name, _ in kept), [info for _, info in kept])

    def node(self, name: str) -> Node:
        """The model's tensor."""
        return node_of(self.model, name)

    def _has(self, name: str) -> bool:
        return module_of(name, self.modules) == self.module


def module_of(name: str, modules: Sequence[str]) -> str | None:
    """The one of these modules that a tensor is in, by its name; None if it is in none of them.

    Of two that it is in, the one with the longer name counts if it lies within the other.
    """
    found = [module for module in modules if module != DEFAULT and _is_in(name, module)]
    if len(found) > 1:
        inner = max(found, key=len)
        if not all(inner == each or inner.startswith(f"{each}.") for each in found):
            raise PlanError(
                f"{name} is in the modules {listed(found)}", advice="Name modules that have no tensor in common."
            )
        return inner
    return found[0] if found else DEFAULT if DEFAULT in modules else None


def _is_in(name: str, module: str) -> bool:
    if module in ROLES:
        return part_of(name) == ROLES[module]
    if module == "decoder" and name.startswith(_HEADS):  # T5's and Whisper's
        return True
    return any(start == module or start.startswith(f"{module}.") for start in (name, name.removeprefix("model.")))


def part_of(name: str) -> str:
    """The part of a multimodal model that a tensor is in: `text`, unless its name says something else."""
    words = name.split(".")
    if any(_PROJECTOR.fullmatch(word) for word in words):
        return "projector"
    return next((part for part, mark in _TOWERS if any(mark.match(word) for word in words)), "text")


def check_modules(models: Mapping[str, Model], modules: Sequence[str]) -> None:
    """PlanError unless each module has tensors in every model that is merged in it; `models` are `module/model`."""
    for called, model in models.items():
        module = called.partition("/")[0]
        if not any(module_of(name, modules) == module for name in model.tensors):
            raise PlanError(
                f"{called.partition('/')[2]} has no tensor in the module {module!r}",
                advice=f"Its names begin with {listed(beginnings(model.tensors))}. A module may be called what they "
                f"begin with, or {', '.join(sorted(ROLES))}, encoder, decoder, {DEFAULT}.",
            )


def outside(models: Iterable[Model], modules: Sequence[str]) -> list[str]:
    """The tensors that are in no module."""
    found = (name for model in models for name in model.tensors if module_of(name, modules) is None)
    return list(dict.fromkeys(found))


def layout_of(models: Mapping[str, Model], modules: Sequence[str]) -> Model:
    """The model that the output is otherwise like: of those in the modules the first that has all of them."""
    has_all = (
        model
        for model in models.values()
        if set(modules) - {DEFAULT} <= {module_of(name, modules) for name in model.tensors}
    )
    found = next(has_all, None)
    if found is None:
        raise PlanError(
            f"no model has all of the modules {listed(list(modules))}",
            advice="The output is like a model that has: name it as one of the models of a module.",
        )
    return found


def rest_of(names: Sequence[str], layout: Model, modules: tuple[str, ...], policy: str) -> dict[str, Merged]:
    """What becomes of tensors that are in no module: an error, a copy of the layout's, or nothing."""
    if policy == "error":
        raise PlanError(
            f"{counted(names, 'tensor', 'is', 'are')} in no module",
            found=list(names),
            advice=f"Add a module for them, or one called {DEFAULT} for all that is in no other; or write on_missing: "
            "keep to copy them from the first model that has all modules, on_missing: drop to leave them out.",
        )
    if policy == "drop":
        return {}
    rest = as_merged(Part(layout, None, modules))
    return {"in no module": replace(rest, remarks=(f"{count(names, 'tensor')} copied: {listed(list(names))}",))}


def assembled(merges: Mapping[str, Merged], layout: Model) -> Merged:
    """Merges of modules, by the modules' names, as one; whatever is not of tensors is that of the layout."""
    parts = list(merges.values())
    remarks = (f"{name}: {remark}" for name, merged in merges.items() for remark in merged.remarks)
    return replace(
        joined(merges, tuple(remarks)),
        layout=layout,
        accounts=tuple(account for merged in parts for account in merged.accounts),
        restated={key: text for merged in reversed(parts) for key, text in merged.restated.items()},
    )
