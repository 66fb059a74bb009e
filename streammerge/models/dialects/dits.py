"""Diffusion transformers of images: Flux and its like (Chroma, Flux 2), Stable Diffusion 3, Z-Image, HunyuanDiT.

The originals keep query, key and value in one tensor, Flux's single blocks the first layer of the MLP with them. The
last modulation gives shift and scale in the original, scale and shift in diffusers. (Black Forest Labs' `model.py`,
Stability AI's `mmdit.py`, Tongyi's Z-Image, Tencent's HunyuanDiT; diffusers' `FluxTransformer2DModel` and its like.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from streammerge.models.dialects.rules import Block, Kind, Side, Table, numbers, split, split_wide, swapped

_NORMS: Final[Table] = {
    "=img_attn.norm.query_norm.scale": "=attn.norm_q.weight",
    "=img_attn.norm.key_norm.scale": "=attn.norm_k.weight",
    "=txt_attn.norm.query_norm.scale": "=attn.norm_added_q.weight",
    "=txt_attn.norm.key_norm.scale": "=attn.norm_added_k.weight",
}

_ATTENTION: Final[Table] = {
    "img_attn.qkv": split("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": split("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}

_DOUBLE: Final[Table] = {
    **_ATTENTION,
    **_NORMS,
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}

_SINGLE: Final[Table] = {
    "modulation.lin": "norm.linear",
    "linear1": split_wide("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
    "=norm.query_norm.scale": "=attn.norm_q.weight",
    "=norm.key_norm.scale": "=attn.norm_k.weight",
}

_FLUX: Final[Table] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{ours}_in.{layer}_layer": f"time_text_embed.{theirs}_embedder.linear_{number}"
        for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for layer, number in (("in", 1), ("out", 2))
    },
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
}

_GUIDANCE: Final[Table] = {"in_layer": "linear_1", "out_layer": "linear_2"}
"""The layers that give Chroma's modulations."""


def _flux(names: Collection[str], _side: Side) -> Iterator[Block]:
    yield Block("", "", _FLUX)
    for n in numbers(names, "double_blocks.", "transformer_blocks."):
        yield Block(f"double_blocks.{n}.", f"transformer_blocks.{n}.", _DOUBLE)
    for n in numbers(names, "single_blocks.", "single_transformer_blocks."):
        yield Block(f"single_blocks.{n}.", f"single_transformer_blocks.{n}.", _SINGLE)
    stem = "distilled_guidance_layer."
    for n in numbers(names, f"{stem}layers.", f"{stem}norms."):
        yield Block(f"{stem}layers.{n}.", f"{stem}layers.{n}.", _GUIDANCE)
        yield Block(f"{stem}norms.{n}.", f"{stem}norms.{n}.", {"=scale": "=weight"})


FLUX: Final = Kind(
    "Flux",
    {
        "ours": r"double_blocks\.\d+\.(?:img|txt)_attn\.|single_blocks\.\d+\.linear[12]\.",
        "theirs": r"single_transformer_blocks\.\d+\.(?:proj_mlp|proj_out|norm\.linear)\.",
    },
    _flux,
    unless=r"double_stream_modulation_|txt_in\.individual_token_refiner\.|context_embedder\.token_refiner\.",
)

_FLUX2_DOUBLE: Final[Table] = {
    **_ATTENTION,
    **_NORMS,
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}

_FLUX2_SINGLE: Final[Table] = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "=norm.query_norm.scale": "=attn.norm_q.weight",
    "=norm.key_norm.scale": "=attn.norm_k.weight",
}

_FLUX2: Final[Table] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{ours}_in.{layer}_layer": f"time_guidance_embed.{theirs}_embedder.linear_{number}"
        for ours, theirs in (("time", "timestep"), ("guidance", "guidance"))
        for layer, number in (("in", 1), ("out", 2))
    },
    **{
        f"{stream}.lin": f"{stream}.linear"
        for stream in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    },
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}


def _flux2(names: Collection[str], _side: Side) -> Iterator[Block]:
    yield Block("", "", _FLUX2)
    for n in numbers(names, "double_blocks.", "transformer_blocks."):
        yield Block(f"double_blocks.{n}.", f"transformer_blocks.{n}.", _FLUX2_DOUBLE)
    for n in numbers(names, "single_blocks.", "single_transformer_blocks."):
        yield Block(f"single_blocks.{n}.", f"single_transformer_blocks.{n}.", _FLUX2_SINGLE)


FLUX2: Final = Kind(
    "Flux 2",
    {
        "ours": r"double_stream_modulation_img\.lin\.",
        "theirs": r"double_stream_modulation_img\.linear\.",
    },
    _flux2,
)

