"""What adapters that are in a merge's inputs change of a tensor: nothing, so that it is copied, or what is told."""

from __future__ import annotations

from collections.abc import Mapping

from streammerge.compute.costs import is_only
from streammerge.compute.expressions import Node, gives, is_stored
from streammerge.models.adapters.adapted import adapters_of
from streammerge.tensors import Model


def is_unchanged(model: Model, name: str, node: Node, own: Node) -> bool:
    """Whether a tensor is the model's, as it was before adapters were put into it."""
    changing = adapters_of(model, name)
    return is_only(node, own) and (changing == [] or (changing is None and is_stored(own)))


def told_adapters(models: Mapping[str, Model], name: str, inputs: Mapping[str, Node], made: Node) -> str:
    """Which adapters of any input change a tensor, in words: of those inputs of which something is in it."""
    found = {model: adapters_of(models[model], name) or [] for model in inputs}
    own = (each for model, each in found.items() if each and gives(inputs[model], made))
    changing = dict.fromkeys(adapter for each in own for adapter in each)
    return f", with {' and '.join(changing)}" if changing else ""
