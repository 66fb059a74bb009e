"""What is asked for of a mixture of experts that is built of dense models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

GateMode = Literal["cheap_embed", "random", "uniform_random"]

GATE_MODES: Final[tuple[GateMode, ...]] = ("cheap_embed", "random", "uniform_random")
"""How the weights by which a layer chooses its experts are made."""


@dataclass(frozen=True)
class Expert:
    """A dense model, by its name in the recipe, that gives experts: one to each layer.

    `positive` and `negative` are prompts, like those that are to be its business and that are not; `noise` is how much
    random noise is added to its weights, and `residual` what its output is multiplied by.
    """

    name: str
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    noise: float = 0.0
    residual: float = 1.0

    def describe(self) -> dict[str, Any]:
        """The same in a recipe's words."""
        said = {
            "positive_prompts": list(self.positive),
            "negative_prompts": list(self.negative),
            "noise_scale": self.noise or None,
            "residual_scale": None if self.residual == 1 else self.residual,
        }
        return {key: value for key, value in said.items() if value is not None and value != []}


@dataclass(frozen=True)
class Mixture:
    """A mixture: its experts, those that all tokens go to (`shared`), and how many of the others one token goes to."""

    gate_mode: GateMode
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...] = ()
    experts_per_token: int = 2
    architecture: str = ""
