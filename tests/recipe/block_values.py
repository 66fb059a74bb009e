"""Values by block of Stable Diffusion's layouts, and small models with the same names."""

from __future__ import annotations

from streammerge.compute.expressions import Combined
from streammerge.models.blocks import Blocks
from streammerge.models.merged import Merged
from streammerge.recipe.blockwise import BlockSetting, bind
from streammerge.recipe.parameters import parse_settings
from streammerge.tools.demo.layouts import checkpoint
from tests.make.models import Tensors, make_tensors

UNET = "model.diffusion_model."
SD_VALUES = [round(0.01 + 0.03 * n, 2) for n in range(26)]
XL_VALUES = SD_VALUES[:20]
SD1 = Blocks.of(checkpoint("sd1", scale=32))
XL = Blocks.of(checkpoint("sdxl", scale=32))

SMALL = {
    "sd1": {name: info.shape[:1] for name, info in checkpoint("sd1", scale=32).items() if "position_ids" not in name},
    "sdxl": {name: info.shape[:1] for name, info in checkpoint("sdxl", scale=32).items() if "position_ids" not in name},
}
"""Every tensor of a real model by its name, with a few elements."""


def setting(raw: object) -> BlockSetting:
    parsed = parse_settings({"alpha": raw}, "recipe")["alpha"]
    assert isinstance(parsed, BlockSetting)
    return parsed


def values(raw: object, blocks: Blocks = SD1) -> dict[str, object]:
    """The value that every tensor gets."""
    bound = bind(setting(raw), blocks)
    return {name: bound.value(name, places) for name, places in blocks.places.items()}


def by_block(raw: object, blocks: Blocks = SD1) -> dict[str, object]:
    """The value of every block, by its narrowest name."""
    return {blocks.places[name][0]: value for name, value in values(raw, blocks).items()}


def pair(layout: str = "sd1") -> tuple[Tensors, Tensors]:
    shapes = SMALL[layout]
    return make_tensors(1, shapes=shapes), make_tensors(2, shapes=shapes)


def coefficients(made: Merged, name: str) -> list[float]:
    node = made.node(name)
    assert isinstance(node, Combined)
    return [term.coefficient for term in node.terms]
