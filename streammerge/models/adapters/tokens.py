"""Tokens that were trained alone: rows of an embedding, or of a head, that stand in the place of the model's.

    W'[t] = D[i] for the i-th trained token t, and W' = W elsewhere

PEFT's `trainable_token_indices`, and its TRAINABLE_TOKENS; which tokens they are, adapter_config.json says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from streammerge.compute.expressions import Node
from streammerge.compute.parts import joined, rows_of
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.modules import Changes, Malformed, Module


@dataclass(frozen=True)
class Tokens(Change):
    """A change that puts rows in the place of others: row i of `value` in that of row `places[i]`, which come sorted.

    Its shape is the least that a tensor can have which has all of them.
    """

    places: tuple[int, ...] = ()

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the tensor has these rows, each as long."""
        return len(shape) == 2 and shape[0] >= self.shape[0] and shape[1] == self.shape[1]

    def resizes(self, shape: Sequence[int]) -> bool:
        """Its rows are some of the tensor's."""
        return False

    @property
    def can_be_turned(self) -> bool:
        """Its rows are tokens."""
        return False

    def applied(self, weight: Node, strength: float) -> Node:
        """The tensor with the trained rows, or what lies between it and the one that was."""
        parts = [part for part in self._parts(weight) if part.info.elements]
        placed = Change(self.kind, weight.info.shape, joined(parts, weight.info), "replace")
        return placed.applied(weight, strength)

    def _parts(self, weight: Node) -> Iterator[Node]:
        """The tensor's rows and the trained ones, in their order; neighbours among these are one part."""
        done, first = 0, 0
        for number, place in enumerate(self.places):
            is_last = number + 1 == len(self.places) or self.places[number + 1] != place + 1
            if is_last:
                start = self.places[first]
                yield rows_of(weight, done, start)
                yield rows_of(self.value, first, number + 1)
                done, first = place + 1, number + 1
        yield rows_of(weight, done, weight.info.shape[0])


def tokens(module: Module) -> Changes:
    """The rows of the tokens that the config names, in the order of their numbers."""
    node, config = module.part("tokens", 2), module.config
    name, shape = module.names["tokens"], node.info.shape
    if config is None:
        raise Malformed(f"{name}   are trained tokens, and adapter_config.json, which would tell which, is not there")
    places = config.tokens_of(module.own_name)
    if len(shape) != 2 or len(places) != shape[0]:
        raise Malformed(
            f"{name}   is of the shape {list(shape)}, and {config.where} names {len(places)} trained tokens"
        )
    order = sorted(range(len(places)), key=places.__getitem__)
    rows = node if order == list(range(len(places))) else joined([rows_of(node, n, n + 1) for n in order], node.info)
    made = Tokens("tokens", (max(places) + 1, shape[1]), rows, "replace")
    return {"weight": replace(made, places=tuple(places[number] for number in order))}
