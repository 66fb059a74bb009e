"""What the modules of an adapter are called that is made of others, and their tensors.

kohya       lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight
comfy       diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight
diffusers   transformer.transformer_blocks.0.attn.to_q.lora_B.weight
peft        base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight, and an adapter_config.json
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal

from streammerge.models.adapters.meanings import FLAT, Meaning, dotted
from streammerge.models.adapters.modules import PEFT
from streammerge.models.adapters.targets import PREFIXES, underscored
from streammerge.models.dialects.places import Role

Dialect = Literal["kohya", "peft", "comfy", "diffusers"]
"""Whose names modules have."""

ADAPTER_NAMES: Final[tuple[Dialect, ...]] = ("kohya", "peft", "comfy", "diffusers")

ROLES: Final[Mapping[Dialect, Mapping[str, str]]] = {
    "kohya": {"up": "lora_up.weight", "down": "lora_down.weight", "diff": "diff", "diff_b": "diff_b"},
    "comfy": {"up": "lora_up.weight", "down": "lora_down.weight", "diff": "diff", "diff_b": "diff_b"},
    "diffusers": {"up": "lora_B.weight", "down": "lora_A.weight"},
    "peft": {
        "up": "lora_B.weight",
        "down": "lora_A.weight",
        "embedding.up": "lora_embedding_B",
        "embedding.down": "lora_embedding_A",
    },
}
"""How the tensors of a module are called in each; what a dialect has no name for can't be written in it."""

COMFY: Final[Mapping[Role | None, str]] = {
    "denoiser": "diffusion_model.",
    "CLIP": "text_encoders.clip_l.transformer.",
    "CLIP 2": "text_encoders.clip_g.transformer.",
    "T5": "text_encoders.t5xxl.transformer.",
}
"""What ComfyUI's names of a component's modules begin with."""

_DIFFUSERS: Final[Mapping[Role | None, str]] = {
    "denoiser": "transformer.",
    "CLIP": "text_encoder.",
    "CLIP 2": "text_encoder_2.",
    "T5": "text_encoder_2.",
}


def dialect_of(module: str) -> Dialect | None:
    """In which dialect a module's name is; None where it has nothing before it that would tell."""
    if module.startswith(PEFT):
        return "peft"
    if module.startswith(FLAT):
        return "kohya"
    prefix = next((each for each in PREFIXES if module.startswith(each)), "")
    if not prefix:
        return None
    return "comfy" if "diffusion_model." in prefix or prefix.startswith("text_encoders.") else "diffusers"


def spelled(
    meaning: Meaning,
    dialect: Dialect,
    roles: Collection[Role | None],
    like: Mapping[Role | None, str],
    *,
    is_told: bool,
) -> str:
    """A module's name in a dialect, with the prefixes that others have there; ValueError with the reason if it has
    none. `roles` are those of all modules; `is_told` says that it is known where dots stand in flat names."""
    role, prefix = meaning.role, like.get(meaning.role)
    if dialect == "kohya":
        if role is None:
            raise ValueError("kohya's names are those of diffusion models")
        return (prefix or _kohya(role, roles)) + underscored(meaning.path)
    if meaning.is_flat and not is_told:
        raise ValueError("nobody can tell which of its underscores are dots")
    path = dotted(meaning)
    if dialect == "peft":
        if len(roles) > 1:
            raise ValueError("PEFT's files are of one component, and these are of several")
        return PEFT + path
    if role is None:
        raise ValueError(f"nothing says which component {path} is of")
    if role == "denoiser" and meaning.side == ("theirs" if dialect == "comfy" else "ours"):
        raise ValueError(f"{path} is {'no original name' if dialect == 'comfy' else 'an original name'}")
    if prefix:
        return prefix + path
    if dialect == "diffusers" and role == "denoiser" and path.startswith(("down_blocks.", "mid_block.", "up_blocks.")):
        return f"unet.{path}"
    return (COMFY if dialect == "comfy" else _DIFFUSERS)[role] + path


def _kohya(role: Role, roles: Collection[Role | None]) -> str:
    first = "lora_te1_" if {"CLIP 2", "T5"} & set(roles) else "lora_te_"
    return {"denoiser": "lora_unet_", "CLIP": first, "CLIP 2": "lora_te2_", "T5": "lora_te3_"}[role]


def prefix_of(module: str, meaning: Meaning) -> str:
    """What stands before a module's path."""
    return module[: len(module) - len(meaning.path)]
