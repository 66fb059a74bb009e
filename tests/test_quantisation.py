"""Quantised weights: known by what stands beside them, decoded while they are read or refused, never averaged raw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import streammerge
from streammerge.errors import CheckpointError, PlanError
from streammerge.quantisation import find_quantised, spread
from tests.headers import header, merged
from tests.models import normal, raw_bytes, save_model

FP8 = torch.float8_e4m3fn


def found(**tensors):
    return find_quantised(header(**tensors).tensors)


# ── how they are known ───────────────────────────────────────────────────────────────────────────────────────────────

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
    "tiles that don't come out even": (
        {"p__weight": "F8_E4M3 4 200", "p__weight_scale_inv": "F32 1 2"},
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


# ── decoding ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SCALES = {
    "one": ((300, 256), ()),
    "one, 1-d": ((300, 256), (1,)),
    "one for a vector": ((77,), (1,)),
    "for each row": ((300, 256), (300, 1)),
    "for each row, 1-d": ((30, 4, 3, 3), (30,)),
    "tiles": ((256, 384), (2, 3)),
    "tiles, the last row of them cut off": ((576, 256), (5, 2)),
    "small tiles": ((64, 96), (2, 3)),
}


def expand(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The scale of every element, in another way than the product's."""
    if scale.numel() == 1:
        return scale.reshape(-1)[0].expand(shape)
    if scale.dim() == 1 or scale.shape[1] == 1:
        return scale.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    down, across = -(-shape[0] // scale.shape[0]), shape[1] // scale.shape[1]
    down = 128 if shape[0] % scale.shape[0] else down
    rows, columns = torch.arange(shape[0]) // down, torch.arange(shape[1]) // across
    return scale[rows][:, columns]


def quantised(shape: tuple[int, ...], scale_shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = normal(shape, seed).mul(50).clamp(-400, 400).to(FP8)
    return codes, normal(scale_shape, seed + 1).abs() / 100 + 1e-3


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("case", SCALES)
def test_scaled_fp8_is_merged_by_its_values(tmp_path, case, scale_name):
    if scale_name != "weight_scale" and case not in ("one", "tiles"):
        pytest.skip("the name makes no difference")
    shape, scale_shape = SCALES[case]
    codes, scale = quantised(shape, scale_shape, 1)
    other = normal(shape, 7)
    values = codes.double() * expand(scale, shape).double()
    a = save_model(tmp_path / "a.safetensors", {"p.weight": codes, f"p.{scale_name}": scale, "q": torch.ones(2)})
    b = save_model(tmp_path / "b.safetensors", {"p.weight": other, "q": torch.ones(2)})
    for models, expected in (
        ((a, b), 0.25 * values + 0.75 * other.double()),
        ((b, a), 0.25 * other.double() + 0.75 * values),
    ):
        recipe = {
            "merge_method": "linear",
            "models": [
                {"model": str(path), "parameters": {"weight": weight}}
                for path, weight in zip(models, (0.25, 0.75), strict=True)
            ],
            "dtype": "fp32",
        }
        report = streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False, force=True, threads=2)
        out = load_file(tmp_path / "out.safetensors")
        assert sorted(out) == ["p.weight", "q"]
        assert_close(out["p.weight"].double(), expected, rtol=1e-6, atol=1e-7)
        assert report.left_out == {}


def test_decoded_weights_are_stored_as_bfloat16_unless_told(tmp_path):
    codes, scale = quantised((40, 8), (), 1)
    model = {
        "p.weight": codes,
        "p.scale_weight": scale,
        "scaled_fp8": torch.zeros(2, dtype=FP8),
        "p.input_scale": scale,
    }
    paths = [save_model(tmp_path / f"{name}.safetensors", {k: v.clone() for k, v in model.items()}) for name in "ab"]
    recipe = {"merge_method": "linear", "models": list(map(str, paths))}
    streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False)
    out = load_file(tmp_path / "out.safetensors")
    assert list(out) == ["p.weight"]
    assert out["p.weight"].dtype == torch.bfloat16
    assert_close(out["p.weight"], (codes.float() * scale).bfloat16())


