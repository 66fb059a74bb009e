"""What the names of modules mean, without a model to compare them with: so the same module of two dialects is one.

    lora_unet_input_blocks_4_1_proj_in            ─►  denoiser, input_blocks.4.1.proj_in
    unet.down_blocks.1.attentions.0.proj_in       ─►  denoiser, input_blocks.4.1.proj_in
    transformer.transformer_blocks.0.attn.to_k    ─►  denoiser, double_blocks.0.img_attn.qkv, the second of three parts

Names of the same naming differ in dots and underscores alone. Only where adapters have original and diffusers' names
of one component, the latter are translated by the rules of `models/dialects`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from streammerge.models.adapters.dialects import (
    FLAT,
    PEFT,
    PREFIXES,
    Dialect,
    dialect_of,
    underscored,
    unwrapped_modules,
)
from streammerge.models.adapters.synonyms import XLABS, usual_path, with_text_model
from streammerge.models.dialects.places import Role
from streammerge.models.dialects.recognition import KINDS
from streammerge.models.dialects.rules import Kind, Link, Linking, Side, accented, numbers, plain

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
    is `wide`, else all have as many. The halves of one that `is_swapped` come the other way round."""

    index: int
    count: int
    is_wide: bool
    is_swapped: bool = False


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
            path = module.removeprefix(prefix).removeprefix(PEFT)
            is_t5 = re.match(r"encoder[._]block[._]|shared$", path) is not None
            role = "T5" if is_t5 and "T5" in roles else roles[0]
            path = with_text_model(path) if role in ("CLIP", "CLIP 2") else path
            return Meaning(role, path, module.startswith(FLAT))
    prefix = next((each for each in FLAT if module.startswith(each)), "")
    return Meaning("denoiser" if prefix else None, module.removeprefix(prefix), bool(prefix))


def meanings(adapters: Mapping[str, Collection[str]], original: Dialect | None = None) -> dict[str, dict[str, Meaning]]:
    """What the modules of adapters mean, by adapter and module: in one naming where the rules tell, and in the original
    one if a dialect is wanted that has it. ValueError, which names two modules, where nobody can tell which of them are
    the same."""
    found = {
        name: {module: meaning_of(bare) for module, bare in zip(modules, names, strict=True)}
        for (name, modules), names in zip(adapters.items(), _without_wrappers(list(adapters.values())), strict=True)
    }
    found = _with_roles(found)
    sides = {
        name: {side for meaning in own.values() if meaning.role == "denoiser" and (side := meaning.side)}
        for name, own in found.items()
    }
    has_both = {"ours", "theirs"} <= {side for own in sides.values() for side in own}
    if not has_both and original is None:
        return found
    others = {module: each for own in found.values() for module, each in own.items() if each.side == "ours"}
    return {name: _translated(own, others, original) if "theirs" in sides[name] else own for name, own in found.items()}


def _without_wrappers(adapters: Sequence[Collection[str]]) -> list[list[str]]:
    """The adapters' modules without what wrappers put before all paths, if some adapters have that alone."""
    given = list(map(list, adapters))
    bare = list(map(unwrapped_modules, given))
    return bare if any(map(list.__eq__, given, bare)) else given


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


@dataclass(frozen=True)
class _Way:
    """What diffusers' modules of an adapter are in the original naming of a kind, as ComfyUI has it if `is_comfys`."""

    kind: Kind
    meant: Mapping[str, Meaning]
    is_comfys: bool = False

    def likeness(self, others: Collection[Meaning]) -> tuple[int, int]:
        """How many of these modules the kind has, and how many of them are here too."""
        names = {f"{dotted(each)}.weight": each.key for each in others if each.role == "denoiser"}
        plains = {plain(name, self.kind.accent): key for name, key in names.items()}
        told = Linking(self.kind, [*plains], "ours").told
        had = {key for name, key in plains.items() if name in told and self.called(told[name]).key == key}
        return len(had), len({each.key for each in self.meant.values()} & {*names.values()})

    def called(self, link: Link) -> Meaning:
        """The original module of a link."""
        ours = accented(link.ours, self.kind.accent) if self.is_comfys else link.ours
        return Meaning("denoiser", ours.removesuffix(".weight"), is_flat=False)


