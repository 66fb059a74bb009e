"""Tensors whose statistics are taken of the whole model: which of them are measured with which."""

from __future__ import annotations

from dataclasses import dataclass, field

from streammerge.compute.application import is_measured_of_model, measured_with
from streammerge.compute.costs import needs_statistics
from streammerge.compute.expressions import ByBlock, Node, Together, walk
from streammerge.errors import PlanError
from streammerge.methods.contract import ParameterValue


@dataclass
class Ensemble:
    """The members of one merge, by name, and those that share their statistics, by the parameters of these."""

    members: dict[str, ByBlock] = field(default_factory=dict)
    together: dict[tuple[ParameterValue, ...], Together] = field(default_factory=dict)

    def joined(self, node: Node) -> Node:
        """The tensor among those with which it shares its statistics; itself if it is measured alone."""
        if not is_measured_of_model(node):
            return node
        if node.name not in self.members:
            self._join(node)
        return self.members[node.name]

    def _join(self, node: ByBlock) -> None:
        method = node.method
        assert method.statistics is not None
        if any(needs_statistics(part) for child in node.inputs for part in walk(child)):
            raise PlanError(
                f"method {method.name!r} measures the whole model at once, and one of its inputs is a merge that has "
                "to be measured itself",
                advice="Write that merge to a file first, or measure each tensor alone (scope: tensor).",
            )
        key = tuple(node.parameters[name] for name in method.statistics.of)
        self.members[node.name] = measured_with(self.together.setdefault(key, Together()), node)
