"""The blocks of a diffusion model, by the names under which the tools that merge by block know them.

A tensor may have several names, the narrowest first, and a value for the narrowest holds: Stable Diffusion's
`time_embed.0.weight` is TIME, which is a part of IN00, and its VAE is VAE, which is a part of BASE.

    UNet    IN00 …    input_blocks.0 … (diffusers: down_blocks, conv_in); a part of IN00 are TIME (time_embed,
                      time_embedding) and LABEL (label_emb, add_embedding)
            M00       middle_block (mid_block)
            OUT00 …   output_blocks.0 … (up_blocks); to the last belong out.* (conv_norm_out, conv_out)
    Flux    IN        img_in, txt_in, time_in, vector_in, guidance_in, and what other versions have in their place
            D00 …     double_blocks.0 … (transformer_blocks); DOUBLE00 … is the same
            S00 …     single_blocks.0 … (single_transformer_blocks); SINGLE00 … is the same
            OUT       final_layer (norm_out, proj_out)
    SD 3    IN00 …    joint_blocks.0 … (transformer_blocks)
            EMBED     pos_embed, x_embedder, context_embedder, y_embedder, t_embedder: a part of BASE
            FINAL     final_layer (norm_out, proj_out): a part of BASE
    Wan, Z-Image, HunyuanDiT
            IN00 …    blocks.0 … or layers.0 …; BASE has what is around them, refiners too
    all     BASE      everything else; of that, CLIP, CLIPL, CLIPG and T5 are the text encoders, VAE the VAE, DEPTH the
                      depth model of Stable Diffusion 2, and EMA the averages that some checkpoints carry

The UNet's and Flux's blocks are SuperMerger's, SD 3's Model-Mixer's; others with one stack of blocks follow SD 3. The
denoiser's tensors are known with or without what full checkpoints put before their names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from streammerge.models.architecture import UNKNOWN, guess_architecture
from streammerge.models.wrappers import bare_names
from streammerge.tensors import TensorInfo

BASE: Final = "BASE"

_DENOISER: Final = r"(?:(?:(?:model\.)?diffusion_model|unet|transformer|control_model|net|model(?:\.model)?)\.)?"
_NUMBERED: Final = re.compile(r"(?!T5$)([A-Z]+?)(\d{1,3})")
_SYNONYMS: Final = {"DOUBLE": "D", "SINGLE": "S"}


@dataclass(frozen=True, slots=True)
class ListForm:
    """A list of values, one for each of these blocks, what people say of such a list, and what they should know."""

    blocks: tuple[str, ...]
    note: str = ""
    remark: str = ""

    def __str__(self) -> str:
        return f"{len(self.blocks)} {self.note}".rstrip()


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of one model.

    `forms` are the lists of values that it takes, the usual one first: its blocks in their order. `places` are the
    names of each tensor's block, the narrowest first. Both are empty where no blocks have names. It is `unsure`, in
    words, where there may be more blocks: no list of values can be taken then.
    """

    architecture: str = UNKNOWN
    forms: tuple[ListForm, ...] = ()
    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unsure: str = ""

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo]) -> Blocks:
        """The blocks of the model that has these tensors, whatever wrappers put into their names."""
        if bare := bare_names(tensors):
            found = cls.of({new: tensors[old] for new, old in bare.items()})
            return replace(found, places={bare[name]: places for name, places in found.places.items()})
        return cls.named(tensors, guess_architecture(tensors))

    @classmethod
    def named(cls, names: Iterable[str], architecture: str = UNKNOWN) -> Blocks:
        """The blocks of the model whose tensors have these names."""
        names = list(names)
        for family in _FAMILIES:
            if any(map(re.compile(family.mark).match, names)):
                return family.blocks(names, family.title if architecture == UNKNOWN else architecture)
        return cls(architecture)

    @property
    def order(self) -> tuple[str, ...]:
        """The blocks in the order in which the usual list gives their values."""
        return self.forms[0].blocks if self.forms else ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a value may be given for: the blocks, and the parts of them that the model has."""
        found = {name for names in self.places.values() for name in names}
        return (*self.order, *sorted(found.difference(self.order)))


def blocks_of(model: Any) -> Blocks:  # noqa: ANN401  (anything with tensors: whether it knows its blocks is asked)
    """The blocks of a model: those that it knows of, or that its names tell."""
    own = getattr(model, "blocks", None)
    return own if isinstance(own, Blocks) else Blocks.of(model.tensors)


def normal_name(name: str) -> str:
    """A block's name as we write it: `in3` is IN03, `DOUBLE00` is D00."""
    name = name.strip().upper()
    match = _NUMBERED.fullmatch(name)
    return f"{_SYNONYMS.get(match[1], match[1])}{int(match[2]):02}" if match else name


