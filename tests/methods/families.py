"""A base and three models, as tensors and as files, with what the references make of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.make.models import SHAPES, Tensors
from tests.references.linear import Array, Case

FAMILY_SHAPES = {name: shape for name, shape in SHAPES.items() if name != "layers.1.block"}


@dataclass(frozen=True)
class Family:
    """A base and three models, as tensors and as files, and what the references make of them."""

    tensors: list[Tensors]
    paths: list[Path]
    references: dict[str, dict[str, Array]] = field(default_factory=dict)

    def expected(self, case: Case) -> dict[str, Array]:
        """The reference's results, worked out once."""
        if str(case) not in self.references:
            self.references[str(case)] = case.expected(self.tensors)
        return self.references[str(case)]
