"""Text encoders: CLIP as OpenCLIP and as transformers name it, and T5, which has one naming.

OpenCLIP keeps query, key and value in one tensor, and its last projection as the transpose of transformers' weight.
(`open_clip/transformer.py`; transformers' `modeling_clip.py`.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from streammerge.models.dialects.rules import Block, Kind, Side, Table, numbers, split, transposed

_LAYER: Final[Table] = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "=attn.in_proj_weight": split(*(f"=self_attn.{part}_proj.weight" for part in "qkv")),
    "=attn.in_proj_bias": split(*(f"=self_attn.{part}_proj.bias" for part in "qkv")),
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

_AROUND: Final[Table] = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "=positional_embedding": "=text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "=text_projection": transposed("=text_projection.weight"),
    "=logit_scale": "=logit_scale",
}


def _blocks(names: Collection[str], side: Side) -> Iterator[Block]:
    yield Block("", "", _AROUND)
    for number in numbers(names, "transformer.resblocks.", "text_model.encoder.layers."):
        yield Block(f"transformer.resblocks.{number}.", f"text_model.encoder.layers.{number}.", _LAYER)


CLIP: Final = Kind(
    "CLIP",
    {
        "ours": r"transformer\.resblocks\.\d+\.(?:attn\.in_proj|ln_1)|ln_final\.",
        "theirs": r"text_model\.(?:encoder\.layers\.\d+\.|embeddings\.|final_layer_norm\.)",
    },
    _blocks,
)


def _same(_names: Collection[str], _side: Side) -> Iterator[Block]:
    yield Block("", "")


T5: Final = Kind("T5", {"ours": r"encoder\.block\.\d+\.layer\.0\.SelfAttention\."}, _same)
