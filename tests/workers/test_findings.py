"""What is wrong with values: counted in inputs and outputs, blamed on who made it, told, refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streammerge
from streammerge.compute.examine import beyond, examine
from streammerge.compute.expressions import BLOCK
from streammerge.errors import OutputError
from streammerge.findings import Finding, refuse_nonfinite, warnings
from tests.make.models import load_model, raw_bytes, save_model, save_models

HALF = torch.float16


def merge(tmp_path, method="linear", *, dtype="keep", parameters=None, base=None, models=None, **options):
    """Merge the models that `save_models` wrote to the folder."""
    recipe = {
        "merge_method": method,
        "models": [str(tmp_path / f"{name}.safetensors") for name in models or ("a", "b")],
        "parameters": parameters or {},
        "dtype": dtype,
    }
    if base:
        recipe["base_model"] = str(tmp_path / f"{base}.safetensors")
    defaults = {"sync": False, "force": True, "threads": 2}
    return streammerge.merge(recipe, output=tmp_path / "out.safetensors", **{**defaults, **options})


# ── a block ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_overflow_is_told_from_what_was_infinite_before():
    values = torch.tensor([1.0, 70000.0, -65504.0, math.inf, math.nan, -90000.0])
    found = examine(values, values.half())
    assert found is not None
    assert (found.nonfinite, found.overflowed, found.saturated) == (4, 2, 0)
    assert (found.largest, found.dtype, found.limit) == (90000.0, "float16", 65504.0)
    assert examine(values[[0, 2]], values[[0, 2]].half()) is None


def test_float8_that_is_cut_to_its_range_is_counted():
    values = torch.tensor([1.0, 448.0, 460.0, 470.0, -1000.0])
    cut = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    found = examine(values, cut)
    assert found is not None
    assert (found.nonfinite, found.saturated, found.largest) == (0, 2, 1000.0)
    assert beyond(torch.float8_e4m3fn) == 464.0
    rounded = examine(values[:3], values[:3].to(torch.float8_e4m3fn))
    assert rounded is None


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=30))
def test_a_block_is_counted_as_it_is_stored(numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    for dtype in (HALF, torch.bfloat16, torch.float32):
        stored = values.to(dtype)
        found = examine(values, stored) or Finding()
        assert found.nonfinite == int((~torch.isfinite(stored)).sum())
        assert found.overflowed == int((torch.isfinite(values) & ~torch.isfinite(stored)).sum())
        assert found.saturated == 0


# ── who is to blame ──────────────────────────────────────────────────────────────────────────────────────────────────


def with_bad(elements: int, **bad: list[int]) -> torch.Tensor:
    tensor = torch.linspace(-1, 1, elements)
    for value, places in bad.items():
        tensor[places] = float(value)
    return tensor


def test_the_input_that_had_them_is_named(tmp_path):
    good, bad = with_bad(2 * BLOCK + 5), with_bad(2 * BLOCK + 5, nan=[0, BLOCK + 3], inf=[2 * BLOCK + 4])
    save_models(tmp_path, a={"w": good, "v": torch.ones(9)}, b={"w": bad, "v": torch.ones(9)})
    report = merge(tmp_path)
    (finding,) = report.findings.values()
    assert (finding.nonfinite, finding.made) == (3, 0)
    assert finding.inputs == {str(tmp_path / "b.safetensors"): 3}
    assert report.warnings()[0] == "3 values are infinite or not numbers: w (3)"
    assert report.warnings()[1].endswith("b.safetensors holds 3 values that are infinite or not numbers: w (3)")


def test_what_the_merge_made_is_told_from_what_was_there(tmp_path):
    save_models(tmp_path, a={"w": torch.tensor([3e38, 1.0])}, b={"w": torch.tensor([3e38, 1.0])})
    report = merge(tmp_path, parameters={"normalize": False}, dtype="fp32", compute_dtype="fp32")
    assert report.findings["w"].made == 1
    assert report.warnings()[1] == "1 value is made so by the merge itself, of finite ones: w (1)"


def test_float16_overflow_is_named_with_the_way_out(tmp_path):
    large = torch.tensor([60000.0, 2.0, -45000.0]).half()
    save_models(tmp_path, a={"w": large}, b={"w": large})
    report = merge(tmp_path, parameters={"normalize": False})
    reason = "it holds 65,504 at the most, the largest value is 120,000"
    assert report.warnings() == [
        "2 values are infinite or not numbers: w (2)",
        f"2 values are overflow of float16 ({reason}); store them as bf16 or fp32: w (2)",
    ]
    assert merge(tmp_path, parameters={"normalize": False}, dtype="bf16").warnings() == []


def test_what_a_method_hides_is_told_all_the_same(tmp_path):
    bad = with_bad(BLOCK + 10, nan=[BLOCK + 2])
    bad[7] = -math.inf
    save_models(tmp_path, a={"w": with_bad(BLOCK + 10)}, b={"w": bad})
    report = merge(tmp_path, "max")
    assert report.findings["w"].inputs == {str(tmp_path / "b.safetensors"): 2}
    assert report.findings["w"].nonfinite < 2


def test_what_is_not_read_is_not_looked_at(tmp_path):
    save_models(tmp_path, a={"w": torch.ones(3)}, b={"w": torch.full((3,), math.nan)})
    report = merge(tmp_path, parameters={"weight": 1.0}, models=("a",))
    assert report.findings == {}


def test_a_whole_tensor_that_is_no_number_is_told_and_no_crash(tmp_path):
    save_models(tmp_path, a={"w": torch.full((8, 8), math.nan)}, base={"w": torch.ones(8, 8)})
    report = merge(tmp_path, "truncate_rank", base="base", models=("a",), parameters={"rank": 2})
    assert report.findings["w"].nonfinite == 64
    assert report.findings["w"].inputs == {str(tmp_path / "a.safetensors"): 64}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "model_stock", "distribution_crossover"])
def test_what_makes_a_method_fall_back_is_told_though_the_output_is_finite(tmp_path, method, threads):
    good = {"w": with_bad(BLOCK + 10).reshape(2, -1), "v": torch.linspace(1, 2, 6)}
    save_models(tmp_path, a=good, b={name: tensor.flip(-1) for name, tensor in good.items()})
    save_models(tmp_path, base={**good, "w": with_bad(BLOCK + 10, nan=[3, BLOCK + 2]).reshape(2, -1)})
    report = merge(tmp_path, method, base="base", threads=threads)
    assert list(report.findings) == ["w"]
    assert report.findings["w"].inputs == {str(tmp_path / "base.safetensors"): 2}
    assert report.findings["w"].nonfinite == 0
    assert len(report.warnings()) == 1


@pytest.mark.parametrize("method", ["max", "nuslerp"])
def test_what_a_nested_method_hides_from_one_that_needs_whole_tensors_is_told(tmp_path, method):
    save_models(tmp_path, a={"w": torch.ones(4, 4)}, b={"w": torch.ones(4, 4) * 2})
    save_models(tmp_path, base={"w": torch.full((4, 4), -math.inf)})
    names = {name: str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "base")}
    inner = {"merge_method": method, "models": [names["a"], names["b"]]}
    inner |= {"base_model": names["base"]} if method == "nuslerp" else {"models": [names["a"], names["base"]]}
    recipe = {"merge_method": "crossover", "models": [{"model": inner}, names["b"]]}
    report = streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False)
    assert report.findings["w"].inputs == {names["base"]: 16}


# ── what follows ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_error_stops_and_leaves_nothing(tmp_path):
    save_models(tmp_path, a={"w": with_bad(9, nan=[1])}, b={"w": with_bad(9)})
    with pytest.raises(OutputError, match=r"1 tensor has values that are infinite(.|\n)*w   1 in the output \(1 in"):
        merge(tmp_path, on_nonfinite="error")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_error_looks_at_copies_too_and_changes_no_byte_of_them(tmp_path):
    path = save_model(tmp_path / "a.safetensors", {"w": with_bad(BLOCK + 9, nan=[3, BLOCK + 1]), "v": torch.ones(3)})
    recipe = {"merge_method": "passthrough", "models": [str(path)]}
    report = streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False)
    assert report.findings == {}
    with pytest.raises(OutputError, match=r"w   2 in the output \(2 in .*a.safetensors\)"):
        streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False, force=True, on_nonfinite="error")


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([complex(math.nan, 0), 1 + 0j, complex(1, math.inf)]),
        torch.tensor([math.nan, 1.0, -math.inf], dtype=torch.float64),
        torch.tensor([1.0, math.nan, math.nan]).to(torch.float8_e4m3fn),
    ],
    ids=lambda values: str(values.dtype),
)
def test_error_looks_at_whatever_may_be_no_number(tmp_path, values):
    path = save_model(tmp_path / "a.safetensors", {"w": values, "v": values[1:1], "i": torch.arange(3)})
    recipe = {"merge_method": "passthrough", "models": [str(path)]}
    with pytest.raises(OutputError, match=r"w   2 in the output \(2 in .*a.safetensors\)"):
        streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False, on_nonfinite="error")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (0.1, 0.9)])
def test_a_file_merged_with_itself_is_a_copy_that_error_looks_at(tmp_path, weights):
    path = str(save_model(tmp_path / "a.safetensors", {"w": with_bad(9, nan=[1])}))
    models = [{"model": path, "name": name, "parameters": {"weight": w}} for name, w in zip("ab", weights, strict=True)]
    recipe = {"merge_method": "linear", "models": models}
    with pytest.raises(OutputError, match=r"w   1 in the output \(1 in .*a.safetensors\)"):
        streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False, on_nonfinite="error")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, HALF, torch.bfloat16, torch.float8_e4m3fn])
def test_the_policy_changes_no_byte(tmp_path, dtype):
    tensors = {"w": with_bad(BLOCK + 77).to(dtype), "i": torch.arange(5), "e": torch.ones(0, 3).to(dtype)}
    save_models(tmp_path, a=tensors, b=tensors)
    files = []
    for policy in ("error", "warn", "ignore"):
        merge(tmp_path, on_nonfinite=policy, parameters={"weight": 0.3})
        files.append((tmp_path / "out.safetensors").read_bytes())
        streammerge.merge(
            {"merge_method": "passthrough", "models": [str(tmp_path / "a.safetensors")]},
            output=tmp_path / "copy.safetensors",
            sync=False,
            force=True,
            on_nonfinite=policy,
        )
        copied = load_model(tmp_path / "copy.safetensors")
        assert {name: raw_bytes(tensor) for name, tensor in copied.items()} == {
            name: raw_bytes(tensor) for name, tensor in tensors.items()
        }
    assert len(set(files)) == 1


def test_ignore_is_silent_and_counts_all_the_same(tmp_path):
    save_models(tmp_path, a={"w": with_bad(9, nan=[1])}, b={"w": with_bad(9)})
    report = merge(tmp_path, on_nonfinite="ignore")
    assert report.warnings() == []
    assert report.to_json()["nonfinite"] == 1


def test_an_error_names_the_tensors_and_what_to_do():
    refuse_nonfinite({"fine": Finding(saturated=3, dtype="float8_e4m3fn", limit=448.0)})
    found = {
        "x": Finding(nonfinite=2, overflowed=2, largest=7e4, dtype="float16", limit=65504.0),
        "y": Finding(nonfinite=5),
    }
    with pytest.raises(OutputError) as caught:
        refuse_nonfinite(found)
    assert str(caught.value).splitlines() == [
        "2 tensors have values that are infinite or not numbers",
        "  x   2 in the output (2 overflowed float16: up to 70000, it holds 65504)",
        "  y   5 in the output (5 made by the merge of finite values)",
        "  Store what overflowed as bf16 or fp32 (--dtype). Use --on-nonfinite warn to write them all the same.",
    ]


def test_many_tensors_are_counted_and_not_listed():
    found = {f"t{number}": Finding(nonfinite=1) for number in range(5)}
    assert warnings(found)[0] == "5 values are infinite or not numbers: t0 (1), t1 (1), t2 (1) and 2 more tensors"