_JOINT: Final[Table] = {
    "x_block.attn.qkv": split("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": split("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": split("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}

_LAST_JOINT: Final[Table] = {**_JOINT, "context_block.adaLN_modulation.1": swapped("norm1_context.linear")}
"""After the last block nothing is made of the text any more: its modulation is only a shift and a scale."""

_SD3: Final[Table] = {
    "=pos_embed": "=pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    **{
        f"{ours}_embedder.mlp.{layer}": f"time_text_embed.{theirs}_embedder.linear_{number}"
        for ours, theirs in (("t", "timestep"), ("y", "text"))
        for layer, number in ((0, 1), (2, 2))
    },
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}


def _sd3(names: Collection[str], _side: Side) -> Iterator[Block]:
    yield Block("", "", _SD3)
    found = numbers(names, "joint_blocks.", "transformer_blocks.")
    for n in found:
        goes_on = f"joint_blocks.{n}.context_block.mlp.", f"transformer_blocks.{n}.ff_context."
        is_last = n == found[-1] and not any(name.startswith(goes_on) for name in names)
        yield Block(f"joint_blocks.{n}.", f"transformer_blocks.{n}.", _LAST_JOINT if is_last else _JOINT)


SD3: Final = Kind(
    "Stable Diffusion 3",
    {
        "ours": r"joint_blocks\.\d+\.(?:x|context)_block\.",
        "theirs": r"transformer_blocks\.\d+\.norm1_context\.",
    },
    _sd3,
    unless=r"x_embedder\.(?:weight|bias)|single_transformer_blocks\.|patch_embed\.",
)
"""What has its tokens from somewhere else than from a convolution and a table of positions is another model."""

_Z_IMAGE_LAYER: Final[Table] = {
    "attention.qkv": split("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    **{name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
}


def _z_image(names: Collection[str], _side: Side) -> Iterator[Block]:
    for stem in ("cap_embedder.", "t_embedder.", "x_pad_token", "cap_pad_token"):
        yield Block(stem, stem)
    yield Block("x_embedder.", "all_x_embedder.2-1.")
    yield Block("final_layer.", "all_final_layer.2-1.")
    for stem in ("layers.", "noise_refiner.", "context_refiner."):
        for n in numbers(names, stem):
            for same in ("feed_forward.", "adaLN_modulation."):
                yield Block(f"{stem}{n}.{same}", f"{stem}{n}.{same}")
            yield Block(f"{stem}{n}.", f"{stem}{n}.", _Z_IMAGE_LAYER)


Z_IMAGE: Final = Kind(
    "Z-Image",
    {
        "theirs": r"all_x_embedder\.2-1\.",
        "ours": r"x_pad_token$|cap_pad_token$",
    },
    _z_image,
)
"""Its original is known by its tokens for padding: Lumina 2 is much the same without."""

_HUNYUAN_DIT: Final[Table] = {
    "x_embedder.proj": "pos_embed.proj",
    "=text_embedding_padding": "=text_embedding_padding",
    "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
    "mlp_t5.0": "text_embedder.linear_1",
    "mlp_t5.2": "text_embedder.linear_2",
    "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
    "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
    "=pooler.positional_embedding": "=time_extra_emb.pooler.positional_embedding",
    **{f"pooler.{part}_proj": f"time_extra_emb.pooler.{part}_proj" for part in "qkvc"},
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}

_HUNYUAN_DIT_BLOCK: Final[Table] = {
    "norm1": "norm1.norm",
    "default_modulation.1": "norm1.linear",
    "attn1.Wqkv": split("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn2.q_proj": "attn2.to_q",
    "attn2.kv_proj": split("attn2.to_k", "attn2.to_v"),
    **{f"{attention}.{part}_norm": f"{attention}.norm_{part}" for attention in ("attn1", "attn2") for part in "qk"},
    **{f"{attention}.out_proj": f"{attention}.to_out.0" for attention in ("attn1", "attn2")},
    "norm2": "norm3",
    "norm3": "norm2",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    **{name: name for name in ("skip_norm", "skip_linear")},
}


def _hunyuan_dit(names: Collection[str], _side: Side) -> Iterator[Block]:
    yield Block("", "", _HUNYUAN_DIT)
    for n in numbers(names, "blocks."):
        yield Block(f"blocks.{n}.", f"blocks.{n}.", _HUNYUAN_DIT_BLOCK)


HUNYUAN_DIT: Final = Kind(
    "HunyuanDiT",
    {"ours": r"blocks\.\d+\.attn1\.Wqkv\.", "theirs": r"time_extra_emb\.pooler\."},
    _hunyuan_dit,
)
"""Of its first version's `style_embedder` diffusers keeps a row alone: it has no name there."""
