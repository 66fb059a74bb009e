"""Quantised weights are decoded while they are read, or copied whole, never averaged raw."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

import streammerge
from streammerge.errors import PlanError
from streammerge.findings import warnings
from streammerge.models.scales import spread
from tests.make.headers import header, merged
from tests.make.models import normal, raw_bytes, save_model
from tests.models.scaled_weights import FP8, expand, quantised

# ── decoding ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SCALES = {
    "one": ((300, 256), ()),
    "one, 1-d": ((300, 256), (1,)),
    "one for a vector": ((77,), (1,)),
    "for each row": ((300, 256), (300, 1)),
    "for each row, 1-d": ((30, 4, 3, 3), (30,)),
    "tiles": ((256, 384), (2, 3)),
    "tiles, the last row of them cut off": ((576, 256), (5, 2)),
    "tiles, the last column of them cut off": ((256, 200), (2, 2)),
    "tiles, cut off on both sides": ((300, 1000), (3, 8)),
    "many tiles, cut off": ((1100, 1500), (9, 12)),
    "small tiles": ((64, 96), (2, 3)),
    "narrow tiles": ((50, 96), (50, 3)),
    "for each column": ((30, 50), (1, 50)),
    "tiles of a stack": ((3, 256, 64), (3, 2, 1)),
    "tiles of a stack, cut off": ((3, 300, 200), (3, 3, 2)),
    "for each row of a stack": ((3, 20, 30), (3, 20, 1)),
    "for each column of a stack": ((3, 20, 30), (3, 1, 30)),
    "one for each of a stack": ((3, 20, 30), (3, 1, 1)),
    "for each element": ((3, 4), (3, 4)),
}


def merged_values(tmp_path: Path, model: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A quarter of the model's weight and three quarters of another's, and the latter part alone in float64."""
    other = normal(model["p.weight"].shape, 7)
    a = save_model(tmp_path / "a.safetensors", {**model, "q": torch.ones(2)})
    b = save_model(tmp_path / "b.safetensors", {"p.weight": other, "q": torch.ones(2)})
    outs = []
    for models in ((a, b), (b, a)):
        weights = {a: 0.25, b: 0.75}
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(path), "parameters": {"weight": weights[path]}} for path in models],
            "dtype": "fp32",
        }
        report = streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False, force=True, threads=2)
        outs.append(load_file(tmp_path / "out.safetensors"))
        assert sorted(outs[-1]) == ["p.weight", "q"]
        assert report.left_out == {}
    assert_close(*(out["p.weight"] for out in outs), rtol=1e-6, atol=1e-7)
    return outs[0]["p.weight"].double(), 0.75 * other.double()


@pytest.mark.parametrize("case", SCALES)
def test_scaled_fp8_is_merged_by_its_values(tmp_path, case):
    codes, scale = quantised(*SCALES[case], 1)
    out, other = merged_values(tmp_path, {"p.weight": codes, "p.weight_scale": scale})
    expected = 0.25 * codes.double() * expand(scale, codes.shape).double() + other
    assert_close(out, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_and_scales_have_any_dtype(tmp_path, dtype, scale_dtype):
    codes, scale = quantised((30, 8), (30, 1), 1)
    codes, scale = codes.float().clamp(-200, 200).to(dtype), scale.to(scale_dtype)
    out, other = merged_values(tmp_path, {"p.weight": codes, "p.weight_scale": scale})
    assert_close(out, 0.25 * codes.double() * scale.double() + other, rtol=1e-6, atol=1e-7)


NAMES = ["scale_weight", "weight_scale", "weight_scale_inv", "scale"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_certain_meaning_multiplies(tmp_path, name):
    codes, scale = quantised((300, 256), (3, 2), 1)
    out, other = merged_values(tmp_path, {"p.weight": codes, f"p.{name}": scale})
    expected = 0.25 * codes.double() * expand(scale, codes.shape).double() + other
    assert_close(out, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("shape", "scale_shape"), [((300, 200), (3, 2)), ((32, 64), (32, 2)), ((32, 64), ())])
def test_scales_that_are_exponents_are_powers_of_two(tmp_path, shape, scale_shape):
    codes, _ = quantised(shape, scale_shape, 1)
    exponents = (torch.arange(math.prod(scale_shape)) % 9 + 117).reshape(scale_shape)
    scale = exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    out, other = merged_values(tmp_path, {"p.weight": codes, "p.weight_scale": scale})
    expected = 0.25 * codes.double() * expand(2.0 ** (exponents.double() - 127), shape) + other
    assert_close(out, expected, rtol=1e-6, atol=1e-7)


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


MARKED = ["scaled_fp8", "model.diffusion_model.scaled_fp8"]


def marked_model(folder: Path, mark: str, *, scaled: bool = True) -> tuple[Path, str]:
    """A model in 8 bits with ComfyUI's marks, and what its names start with."""
    prefix = mark.removesuffix("scaled_fp8")
    tensors = {mark: torch.zeros(0, dtype=FP8)}
    for number, name in enumerate("pq"):
        codes, scale = quantised((8, 4), (), 3 * number)
        tensors[f"{prefix}{name}.weight"] = codes
        if scaled:
            tensors[f"{prefix}{name}.scale_weight"] = scale
            tensors[f"{prefix}{name}.scale_input"] = scale.clone()
            tensors[f"{prefix}{name}.comfy_quant"] = torch.arange(9).to(torch.uint8)
    return save_model(folder / "marked.safetensors", tensors), prefix


@pytest.mark.parametrize("mark", MARKED)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", ["keep", "fp8_e4m3", "fp32"])
def test_no_mark_and_no_scale_is_left_of_weights_that_were_decoded(tmp_path, mark, scaled, dtype):
    path, prefix = marked_model(tmp_path, mark, scaled=scaled)
    recipe = {"merge_method": "linear", "models": [str(path), str(path)], "dtype": dtype}
    streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False)
    assert sorted(load_file(tmp_path / "out.safetensors")) == [f"{prefix}p.weight", f"{prefix}q.weight"]


@pytest.mark.parametrize("mark", MARKED)
def test_marks_and_scales_stay_with_weights_that_are_kept(tmp_path, mark):
    path, prefix = marked_model(tmp_path, mark)
    rules = [{"match": f"{prefix}p.weight", "keep": True}]
    recipe = {"merge_method": "linear", "models": [str(path), str(path)], "dtype": "fp8_e4m3", "rules": rules}
    streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False)
    own = ["comfy_quant", "scale_input", "scale_weight", "weight"]
    expected = [mark, f"{prefix}q.weight", *(f"{prefix}p.{name}" for name in own)]
    assert sorted(load_file(tmp_path / "out.safetensors")) == sorted(expected)


