"""An adapter as a file has it: its modules, each with what it changes, every tensor accounted for."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from streammerge.compute.expressions import Node
from streammerge.errors import CheckpointError, count
from streammerge.models.adapters.config import Config, config_of, read_configs
from streammerge.models.adapters.decompositions import SAVED, changes_of
from streammerge.models.adapters.dialects import PEFT
from streammerge.models.adapters.modules import Changes, Malformed, Module
from streammerge.models.adapters.parameters import parameters_of
from streammerge.models.adapters.parts import INVERSION, sorted_parts
from streammerge.models.adapters.recognition import find_adapter
from streammerge.models.checkpoints import Checkpoint

_INVERSIONS: Final = "Textual inversions are no part of a model, and are loaded beside it."
_LEFT_OUT: Final = "Those in an adapter's file streammerge bake leaves out with --on-missing drop."


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, its file open: `roles` has of each module which tensor plays which role in it.

    `parameters` has of those that are wrappers of one which it is.
    """

    checkpoint: Checkpoint
    roles: Mapping[str, Mapping[str, str]]
    shared: Mapping[str, str]
    configs: Mapping[str, Config]
    parameters: Mapping[str, str] = field(default_factory=dict)
    inversions: tuple[str, ...] = ()
    """Tensors of textual inversions beside the modules, which are left out."""

    def __len__(self) -> int:
        return len(self.roles)

    def changes(self, module: str) -> Changes:
        """What a module changes, made again when it is asked for; Malformed if its parts don't make anything."""
        roles, nodes = self.roles[module], self.checkpoint.nodes
        config = config_of(self.configs, module)
        own = {role: nodes[name] for role, name in roles.items()}
        return changes_of(Module(module, own, roles, config, self._shared, self.parameters.get(module, "")))

    @functools.cached_property
    def _shared(self) -> Mapping[str, Node]:
        return {role: self.checkpoint.nodes[name] for role, name in self.shared.items()}


def read_adapter(checkpoint: Checkpoint, path: str, *, drop: bool = False) -> Adapter:
    """The adapter in a file that is open; CheckpointError with all that is wrong with it, by tensor.

    `path` is what was named, a folder perhaps, beside or in which adapter_config.json may lie. Textual inversions that
    lie in the file too are wrong unless they are to be dropped.
    """
    tensors, where = checkpoint.tensors, checkpoint.path
    found = sorted_parts(tensors)
    configs = read_configs(type(where)(path), checkpoint.metadata)
    if not tensors:
        raise CheckpointError(f"{where}: is empty, and no adapter")
    is_saved = SAVED.issuperset(role for roles in found.modules.values() for role in roles)
    is_told = found.is_known or found.inversions
    if is_saved and not is_told and not (configs and any(module.startswith(PEFT) for module in found.modules)):
        _refuse_models(checkpoint)
    try:
        parameters = parameters_of(found.modules, configs[""]) if "" in configs else {}
    except ValueError as error:
        raise CheckpointError(
            f"{where}: {error}", advice="Put it into its model with PEFT's merge_and_unload, and name what that saves."
        ) from None
    adapter = Adapter(checkpoint, found.modules, found.shared, configs, parameters, tuple(found.inversions))
    problems = [*found.problems, *_malformed(adapter)]
    is_inversion = bool(found.inversions) and not problems
    if not (drop and found.modules):
        problems += [f"{name}   is of {INVERSION}, which is not read" for name in found.inversions]
    if problems:
        raise CheckpointError(
            f"{where}: {count(problems, 'thing')} in it can't be taken for a part of an adapter",
            found=problems,
            advice=_INVERSIONS + (f" {_LEFT_OUT}" if found.modules else "")
            if is_inversion
            else "Fetch it again, or bake it with the program that it was made for.",
        )
    return adapter


def _refuse_models(checkpoint: Checkpoint) -> None:
    """CheckpointError for a file that has nothing of an adapter."""
    if find_adapter(checkpoint.tensors) is None:
        beside = next(iter(sorted(checkpoint.path.parent.glob("adapter_model.*"))), None)
        raise CheckpointError(
            f"{checkpoint.path}: is no adapter: none of its {len(checkpoint.tensors):,} tensors is a part of one",
            advice=f"Name the adapter that lies beside it: {beside}."
            if beside
            else "Name a LoRA or one of its kin; whole models are merged, and textual inversions loaded beside one.",
        )


def _malformed(adapter: Adapter) -> Iterator[str]:
    """What is wrong with each module."""
    for module in adapter.roles:
        try:
            adapter.changes(module)
        except Malformed as error:
            yield str(error)


def kinds_of(kinds: Mapping[str, int] | Counter[str]) -> str:
    """`LoRA`, `LoRA and difference`: the most frequent first."""
    return " and ".join(kind for kind, _ in Counter(kinds).most_common())