def abridged(names: Sequence[str]) -> str:
    """`BASE, IN00-IN11, M00, OUT00-OUT11`: the names, with what only counts on left out."""
    runs: list[list[str]] = []
    for name in names:
        match = _NUMBERED.fullmatch(name)
        before = match and f"{match[1]}{int(match[2]) - 1:02}"
        if runs and runs[-1][-1] == before:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# Where a tensor is, by how its name starts


_Match = Callable[[str], "re.Match[str] | None"]


@dataclass(frozen=True, slots=True)
class _Place:
    """Tensors whose names start in a certain way, an expression, and their block's names.

    `#` in these is a number, `start` + 3 `level` + `n`: diffusers counts the blocks of every resolution from 0, and
    there are three to a resolution. `$` is the number of the last block. No number has more than three digits: a
    stranger's file must not make us count further.
    """

    start_of_name: str
    blocks: tuple[str, ...]
    first: int = 0

    def number(self, match: re.Match[str]) -> int:
        groups = match.groupdict(default="0")
        return self.first + 3 * int(groups.get("level", 0)) + int(groups.get("n", 0))


def _denoiser(start: str, *blocks: str, first: int = 0) -> _Place:
    return _Place(_DENOISER + f"(?:{start})", blocks, first)


def _beside(start: str, *blocks: str) -> _Place:
    return _Place(start, blocks)


@dataclass(frozen=True, slots=True)
class _Family:
    """Models of one build: the mark by which they are known, where their tensors are, and which lists they take.

    Expressions are compiled when a model is looked at: most merges have no values by block.
    """

    title: str
    mark: str
    places: tuple[_Place, ...]
    forms: Callable[[Mapping[str, int]], tuple[ListForm, ...]]

    def blocks(self, names: Iterable[str], architecture: str) -> Blocks:
        starts = [(re.compile(place.start_of_name).match, place) for place in self.places]
        located = {name: _located(name, starts) for name in names}
        counts: defaultdict[str, int] = defaultdict(int)
        for blocks, number in located.values():
            for block in blocks:
                if block.endswith("#"):
                    counts[block[:-1]] = max(counts[block[:-1]], number + 1)
        forms = self.forms(counts)
        last = max(counts["IN"], counts["OUT"]) - 1
        places = {
            name: tuple(block.replace("#", f"{number:02}").replace("$", f"{last:02}") for block in blocks)
            for name, (blocks, number) in located.items()
        }
        return Blocks(architecture, forms, places)


def _located(name: str, starts: Iterable[tuple[_Match, _Place]]) -> tuple[tuple[str, ...], int]:
    """The names of the tensor's block, by the first start that fits, and its number."""
    for fits, place in starts:
        if match := fits(name):
            return place.blocks, place.number(match)
    return (BASE,), 0


# The families


def _numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}{number:02}" for number in range(count))


def unet_blocks(count: int) -> tuple[str, ...]:
    """The blocks of a UNet that has so many of them on each side, in their order."""
    return (BASE, *_numbered("IN", count), "M00", *_numbered("OUT", count))


def _with_and_without_base(names: tuple[str, ...]) -> tuple[ListForm, ...]:
    return ListForm(names), ListForm(names[1:], "without BASE")


def _unet_forms(counts: Mapping[str, int]) -> tuple[ListForm, ...]:
    count = max(counts["IN"], counts["OUT"])
    names = unet_blocks(count)
    forms = _with_and_without_base(names)
    if count != 9:
        return forms
    # SDXL; SuperMerger takes Stable Diffusion's lists too, and leaves out what SDXL doesn't have
    usual, short = _with_and_without_base(unet_blocks(12))
    vae = "the last of 21 values is the VAE's; SuperMerger counts the VAE as part of BASE, and makes nothing of it"
    with_vae = ListForm((*names, "VAE"), "with VAE at the end", vae)
    return (*forms, with_vae, ListForm(usual.blocks, "as Stable Diffusion's"), ListForm(short.blocks, "of these"))


def _flux_forms(counts: Mapping[str, int]) -> tuple[ListForm, ...]:
    middle = (*_numbered("D", counts["D"]), *_numbered("S", counts["S"]))
    return (
        ListForm(("CLIP", "T5", "IN", *middle, "OUT")),
        ListForm((BASE, *middle), "from BASE to the last S"),
        ListForm(middle, "without BASE"),
    )


