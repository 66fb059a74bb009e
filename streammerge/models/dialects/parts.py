"""The parts of a model by the words that people have for them, and whether one fits where it is put."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from streammerge.models.architecture import UNKNOWN
from streammerge.models.dialects.counterparts import width
from streammerge.models.dialects.encoders import CLIP
from streammerge.models.dialects.places import Place, Role
from streammerge.models.dialects.recognition import Component, Recognised
from streammerge.models.dialects.rules import Side, numbers
from streammerge.models.dialects.vaes import VAE, WAN_22_VAE, WAN_VAE

ROLES_OF: Final[Mapping[str, Role]] = {
    "unet": "denoiser",
    "transformer": "denoiser",
    "controlnet": "ControlNet",
    "vae": "VAE",
    "clip_l": "CLIP",
    "clip_g": "CLIP 2",
    "t5": "T5",
}
"""What those parts do that are the same in every architecture; text encoders are counted otherwise in each."""

ENCODERS: Final[tuple[Role, ...]] = ("CLIP", "CLIP 2", "T5")

LATENTS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("Stable Diffusion 1", "Stable Diffusion 2", "SDXL", "SDXL refiner"), 4),
    **dict.fromkeys(("Stable Diffusion 3", "Stable Diffusion 3.5", "Flux", "Chroma", "Z-Image"), 16),
    "Flux 2": 32,
}
"""How many channels the latent images of an architecture have, which its VAE makes and reads."""

WIDTHS: Final[Mapping[tuple[str, Role], int]] = {
    ("Stable Diffusion 1", "CLIP"): 768,
    ("Stable Diffusion 2", "CLIP"): 1024,
    ("SDXL refiner", "CLIP 2"): 1280,
    **dict.fromkeys(((name, "CLIP") for name in ("SDXL", "Stable Diffusion 3", "Stable Diffusion 3.5", "Flux")), 768),
    **dict.fromkeys(((name, "CLIP 2") for name in ("SDXL", "Stable Diffusion 3", "Stable Diffusion 3.5")), 1280),
}
"""How wide the CLIP of an architecture is."""


NEEDED: Final[Mapping[tuple[str, Side], tuple[str, ...]]] = {
    ("VAE", "ours"): ("conv_in or conv1", "mid or middle", "conv_out or head"),
    ("VAE", "theirs"): ("conv_in", "mid_block", "conv_out"),
    ("CLIP", "ours"): ("token_embedding", "positional_embedding", "ln_final"),
    ("CLIP", "theirs"): ("text_model.embeddings", "text_model.final_layer_norm"),
}
"""How names start that every component of a kind has: of a VAE, in either half."""


def role_of(word: str, model: Recognised) -> Role | None:
    """What the part of this name does in the model; None if its architecture has no such part."""
    if word in ROLES_OF:
        return ROLES_OF[word]
    known = model.homes("original")
    folders = {place.prefix: role for role, place in model.homes("diffusers").items()}
    role = folders.get(f"{word}.")
    if folders:
        return role if role is not None and (role in known or model.component(role)) else None
    own = [component.role for component in model.components if component.role in ENCODERS]
    return own[0] if len(own) == 1 else None


def part_of(role: Role, model: Recognised) -> Component | None:
    """The model's component of a role. A CLIP that is alone is the first or the second: its width tells which."""
    found = model.component(role)
    alone = model.components[0] if len(model.components) == 1 else None
    if found is None and role == "CLIP 2" and alone is not None and alone.kind is CLIP:
        return alone
    return found


def misfit(part: Component, role: Role, source: Recognised, model: Recognised) -> str:
    """Why a part of one model can't be another's; "" if nothing tells that it can't.

    Stable Diffusion 1, 2 and XL have VAEs of the same shapes: headers don't tell which is whose.
    """
    own, other = source.architecture, model.architecture
    if role == "denoiser" and model.component(role) is not None and own != other and UNKNOWN not in (own, other):
        return f"it is of another architecture: {own}, not {other}"
    if part.kind is VAE and (wanted := LATENTS.get(model.architecture)):
        convolution = part.tensors.get("decoder.conv_in.weight")
        channels = convolution.shape[1] if convolution is not None and len(convolution.shape) > 1 else wanted
        return "" if channels == wanted else f"it is for latents of {channels} channels, and they have {wanted} there"
    if part.kind in (WAN_VAE, WAN_22_VAE) and model.architecture in LATENTS:
        return f"it is Wan's, and the model is {model.architecture}"
    if part.kind is VAE and model.architecture in ("Wan", "Qwen-Image"):
        return f"it is Stable Diffusion's kind, and the model is {model.architecture}"
    broad, wanted = width(part), WIDTHS.get((model.architecture, role))
    if part.kind is CLIP and wanted and broad in WIDTHS.values() and broad != wanted:
        return f"it is {broad} wide, and the {role} of {model.architecture} {wanted}"
    return ""


def other_shapes(part: Component, own: Component) -> str:
    """Where a part has another shape than the one that it is to replace; "" if nowhere.

    A matrix and the same as a 1×1 convolution have one.
    """
    for name, source in part.seen(own.side).items():
        shape, wanted = source.info.shape, own.tensors[name].shape if name in own.tensors else source.info.shape
        if tuple(shape) + (1,) * (4 - len(shape)) != tuple(wanted) + (1,) * (4 - len(wanted)):
            return f"its {name} is {list(shape)}, and {list(wanted)} there"
    return ""


def incomplete(part: Component) -> str:
    """What a part lacks without which it can't be put into a model that has none; "" if nothing is known to be.

    Looked for are the ends and the middle, and layers between them: nobody cuts out anything else.
    """
    names, halves = tuple(part.tensors), ("encoder.", "decoder.") if part.role == "VAE" else ("",)
    stems = [(half, stem) for half in halves for stem in NEEDED.get((part.kind.name, part.side), ())]
    lacking = [half + stem for half, stem in stems if not _has(names, half, stem)]
    layers = numbers(names, "text_model.encoder.layers.", "transformer.resblocks.", "encoder.block.")
    if layers != list(range(len(layers))):
        return f"it has layers up to {layers[-1]}, and {len(layers)} of them"
    return f"it has no {lacking[0]}" if lacking else ""


def _has(names: Collection[str], half: str, stem: str) -> bool:
    return any(name.startswith(tuple(half + one for one in stem.split(" or "))) for name in names)


def home(model: Recognised, role: Role) -> Place | None:
    """Where the model would keep a part of this role: in the manner in which it has its denoiser."""
    denoiser = model.component("denoiser")
    if denoiser is None:
        return None
    is_theirs = denoiser.side == "theirs"
    return model.homes("diffusers" if is_theirs else "original").get(role)
