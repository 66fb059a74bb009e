"""Diffusion transformers of videos: Wan 2 and HunyuanVideo.

(Alibaba's `wan/modules/model.py`, Tencent's `hyvideo/modules/models.py`; diffusers' `WanTransformer3DModel` and
`HunyuanVideoTransformer3DModel`.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from streammerge.models.dialects.rules import Accent, Block, Kind, Side, Table, numbers, split, split_wide, swapped

_WAN: Final[Table] = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "=img_emb.emb_pos": "=condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "=head.modulation": "=scale_shift_table",
}

_WAN_BLOCK: Final[Table] = {
    **{
        f"{ours}_attn.{part}": f"{theirs}.{name}"
        for ours, theirs in (("self", "attn1"), ("cross", "attn2"))
        for part, name in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "=modulation": "=scale_shift_table",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}


def _wan(names: Collection[str], _side: Side) -> Iterator[Block]:
    yield Block("", "", _WAN)
    for stem in ("blocks.", "vace_blocks."):
        for n in numbers(names, stem):
            yield Block(f"{stem}{n}.", f"{stem}{n}.", _WAN_BLOCK)


WAN: Final = Kind(
    "Wan",
    {
        "ours": r"blocks\.\d+\.(?:self|cross)_attn\.[qkvo]\.",
        "theirs": r"condition_embedder\.time_(?:embedder|proj)\.",
    },
    _wan,
)

_HUNYUAN_EMBEDDERS: Final = (
    ("time_in.mlp.0", "timestep_embedder.linear_1"),
    ("time_in.mlp.2", "timestep_embedder.linear_2"),
    ("guidance_in.mlp.0", "guidance_embedder.linear_1"),
    ("guidance_in.mlp.2", "guidance_embedder.linear_2"),
    ("vector_in.in_layer", "text_embedder.linear_1"),
    ("vector_in.out_layer", "text_embedder.linear_2"),
)

_HUNYUAN: Final[Table] = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    **{ours: f"time_text_embed.{theirs}" for ours, theirs in _HUNYUAN_EMBEDDERS},
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}

_HUNYUAN_REFINER: Final[Table] = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_qkv": split("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}

_HUNYUAN_DOUBLE: Final[Table] = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_attn_qkv": split("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": split("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}

_HUNYUAN_SINGLE: Final[Table] = {
    "modulation.linear": "norm.linear",
    "linear1": split_wide("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
}


def _hunyuan(names: Collection[str], _side: Side) -> Iterator[Block]:
    yield Block("", "", _HUNYUAN)
    for n in numbers(names, "double_blocks.", "transformer_blocks."):
        yield Block(f"double_blocks.{n}.", f"transformer_blocks.{n}.", _HUNYUAN_DOUBLE)
    for n in numbers(names, "single_blocks.", "single_transformer_blocks."):
        yield Block(f"single_blocks.{n}.", f"single_transformer_blocks.{n}.", _HUNYUAN_SINGLE)
    ours, theirs = "txt_in.individual_token_refiner.blocks.", "context_embedder.token_refiner.refiner_blocks."
    for n in numbers(names, ours, theirs):
        yield Block(f"{ours}{n}.", f"{theirs}{n}.", _HUNYUAN_REFINER)


COMFYUIS: Final[Accent] = (
    *((f"_attn_{part}_norm.weight", f"_attn.norm.{word}_norm.scale") for part, word in (("q", "query"), ("k", "key"))),
    *((f".{part}_norm.weight", f".norm.{word}_norm.scale") for part, word in (("q", "query"), ("k", "key"))),
    *(("_attn_qkv.", "_attn.qkv."), ("_attn_proj.", "_attn.proj.")),
    *(("_mod.linear.", "_mod.lin."), (".modulation.linear.", ".modulation.lin.")),
    *(("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.2.")),
    *((f"{part}.mlp.0.", f"{part}.in_layer.") for part in ("time_in", "guidance_in", "t_embedder")),
    *((f"{part}.mlp.2.", f"{part}.out_layer.") for part in ("time_in", "guidance_in", "t_embedder")),
    *(("c_embedder.linear_1.", "c_embedder.in_layer."), ("c_embedder.linear_2.", "c_embedder.out_layer.")),
)
"""What ComfyUI calls otherwise in it, as it does when it reads Tencent's. (`HunyuanVideo` of `supported_models.py`.)"""

HUNYUAN: Final = Kind(
    "HunyuanVideo",
    {
        "ours": r"double_blocks\.\d+\.(?:img|txt)_attn_(?:qkv|proj)\.",
        "theirs": r"context_embedder\.token_refiner\.",
    },
    _hunyuan,
    accented=r"txt_in\.individual_token_refiner\.blocks\.\d+\.self_attn\.(?:qkv|proj)\.",
    accent=COMFYUIS,
)
"""As Tencent names it; ComfyUI's names differ in parts alone."""


def _same(_names: Collection[str], _side: Side) -> Iterator[Block]:
    yield Block("", "")


QWEN_IMAGE: Final = Kind("Qwen-Image", {"ours": r"transformer_blocks\.\d+\.img_mod\.1\."}, _same)
"""It has one naming everywhere; only what stands before the names differs."""
