"""What the names of modules mean, without a model to compare them with: so the same module of two dialects is one.

    lora_unet_input_blocks_4_1_proj_in            ─►  denoiser, input_blocks.4.1.proj_in
    unet.down_blocks.1.attentions.0.proj_in       ─►  denoiser, input_blocks.4.1.proj_in
    transformer.transformer_blocks.0.attn.to_k    ─►  denoiser, double_blocks.0.img_attn.qkv, the second of three parts

Names of the same naming differ in dots and underscores alone. Only where adapters have original and diffusers' names
of one component, the latter are translated by the rules of `models/dialects`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from streammerge.models.adapters.dialects import FLAT, PEFT, PREFIXES, underscored
from streammerge.models.adapters.synonyms import XLABS, usual_path, with_text_model
from streammerge.models.dialects.places import Role
from streammerge.models.dialects.recognition import KINDS
from streammerge.models.dialects.rules import Kind, Link, Linking, Side

_SIDES: Final[Mapping[Side, re.Pattern[str]]] = {
    "ours": re.compile(
        r"(?:input|middle|output|double|single|joint)\.blocks?\.|blocks\.\d+\.(?:self\.attn|cross\.attn|ffn\.[02]$)"
        r"|.*attention\.(?:qkv|out)$"
    ),
    "theirs": re.compile(
        r"(?:down|mid|up)\.blocks?\.|single\.transformer\.blocks\.|transformer\.blocks\.\d+\.(?:attn|ff|ff\.context|norm1)\."
        r"|blocks\.\d+\.(?:attn[12]|ffn\.net)\.|.*attention\.to\."
    ),
}
"""Names that are original ones, or diffusers', with dots for all underscores."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which of several modules, that are rows of one, a module is; all but the last have as many rows as columns if it
    is `wide`, else all have as many."""

    index: int
    count: int
    is_wide: bool


@dataclass(frozen=True, slots=True)
class Meaning:
    """A module's component, and what it is called there; `is_flat` with underscores for dots."""

    role: Role | None
    path: str
    is_flat: bool
    part: Part | None = None

    @property
    def key(self) -> tuple[Role | None, str]:
        """Equal for names of the same naming that differ in dots and underscores alone."""
        return self.role, underscored(self.path)

    @property
    def side(self) -> Side | None:
        """In which of two namings the path is, if it tells."""
        dotted = self.path.replace("_", ".")
        return next((side for side, pattern in _SIDES.items() if pattern.match(dotted)), None)


def meaning_of(module: str) -> Meaning:
    """What a module's name means by itself."""
    if module.startswith(PEFT):
        return Meaning(None, module.removeprefix(PEFT), is_flat=False)
    if XLABS.fullmatch(module):
        return Meaning("denoiser", usual_path(module), is_flat=False)
    for prefix, roles in PREFIXES.items():
        if module.startswith(prefix):
            path = module.removeprefix(prefix)
            is_t5 = re.match(r"encoder[._]block[._]|shared$", path) is not None
            role = "T5" if is_t5 and "T5" in roles else roles[0]
            path = with_text_model(path) if role in ("CLIP", "CLIP 2") else path
            return Meaning(role, path, module.startswith(FLAT))
    prefix = next((each for each in FLAT if module.startswith(each)), "")
    return Meaning("denoiser" if prefix else None, module.removeprefix(prefix), bool(prefix))


def meanings(adapters: Mapping[str, Collection[str]], *, original: bool = False) -> dict[str, dict[str, Meaning]]:
    """What the modules of adapters mean, by adapter and module: in one naming where the rules tell, and in the original
    one if that is wanted. ValueError, which names two modules, where nobody can tell which of them are the same."""
    found = {name: {module: meaning_of(module) for module in modules} for name, modules in adapters.items()}
    found = _with_roles(found)
    sides = {
        name: {side for meaning in own.values() if meaning.role == "denoiser" and (side := meaning.side)}
        for name, own in found.items()
    }
    has_both = {"ours", "theirs"} <= {side for own in sides.values() for side in own}
    if not has_both and not original:
        return found
    wanted = {each.key for own in found.values() for each in own.values() if each.side == "ours"}
    return {
        name: _translated(own, wanted, _others(found, name)) if "theirs" in sides[name] else own
        for name, own in found.items()
    }


def _others(found: Mapping[str, Mapping[str, Meaning]], name: str) -> str:
    """A module of another adapter that has original names."""
    others = (own for other, own in found.items() if other != name)
    return next((module for own in others for module, each in own.items() if each.side == "ours"), "")


def _with_roles(found: dict[str, dict[str, Meaning]]) -> dict[str, dict[str, Meaning]]:
    """Those whose names say nothing of components have that in which another adapter has such modules."""
    known = {each.key for own in found.values() for each in own.values() if each.role}
    if not known:
        return found
    made = {}
    for name, own in found.items():
        loose = [each for each in own.values() if each.role is None]
        roles = {role for each in loose for role, path in known if path == each.key[1]}
        if loose and not roles and any(each.side for each in loose):
            roles = {"denoiser"}
        if loose and len(roles) != 1:
            module = next(module for module, each in own.items() if each.role is None)
            other = next(module for each in found.values() for module, its in each.items() if its.role)
            raise ValueError(f"{module}   and {other}")
        role = next(iter(roles), None)
        made[name] = {module: replace(each, role=each.role or role) for module, each in own.items()}
    return made