def _stack_forms(counts: Mapping[str, int]) -> tuple[ListForm, ...]:
    return _with_and_without_base((BASE, *_numbered("IN", counts["IN"])))


_PARTS_OF_BASE: Final = (
    _beside(r"first_stage_model\.|vae\.", "VAE", BASE),
    _beside(r"cond_stage_model\.|text_encoder\.", "CLIP", BASE),
    _beside(r"conditioner\.embedders\.0\.transformer\.|text_encoders\.clip_l\.", "CLIPL", BASE),
    _beside(r"conditioner\.embedders\.\d+\.model\.|text_encoders\.clip_g\.", "CLIPG", BASE),
    _beside(r"text_encoders\.t5", "T5", BASE),
    _beside(r"depth_model\.", "DEPTH", BASE),
    _beside(r"model_ema\.", "EMA", BASE),
)

_FAMILIES: Final = (
    _Family(
        "a UNet",
        _DENOISER + r"(?:input_blocks|down_blocks)\.\d",
        (
            *_PARTS_OF_BASE,
            _denoiser(r"time_embed\.|time_embedding\.", "TIME", "IN00"),
            _denoiser(r"label_emb\.|add_embedding\.", "LABEL", "IN00"),
            _denoiser(r"conv_in\.", "IN00"),
            _denoiser(r"input_blocks\.(?P<n>\d{1,3})\.", "IN#"),
            _denoiser(r"down_blocks\.(?P<level>\d{1,3})\.(?:resnets|attentions)\.(?P<n>\d{1,3})\.", "IN#", first=1),
            _denoiser(r"down_blocks\.(?P<level>\d{1,3})\.downsamplers\.", "IN#", first=3),
            _denoiser(r"middle_block\.|mid_block\.", "M00"),
            _denoiser(r"output_blocks\.(?P<n>\d{1,3})\.", "OUT#"),
            _denoiser(r"up_blocks\.(?P<level>\d{1,3})\.(?:resnets|attentions)\.(?P<n>\d{1,3})\.", "OUT#"),
            _denoiser(r"up_blocks\.(?P<level>\d{1,3})\.upsamplers\.", "OUT#", first=2),
            _denoiser(r"out\.|conv_norm_out\.|conv_out\.", "OUT$"),
        ),
        _unet_forms,
    ),
    _Family(
        "a Flux",
        _DENOISER + r"(?:double_blocks|single_transformer_blocks)\.\d",
        (
            _beside(r"text_encoders\.clip_l\.|text_encoder\.", "CLIP", BASE),
            *_PARTS_OF_BASE,
            _denoiser(r"(?:img|txt|time|vector|guidance)_in\.", "IN"),
            _denoiser(r"distilled_guidance_layer\.|(?:double|single)_stream_modulation", "IN"),  # Chroma, Flux 2
            _denoiser(r"x_embedder\.|context_embedder\.|time_text_embed\.|time_guidance_embed\.", "IN"),
            _denoiser(r"(?:double|transformer)_blocks\.(?P<n>\d{1,3})\.", "D#"),
            _denoiser(r"single_(?:transformer_)?blocks\.(?P<n>\d{1,3})\.", "S#"),
            _denoiser(r"final_layer\.|norm_out\.|proj_out\.", "OUT"),
        ),
        _flux_forms,
    ),
    _Family(
        "a Stable Diffusion 3",
        _DENOISER + r"(?:joint_blocks\.\d|transformer_blocks\.\d+\.attn\.add_q_proj\.)",
        (
            *_PARTS_OF_BASE,
            _denoiser(r"(?:joint|transformer)_blocks\.(?P<n>\d{1,3})\.", "IN#"),
            _denoiser(r"pos_embed|[xyt]_embedder\.|context_embedder\.|time_text_embed\.", "EMBED", BASE),
            _denoiser(r"final_layer\.|norm_out\.|proj_out\.", "FINAL", BASE),
        ),
        _stack_forms,
    ),
    _Family(
        "a diffusion transformer",
        _DENOISER + r"(?:blocks\.\d+\.(?:self_attn|cross_attn|attn1)\.|layers\.\d+\.adaLN_modulation\.)",
        (*_PARTS_OF_BASE, _denoiser(r"(?:blocks|layers)\.(?P<n>\d{1,3})\.", "IN#")),
        _stack_forms,
    ),
)
