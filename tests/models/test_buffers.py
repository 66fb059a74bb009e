"""Buffers that libraries compute are never averaged, and never missing."""

from __future__ import annotations

import pytest

from streammerge.models.buffers import is_computed
from streammerge.tensors import DTYPES, described
from tests.make.headers import header, merged
from tests.plan.fates import fates

WEIGHT = {"model.norm.weight": "F16 4"}
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
MASK = "transformer.h.0.attn.bias"
NOTED = "copied: from a: a buffer that libraries compute is never averaged"


@pytest.mark.parametrize(
    ("buffer", "shape"), [(INV_FREQ, "F32 2"), (MASK, "F32 1 1 8 8"), ("transformer.h.0.attn.masked_bias", "F32")]
)
def test_they_are_the_layouts_whoever_else_has_them(buffer, shape):
    whole, bare = header(**WEIGHT, **{buffer: shape}), header(**WEIGHT)
    own = {"model.norm.weight": "merged: linear", buffer: NOTED}
    assert fates(merged({"a": whole, "b": whole})) == own
    assert fates(merged({"a": whole, "b": bare})) == own
    made = merged({"a": bare, "b": whole})
    assert list(made.tensors) == [*WEIGHT]
    assert made.left_out == {"b": (buffer,)}, "it is told"


def test_they_keep_their_dtype_unless_a_rule_gives_them_one():
    models = {"a": header(**WEIGHT, **{INV_FREQ: "F32 2"}), "b": header(**WEIGHT)}
    made = merged(models, dtype="bf16")
    assert [str(made.tensors[name].dtype) for name in (*WEIGHT, INV_FREQ)] == ["BF16", "F32"]
    made = merged(models, dtype="bf16", rules=[{"match": "*inv_freq", "dtype": "fp16"}])
    assert str(made.tensors[INV_FREQ].dtype) == "F16"


def test_masks_of_other_lengths_or_dtypes_are_no_mismatch():
    for other in ("F32 1 1 16 16", "U8 1 1 8 8"):
        models = {"a": header(**WEIGHT, **{MASK: "F32 1 1 8 8"}), "b": header(**WEIGHT, **{MASK: other})}
        assert fates(merged(models))[MASK] == NOTED


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.rotary_emb.inv_freq", (64,), True),
        ("model.rotary_emb.original_inv_freq", (64,), True),
        ("visual.rotary_pos_emb.inv_freq", (20,), True),
        ("transformer.h.1.crossattention.bias", (1, 1, 8, 8), True),
        ("gpt_neox.layers.3.attention.bias", (1, 1, 8, 8), True),
        ("gpt_neox.layers.3.attention.masked_bias", (), True),
        ("transformer.h.0.attn.attention.bias", (1, 1, 8, 8), True),
        ("transformer.h.0.attn.c_attn.bias", (24,), False),
        ("transformer.h.0.attn.bias", (12, 8), False),
        ("transformer.h.0.attn.bias", (1, 4, 8, 8), False),
        ("transformer.h.0.attn.bias", (1, 1, 8, 4), False),
        ("blocks.0.attn.bias", (1, 1, 8, 8), False),
        ("model.rotary_emb.inv_freq", (2, 64), False),
        ("model.inv_freq", (64,), False),
        ("masked_bias", (), False),
    ],
)
def test_they_are_told_by_name_and_shape(name, shape, expected):
    assert is_computed(name, described(DTYPES["F32"], shape)) is expected