def _translated(own: Mapping[str, Meaning], wanted: Collection[object], other: str) -> dict[str, Meaning]:
    """The adapter's modules under original names: those that others have, or that it can only have."""
    theirs = {module: dotted(each) for module, each in own.items() if each.role == "denoiser"}
    ways = [links for kind in KINDS["denoiser"] if (links := _links(kind, theirs.values())) is not None]
    meant = [links for links in ways if any(("denoiser", underscored(link.ours)) in wanted for link in links.values())]
    chosen = meant if wanted else [links for links in ways if links == ways[0]]
    if not chosen or (not wanted and len(chosen) != len(ways)):
        raise ValueError(f"{next(iter(theirs))}   {f'and {other}' if other else 'may be several original names'}")
    links = chosen[0]
    return {
        module: _named(links[theirs[module]], theirs[module]) if module in theirs else each
        for module, each in own.items()
    }


def _links(kind: Kind, paths: Iterable[str]) -> dict[str, Link] | None:
    """What each of these modules is in the original naming; None if this kind has others."""
    names = [f"{path}.weight" for path in paths]
    linking = Linking(kind, names, "theirs")
    if linking.unknown or not _may_be(kind, names):
        return None
    return {
        name.removesuffix(".weight"): replace(link, ours=link.ours.removesuffix(".weight"))
        for link in linking.links.values()
        for name in link.theirs
    }


def _may_be(kind: Kind, names: Collection[str]) -> bool:
    """Whether these may be a component's of this kind: one whose names are the same in both namings has to show it."""
    return len(kind.signs) > 1 or any(re.match(sign, name) for sign in kind.signs.values() for name in names)


def _named(link: Link, path: str) -> Meaning:
    count = len(link.theirs)
    part = Part(link.theirs.index(f"{path}.weight"), count, link.way == "wide rows") if count > 1 else None
    if link.way in ("halves", "transposed"):
        raise ValueError(f"{path}   and {link.ours}, which lies otherwise")
    return Meaning("denoiser", link.ours, is_flat=False, part=part)


WORDS: Final = re.compile(
    "|".join(
        (
            *("down_blocks", "mid_block", "up_blocks", "single_transformer_blocks", "transformer_blocks"),
            *("text_model", "input_blocks", "middle_block", "output_blocks", "double_blocks", "single_blocks"),
            *("joint_blocks", "to_add_out", "to_out", "to_qkv_mlp_proj", "to_[qkv]", "add_[qkv]_proj", "proj_in"),
            *("proj_out", "proj_mlp", "ff_context", "norm1_context", "conv_in", "conv_out", "conv_shortcut"),
            *("time_emb_proj", "in_layers", "out_layers", "emb_layers", "skip_connection", "time_embedding"),
            *("add_embedding", "label_emb", "self_attn", "cross_attn", "[kv]_img", "img_mlp", "txt_mlp", "img_attn"),
            *("txt_attn", "img_mod", "txt_mod", "x_block", "context_block", "feed_forward", "noise_refiner"),
            *("context_refiner", "x_embedder", "context_embedder", "[qkv]_proj", "out_proj", "time_text_embed"),
            *("timestep_embedder", "text_embedder", "guidance_embedder", "linear_[12]", "img_in", "txt_in"),
            *("conv_norm_out", "layer_norm[12]", "final_layer_norm", "token_embedding", "position_embedding"),
            *(
                "norm_[qk]_img",
                "norm_added_[qk]",
                "norm_[qk]",
                "[qk]_norm",
                "ln_[qk]",
                "[cty]_embedder",
                "cap_embedder",
            ),
            *("attention_norm[12]", "ffn_norm[12]", "img_emb"),
            *("time_in", "vector_in", "guidance_in", "in_layer", "out_layer", "final_layer", "adaLN_modulation"),
            *("time_embed", "text_embedding", "time_projection", "patch_embedding", "norm_out", "linear_fc[12]"),
        )
    )
)
"""What has underscores of its own in the namings that are known."""


def dotted(meaning: Meaning) -> str:
    """A path with its dots, as far as the words that are known tell."""
    if not meaning.is_flat:
        return meaning.path
    pieces, rest = [], meaning.path
    while rest:
        match = WORDS.match(rest)
        end = match.end() if match and (match.end() == len(rest) or rest[match.end()] == "_") else rest.find("_")
        end = len(rest) if end < 0 else end
        pieces.append(rest[:end])
        rest = rest[end + 1 :]
    return ".".join(pieces)


def are_told(role: Role | None, own: Collection[Meaning]) -> bool:
    """Whether it is known where dots stand in these paths: the rules know all of them so."""
    names = [f"{dotted(meaning)}.weight" for meaning in own]
    kinds, sides = (KINDS[role] if role else ()), ("ours", "theirs")
    known = (kind for kind in kinds if _may_be(kind, names))
    return any(not Linking(kind, names, side).strange for kind in known for side in sides)  # type: ignore[arg-type]
