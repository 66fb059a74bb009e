"""The depth estimator of Stable Diffusion 2's depth model: MiDaS' DPT hybrid, as Intel and as transformers name it.

Transformers has query, key and value apart, counts levels from 0, and those where features are fused from the coarsest
on. (MiDaS' `dpt_depth.py`; transformers' `DPTForDepthEstimation`.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from streammerge.models.dialects.rules import Block, Kind, Side, Table, numbers, split

_SEEN: Final = "pretrained.model."

_AROUND: Final[Table] = {
    f"={_SEEN}cls_token": "=dpt.embeddings.cls_token",
    f"={_SEEN}pos_embed": "=dpt.embeddings.position_embeddings",
    f"{_SEEN}patch_embed.proj": "dpt.embeddings.projection",
    f"{_SEEN}patch_embed.backbone.stem.conv": "dpt.embeddings.backbone.bit.embedder.convolution",
    f"{_SEEN}patch_embed.backbone.stem.norm": "dpt.embeddings.backbone.bit.embedder.norm",
    f"{_SEEN}norm": "dpt.layernorm",
    **{f"scratch.output_conv.{number}": f"head.head.{number}" for number in (0, 2, 4)},
    **{f"scratch.layer{level}_rn": f"neck.convs.{level - 1}" for level in (1, 2, 3, 4)},
}

_LAYER: Final[Table] = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": split(*(f"attention.attention.{part}" for part in ("query", "key", "value"))),
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}

_FUSION: Final[Table] = {
    "out_conv": "projection",
    **{
        f"resConfUnit{unit}.conv{number}": f"residual_layer{unit}.convolution{number}"
        for unit in (1, 2)
        for number in (1, 2)
    },
}


def _blocks(names: Collection[str], _side: Side) -> Iterator[Block]:
    yield Block("", "", _AROUND)
    for n in numbers(names, f"{_SEEN}blocks.", "dpt.encoder.layer."):
        yield Block(f"{_SEEN}blocks.{n}.", f"dpt.encoder.layer.{n}.", _LAYER)
    ours, theirs = f"{_SEEN}patch_embed.backbone.stages.", "dpt.embeddings.backbone.bit.encoder.stages."
    for number in numbers(names, ours, theirs):
        for n in numbers(names, f"{ours}{number}.blocks.", f"{theirs}{number}.layers."):
            yield Block(f"{ours}{number}.blocks.{n}.", f"{theirs}{number}.layers.{n}.")
    for level in (1, 2, 3, 4):
        yield Block(f"scratch.refinenet{level}.", f"neck.fusion_stage.layers.{4 - level}.", _FUSION)
        stem, stage = f"pretrained.act_postprocess{level}.", "neck.reassemble_stage."
        yield Block(f"{stem}0.project.0.", f"{stage}readout_projects.{level - 1}.0.")
        yield Block(f"{stem}3.", f"{stage}layers.{level - 1}.projection.")
        yield Block(f"{stem}4.", f"{stage}layers.{level - 1}.resize.")


MIDAS: Final = Kind(
    "depth estimator",
    {
        "ours": r"pretrained\.act_postprocess\d\.|scratch\.refinenet\d\.",
        "theirs": r"neck\.(?:reassemble|fusion)_stage\.",
    },
    _blocks,
)
"""What is left of its first training, `pretrained.model.head`, transformers doesn't have."""
