"""Weights stored as codes: every kind is known by its layer's names and shapes, and nothing honest is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import PlanError
from streammerge.models.codes import find_quantised
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.demo.layouts import LAYOUTS, MINIATURE, checkpoint
from tests.make.headers import Header, merged


def info(text: str) -> TensorInfo:
    """`F16 4 8`, or `F32` for a 0-d tensor."""
    dtype, *sizes = text.split()
    return TensorInfo(DTYPES[dtype], tuple(map(int, sizes)))


def layer(tensors: str, prefix: str = "m.l.") -> dict[str, TensorInfo]:
    """Tensors of one layer, written `weight I8 4 8, scale F16`."""
    words = (text.strip().partition(" ") for text in tensors.split(","))
    return {f"{prefix}{name}": info(rest) for name, _, rest in words}


CODED = {
    "HQQ": ("HQQ", "W_q U8 16 32, scale F16 64 1, zero F16 64 1, meta U8 200, nbits I64"),
    "HQQ as floats": ("HQQ", "W_q BF16 16 32, scale F16 64 1, zero F16 64 1"),
    "SVDQuant": (
        "SVDQuant",
        "qweight I8 32 16, wscales BF16 1 32, smooth_factor BF16 32, lora_down BF16 32 8, lora_up BF16 32 8",
    ),
    "SVDQuant, 4-bit floats": (
        "SVDQuant",
        "qweight I8 32 16, wscales F8_E4M3 1 32, wtscale F32, wcscales BF16 32, proj_down BF16 32 8",
    ),
    "AWQ of nunchaku": ("SVDQuant", "qweight I32 8 16, wscales BF16 1 32, wzeros BF16 1 32"),
    "AQLM": ("AQLM", "codes I8 32 4 1, codebooks F16 1 256 1 8, scales F16 32 1 1 1"),
    "AQLM, 16 bits": ("AQLM", "codes I16 32 4 1, codebooks F16 1 65536 1 8, scales F16 32 1 1 1"),
    "EETQ": ("EETQ", "weight I8 32 32, weight_scales F16 32"),
    "Marlin": ("Marlin", "B I32 2 64, s F16 1 32, workspace I32 16"),
    "GPTQ": ("GPTQ", "qweight I32 4 32, scales F16 1 32, g_idx I32 32, qzeros I32 1 4"),
    "GPTQ without zeros": ("GPTQ", "qweight I32 4 32, scales F16 1 32"),
    "VPTQ": (
        "VPTQ",
        "indices I32 1 4 8, centroids.weight F16 1 4096, weight_scale F16 32, weight_bias F16 32, perm I16 32",
    ),
    "HIGGS": ("HIGGS", "weight I16 32 16, scales F16 32 1, tables F16 256 2, tables2 F16 256 1"),
    "QuIP#": ("QuIP#", "Qidxs I64 4 4, SU F16 32, SV F16 32, Wscale F32, codebook_id I64"),
    "EXL2": ("EXL2", "q_weight I32 4 32, q_groups I16 8, q_invperm I16 32, q_scale I32 1 4, q_scale_max F16 1"),
    "EXL3": ("EXL3", "trellis I16 2 2 64, suh F16 32, svh F16 32, mcg I32"),
    "MLX": ("MLX", "weight U32 32 4, scales F16 32 1, biases F16 32 1"),
    "MLX, MXFP4": ("U32 with a scale", "weight U32 32 4, scales U8 32 1"),
    "BitNet": ("U8 with a scale", "weight U8 8 32, weight_scale BF16 1"),
    "SpQR": ("SpQR", "dense_weights I64 128, row_offsets I32 33, col_vals I32 10, in_perm U16 32"),
    "quanto": ("quanto", "weight._data I8 32 32, weight._scale F16 32 1, weight._shift F16 32 1"),
    "torchao": ("torchao", "_weight_qdata I8 32 32, _weight_scale F32 32 1"),
    "torchao, older": ("torchao", "weight:qdata F8_E4M3 32 32, weight:scale F32 32 1"),
    "torchao, NVFP4": ("torchao", "_weight_qdata U8 32 16, _weight_scale F8_E4M3 32 2"),
    "NF4": (
        "bitsandbytes, 4",
        "weight U8 512 1, weight.absmax U8 16, weight.quant_map F32 16, weight.quant_state.bitsandbytes__nf4 U8 90",
    ),
    "NF4 as bfloat16": ("bitsandbytes, 4", "weight BF16 256 1, weight.absmax F32 16, weight.quant_map F32 16"),
    "NF4 without its state": ("U8 codes", "weight U8 512 1"),
    "LLM.int8": ("bitsandbytes, 8", "weight I8 32 32, SCB F32 32, weight_format U8"),
    "MXFP4": ("MXFP4", "w_blocks U8 4 32 2 16, w_scales U8 4 32 2"),
    "NVFP4": ("NVFP4", "weight U8 32 16, weight_scale F8_E4M3 32 2, weight_scale_2 F32, input_scale F32"),
    "packed NVFP4": (
        "packed",
        "weight_packed U8 32 16, weight_scale F8_E4M3 32 2, weight_global_scale F32, input_global_scale F32",
    ),
    "packed integers": ("packed", "weight_packed I32 32 4, weight_scale BF16 32 1, weight_shape I64 2"),
    "FP-Quant": ("FP-Quant", "qweight U8 32 16, scales U8 32 1, forward_hadamard_matrix BF16 32 32"),
    "MXFP8 in bytes": (
        r"F8_E4M3 with m\.l\.weight_scale \(U8 \[32, 2\]\)",
        "weight F8_E4M3 32 64, weight_scale U8 32 2",
    ),
    "8-bit integers": ("I8 with a scale", "weight I8 32 32, weight_scale BF16 32 1"),
    "8-bit integers of ComfyUI": ("I8 with a scale", "weight I8 32 32, weight_scale F32, comfy_quant U8 60"),
    "a scale for the inputs' side": (
        "F8_E4M3 with",
        "weight F8_E4M3 32 32, weight_scale F32, input_scale F32, pre_quant_scale F32 32",
    ),
    "SDNQ": ("SDNQ", "weight U8 512, scale BF16 32 1, zero_point BF16 32 1, svd_up BF16 32 8, svd_down BF16 8 32"),
    "flux-fp8-api": ("flux-fp8-api", "float8_data F8_E4M3 32 32, scale F32, scale_reciprocal F32, input_scale F32"),
    "integers of nobody": ("I32 codes", "packed I32 32 4, lut F16 32 16"),
    "bytes of nobody": ("U8 codes", "blob U8 4096, lut F16 16"),
    "packed weights alone": ("U8 codes", "weight_packed U8 32 16"),
    "GPTQ's weights alone": ("I32 codes", "qweight I32 4 32"),
    "4-bit floats": ("F4 with a scale", "weight F4 32 32, weight_scale F8_E8M0 32 1"),
    "two scales": ("F8_E4M3 with", "weight F8_E4M3 32 32, weight_scale F32, weight_scale_inv F32"),
    "a scale that may be its inverse": ("F8_E4M3 with", "weight F8_E4M3 32 32, scale F32 1"),
    "scales of an unknown meaning": ("F8_E4M3 with", "weight F8_E4M3 32 32, weight_scales F32 32"),
    "a scale below the weight": ("F8_E4M3 with", "weight F8_E4M3 32 32, weight.scale F32"),
    "an inverse below the weight": ("F8_E4M3 with", "weight F8_E4M3 32 32, weight.scale_inv F32 1"),
    "a scale of no name": ("F8_E4M3 with", "weight F8_E4M3 32 32, s F32 32"),
    "a scale of no name below the weight": ("F8_E4M3 with", "weight F8_E4M3 32 32, weight.s F32"),
    "tiles of no name": ("F8_E4M3 with", "weight F8_E4M3 256 256, t F32 2 2"),
    "scales in 8 bits": ("F8_E4M3 with", "weight F8_E4M3 32 32, weight_scale F8_E4M3 32 1"),
}
HONEST = {
    "8-bit floats": "weight F8_E4M3 32 32, bias F16 32",
    "a weight normalisation": "weight_v F8_E4M3 32 32, weight_g F16 32 1, bias F16 32",
    "scales that are weights": "query_norm.scale F8_E4M3 8, key_norm.scale F16 8",
    "scales of activations": "weight F8_E4M3 32 32, input_scale F32, k_scale F32",
    "a temperature": "text_projection F8_E4M3 8 8, logit_scale F32, ln_final.weight F32 8",
    "a scale beside 16 bits": "weight BF16 32 32, weight_scale F32",
    "window attention": "relative_position_index I64 49 49, relative_position_bias_table F32 169 3, qkv.weight F32 9 3",
    "window attention in 32 bits": "attention_bias_idxs I32 49 49, attention_biases F32 4 49",
    "a causal mask": "bias U8 1 1 64 64, masked_bias F32, c_attn.weight F32 9 3",
    "positions": "position_ids I64 1 257, class_embedding F32 8, position_embedding.weight F32 257 8",
    "many positions": "position_ids I32 2 257, class_embedding F32 8",
    "batches": "weight F32 8, bias F32 8, running_mean F32 8, num_batches_tracked I64",
    "experts by token": "weight BF16 8 8, tid2eid I32 100 6",
    "a tokenizer": "spiece_model U8 8000, shared.weight F8_E4M3 8 8, scaled_fp8 F8_E4M3 0",
    "vectors of integers": "weight F16 8 8, sizes I32 8, one I8 1 1",
}


def everything(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    return tensors | {"m.norm.weight": info("BF16 32"), "m.l.bias": info("BF16 32")}


@pytest.mark.parametrize("prefix", ["m.l.", "l.", "model.layers.0.mlp.experts.7.down_proj."])
@pytest.mark.parametrize("kind", CODED)
def test_codes_are_known_with_all_that_belongs_to_them(kind, prefix):
    tensors = layer(CODED[kind][1], prefix)
    found = set(find_quantised(tensors | {f"{prefix}bias": info("F16 32"), "norm.weight": info("F16 32")}).values())
    assert len(found) == 1
    weight = found.pop()
    assert not weight.is_readable
    assert {weight.codes, *weight.companions} == {*tensors}


@pytest.mark.parametrize("kind", CODED)
def test_codes_are_refused_by_their_kind_and_may_be_kept(kind):
    told, text = CODED[kind]
    tensors = everything(layer(text))
    model = Header(tensors)
    plain = Header({"m.l.weight": info("BF16 32 32"), "m.norm.weight": info("BF16 32"), "m.l.bias": info("BF16 32")})
    with pytest.raises(PlanError, match=rf"1 tensor is quantised in a way that(.|\n)*  m\..*a: {told}"):
        merged({"a": model, "b": model})
    if "nobody" not in kind and kind != "MXFP4":
        with pytest.raises(PlanError, match=rf"1 tensor is quantised in a way that(.|\n)*  m\.l\.weight   b: {told}"):
            merged({"a": plain, "b": model}, on_missing="keep", on_shape_mismatch="keep")
    kept = merged({"a": model, "b": model}, rules=[{"match": "m.l.*", "keep": True}])
    assert {d.name: d.action for d in kept.decisions} == {
        **dict.fromkeys(tensors, "copied"),
        "m.norm.weight": "merged",
    }


@pytest.mark.parametrize("content", HONEST)
@pytest.mark.parametrize("prefix", ["m.l.", ""])
def test_nothing_honest_is_taken_for_codes(content, prefix):
    tensors = layer(HONEST[content], prefix) | {"m.norm.weight": info("BF16 32")}
    assert find_quantised(tensors) == {}
    made = merged({"a": Header(tensors), "b": Header(tensors)})
    assert all(
        d.action == ("merged" if d.info.dtype.mergeable else "copied") for d in made.decisions if "fp8" not in d.name
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("narrow", [0, 2, 3])
def test_real_checkpoints_in_8_bits_are_what_they_are(layout, narrow):
    tensors = {
        name: TensorInfo(DTYPES["F8_E4M3"], found.shape)
        if found.dtype.mergeable and len(found.shape) >= narrow
        else found
        for name, found in checkpoint(layout, scale=MINIATURE).items()
    }
    assert find_quantised(tensors) == {}


def test_an_integer_matrix_among_modules_is_never_kept_in_silence():
    tensors = layer("codes I16 8 8, gain F16 8, part.weight F16 8 8")
    with pytest.raises(PlanError, match=r"1 tensor is quantised(.|\n)*  m\.l\.codes   a: I16 codes"):
        merged({"a": Header(tensors), "b": Header(tensors)})
    kept = merged({"a": Header(tensors), "b": Header(tensors)}, rules=[{"match": "*.codes", "keep": True}])
    assert [d.action for d in kept.decisions] == ["copied", "merged", "merged"]


@pytest.mark.parametrize(
    ("name", "text", "is_copied"),
    [
        ("weights1", "C64 8 8", False),
        ("filter.complex_weight", "C64 4 8 8", False),
        ("l.weight", "BOOL 8 8", False),
        ("freqs_cis", "C64 32 8", True),
        ("rope.table", "C64 32 8", True),
        ("l.phase", "C64 8", True),
        ("attn.mask", "BOOL 8 8", True),
    ],
)
def test_matrices_that_can_not_be_averaged_are_not_copied_in_silence(name, text, is_copied):
    model = Header({name: info(text), "x": info("F16 3")})
    if is_copied:
        assert [d.action for d in merged({"a": model, "b": model}).decisions] == ["copied", "merged"]
        return
    with pytest.raises(PlanError, match=f"1 tensor can't be averaged: not all are floating point\n  {name}   a "):
        merged({"a": model, "b": model})
    kept = merged({"a": model, "b": model}, rules=[{"match": name, "keep": True}])
    assert [d.action for d in kept.decisions] == ["copied", "merged"]


WORDS = st.sampled_from(
    ["", "weight", "scale", "weight_scale", "W_q", "qweight", "weight_packed", "a", "bias", ".", "_data", "w_blocks"]
)


@given(
    st.dictionaries(st.lists(WORDS, min_size=1, max_size=4).map(".".join), st.sampled_from(sorted(DTYPES)), max_size=12)
)
def test_any_names_are_looked_at_and_no_tensor_belongs_to_two_weights(dtypes):
    tensors = {name: TensorInfo(DTYPES[dtype], (8, 8)) for name, dtype in dtypes.items()}
    weights = {weight.codes: weight for weight in find_quantised(tensors).values()}
    parts = [name for weight in weights.values() for name in (weight.codes, *weight.companions)]
    assert len(parts) == len(set(parts))
    assert {*parts} <= {*tensors}


def test_a_tensor_of_no_name_is_a_tensor_as_any_other():
    tensors = {"": info("F32 3"), "x": info("F32 9"), "y_scale": info("F32 2"), "_scales": info("F32 5")}
    for rules, expected in (
        ([], "merged"),
        ([{"match": "", "keep": True}], "copied"),
        ([{"match": "", "drop": True}], "dropped"),
        ([{"match": "", "take": "b"}], "copied"),
    ):
        made = merged({"a": Header(tensors), "b": Header(tensors)}, rules=rules)
        assert {d.name: d.action for d in made.decisions} == {**dict.fromkeys(tensors, "merged"), "": expected}
