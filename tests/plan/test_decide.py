"""What becomes of every tensor, decided from headers: methods, dtypes, real layouts, merges of merges."""

from __future__ import annotations

import pytest

from streammerge.compute.expressions import ByBlock, ByGram, Combined, External, Stored
from streammerge.errors import PlanError, RecipeError, count, listed, plural
from streammerge.tools.demo.layouts import checkpoint
from tests.make.headers import Header, header, merged
from tests.plan.fates import CONVOLUTION, fates, pair, sd2

# ── the plain case ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_all_models_have_is_merged():
    made = merged(pair(x=(2, 3), y=(4,)))
    assert fates(made) == {"x": "merged: linear", "y": "merged: linear"}
    node = made.node("x")
    assert isinstance(node, Combined)
    assert [term.coefficient for term in node.terms] == [0.5, 0.5]
    assert made.left_out == {}
    assert made.lacking == {}


def test_the_layout_gives_names_order_shapes_and_dtypes():
    models = {"a": header("F16", y=(4,), x=(2, 3)), "b": header("F32", x=(2, 3), y=(4,))}
    assert {name: str(info) for name, info in merged(models).tensors.items()} == {"y": "F16 [4]", "x": "F16 [2, 3]"}
    assert list(merged(models).tensors) == ["y", "x"]
    assert list(merged(models, layout="b").tensors) == ["x", "y"]
    assert str(merged(models, layout="b").tensors["x"]) == "F32 [2, 3]"


def test_the_layout_may_be_the_base_or_a_model_that_is_not_merged():
    models = {"a": header(x=(1,), y=(1,)), "b": header(x=(1,)), "c": header(x=(1,))}
    made = merged(models, "task_arithmetic", base="b", beside="c", layout="b", on_missing="keep")
    assert list(made.tensors) == ["x"]
    assert made.left_out == {"a": ("y",)}
    made = merged({**models, "a": header(x=(1,))}, "task_arithmetic", base="b", beside="c", layout="c")
    node = made.node("x")
    assert isinstance(node, Combined)
    assert len(node.terms) == 1  # only a: its weight is 1, so the base's is 0


@pytest.mark.parametrize(
    ("method", "keys", "kind"),
    [
        ("linear", {}, Combined),
        ("slerp", {"parameters": {"t": 0.5}}, ByGram),
        ("ties", {"base": "b"}, ByBlock),
    ],
)
def test_every_kind_of_method_gives_its_own_expression(method, keys, kind):
    assert isinstance(merged(pair(x=(2,)), method, **keys).node("x"), kind)


def test_parameters_reach_the_expression_tensor_by_tensor():
    parameters = {"weight": [{"filter": "layers", "value": [0, 1]}, {"value": 1}]}
    models = pair(layers__0__x=(1,), layers__1__x=(1,), layers__2__x=(1,), y=(1,))
    made = merged(models, models=[{"model": "a", "parameters": parameters}, {"model": "b"}])
    shares = {}
    for name, node in made.nodes.items():
        assert isinstance(node, Combined)
        shares[name] = [term.coefficient / node.divisor for term in node.terms]
    assert shares == {"layers.0.x": [1.0], "layers.1.x": [1 / 3, 2 / 3], "layers.2.x": [0.5, 0.5], "y": [0.5, 0.5]}


def test_a_missing_parameter_is_an_error_at_once():
    with pytest.raises(RecipeError, match="method 'slerp' needs the parameter 't'"):
        merged(pair(x=(2,)), "slerp")


def test_a_model_that_is_not_ours_is_asked_to_read_itself():
    class Other:
        tensors = header(x=(2,)).tensors

        def read(self, name, start, stop):
            raise AssertionError

    made = merged({"a": header(x=(2,)), "b": Other()})
    node = made.node("x")
    assert isinstance(node, Combined)
    assert [type(term.node) for term in node.terms] == [Stored, External]


# ── element types ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL", "C64", "I32"])
def test_what_is_not_floating_point_is_copied(dtype):
    made = merged(pair(x=(1,), ids=f"{dtype} 1 77"), dtype="fp32")
    assert fates(made)["ids"] == f"copied: from a: {dtype} is never averaged"
    assert str(made.tensors["ids"]) == f"{dtype} [1, 77]"
    assert str(made.tensors["x"]) == "F32 [1]"


def test_a_rule_without_an_action_does_not_average_integers():
    made = merged(pair(ids="I64 3"), rules=[{"match": "*", "parameters": {"weight": 1}}])
    assert fates(made) == {"ids": "copied: from a: I64 is never averaged"}


def test_integers_need_not_be_in_every_model():
    made = merged({"a": header(x=(1,), ids="I64 77"), "b": header(x=(1,))})
    assert fates(made)["ids"] == "copied: from a: I64 is never averaged"


