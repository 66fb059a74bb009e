"""What the modules of an adapter are called, and their tensors, by whose programs read it: what is read and written.

kohya       lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight
comfy       diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight
diffusers   transformer.transformer_blocks.0.attn.to_q.lora_B.weight
peft        base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight, and an adapter_config.json
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from streammerge.models.wrappers import before_all

if TYPE_CHECKING:
    from streammerge.models.dialects.places import Role

Dialect = Literal["kohya", "peft", "comfy", "diffusers"]
"""Whose names modules have."""

PEFT: Final = "base_model.model."
"""How the names of modules begin in PEFT's files."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a dialect spells: what stands before the modules of each component, and what the tensors of a module are
    called by their roles.

    Of several `prefixes` the first is what is written; `plain` ones say nothing of components, and are written where
    there are no others. What `tensors` have no name for can't be written. It `is_flat` with underscores for dots; where
    it `has_tables`, what reads it takes factors of embeddings.
    """

    prefixes: Mapping[Role, tuple[str, ...]]
    plain: tuple[str, ...]
    tensors: Mapping[str, str]
    is_flat: bool = False
    has_tables: bool = True

    @property
    def beginnings(self) -> tuple[str, ...]:
        """All that may stand before a module's name, what tells a component first."""
        return (*(each for prefixes in self.prefixes.values() for each in prefixes), *self.plain)


_FACTORS: Final = {"up": "lora_up.weight", "down": "lora_down.weight", "alpha": "alpha"}
_PEFTS_FACTORS: Final = {"up": "lora_B.weight", "down": "lora_A.weight"}
_DIFFERENCES: Final = {"diff": "diff", "diff_b": "diff_b"}

SPELLINGS: Final[Mapping[Dialect, Spelling]] = {
    "kohya": Spelling(
        {
            "denoiser": ("lora_unet_", "lora_transformer_", "lycoris_unet_", "oft_unet_", "lora_prior_unet_"),
            "CLIP": ("lora_te_", "lora_te1_"),
            "CLIP 2": ("lora_te2_", "lora_prior_te_"),
            "T5": ("lora_te3_", "lora_te2_"),
        },
        ("lycoris_", "lora_"),
        {**_FACTORS, **_DIFFERENCES},
        is_flat=True,
        has_tables=False,
    ),
    "peft": Spelling(
        {},
        (PEFT,),
        {**_PEFTS_FACTORS, "embedding.up": "lora_embedding_B", "embedding.down": "lora_embedding_A"},
    ),
    "comfy": Spelling(
        {
            "denoiser": ("diffusion_model.", "model.diffusion_model."),
            "CLIP": ("text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
            "CLIP 2": ("text_encoders.clip_g.transformer.",),
            "T5": ("text_encoders.t5xxl.transformer.", "text_encoders.umt5xxl.transformer."),
        },
        (),
        {**_FACTORS, **_DIFFERENCES},
    ),
    "diffusers": Spelling(
        {
            "denoiser": ("transformer.", "unet."),
            "CLIP": ("text_encoder.",),
            "CLIP 2": ("text_encoder_2.",),
            "T5": ("text_encoder_2.", "text_encoder_3."),
        },
        (),
        _PEFTS_FACTORS,
        has_tables=False,
    ),
}
"""Every dialect's spelling."""

DIALECTS: Final[tuple[Dialect, ...]] = tuple(SPELLINGS)


def _components() -> dict[str, tuple[Role, ...]]:
    found: dict[str, tuple[Role, ...]] = {}
    for spelling in SPELLINGS.values():
        for role, prefixes in spelling.prefixes.items():
            found.update({each: (*found.get(each, ()), role) for each in prefixes})
    return found


PREFIXES: Final[Mapping[str, tuple[Role, ...]]] = _components()
"""What stands before the names of modules in any dialect, and of which components these may be."""

FLAT: Final = SPELLINGS["kohya"].beginnings
"""How names begin that have underscores for dots."""

ANY: Final = (*(each for spelling in SPELLINGS.values() for each in spelling.plain), "")
"""What may stand there that says nothing of components."""

_DOTS: Final = re.compile(r"[._]+")
_PARALLEL: Final = re.compile(r"(?:module[._])+(?=.)")


def underscored(name: str) -> str:
    """The name with underscores for its dots."""
    return _DOTS.sub("_", name).strip("_")


def beginning_of(module: str) -> str:
    """What stands before a module's path in its dialect; nothing where it has none."""
    dialect = dialect_of(module)
    beginnings = SPELLINGS[dialect].beginnings if dialect else ()
    return next((each for each in beginnings if module.startswith(each)), "")


def unparalleled(module: str) -> str:
    """A module's name without what data parallelism puts before paths, behind a dialect's beginning."""
    beginning = beginning_of(module)
    path = module.removeprefix(beginning)
    bare = _PARALLEL.sub("", path)
    return module if bare == path else unparalleled(beginning + bare)


def unwrapped_modules(modules: Collection[str]) -> list[str]:
    """The modules of an adapter without what wrappers put before all of their paths."""
    beginnings = list(map(beginning_of, modules))
    paths = [module.removeprefix(start) for module, start in zip(modules, beginnings, strict=True)]
    while before := before_all(paths):
        paths = [path.removeprefix(before) for path in paths]
    return [start + path for start, path in zip(beginnings, paths, strict=True)]


def dialect_of(module: str) -> Dialect | None:
    """In which dialect a module's name is; None where it has nothing before it that would tell, or what PEFT puts
    there within a component."""
    if PEFT in module.removeprefix(PEFT):
        return None
    return next((name for name, spelling in SPELLINGS.items() if module.startswith(spelling.beginnings)), None)


def spelled(
    dialect: Dialect,
    role: Role | None,
    path: str,
    roles: Collection[Role | None],
    like: Mapping[Role | None, str],
) -> str | None:
    """What a dialect calls the module at this path of a component; None if it has no names for such components.

    `roles` are those of all components, `like` what stands before the modules of some of them, if not the usual.
    """
    spelling = SPELLINGS[dialect]
    own = () if role is None else spelling.prefixes.get(role, ())
    usual = own if spelling.prefixes else spelling.plain
    if not usual:
        return None
    first = "lora_te1_" if usual[0] == "lora_te_" and {"CLIP 2", "T5"} & set(roles) else usual[0]
    return like.get(role, first) + (underscored(path) if spelling.is_flat else path)
