"""What becomes of tensors, in words, and headers to decide it from."""

from __future__ import annotations

from streammerge.models.merged import Merged
from streammerge.tools.demo.layouts import checkpoint
from tests.make.headers import Header, header

CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"


def fates(made: Merged) -> dict[str, str]:
    return {decision.name: f"{decision.action}: {decision.why}" for decision in made.decisions}


def pair(**shapes):
    return {"a": header(**shapes), "b": header(**shapes)}


def sd2(scale: int = 32) -> dict[str, Header]:
    """The three models of the founding job, in miniature: all names are true."""
    layouts = {"depth": "sd2-depth", "waifu": "sd2-waifu", "base": "sd2-base"}
    return {name: Header(checkpoint(layout, scale=scale)) for name, layout in layouts.items()}