def _translated(
    own: Mapping[str, Meaning], others: Mapping[str, Meaning], original: Dialect | None
) -> dict[str, Meaning]:
    """The adapter's modules under original names: those that are most like others', or that it can only have."""
    theirs = {module: dotted(each) for module, each in own.items() if each.role == "denoiser"}
    ways = [way for kind in KINDS["denoiser"] for way in _ways(kind, theirs)]
    other = next(iter(others), "")
    if others:
        alike = [way.likeness(others.values()) for way in ways]
        ways = [way for way, found in zip(ways, alike, strict=True) if found == max(alike) and found[1]]
    # kohya's names of HunyuanVideo are those of its trainers, and not ComfyUI's
    has_dots = (original or dialect_of(other)) == "comfy"
    preferred = [way for way in ways if way.is_comfys == (has_dots and bool(way.kind.accent))]
    chosen = _one_of(preferred or ways, theirs.values(), has_dots=has_dots)
    if chosen is None:
        raise ValueError(f"{next(iter(theirs))}   {f'and {other}' if other else 'may be several original names'}")
    return {**own, **chosen.meant}


def _one_of(ways: Sequence[_Way], paths: Iterable[str], *, has_dots: bool) -> _Way | None:
    """The way that is meant: one of several that come to the same names, whose dots count or don't, or that of the
    model which has as many blocks as the adapter."""
    called = {tuple((each.path if has_dots else each.key, each.part) for each in way.meant.values()) for way in ways}
    if len(called) == 1:
        return ways[0]
    has = {stem: numbers((f"{path}." for path in paths), stem) for stem in (_DOUBLE, _SINGLE)}
    lasts = {stem: found[-1] + 1 for stem, found in has.items() if found}
    fitting = [way for way in ways if DEPTHS.get(way.kind.name) == lasts]
    return fitting[0] if len(fitting) == 1 else None


_DOUBLE, _SINGLE = "transformer_blocks.", "single_transformer_blocks."

DEPTHS: Final[Mapping[str, Mapping[str, int]]] = {
    "Flux": {_DOUBLE: 19, _SINGLE: 38},
    "HunyuanVideo": {_DOUBLE: 20, _SINGLE: 40},
}
"""How many blocks those models have whose modules diffusers calls the same."""


def _ways(kind: Kind, theirs: Mapping[str, str]) -> Iterator[_Way]:
    """What these modules, by their paths, are in the original naming, and in ComfyUI's of it; none if this kind has
    others."""
    names = {module: f"{path}.weight" for module, path in theirs.items()}
    linking = Linking(kind, [*names.values()], "theirs")
    if linking.strange or not _may_be(kind, names.values()):
        return
    links = {module: linking.told[name] for module, name in names.items()}
    for is_comfys in (False, True) if kind.accent else (False,):
        way = _Way(kind, {}, is_comfys)
        parts = {module: _part(link, names[module]) for module, link in links.items()}
        yield replace(
            way, meant={module: replace(way.called(link), part=parts[module]) for module, link in links.items()}
        )


def _may_be(kind: Kind, names: Collection[str]) -> bool:
    """Whether these may be a component's of this kind: one whose names are the same in both namings has to show it."""
    return len(kind.signs) > 1 or any(re.match(sign, name) for sign in kind.signs.values() for name in names)


def _part(link: Link, name: str) -> Part | None:
    """Which part of an original module another is whose weight has this name, if it isn't all of it as it is."""
    count, is_swapped = len(link.theirs), link.way == "halves"
    if count == 1 and not is_swapped:
        return None
    return Part(link.theirs.index(name), count, link.way == "wide rows", is_swapped)


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
