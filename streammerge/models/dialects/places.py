"""Where a file keeps its components: what stands before the names of each, by who wrote the file.

Checkpoints of CompVis and Stability AI, those that ComfyUI saves, the folders of a diffusers pipeline (whose names
stand for prefixes here), and single components, whose names have nothing before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from streammerge.models.dialects.rules import Accent, Side, accented, plain

Role = Literal["denoiser", "ControlNet", "VAE", "CLIP", "CLIP 2", "T5", "depth"]
"""What a component does in its model: `CLIP` is the only or the first of its text encoders of this kind."""

ROLES: Final[Mapping[str, Role | None]] = {
    "model.diffusion_model.": "denoiser",
    "diffusion_model.": "denoiser",
    "model.model.": "denoiser",
    "model.": "denoiser",
    "net.": "denoiser",
    "unet.": "denoiser",
    "transformer.": "denoiser",
    "control_model.": "ControlNet",
    "controlnet.": "ControlNet",
    "first_stage_model.": "VAE",
    "vae.": "VAE",
    "cond_stage_model.transformer.": "CLIP",
    "cond_stage_model.model.": "CLIP",
    "conditioner.embedders.0.transformer.": "CLIP",
    "conditioner.embedders.0.model.": "CLIP 2",
    "conditioner.embedders.1.model.": "CLIP 2",
    "text_encoders.clip_l.transformer.": "CLIP",
    "text_encoders.clip_h.transformer.": "CLIP",
    "text_encoders.clip_g.transformer.": "CLIP 2",
    "text_encoders.t5xxl.transformer.": "T5",
    "text_encoders.umt5xxl.transformer.": "T5",
    "text_encoder.": "CLIP",
    "text_encoder_2.": "CLIP 2",
    "text_encoder_3.": "T5",
    "depth_model.model.": "depth",
    "depth_estimator.": "depth",
    "": None,
}
"""What is found behind each prefix; behind none, whatever it looks like. A text encoder that looks like T5 is T5."""

SECOND: Final = "conditioner."
"""In a model with names that start so, `cond_stage_model.model.` is another name of the second text encoder: Stability
AI's own SDXL in torch files has it under both."""


DIFFUSERS: Final = (
    "unet.",
    "transformer.",
    "controlnet.",
    "vae.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "depth_estimator.",
)
"""The folders of a pipeline."""

SAFETY_CHECKER: Final = "safety_checker."
"""The folder of a pipeline that judges images, and is no part of what makes them: it is never averaged."""

COMFYUI: Final = ("text_encoders.", "diffusion_model.", "model.model.")
"""How prefixes start that ComfyUI alone writes."""


@dataclass(frozen=True, slots=True)
class Place:
    """What stands before a component's names, and in which naming of its kind they are.

    `within` is what the names have before them in that naming and not in the file: CLIP without `text_model.`, as in
    NovelAI's. `accent` are parts of names that the file has otherwise.
    """

    prefix: str
    side: Side
    within: str = ""
    accent: Accent = ()

    @property
    def naming(self) -> str:
        """Whose the names are, for people to read."""
        if self.within:
            return "NovelAI's"
        if self.accent:
            return "ComfyUI's"
        if self.prefix in DIFFUSERS or (not self.prefix and self.side == "theirs"):
            return "diffusers'"
        return "bare" if not self.prefix else "ComfyUI's" if self.prefix.startswith(COMFYUI) else "original"

    def own(self, name: str) -> str:
        """What the file calls a tensor that is called so in the component's naming."""
        return self.prefix + accented(name.removeprefix(self.within), self.accent)

    def inner(self, name: str) -> str:
        """What a tensor of the file is called in the component's naming."""
        rest = plain(name[len(self.prefix) :], self.accent)
        return self.within + rest if self.within and not rest.startswith("text_projection") else rest


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How models of one architecture are put together: where the original and diffusers keep each component."""

    original: Mapping[Role, Place]
    diffusers: Mapping[Role, Place]


_DENOISER: Final = Place("model.diffusion_model.", "ours")
_VAE: Final = Place("first_stage_model.", "ours")
_UNET: Final[Mapping[Role, Place]] = {
    "denoiser": Place("unet.", "theirs"),
    "ControlNet": Place("controlnet.", "theirs"),
    "VAE": Place("vae.", "theirs"),
    "CLIP": Place("text_encoder.", "theirs"),
    "CLIP 2": Place("text_encoder_2.", "theirs"),
    "depth": Place("depth_estimator.", "theirs"),
}
_LATENT: Final[Mapping[Role, Place]] = {
    "denoiser": _DENOISER,
    "ControlNet": Place("control_model.", "ours"),
    "VAE": _VAE,
}


def _transformer(vae: str, **folders: str) -> Arrangement:
    """Of a diffusion transformer, its VAE behind this prefix, and which folder of a pipeline has which encoder."""
    encoders: Mapping[str, tuple[Role, str]] = {
        "clip_l": ("CLIP", "text_encoders.clip_l.transformer."),
        "clip_g": ("CLIP 2", "text_encoders.clip_g.transformer."),
        "t5": ("T5", "text_encoders.t5xxl.transformer."),
        "umt5": ("T5", "text_encoders.umt5xxl.transformer."),
    }
    original: dict[Role, Place] = {"denoiser": _DENOISER, "VAE": Place(vae, "ours")}
    diffusers: dict[Role, Place] = {"denoiser": Place("transformer.", "theirs"), "VAE": Place("vae.", "theirs")}
    for encoder, folder in folders.items():
        role, prefix = encoders[encoder]
        original[role], diffusers[role] = Place(prefix, "theirs"), Place(f"{folder}.", "theirs")
    return Arrangement(original, diffusers)


UNKNOWN_ARRANGEMENT: Final = Arrangement({}, {})

ARRANGEMENTS: Final[Mapping[str, Arrangement]] = {
    "UNet": Arrangement(_LATENT, _UNET),
    "Stable Diffusion 1": Arrangement(
        {**_LATENT, "CLIP": Place("cond_stage_model.transformer.", "theirs")},
        _UNET,
    ),
    "Stable Diffusion 2": Arrangement(
        {
            **_LATENT,
            "CLIP": Place("cond_stage_model.model.", "ours"),
            "depth": Place("depth_model.model.", "ours"),
        },
        _UNET,
    ),
    "SDXL": Arrangement(
        {
            **_LATENT,
            "CLIP": Place("conditioner.embedders.0.transformer.", "theirs"),
            "CLIP 2": Place("conditioner.embedders.1.model.", "ours"),
        },
        _UNET,
    ),
    "SDXL refiner": Arrangement({**_LATENT, "CLIP 2": Place("conditioner.embedders.0.model.", "ours")}, _UNET),
    "Flux": _transformer("vae.", clip_l="text_encoder", t5="text_encoder_2"),
    **dict.fromkeys(("Flux 2", "HunyuanVideo", "HunyuanDiT", "Qwen-Image", "Z-Image"), _transformer("vae.")),
    "Wan": _transformer("vae.", umt5="text_encoder"),
    "Chroma": _transformer("vae.", t5="text_encoder"),
    **dict.fromkeys(
        ("Stable Diffusion 3", "Stable Diffusion 3.5"),
        _transformer("first_stage_model.", clip_l="text_encoder", clip_g="text_encoder_2", t5="text_encoder_3"),
    ),
}
"""By the architecture, as `guess_architecture` calls it, or the kind of the denoiser. Of a UNet that is nobody's, where
the original keeps text encoders isn't known."""
