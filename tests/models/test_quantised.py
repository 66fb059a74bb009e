"""Quantised weights are known by what stands beside them, and refused if they can't be decoded."""

from __future__ import annotations

import pytest

import streammerge
from streammerge.errors import CheckpointError, PlanError
from streammerge.models.codes import find_quantised
from tests.make.headers import header, merged
from tests.models.scaled_weights import found

KINDS = {
    "bitsandbytes 4 bits": (
        {"p__weight": "U8 32 1", "p__weight__absmax": "F32 1", "p__weight__quant_map": "F32 16"},
        "bits",
    ),
    "bitsandbytes state": (
        {"p__weight": "U8 32 1", "p__weight__quant_state__bitsandbytes__nf4": "U8 90"},
        "bitsandbytes",
    ),
    "bitsandbytes 8 bits": ({"p__weight": "I8 4 8", "p__SCB": "F32 4"}, "bitsandbytes, 8 bits"),
    "GPTQ": ({"p__qweight": "I32 4 8", "p__qzeros": "I32 1 1", "p__scales": "F16 1 8", "p__g_idx": "I32 32"}, "GPTQ"),
    "NVFP4": (
        {"p__weight": "U8 4 8", "p__weight_scale": "F8_E4M3 4 1", "p__weight_scale_2": "F32"},
        "NVFP4",
    ),
    "MXFP4": ({"p__w_blocks": "U8 4 8 16", "p__w_scales": "U8 4 8"}, "MXFP4"),
    "compressed-tensors": ({"p__weight_packed": "I32 4 8", "p__weight_scale": "F16 4 1"}, "packed"),
    "8-bit integers": ({"p__weight": "I8 4 8", "p__weight_scale": "F32 4 1"}, "I8 with a scale"),
    "tiles of no known size": (
        {"p__weight": "F8_E4M3 4 300", "p__weight_scale_inv": "F32 1 2"},
        r"\[1, 2\] scales",
    ),
    "two scales": (
        {"p__weight": "F8_E4M3 4 8", "p__weight_scale": "F32", "p__scale_weight": "F32"},
        "F8_E4M3 with p.weight_scale, p.scale_weight",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_decoded_is_known_and_refused(kind):
    tensors, told = KINDS[kind]
    model = header(**tensors, q__weight="F16 3")
    weights = set(find_quantised(model.tensors).values())
    assert len(weights) == 1
    assert not weights.pop().is_readable
    with pytest.raises(PlanError, match=rf"1 tensor is quantised in a way that(.|\n)*  p\..*{told}"):
        merged({"a": model, "b": model})
    kept = merged({"a": model, "b": model}, rules=[{"match": "p*", "keep": True}])
    assert {d.name: d.action for d in kept.decisions} == {
        **dict.fromkeys(model.tensors, "copied"),
        "q.weight": "merged",
    }


@pytest.mark.parametrize("kind", ["GPTQ", "bitsandbytes 4 bits", "NVFP4", "compressed-tensors"])
def test_a_quantised_model_beside_a_plain_one_is_refused_for_its_own_reason(kind):
    plain = header(p__weight="BF16 4 8")
    with pytest.raises(PlanError, match="1 tensor is quantised in a way that"):
        merged({"a": plain, "b": header(**KINDS[kind][0])}, on_missing="keep", on_shape_mismatch="keep")


@pytest.mark.parametrize("kind", ["GPTQ", "compressed-tensors"])
def test_a_weight_that_the_layout_has_as_codes_is_not_missing_there(kind):
    coded, plain = header(**KINDS[kind][0], q__weight="F16 3"), header(p__weight="BF16 4 8", q__weight="F16 3")
    made = merged({"a": coded, "b": plain}, rules=[{"match": "p*", "keep": True}])
    assert list(made.tensors) == list(coded.tensors)
    with pytest.raises(PlanError, match="1 tensor is quantised in a way that"):
        merged({"a": coded, "b": plain})


@pytest.mark.parametrize(
    "tensors",
    [
        {"logit_scale": "F32", "p__weight": "F16 4 4"},
        {"p__weight": "F8_E4M3 4 4"},
        {"p__weight": "BF16 4 4", "p__weight_scale": "F32"},
        {"p__weight": "F8_E4M3 4 4", "p__input_scale": "F32"},
        {"layer_scale": "F32 4", "layer": "F32 4"},
        {"p__scales": "F16 4"},
    ],
)
def test_plain_weights_are_not_taken_for_quantised_ones(tensors):
    assert found(**tensors) == {}


def test_gguf_is_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"is GGUF, whose tensors are quantised .* merge the safetensors"):
        streammerge.open_model(path)