def test_plain_fp8_says_what_share_of_scaled_weights_it_can_not_hold(tmp_path):
    tensors: dict[str, torch.Tensor] = {}
    lost = elements = 0
    for number, (name, size) in enumerate((("small", 0.003), ("large", 900.0), ("fit", 1.0))):
        values = normal((300, 1000), number).abs().clamp(0.1) * size
        scale = values.max() / 448
        codes = (values / scale).to(FP8)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
        exact = codes.double() * scale.double()
        gone = int(((exact.abs() <= 2**-10) & (exact != 0) | (exact.abs() > 464)).sum())
        lost, elements = lost + gone, elements + (codes.numel() if gone else 0)
    path = save_model(tmp_path / "a.safetensors", tensors)
    recipe = {"merge_method": "linear", "models": [str(path), str(path)], "dtype": "fp8_e4m3"}
    report = streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False)
    told = [warning for warning in warnings(report.findings) if "of weights that had scales" in warning]
    assert len(told) == 1
    assert told[0].startswith(f"{lost:,} of {elements:,} values ({lost / elements:.1%})")
    assert "fit.weight" not in told[0]
    plain = streammerge.merge({**recipe, "dtype": "bf16"}, output=tmp_path / "wide.safetensors", sync=False)
    assert plain.findings == {}


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
    rules = [{"match": "p.weight", "take": "b"}]
    with pytest.raises(PlanError, match=r"a, the layout, has no room(.|\n)*p\.weight   b: bitsandbytes, 8 bits"):
        merged({"a": plain, "b": model}, rules=rules)
    taken = merged({"a": plain, "b": model}, rules=rules, layout="b")
    assert [d.action for d in taken.decisions] == ["copied", "copied"]


def test_codes_that_can_not_be_decoded_are_kept_as_they_are_whatever_the_dtype():
    model = header(p__weight="F8_E4M3 4 8", p__strange="F16 4", q="F16 3")
    kept = merged({"a": model, "b": model}, rules=[{"match": "p.*", "keep": True}], dtype="fp32")
    assert {d.name: str(d.info.dtype) for d in kept.decisions} == {
        "p.weight": "F8_E4M3",
        "p.strange": "F16",
        "q": "F32",
    }


@st.composite
def tiled(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape of two or three dimensions, and that of a scale for it in tiles of some size, cut off or not."""
    sizes = draw(st.lists(st.integers(1, 300), min_size=2, max_size=2))
    tiles = []
    for size in sizes:
        even = [size >> power for power in range(9) if size % (1 << power) == 0]
        tiles.append(draw(st.sampled_from([1, -(-size // 128), *even])))
    stack = draw(st.sampled_from([(), (1,), (3,)]))
    return (*stack, *sizes), (*stack, *tiles)


@settings(max_examples=60, deadline=None)
@given(tiled())
def test_every_element_has_the_scale_of_its_tile(case):
    shape, scale_shape = case
    scale = torch.arange(math.prod(scale_shape)).reshape(scale_shape)
    way = spread(shape, scale_shape)
    assert way is not None
    flat = scale.reshape(-1).as_strided(way.shape, way.strides).reshape(-1)
    found = flat.as_strided(shape, way.cut) if way.cut else flat[: math.prod(shape)].reshape(shape)
    assert torch.equal(found, expand(scale, shape))


def test_a_scale_lies_over_its_tensor():
    assert spread((4, 3), (3,)) is None
    assert spread((4, 3), (4, 3)) == spread((4, 3), (4, 3))
    assert spread((192, 128), (2, 1)) is not None
    assert spread((128, 192), (1, 2)) is not None
    assert spread((128, 300), (1, 2)) is None
    assert spread((4, 4, 4), (2, 2, 2)) is None
