"""What PEFT's adapters hold whole, beside factors: modules that are saved, and biases of modules that have factors.

    model.norm.weight        ─►  base_model.model.model.norm.weight, and modules_to_save names model.norm
    h.0.attn.c_attn.bias     ─►  base_model.model.h.0.attn.c_attn.base_layer.bias

The heads of some tasks PEFT saves whole whatever is asked for, and reads no adapter that hasn't them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from streammerge.models.adapters.dialects import PEFT
from streammerge.tensors import TensorInfo

HEADS: Final[Mapping[str, tuple[str, ...]]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""How the names of modules end that PEFT saves whole for a task."""

PARAMETERS: Final = frozenset({"weight", "bias"})


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor that is held whole: as a part of a `module` that is saved, a head perhaps, or as a bias `beside` the
    factors of a weight."""

    module: str = ""
    is_head: bool = False
    beside: str = ""

    def called(self, name: str) -> str:
        """What an adapter calls the tensor."""
        return f"{PEFT}{name.removesuffix('bias')}base_layer.bias" if self.beside else f"{PEFT}{name}"


def saved_of(tensors: Mapping[str, TensorInfo], task: str | None, *, vectors: bool) -> Mapping[str, Saved]:
    """Which of a model's tensors an adapter for this task holds whole: its head, and all `vectors` if they are asked
    for."""
    heads = {name: Saved(module, is_head=True) for name, module in _heads(tensors, task)}
    if not vectors:
        return heads
    modules = _of_vectors(tensors, {saved.module for saved in heads.values()})
    saved = {name: Saved(_module(name)) for name in tensors if _module(name) in modules}
    biases = {
        name: Saved(beside=weight)
        for name in tensors
        if name.endswith(".bias") and len(tensors[name].shape) == 1
        for weight in [f"{_module(name)}.weight"]
        if weight in tensors and len(tensors[weight].shape) > 1
    }
    return {**biases, **saved, **heads}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _heads(tensors: Mapping[str, TensorInfo], task: str | None) -> Iterator[tuple[str, str]]:
    """The tensors of a task's heads, and the outermost module that PEFT takes for the head."""
    ends = HEADS.get(task or "", ())
    for name in tensors:
        module = next((each for each in _around(name) if each.endswith(ends)), "") if ends else ""
        if module:
            yield name, module


def _around(name: str) -> Iterator[str]:
    """All modules that a tensor is in, the outermost first."""
    return itertools.accumulate(name.split(".")[:-1], lambda outer, inner: f"{outer}.{inner}")


def _of_vectors(tensors: Mapping[str, TensorInfo], heads: Collection[str]) -> frozenset[str]:
    """The modules of vectors alone. PEFT takes every module for one whose name ends as its does: one whose name is the
    end of another's, which is no such module, is none."""
    inside: dict[str, list[str]] = {}
    for name in tensors:
        for module in _around(name):
            inside.setdefault(module, []).append(name)
    found = {module for module, names in inside.items() if _is_of_vectors(module, names, tensors)}
    others = {module for module in inside if module not in found and module not in heads}
    lengths = set(map(len, found))
    ends = {other[-length:] for other in others for length in lengths}
    return frozenset(found - ends)


def _is_of_vectors(module: str, names: Collection[str], tensors: Mapping[str, TensorInfo]) -> bool:
    own = {name.removeprefix(f"{module}.") for name in names}
    return own <= PARAMETERS and all(len(tensors[name].shape) == 1 for name in names)
