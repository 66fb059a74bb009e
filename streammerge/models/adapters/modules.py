"""A module of an adapter: its parts by role, their numbers, and its strength."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from streammerge.compute.expressions import Node
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.config import ALPHAS, MLX, TRANSPOSED, Config
from streammerge.models.adapters.dialects import PEFT
from streammerge.models.adapters.numbers import can_be_read, number_of
from streammerge.models.adapters.parameters import parameter_path


class Malformed(Exception):  # noqa: N818  (a word for the user, gathered with others into one error)
    """Parts of an adapter that don't make one."""


@dataclass(frozen=True)
class Module:
    """A module of an adapter: its name, its parts' expressions and names by role, and what all modules share.

    A wrapper of a single `parameter` of the model's module says so.
    """

    name: str
    nodes: Mapping[str, Node]
    names: Mapping[str, str]
    config: Config | None = None
    shared: Mapping[str, Node] | None = None
    parameter: str = ""

    def __contains__(self, role: str) -> bool:
        return role in self.nodes

    @property
    def own_name(self) -> str:
        """What the model calls the module, or the parameter, as PEFT's configs do."""
        return parameter_path(self.name, self.parameter) if self.parameter else self.name.rpartition(PEFT)[2]

    def part(self, role: str, dimensions: int = 0) -> Node:
        """The part of this role; Malformed if it is missing, is empty, or has fewer dimensions than it needs."""
        node = self.nodes.get(role)
        if node is None:
            raise Malformed(f"{self.name}   has {', '.join(sorted(self.names.values()))}, and no {_called(role)}")
        shape = node.info.shape
        if len(shape) < dimensions or not node.info.elements:
            raise Malformed(f"{self.names[role]}   is of the shape {list(shape)}, which is no {_called(role)}'s")
        if not node.info.dtype.mergeable:
            raise Malformed(f"{self.names[role]}   is {node.info.dtype}, and should be floats")
        return node

    def is_true(self, role: str) -> bool:
        """Whether a part, a truth or a number, is true."""
        return bool(self._element(role) if self.nodes[role].info.dtype.name == "BOOL" else self.number(role))

    def number(self, role: str) -> float:
        """The one number that a part is."""
        if self.nodes[role].info.dtype.name == "BOOL":
            raise Malformed(f"{self.names[role]}   is BOOL, and should be a float or an integer")
        return self._element(role)

    def _element(self, role: str) -> float:
        node = self.nodes[role]
        if node.info.elements != 1:
            raise Malformed(f"{self.names[role]}   is of the shape {list(node.info.shape)}, and should be one number")
        if not can_be_read(node):
            raise Malformed(f"{self.names[role]}   is {node.info.dtype}, and should be a float or an integer")
        found = number_of(node)
        if not math.isfinite(found):
            raise Malformed(f"{self.names[role]}   is {found}, which is no number to multiply by")
        return found

    def scale(self, rank: int) -> tuple[float, str]:
        """α/r, and what is to be told of it: the tensor `alpha` says, else the config, else α is the rank."""
        if "alpha" in self:
            return self._alpha() / rank, ""
        if self.config is not None:
            return self._configured(self.config, rank), ""
        if PEFT in self.name:
            raise Malformed(f"{self.name}   has no alpha, and adapter_config.json, which would tell it, is not there")
        return 1.0, "no alpha"

    def _alpha(self) -> float:
        alpha = self.number("alpha")
        if not alpha:
            raise Malformed(
                f"{self.names['alpha']}   is 0: some programs take that for the rank, and by others it does nothing"
            )
        return alpha

    def _configured(self, config: Config, rank: int) -> float:
        """The strength that the config says for this rank, which must be the one that it speaks of."""
        if config.kind == MLX and "mlx.a" not in self:
            raise Malformed(f"{self.name}   is no LoRA of MLX's, and {config.where} is of one")
        said = config.rank(self.own_name)
        if rank and said not in (0, rank) and config.kind != "ADALORA":
            raise Malformed(f"{self.name}   is of rank {rank}, and {config.where} says {said}")
        if not (rank or said):
            raise Malformed(f"{self.name}   has no rank of its own, and {config.where} says none")
        if config.alpha_of(self.own_name) is None:
            key = ALPHAS.get(config.kind, "lora_alpha")
            raise Malformed(f"{self.name}   has no alpha, and {config.where} doesn't say {key}")
        scale = config.scale(self.own_name, rank or said)
        if not scale:
            raise Malformed(f"{self.name}   has the alpha 0 by {config.where}, with which it does nothing")
        return scale

    def turned(self, change: Change) -> Change:
        """The change, transposed if the config says that the model's weights are (`fan_in_fan_out`).

        PEFT takes that back where a layer is none of GPT-2's kind. A shape tells which it is, unless it is a square.
        """
        if self.config is None or not self.config.fan_in_fan_out:
            return change
        if len({*change.shape}) == 1 and not TRANSPOSED.fullmatch(self.own_name):
            told = "which is true of layers of GPT-2's kind alone: nothing tells whether this square lies transposed"
            raise Malformed(f"{self.name}   by {self.config.where} is fan_in_fan_out, {told}; say false if it does not")
        return change.turned()

    def differ(self, one: str, other: str, why: str) -> Malformed:
        """The error for two parts whose shapes don't fit."""
        shapes = (f"{self.names[role]} {list(self.nodes[role].info.shape)}" for role in (one, other))
        return Malformed(f"{'   and '.join(shapes)}   {why}")


Changes = Mapping[str, Change]
"""The changes of a module's tensors: of its `weight`, of its `bias`."""


def _called(role: str) -> str:
    words = {"up": "lora_up (lora_B)", "down": "lora_down (lora_A)", "mid": "lora_mid"}
    words |= {"mlx.a": "lora_a", "mlx.b": "lora_b", "mlx.m": "m"}
    return words.get(role, role.replace("hada.", "hada_").replace("lokr.", "lokr_"))
