"""Merges stored as ComfyUI's scaled fp8: what they decode to, what has scales and what has none, and who can ask."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from benchmarks.standin import Cards
from streammerge.cli.main import main
from streammerge.compute import costs
from streammerge.errors import MethodError, PlanError, RecipeError
from streammerge.methods.statistics.stretches import Stretch
from streammerge.models.encoding import LEAST, ScalePass
from tests.make.diffusion import diffusion_model, part_of
from tests.make.models import (
    Tensors,
    assert_same_bytes,
    load_model,
    merge_to,
    near,
    normal,
    save_model,
    save_models,
)
from tests.storage.stopped_merges import run, stop

FP8 = {"fp8_scaled": torch.float8_e4m3fn, "fp8_scaled_e5m2": torch.float8_e5m2}
UNET, VAE = "model.diffusion_model.", "first_stage_model."
MARKS = ("_scale", "comfy_quant")
WEIGHT = "double_blocks.0.img_mlp.0.weight"


def recipe_of(*paths: Path, **keys: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [str(path) for path in paths], "dtype": "fp8_scaled", **keys}


def flux_models(folder: Path, **more: Tensors) -> dict[str, Path]:
    a = diffusion_model("flux", 1, torch.bfloat16)
    return save_models(folder, a=a, b=near(a, 2, 0.1), **more)


def in_halves(a: Tensors, b: Tensors) -> Tensors:
    """(a + b) / 2 in float64"""
    return {name: (tensor.double() + b[name].double()) / 2 for name, tensor in a.items()}


def weights_of(found: Tensors) -> list[str]:
    return [name.removesuffix("_scale") for name in found if name.endswith("weight_scale")]


def decoded(found: Tensors) -> Tensors:
    """The values, in float64, of a file with scales; marks left out."""
    scales = {name: found[f"{name}_scale"].double() for name in weights_of(found)}
    return {name: tensor.double() * scales.get(name, 1.0) for name, tensor in found.items() if not name.endswith(MARKS)}


def quantum(codes: torch.Tensor) -> torch.Tensor:
    """How far apart the numbers are of which the codes are one, in float64."""
    info = torch.finfo(codes.dtype)
    return (torch.frexp(codes.double().abs().clamp(info.tiny))[1] - 1).double().exp2() * info.eps


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_card_measures_scales_in_stretches_and_gives_the_same_bytes(tmp_path, monkeypatch):
    values = normal((500, 5000), 1)
    values[450, 7] = 300.0  # what the scale hangs on is in the last stretch, beside what is no number
    values[460, 8] = math.inf
    paths = save_models(tmp_path, a={**diffusion_model("flux", 1, torch.bfloat16), WEIGHT: values.bfloat16()})
    words, begin = recipe_of(paths["a"], paths["a"]), ScalePass.begin
    begun: list[Stretch] = []

    def noted(self, stretch, inputs):
        begun.append(stretch)
        return begin(self, stretch, inputs)

    monkeypatch.setattr(ScalePass, "begin", noted)
    with Cards().there() as cards:
        made = merge_to(tmp_path / "card.safetensors", words, device="cuda", threads=1)
    assert max(len(stretch.blocks) for stretch in begun) == 16
    assert cards.lanes
    monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    assert_same_bytes(made, merge_to(tmp_path / "cpu.safetensors", words))


@pytest.mark.parametrize("loops", ["on", "off"])
@pytest.mark.parametrize("dtype", FP8)
def test_what_is_decoded_is_the_merge_within_half_a_quantum(tmp_path, monkeypatch, dtype, loops):
    monkeypatch.setenv("STREAMMERGE_KERNELS", loops)
    paths = flux_models(tmp_path)
    found = merge_to(tmp_path / "out.safetensors", recipe_of(paths["a"], paths["b"], dtype=dtype))
    wanted, limit = in_halves(load_model(paths["a"]), load_model(paths["b"])), torch.finfo(FP8[dtype]).max
    assert decoded(found).keys() == wanted.keys()
    assert len(weights_of(found)) == 2 * 8 + 2 * 3 + 2 * 2
    for name in weights_of(found):
        codes, scale = found[name], found[f"{name}_scale"]
        assert codes.dtype == FP8[dtype]
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        assert scale.double() == pytest.approx(float(wanted[name].abs().max()) / limit, rel=1e-6)
        assert codes.double().abs().max() == limit, "all of the codes' range is used"
        off = (codes.double() * scale.double() - wanted[name]).abs()
        assert (off <= quantum(codes) * scale.double() * (0.5 + 1e-4)).all()
        mark = bytes(found[name.removesuffix("weight") + "comfy_quant"].tolist())
        assert json.loads(mark) == {"format": str(FP8[dtype]).removeprefix("torch.")}
    for name in wanted.keys() - set(weights_of(found)):
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], wanted[name].to(torch.bfloat16))


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "z-image", "sd1", "sdxl"])
def test_only_matrices_inside_of_blocks_have_scales(tmp_path, name):
    model = diffusion_model(name, 1)
    path = save_model(tmp_path / "a.safetensors", model)
    found = merge_to(tmp_path / "out.safetensors", recipe_of(path))
    weights = weights_of(found)
    assert weights
    for own in weights:
        assert model[own].ndim == 2
        assert not any(word in own for word in ("norm", "bias", "embed", "time_", "_in.", "final", "head", "refiner"))
    kept = [own for own, tensor in model.items() if tensor.ndim == 2 and own not in weights]
    inside = [own for own in kept if ".transformer_blocks." in own or own.split(".")[0].endswith("blocks")]
    assert all(own.startswith(UNET) and ".emb_layers." in own for own in inside if not own.startswith("cond")), inside
    assert_same_bytes(
        {own: found[own] for own in model.keys() - set(weights)},
        {own: model[own] for own in model.keys() - set(weights)},
    )


def test_a_model_that_has_scales_gets_new_ones(tmp_path):
    """The old form, with `scale_weight` and a mark of the whole: decoded, merged, written in the new form."""
    truth = diffusion_model("flux", 3, torch.bfloat16)
    coded: Tensors = {f"{UNET}scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in truth.items():
        if name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.float().abs().max() / 448
            coded |= {UNET + name: (tensor.float() / scale).to(torch.float8_e4m3fn)}
            coded |= {UNET + name.removesuffix("weight") + "scale_weight": scale}
        else:
            coded[UNET + name] = tensor
    paths = save_models(tmp_path, old=coded)
    found = merge_to(tmp_path / "out.safetensors", recipe_of(paths["old"]))
    assert not [name for name in found if "scaled_fp8" in name or "scale_weight" in name]
    assert found[f"{UNET}img_in.weight"].dtype == torch.bfloat16
    for name in weights_of(found):
        assert torch.equal(found[name].view(torch.uint8), coded[name].view(torch.uint8)), (
            "the same codes, for the same values"
        )
    again = merge_to(tmp_path / "again.safetensors", recipe_of(tmp_path / "out.safetensors"))
    assert_same_bytes(again, found)


def test_a_model_in_plain_fp8_has_16_bits_where_it_has_no_scales(tmp_path):
    plain = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in diffusion_model("flux", 1).items()}
    path = save_model(tmp_path / "a.safetensors", plain)
    found = merge_to(tmp_path / "out.safetensors", recipe_of(path))
    assert found["img_in.weight"].dtype == torch.bfloat16
    off = {name: tensor - plain[name].double() for name, tensor in decoded(found).items()}
    assert max(float(tensor.abs().max()) for tensor in off.values()) < 0.05


# ── the odd ones ─────────────────────────────────────────────────────────────────────────────────────────────────────


def one_weight(folder: Path, values: torch.Tensor, **options: Any) -> Tensors:
    model = {**diffusion_model("flux", 1, torch.float32), WEIGHT: values}
    path = save_model(folder / "a.safetensors", model)
    return merge_to(folder / "out.safetensors", recipe_of(path), **options)


def test_zeros_have_the_scale_1(tmp_path):
    found = one_weight(tmp_path, torch.zeros(32, 8))
    assert found[f"{WEIGHT}_scale"] == 1
    assert not found[WEIGHT].float().any()


def test_the_least_numbers_have_a_scale_that_is_no_zero(tmp_path):
    found = one_weight(tmp_path, torch.full((32, 8), 1e-42))
    assert found[f"{WEIGHT}_scale"] == LEAST
    assert torch.isfinite(found[WEIGHT].float()).all()


def test_the_greatest_numbers_have_a_scale(tmp_path):
    values = normal((32, 8), 1)
    values[3, 2] = -3.4e38
    found = one_weight(tmp_path, values)
    assert found[WEIGHT][3, 2].float() == -448
    assert float(found[f"{WEIGHT}_scale"]) == pytest.approx(3.4e38 / 448)


def test_numbers_whose_scale_is_none_of_float32_are_refused(tmp_path):
    with pytest.raises(MethodError, match=rf"{WEIGHT}(.|\n)*no float32 is their scale"):
        one_weight(tmp_path, torch.full((32, 8), 1e60, dtype=torch.float64))


@pytest.mark.parametrize("loops", ["on", "off"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_told_and_spoils_nothing_else(tmp_path, monkeypatch, odd, loops):
    monkeypatch.setenv("STREAMMERGE_KERNELS", loops)
    values = normal((32, 8), 1)
    wanted = one_weight(tmp_path, values)
    values[2, 1] = odd
    path = save_model(tmp_path / "b.safetensors", {**diffusion_model("flux", 1, torch.float32), WEIGHT: values})
    report = streammerge.merge(recipe_of(path), output=tmp_path / "odd.safetensors")
    with pytest.raises(streammerge.MergeError, match=r"NaN|infinite"):
        streammerge.merge(recipe_of(path), output=tmp_path / "no.safetensors", on_nonfinite="error")
    assert list(report.findings) == [WEIGHT]
    found = load_file(tmp_path / "odd.safetensors")
    assert torch.equal(found[f"{WEIGHT}_scale"], wanted[f"{WEIGHT}_scale"])
    same = found[WEIGHT].view(torch.uint8) == wanted[WEIGHT].view(torch.uint8)
    assert [tuple(place) for place in (~same).nonzero().tolist()] == [(2, 1)]


def test_empty_matrices_and_vectors_have_no_scales(tmp_path):
    model = {**diffusion_model("flux", 1), "double_blocks.0.img_mlp.0.weight": torch.empty(0, 8, dtype=torch.float16)}
    model["double_blocks.0.img_mlp.2.weight"] = normal((1, 32), 1, torch.float16)
    path = save_model(tmp_path / "a.safetensors", model)
    found = merge_to(tmp_path / "out.safetensors", recipe_of(path))
    assert found["double_blocks.0.img_mlp.0.weight"].dtype == torch.float16
    assert found["double_blocks.0.img_mlp.2.weight"].dtype == torch.float16


# ── what depends on nothing else ─────────────────────────────────────────────────────────────────────────────────────

LARGE = {"double_blocks.0.img_mlp.0.weight": (900, 801), "single_blocks.1.linear2.weight": (512, 513)}


@pytest.fixture
def large(tmp_path) -> dict[str, Path]:
    """Models with matrices of several windows, and of no whole number of pieces."""
    a = diffusion_model("flux", 1, torch.bfloat16)
    a |= {name: normal(shape, 7, torch.bfloat16) for name, shape in LARGE.items()}
    return save_models(tmp_path, a=a, b=near(a, 2, 0.1))


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_the_bytes_are_the_same_whatever_computes_them(tmp_path, monkeypatch, large, method):
    monkeypatch.setattr(costs, "WINDOW", 2)
    base = {"base_model": str(large["a"])} if method == "ties" else {}
    parameters = {"parameters": {"t": 0.3}} if method == "slerp" else {}
    recipe = recipe_of(large["a"], large["b"], merge_method=method, **base, **parameters)
    wanted = merge_to(tmp_path / "one.safetensors", recipe, threads=1, io="pread")
    assert wanted[next(iter(LARGE))].dtype == torch.float8_e4m3fn
    assert_same_bytes(merge_to(tmp_path / "two.safetensors", recipe, threads=3, io="mmap", verify=True), wanted)
    sharded = streammerge.merge(recipe, output=tmp_path / "shards", shard_size="300KB")
    parts = [load_file(path) for path in sharded.output if path.endswith(".safetensors")]
    assert_same_bytes({name: tensor for part in parts for name, tensor in part.items()}, wanted)
    monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    by_torch = merge_to(tmp_path / "torch.safetensors", recipe)
    assert_same_bytes(by_torch, wanted)


def test_what_the_scale_was_measured_by_is_not_read_again_for_the_codes(tmp_path):
    """Of many weights: windows stand in line, those of few before their scales are known."""
    weights = {f"double_blocks.{n}.img_mlp.0.weight": normal((64, 8), n, torch.bfloat16) for n in range(100)}
    path = save_model(tmp_path / "a.safetensors", diffusion_model("flux", 1, torch.bfloat16) | weights)
    report = streammerge.merge(recipe_of(path), output=tmp_path / "out.safetensors", threads=1, verify=True)
    most = streammerge.make_plan(recipe_of(path), output=tmp_path / "out.safetensors").bytes_to_read
    assert most - report.bytes_read >= sum(tensor.nbytes for tensor in weights.values())


def test_a_merge_of_scaled_merges_has_the_scales_of_its_own(tmp_path, large):
    inner = recipe_of(large["a"], large["b"])
    ten: dict[str, Any] = {"model": inner, "name": "x", "parameters": {"weight": 10}}
    tenfold = {"merge_method": "linear", "models": [ten], "parameters": {"normalize": False}, "dtype": "fp8_scaled"}
    found = merge_to(tmp_path / "out.safetensors", tenfold, threads=1)
    wanted = in_halves(load_model(large["a"]), load_model(large["b"]))
    for name in LARGE:
        assert float(found[f"{name}_scale"]) == pytest.approx(float(wanted[name].abs().max()) / 44.8, rel=0.05)


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, large):
    recipe, output = recipe_of(large["a"], large["b"]), tmp_path / "out.safetensors"
    wanted = merge_to(tmp_path / "whole.safetensors", recipe, metadata=False)
    first = stop(monkeypatch, recipe, output, after=20, metadata=False)
    seen: list[str] = []
    run(recipe, output, seen.append, resume=True, metadata=False)
    assert len(first.windows) >= 20
    assert any("resum" in line for line in seen)
    assert_same_bytes(load_model(output), wanted)


def test_it_is_verified(tmp_path, large):
    output = str(tmp_path / "out.safetensors")
    assert main([str(large["a"]), str(large["b"]), "--dtype", "fp8_scaled", "-o", output, "-q"]) == 0
    assert main(["verify", output, "-q"]) == 0


def test_a_merge_of_it_is_that_of_the_file(tmp_path, large):
    inner = recipe_of(large["a"], large["b"])
    merge_to(tmp_path / "inner.safetensors", inner)
    outer = {"merge_method": "linear", "models": [{"model": inner, "name": "x"}, str(large["a"])], "dtype": "bfloat16"}
    file = {**outer, "models": [str(tmp_path / "inner.safetensors"), str(large["a"])]}
    nested, from_file = (merge_to(tmp_path / "out.safetensors", recipe) for recipe in (outer, file))
    weights = weights_of(load_model(tmp_path / "inner.safetensors"))
    assert nested.keys() == from_file.keys()
    assert_same_bytes({name: nested[name] for name in weights}, {name: from_file[name] for name in weights})


# ── who can ask for it ───────────────────────────────────────────────────────────────────────────────────────────────


def test_components_have_dtypes_of_their_own(tmp_path):
    model = diffusion_model("sd1", 1, torch.float32)
    path = save_model(tmp_path / "a.safetensors", model)
    rules = [{"component": "vae", "dtype": "float16"}, {"component": "text_encoder", "dtype": "bfloat16"}]
    found = merge_to(tmp_path / "out.safetensors", recipe_of(path, rules=rules))
    by_rule = recipe_of(path, dtype="keep", rules=[*rules, {"component": "unet", "dtype": "fp8_scaled"}])
    assert_same_bytes(merge_to(tmp_path / "rule.safetensors", by_rule), found)
    assert {tensor.dtype for name, tensor in found.items() if name.startswith(VAE)} == {torch.float16}
    assert {tensor.dtype for name, tensor in found.items() if name.startswith(UNET)} == {
        *(torch.float8_e4m3fn, torch.float32, torch.uint8)
    }


def t5(folder: Path, prefix: str = "") -> Tensors:
    block = "encoder.block.0.layer."
    names = [f"{block}0.SelfAttention.{part}.weight" for part in "qkvo"] + [f"{block}1.DenseReluDense.wi_0.weight"]
    model = {name: normal((8, 8), number, torch.bfloat16) for number, name in enumerate(names)}
    model[f"{block}0.SelfAttention.relative_attention_bias.weight"] = normal((32, 4), 1, torch.bfloat16)
    model |= {"shared.weight": normal((9, 8), 2, torch.bfloat16), f"{block}0.layer_norm.weight": torch.ones(8)}
    return {prefix + name: tensor for name, tensor in model.items()}


def test_t5_alone_has_scales(tmp_path):
    path = save_model(tmp_path / "t5.safetensors", t5(tmp_path))
    found = merge_to(tmp_path / "out.safetensors", recipe_of(path))
    assert len(weights_of(found)) == 5
    assert found["shared.weight"].dtype == torch.bfloat16


def test_t5_beside_a_transformer_has_scales_if_it_is_asked_for(tmp_path):
    model = {f"{UNET}{name}": tensor for name, tensor in diffusion_model("flux", 1, torch.bfloat16).items()}
    prefix = "text_encoders.t5xxl.transformer."
    path = save_model(tmp_path / "all.safetensors", model | t5(tmp_path, prefix))
    found = merge_to(tmp_path / "out.safetensors", recipe_of(path))
    assert not [name for name in weights_of(found) if name.startswith(prefix)]
    rules = [{"component": "t5", "dtype": "fp8_scaled"}]
    found = merge_to(tmp_path / "t5.safetensors", recipe_of(path, dtype="keep", rules=rules))
    assert all(name.startswith(prefix) for name in weights_of(found))
    assert len(weights_of(found)) == 5


def refusal(recipe: dict[str, Any], **options: Any) -> str:
    with pytest.raises(PlanError) as refused:
        streammerge.make_plan(recipe, output="out.safetensors", **options)
    return str(refused.value)


def test_what_has_no_scales_is_refused(tmp_path):
    sd1 = diffusion_model("sd1", 1)
    paths = save_models(tmp_path, sd1=sd1, vae=part_of(sd1, VAE), other={"model.layers.0.mlp.weight": torch.ones(4, 4)})
    assert "none of a diffusion model that streammerge knows" in refusal(recipe_of(paths["other"]))
    assert "nothing of it can be stored with scales" in refusal(recipe_of(paths["vae"]))
    rules = [{"component": "vae", "dtype": "fp8_scaled"}]
    told = refusal(recipe_of(paths["sd1"], dtype="keep", rules=rules))
    assert "rule for vae" in told
    assert "--dtype vae=fp16" in told
    dropped = [{"component": "unet", "drop": True}]
    assert "nothing of it can be stored with scales" in refusal(recipe_of(paths["sd1"], rules=dropped))
    assert "diffusers', which reads no scales" in refusal(recipe_of(paths["sd1"]), names="diffusers")
    assert "fp32 or fp64" in refusal(recipe_of(paths["sd1"], paths["sd1"]), compute_dtype="bf16")


def test_a_tensor_that_is_called_as_a_scale_would_be_is_refused(tmp_path):
    model = diffusion_model("flux", 1) | {"double_blocks.0.img_mlp.0.comfy_quant": torch.ones(3)}
    path = save_model(tmp_path / "a.safetensors", model)
    assert "called as scales of others would be" in refusal(recipe_of(path))


def test_single_tensors_have_no_scales(tmp_path):
    path = save_model(tmp_path / "a.safetensors", diffusion_model("flux", 1))
    with streammerge.open_model(path) as model, pytest.raises(RecipeError, match="dtype of whole models"):
        streammerge.Cast(model, "fp8_scaled")


def test_the_recipe_in_the_metadata_says_it(tmp_path):
    paths = flux_models(tmp_path)
    rules = [{"component": "transformer", "dtype": "fp8_scaled_e5m2"}]
    merge_to(tmp_path / "out.safetensors", recipe_of(paths["a"], rules=rules))
    with streammerge.open_model(tmp_path / "out.safetensors") as model:
        said = json.loads(model.metadata["streammerge.recipe"])
    assert said["dtype"] == "fp8_scaled"
    assert said["rules"][0]["dtype"] == "fp8_scaled_e5m2"