@pytest.mark.parametrize("method", ["slerp", "ties", "max"])
def test_every_kind_of_method_is_given_values(tmp_path, method):
    codes, scale = quantised((300, 1000), (300, 1), 1)
    plain = codes.float() * scale
    other = normal((300, 1000), 5)
    save_model(tmp_path / "q.safetensors", {"p.weight": codes, "p.weight_scale": scale})
    save_model(tmp_path / "plain.safetensors", {"p.weight": plain})
    save_model(tmp_path / "other.safetensors", {"p.weight": other})
    outs = []
    for name in ("q", "plain"):
        recipe = {
            "merge_method": method,
            "models": [str(tmp_path / "other.safetensors"), str(tmp_path / f"{name}.safetensors")],
            "parameters": {"t": 0.3} if method == "slerp" else {},
            "dtype": "fp32",
        }
        if method == "ties":
            recipe["base_model"] = str(tmp_path / "other.safetensors")
            recipe["models"] = [str(tmp_path / f"{name}.safetensors")]
        streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False, force=True, threads=2)
        outs.append(load_file(tmp_path / "out.safetensors")["p.weight"])
    assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-6)


# ── copies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def two_models(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A quantised model of two weights and a plain one."""
    tensors = {}
    for number, name in enumerate("pq"):
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = quantised((8, 4), (), 3 * number)
    plain = {name: normal((8, 4), 9 + number) for number, name in enumerate(("p.weight", "q.weight"))}
    return (
        save_model(tmp_path / "quantised.safetensors", tensors),
        save_model(tmp_path / "plain.safetensors", plain),
        tensors,
    )


def test_what_is_kept_stays_quantised_with_all_that_belongs_to_it(tmp_path):
    path, plain, tensors = two_models(tmp_path)
    recipe = {
        "merge_method": "linear",
        "models": [str(path), str(plain)],
        "rules": [{"match": "p.weight", "keep": True}],
    }
    streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False)
    out = load_file(tmp_path / "out.safetensors")
    assert sorted(out) == ["p.weight", "p.weight_scale", "q.weight"]
    for name in ("p.weight", "p.weight_scale"):
        assert raw_bytes(out[name]) == raw_bytes(tensors[name])
    assert out["q.weight"].dtype == torch.bfloat16


def test_what_is_taken_for_a_plain_layout_or_cast_is_decoded(tmp_path):
    path, plain, tensors = two_models(tmp_path)
    rules = [{"match": "*.weight", "take": "quantised"}]
    values = tensors["p.weight"].float() * tensors["p.weight_scale"]
    for models, dtype in (([plain, path], "keep"), ([path, plain], "fp16")):
        recipe = {"merge_method": "linear", "models": list(map(str, models)), "rules": rules, "dtype": dtype}
        streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False, force=True)
        out = load_file(tmp_path / "out.safetensors")
        assert sorted(out) == ["p.weight", "q.weight"]
        expected = values.half() if dtype == "fp16" else values.bfloat16()
        assert_close(out["p.weight"], expected)


def test_codes_are_not_taken_without_what_belongs_to_them():
    model, plain = header(p__weight="I8 4 8", p__SCB="F32 4"), header(p__weight="BF16 4 8")
    with pytest.raises(PlanError, match=r"p\.weight   b: bitsandbytes, 8 bits"):
        merged({"a": plain, "b": model}, rules=[{"match": "p.weight", "take": "b"}])


def test_a_scale_lies_over_its_tensor():
    assert spread((4, 3), (3,)) is None
    assert spread((4, 3), (4, 3)) == spread((4, 3), (4, 3))
    assert spread((192, 128), (2, 1)) is not None
    assert spread((128, 192), (1, 2)) is None
    assert spread((4, 4, 4), (2, 2, 2)) is None