def test_the_output_may_be_stored_otherwise():
    models = {"a": header("F16", x=(1,), y=(1,), z=(1,)), "b": header("F32", x=(1,), y=(1,), z=(1,))}
    rules = [{"match": "y", "dtype": "bf16"}, {"match": "z", "take": "b"}]
    made = merged(models, dtype="fp32", rules=rules)
    assert {name: str(info.dtype) for name, info in made.tensors.items()} == {"x": "F32", "y": "BF16", "z": "F32"}
    assert fates(made)["z"] == "copied: from b: taken by rule z"
    made = merged(models, dtype="fp16", rules=rules)
    assert fates(made)["z"] == "copied: from b: taken by rule z, stored as F16"
    made = merged(models, rules=[{"match": "x", "keep": True, "dtype": "fp8_e4m3"}, *rules])
    assert fates(made)["x"] == "copied: from a: kept by rule x, stored as F8_E4M3"


@pytest.mark.parametrize(("dtype", "kinds"), [("I8 4", "a F16, b I8"), ("U8 4", "a F16, b U8")])
def test_floats_and_integers_are_not_averaged(dtype, kinds):
    with pytest.raises(PlanError, match=f"1 tensor can't be averaged: not all are floating point\n  x   {kinds}\n"):
        merged({"a": header(x=(4,)), "b": header(x=dtype)})


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "F6_E2M3"])
def test_packed_weights_are_not_averaged_but_copied_if_asked(dtype):
    models = pair(x=f"{dtype} 8")
    with pytest.raises(PlanError, match=f"x   a {dtype}, b {dtype}\n  Copy such tensors: a's with --keep GLOB"):
        merged(models)
    assert fates(merged(models, rules=[{"match": "x", "keep": True}]))["x"].startswith("copied: from a")


# ── real layouts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_founding_job_decides_all_tensors():
    made = merged(
        sd2(),
        "task_arithmetic",
        base="base",
        layout="depth",
        on_shape_mismatch="keep",
        rules=[
            {"match": "first_stage_model.*", "take": "waifu"},
            {"match": ["cond_stage_model.*", "depth_model.*"], "take": "depth"},
        ],
    )
    actions: dict[str, int] = {}
    for decision in made.decisions:
        actions[decision.why] = actions.get(decision.why, 0) + 1
    depth = checkpoint("sd2-depth", scale=32)
    unet = [name for name in depth if name.startswith("model.diffusion_model.")]
    assert actions["task_arithmetic"] == len(unet) - 1
    assert fates(made)[CONVOLUTION] == f"copied: from depth: kept for its shape {list(depth[CONVOLUTION].shape)}"
    assert len(made.tensors) == len(depth)
    assert all(name in depth for name in made.lacking["waifu"])


@pytest.mark.parametrize("policy", ["error", "keep"])
def test_different_architectures_are_told_by_name(policy):
    models = {"one": Header(checkpoint("sd1")), "two": Header(checkpoint("sd2-base"))}
    with pytest.raises(PlanError, match="one and two are of different architectures") as error:
        merged(models, on_shape_mismatch=policy)
    assert error.value.found == ("one   Stable Diffusion 1", "two   Stable Diffusion 2")
    assert "--keep 'model.diffusion_model.*'" in error.value.advice


def test_one_tensor_too_few_is_no_other_architecture():
    with pytest.raises(PlanError) as error:
        merged({"a": header(x=(1,), y=(1,)), "b": header(x=(1,))})
    assert error.value.advice.startswith("Use --on-missing")


# ── merges of merges ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_merges_nest_and_fold_into_one_combination():
    models = {name: header(x=(2,)) for name in ("depth", "waifu", "base")}
    first = merged({"depth": models["depth"], "base": models["base"]}, "task_arithmetic", base="base")
    second = merged({"waifu": models["waifu"], "base": models["base"]}, "task_arithmetic", base="base")
    made = merged({"first": first, "second": second})
    node = made.node("x")
    assert isinstance(node, Combined)
    assert {id(term.node): term.coefficient for term in node.terms} == {
        id(models["depth"].node("x")): 0.5,
        id(models["waifu"].node("x")): 0.5,
    }


def test_counts_have_their_plural():
    assert count(["x"], "tensor") == "1 tensor"
    assert count(["x"] * 1228, "tensor") == "1,228 tensors"
    assert plural([], "one", "many") == "many"


def test_long_lists_of_names_end_in_a_count():
    assert listed(list("abcde")) == "a, b, c, d, e"
    assert listed([*"abcde", *["x"] * 1234]) == "a, b, c, d, e and 1,234 more"
