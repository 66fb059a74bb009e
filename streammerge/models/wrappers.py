"""What wrappers put into names: torch's, such as `torch.compile` and data parallelism, and classes around a model.

    _orig_mod.                        wherever a module was compiled by itself
    _fsdp_wrapped_module.             wherever parameters of a module are divided among processes
    _checkpoint_wrapped_module.       wherever activations are computed again
    module.                           before all names, or it is something else
    model.                            before all names, if some of them have it twice then

Checkpoints that were saved through a wrapper have names that no library loads, and share none with those that were not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from streammerge.tensors import TensorInfo

WITHIN: Final[Mapping[str, str]] = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Parts of names that can be nothing else, and whose they are."""

PARALLEL: Final = "module."
"""Stands before every name, or is something else."""

AROUND: Final = "model."
"""Stands before every name, and twice before some, or is something else."""

_WITHIN: Final = re.compile(rf"(?:^|(?<=[._]))(?:{'|'.join(WITHIN)})[._]")
_BEFORE_PEFT: Final = re.compile(r"(?:module\.)+(?=base_model\.)")


def bare_names(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """What the tensors are called, by their names without wrappers; nothing if these are their names, or not theirs
    alone."""
    if not before_all(tensors) and not any(mark in name for name in tensors for mark in WITHIN):
        return {}  # as nearly all are: of many names no others are made
    found = {bare_name(name): name for name in tensors}
    while before := before_all(found):
        found = {bare.removeprefix(before): name for bare, name in found.items()}
    is_changed = any(bare != name for bare, name in found.items())
    return found if is_changed and len(found) == len(tensors) and "" not in found else {}


def bare_tensors(tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """The tensors by their names without wrappers."""
    bare = bare_names(tensors)
    return {new: tensors[old] for new, old in bare.items()} if bare else tensors


def bare_name(name: str) -> str:
    """A tensor's name, or a module's, without what can be nothing but a wrapper's: of adapters' names the dots may be
    underscores, and PEFT's are known by how they begin."""
    name = _WITHIN.sub("", name) if any(mark in name for mark in WITHIN) else name
    return _BEFORE_PEFT.sub("", name, count=1) if name.startswith(PARALLEL) else name


def before_all(names: Collection[str]) -> str:
    """What a wrapper has put before all names; nothing if there is none."""
    if names and all(name.startswith(PARALLEL) for name in names):
        return PARALLEL
    is_around = bool(names) and all(name.startswith(AROUND) for name in names)
    return AROUND if is_around and any(name.startswith(2 * AROUND) for name in names) else ""


def wrappers_of(names: Iterable[str]) -> str:
    """Which wrappers have put something into names."""
    told = [f"{who} ({mark}.)" for mark, who in WITHIN.items() if any(mark in name for name in names)]
    bare = [bare_name(name) for name in names]
    while before := before_all(bare):
        told += [f"data parallelism ({PARALLEL})" if before == PARALLEL else f"a class around it ({AROUND})"]
        bare = [name.removeprefix(before) for name in bare]
    return " and ".join(dict.fromkeys(told))
