"""What tensors the modules of adapters would be in a model: values by name, by layer and by block go by that.

    lora_unet_mid_block_attentions_0_proj_in
        ─►  model.diffusion_model.mid_block.attentions.0.proj_in.weight (lora_unet_mid_block_attentions_0_proj_in)

There is no model to ask. So a part of a name may be one of what a module means, or of its own in any of the adapters,
and what only a whole model could tell, such as how many blocks it has, is known or refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from streammerge.errors import RecipeError
from streammerge.models.adapters.dialects import spelled
from streammerge.models.adapters.meanings import DEPTHS, Meaning, are_told, dotted
from streammerge.models.adapters.together import Together
from streammerge.models.blocks import Blocks, ListForm, abridged
from streammerge.models.dialects.places import Role
from streammerge.models.layers import Layers
from streammerge.tensors import DTYPES, TensorInfo, described

OF_A_UNET: Final = re.compile(r"(?:input|output|down|up)_blocks\.\d+\.|mid_block\.|middle_block\.")
OF_FOUR_LEVELS: Final = re.compile(r"(?:down|up)_blocks\.3\.|(?:input|output)_blocks\.(?:9|1\d)\.")
OF_THREE_LEVELS: Final = re.compile(r"(?:input|output|down|up|mid|middle)_blocks?\..*transformer_blocks\.[1-9]")
"""Which paths are of a UNet, of one with four levels (Stable Diffusion 1 and 2), and of one with three (SDXL)."""

WITHOUT_OTHERS: Final[Mapping[int, str]] = {
    12: "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    9: "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
}
"""The blocks that LoRAs of a UNet change which has so many on a side, as LoRA Block Weight lists them."""


BY_NAME: Final = "Give values by a part of the names: a list of {filter, value}."
"""What can always be done."""

_LIKE_OTHERS: Final[Mapping[Role | None, str]] = {"denoiser": "model.diffusion_model."}
_LIKE_FOUR_LEVELS: Final = {**_LIKE_OTHERS, "CLIP": "cond_stage_model.transformer."}


@dataclass(frozen=True, eq=False)
class Addresses:
    """The modules of adapters as tensors of a model."""

    together: Together

    def of(self, module: str) -> str:
        """What a module of the sum would be, and what the adapters call it."""
        return self._names[module]

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All modules, each as the one tensor that it would be."""
        return {name: described(DTYPES["F32"], (1,)) for name in self._names.values()}

    @functools.cached_property
    def layers(self) -> Layers:
        """How many layers each stack has, as far as the adapters tell; RecipeError where they don't tell layers."""
        for role, own in self._by_role.items():
            if any(meaning.is_flat for meaning in own) and not are_told(role, own):
                path = next(meaning.path for meaning in own if meaning.is_flat)
                raise RecipeError(
                    f"a list of numbers is stretched over layers, and nobody can tell from {path} which of its "
                    "numbers is that of a layer",
                    advice=BY_NAME,
                )
        return Layers.of(self._plain.values())

    @functools.cached_property
    def blocks(self) -> Blocks:
        """The blocks of the model, as far as the adapters tell; RecipeError where they don't tell which model's."""
        if self._levels == 0:
            raise RecipeError(
                "nothing in the adapters' names tells whether they are of Stable Diffusion 1, 2 or XL, whose blocks "
                "are other ones",
                advice=BY_NAME,
            )
        ends = [f"diffusion_model.{side}_blocks.{self._levels - 1}." for side in ("input", "output") if self._levels]
        found = Blocks.named([*self._plain.values(), *ends])
        if not found.forms:
            raise RecipeError(
                "values by block need blocks that have names, and none of the adapters' modules is in one",
                advice=BY_NAME,
            )
        places = {self.of(module): found.places[plain] for module, plain in self._plain.items()}
        seen = Blocks(found.architecture, found.forms, places)
        if self._levels:
            return replace(seen, forms=(*seen.forms, *_usual(seen, self._levels)))
        counts = tuple(sum(block.startswith(side) for block in seen.order) for side in "DS")
        # adapters of as many as Flux has have all of them
        return seen if counts == (*DEPTHS["Flux"].values(),) else replace(seen, unsure=_unsure(seen))

    def remarks(self) -> Iterator[str]:
        """What is to be known of values that are stretched over layers."""
        counts = self.layers.counts
        told = ", ".join(f"{count} of {stack}" for stack, count in counts.items())
        if counts:
            yield f"values are stretched over the layers that the adapters have, which may not be all: {told}"

    @functools.cached_property
    def _names(self) -> Mapping[str, str]:
        own = {module: dict.fromkeys(each.module for each in self.together.own(module)) for module in self._plain}
        return {module: f"{plain} ({', '.join(own[module])})" for module, plain in self._plain.items()}

    @functools.cached_property
    def _plain(self) -> Mapping[str, str]:
        """What each module would be, by its name in the sum."""
        like = _LIKE_FOUR_LEVELS if self._levels == 12 else _LIKE_OTHERS
        return {module: _address(meaning, like, self._by_role.keys()) for module, meaning in self._meant.items()}

    @functools.cached_property
    def _by_role(self) -> Mapping[Role | None, list[Meaning]]:
        found: dict[Role | None, list[Meaning]] = {}
        for meaning in self._meant.values():
            found.setdefault(meaning.role, []).append(meaning)
        return found

    @functools.cached_property
    def _levels(self) -> int | None:
        """How many blocks each side of a UNet has, 0 if nothing tells; None without one."""
        paths = [dotted(each) for each in self._meant.values() if each.role in ("denoiser", None)]
        if not any(map(OF_A_UNET.match, paths)):
            return None
        if any(map(OF_FOUR_LEVELS.match, paths)):
            return 12
        return 9 if "CLIP 2" in self._by_role or any(map(OF_THREE_LEVELS.match, paths)) else 0

    @property
    def _meant(self) -> Mapping[str, Meaning]:
        return self.together.matched.meant


def _address(meaning: Meaning, like: Mapping[Role | None, str], roles: Collection[Role | None]) -> str:
    """The tensor that a module would be in a model of ComfyUI's, which has all components."""
    path = dotted(meaning)
    name = path if meaning.role is None else spelled("comfy", meaning.role, path, roles, like)
    return f"{name}.weight"


def _usual(blocks: Blocks, levels: int) -> list[ListForm]:
    """The lists that leave out blocks that a LoRA doesn't change as a rule, if these don't."""
    names = tuple(WITHOUT_OTHERS[levels].split())
    changed = {places[-1] for places in blocks.places.values()}
    return [ListForm(names, f"for {abridged(names)}")] if changed <= set(names) else []


def _unsure(blocks: Blocks) -> str:
    return (
        f"adapters alone don't tell how many blocks {blocks.architecture} has, whose they are: these change "
        f"{abridged(blocks.order)}"
    )
