"""What becomes of every tensor, decided from headers: rules, policies, dtypes, and the messages where it can't be."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.compute.expressions import ByBlock, ByGram, Combined, External, Stored, Viewed
from streammerge.errors import PlanError, RecipeError, count, listed, plural
from streammerge.models.merged import Merged
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.demo.layouts import checkpoint
from tests.make.headers import Header, header, merged

CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"


def fates(made: Merged) -> dict[str, str]:
    return {decision.name: f"{decision.action}: {decision.why}" for decision in made.decisions}


def pair(**shapes):
    return {"a": header(**shapes), "b": header(**shapes)}


def sd2(scale: int = 32) -> dict[str, Header]:
    """The three models of the founding job, in miniature: all names are true."""
    layouts = {"depth": "sd2-depth", "waifu": "sd2-waifu", "base": "sd2-base"}
    return {name: Header(checkpoint(layout, scale=scale)) for name, layout in layouts.items()}


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


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_rule_does_what_it_says():
    rules = [
        {"match": "keep.*", "keep": True},
        {"match": ["take.*", "other"], "take": "b"},
        {"match": "drop.*", "drop": True},
        {"match": "merge.*", "parameters": {"weight": {"a": 3, "b": 1}}},
    ]
    shapes = {"keep__x": (1,), "take__x": (2,), "other": (3,), "drop__x": (4,), "merge__x": (5,), "rest": (6,)}
    models = pair(**shapes)
    made = merged(models, rules=rules)
    assert fates(made) == {
        "keep.x": "copied: from a: kept by rule keep.*",
        "take.x": "copied: from b: taken by rule take.*, other",
        "other": "copied: from b: taken by rule take.*, other",
        "drop.x": "dropped: rule drop.*",
        "merge.x": "merged: linear",
        "rest": "merged: linear",
    }
    assert made.node("keep.x") is models["a"].node("keep.x")
    assert made.node("take.x") is models["b"].node("take.x")
    node = made.node("merge.x")
    assert isinstance(node, Combined)
    assert [term.coefficient for term in node.terms] == [0.75, 0.25]
    assert "drop.x" not in made.tensors
    assert "drop.x" not in made.nodes


def test_the_first_rule_that_matches_wins():
    rules = [{"match": "x.1", "take": "b"}, {"match": "x.*", "keep": True}, {"match": "*"}]
    made = merged(pair(x__1=(1,), x__2=(1,), y=(1,)), rules=rules)
    assert [decision.action for decision in made.decisions] == ["copied", "copied", "merged"]
    assert fates(made)["x.1"].startswith("copied: from b")


def test_globs_tell_capitals_from_small_letters_and_match_the_whole_name():
    made = merged(pair(X=(1,), xx=(1,), x=(1,)), rules=[{"match": "x", "drop": True}])
    assert list(made.tensors) == ["X", "xx"]
    made = merged(pair(a__1=(1,), a__12=(1,), b__1=(1,)), rules=[{"match": "[!a].?", "drop": True}])
    assert list(made.tensors) == ["a.1", "a.12"]


def test_what_is_taken_may_come_from_a_model_that_is_not_merged():
    models = pair(x=(1,), vae=(3,)) | {"c": header(vae=(3,))}
    made = merged(models, beside="c", rules=[{"match": "vae", "take": "c"}])
    assert made.tensors["vae"].shape == (3,)
    assert made.lacking == {"c": ("x",)}


@pytest.mark.parametrize(("policy", "source"), [("keep", "a"), ("pad", "c"), ("slice", "")])
def test_what_is_taken_has_the_layouts_shape(policy: str, source: str):
    models = pair(x=(1,), vae=(3,)) | {"c": header(vae=(2,))}
    rules = [{"match": "vae", "take": "c"}]
    with pytest.raises(PlanError, match=r"1 tensor differs in shape(.|\n)*vae   a \[3\]   c \[2\]"):
        merged(models, beside="c", rules=rules)
    if not source:
        with pytest.raises(PlanError, match="differs in shape"):
            merged(models, beside="c", rules=rules, on_shape_mismatch=policy)
        return
    made = merged(models, beside="c", rules=rules, on_shape_mismatch=policy)
    decision = next(decision for decision in made.decisions if decision.name == "vae")
    assert made.tensors["vae"].shape == (3,)
    assert decision.why.startswith(f"from {source}: ")


def test_rules_that_match_nothing_are_an_error():
    rules = [{"match": ["vea.*", "w"], "take": "b"}, {"match": "x", "keep": True}, {"match": "x", "drop": True}]
    with pytest.raises(PlanError, match=r"^2 rules match no tensor of a that an earlier rule left") as error:
        merged(pair(x=(1,)), rules=rules)
    assert error.value.found == ("vea.*, w", "x")
    assert "choose another --layout" in error.value.advice
    with pytest.raises(PlanError, match=r"^1 rule matches no tensor of b that"):
        merged(pair(x=(1,)), layout="b", rules=[{"match": "y"}])


# ── tensors that some model lacks ────────────────────────────────────────────────────────────────────────────────────


def some_lack():
    return {"a": header(x=(1,), y=(1,), z=(1,)), "b": header(x=(1,), z=(1,)), "c": header(x=(1,), y=(1,))}


def test_tensors_that_are_missing_are_an_error():
    with pytest.raises(PlanError) as error:
        merged(some_lack())
    assert str(error.value) == (
        "2 tensors are not in every model\n"
        "  y   in a, c, not in b\n"
        "  z   in a, b, not in c\n"
        "  Use --on-missing keep (copy a's), --on-missing drop (leave them out), --drop GLOB, or --take 'GLOB=MODEL'."
    )


def test_the_base_counts_among_those_that_lack():
    models = {"a": header(x=(1,), y=(1,)), "b": header(x=(1,)), "c": header(x=(1,))}
    with pytest.raises(PlanError, match="1 tensor is not in every model\n  y   in a, not in c, b\n"):
        merged(models, "task_arithmetic", base="c")


def test_tensors_that_are_missing_may_be_kept():
    made = merged(some_lack(), on_missing="keep")
    assert fates(made) == {"x": "merged: linear", "y": "copied: from a: b lacks it", "z": "copied: from a: c lacks it"}
    assert made.lacking == {"b": ("y",), "c": ("z",)}


def test_tensors_that_are_missing_may_be_dropped():
    made = merged(some_lack(), on_missing="drop")
    assert fates(made)["y"] == "dropped: b lacks it"
    assert list(made.tensors) == ["x"]


def test_the_policy_for_several_that_lack():
    models = {"a": header(w=(1,), x=(1,)), "b": header(w=(1,), y=(1,)), "c": header(w=(1,), z=(1,))}
    made = merged(models, on_missing="keep")
    assert fates(made) == {"w": "merged: linear", "x": "copied: from a: b and c lack it"}
    assert made.left_out == {"b": ("y",), "c": ("z",)}


def test_what_is_taken_and_missing_follows_the_policy_too():
    rules = [{"match": "y", "take": "b"}]
    models = {"a": header(x=(1,), y=(1,)), "b": header(x=(1,))}
    with pytest.raises(PlanError, match="1 tensor is not in every model\n  y   in a, not in b\n"):
        merged(models, rules=rules)
    assert fates(merged(models, rules=rules, on_missing="keep"))["y"] == "copied: from a: b lacks it"
    assert list(merged(models, rules=rules, on_missing="drop").tensors) == ["x"]


def test_a_rule_settles_what_is_missing():
    rules = [{"match": "y", "take": "c"}, {"match": "z", "drop": True}]
    assert fates(merged(some_lack(), rules=rules)) == {
        "x": "merged: linear",
        "y": "copied: from c: taken by rule y",
        "z": "dropped: rule z",
    }


def test_tensors_that_the_layout_does_not_have_are_left_out_and_told():
    models = {"a": header(x=(1,)), "b": header(w=(1,), x=(1,), y=(1,))}
    made = merged(models, on_missing="keep")
    assert list(made.tensors) == ["x"]
    assert made.left_out == {"b": ("w", "y")}


# ── shapes that differ ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_depth_models_convolution_gives_the_message_of_the_founding_job():
    shapes = {"depth": (320, 5, 3, 3), "waifu": (320, 4, 3, 3), "base": (320, 4, 3, 3)}
    models = {
        name: Header({CONVOLUTION: TensorInfo(DTYPES["F16"], shape), "model.x": TensorInfo(DTYPES["F16"], (320,))})
        for name, shape in shapes.items()
    }
    with pytest.raises(PlanError) as error:
        merged(models, "task_arithmetic", base="base")
    assert str(error.value) == (
        "1 tensor differs in shape between the models\n"
        "  model.diffusion_model.input_blocks.0.0.weight   depth [320, 5, 3, 3]   base, waifu [320, 4, 3, 3]\n"
        "  Use --on-shape-mismatch overlap (merge what all have, keep depth's rest), keep (copy depth's), pad (fill "
        "smaller ones with zeros), or --keep GLOB, --drop GLOB or a rule for such tensors."
    )


def test_every_shape_is_told_the_layouts_first():
    models = {"a": header(x=(3, 4)), "b": header(x=(3, 5)), "c": header(x=(3, 4)), "d": header(x=(12,))}
    with pytest.raises(PlanError, match=r"\n  x   c, a \[3, 4\]   b \[3, 5\]   d \[12\]\n"):
        merged(models, layout="c")
    with pytest.raises(PlanError, match=r"\n  x   b \[3, 5\]   a, c \[3, 4\]   d \[12\]\n"):
        merged(models, layout="b")


def test_all_mismatches_are_in_one_message():
    sizes: dict[str, Any] = {f"x{n}": (n,) for n in range(1, 9)}
    with pytest.raises(PlanError, match=r"^8 tensors differ in shape between the models") as error:
        merged({"a": header("F16", **sizes), "b": header("F16", **dict.fromkeys(sizes, (9,)))})
    assert len(error.value.found) == 8
    assert str(error.value).count("b [9]") == 5
    assert "\n  … and 3 more\n" in str(error.value)


def test_a_shape_that_differs_may_be_kept():
    models = {"a": header(x=(5, 2), y=(1,)), "b": header(x=(4, 2), y=(1,))}
    made = merged(models, on_shape_mismatch="keep")
    assert fates(made) == {"x": "copied: from a: kept for its shape [5, 2]", "y": "merged: linear"}
    assert made.node("x") is models["a"].node("x")


@pytest.mark.parametrize(
    ("policy", "layout", "other", "fits"),
    [
        ("pad", (5, 2), (4, 2), True),
        ("pad", (5, 3), (4, 2), True),
        ("pad", (5, 2), (4, 3), False),
        ("pad", (4, 2), (5, 2), False),
        ("pad", (4, 2), (8,), False),
        ("slice", (4, 2), (5, 2), True),
        ("slice", (4, 2), (5, 3), True),
        ("slice", (5, 2), (4, 2), False),
        ("slice", (4, 3), (5, 2), False),
        ("slice", (4,), (4, 1), False),
        ("pad", (0,), (0, 1), False),
        ("pad", (3,), (0,), True),
        ("slice", (0,), (3,), True),
    ],
)
def test_padding_makes_larger_and_slicing_smaller(policy, layout, other, fits):
    models = {"a": header(x=layout), "b": header(x=other)}
    if not fits:
        with pytest.raises(PlanError, match="1 tensor differs in shape"):
            merged(models, on_shape_mismatch=policy)
        return
    made = merged(models, on_shape_mismatch=policy)
    assert fates(made) == {"x": f"merged: linear, b {'cut' if policy == 'slice' else 'padded with zeros'}"}
    assert made.tensors["x"].shape == layout
    node = made.node("x")
    assert isinstance(node, Combined)
    own, fitted = (term.node for term in node.terms)
    assert own is models["a"].node("x")
    assert isinstance(fitted, Viewed)
    assert fitted.info.shape == layout
    assert fitted.source is models["b"].node("x")
    assert fitted.inner == tuple(map(min, layout, other))


def test_what_padding_cannot_mend_is_listed_and_the_rest_is_not():
    models = {"a": header(x=(5,), y=(5,)), "b": header(x=(4,), y=(6,))}
    with pytest.raises(PlanError) as error:
        merged(models, on_shape_mismatch="pad")
    assert error.value.found == ("y   a [5]   b [6]",)


def test_a_rule_settles_a_shape():
    models = {"a": header(x=(5,)), "b": header(x=(4,))}
    assert fates(merged(models, rules=[{"match": "x", "keep": True}]))["x"].startswith("copied: from a")


def test_the_first_kind_of_problem_is_told_first():
    models = {"a": header(x=(5,), y=(1,)), "b": header(x=(4,))}
    with pytest.raises(PlanError, match="differs in shape"):
        merged(models)
    models = {"a": header(x=(5,), y=(1,), z=(1,)), "b": header(x=(4,), z=(1,))}
    with pytest.raises(PlanError, match="is not in every model"):
        merged(models, on_shape_mismatch="keep")


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


def test_different_architectures_are_told_by_name():
    models = {"one": Header(checkpoint("sd1", scale=32)), "two": Header(checkpoint("sd2-base", scale=32))}
    with pytest.raises(PlanError, match="differ in shape") as error:
        merged({name: Header(checkpoint(layout)) for name, layout in (("one", "sd1"), ("two", "sd2-base"))})
    assert "one" in error.value.advice
    assert "Stable Diffusion 1" in error.value.advice
    assert "Stable Diffusion 2" in error.value.advice
    assert error.value.advice.index("Stable Diffusion") < error.value.advice.index("Use --on-shape-mismatch")
    with pytest.raises(PlanError) as error:
        merged(models, on_shape_mismatch="keep")
    assert "are not in every model" in error.value.what


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


# ── what only some models have ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", ["a", "b"])
def test_a_dropped_tensor_may_be_any_models(layout):
    models = {"a": header(x=(1,)), "b": header(x=(1,), y=(1,))}
    made = merged(models, layout=layout, rules=[{"match": "y", "drop": True}])
    assert list(made.tensors) == ["x"]
    assert made.left_out == {}


def test_what_is_not_merged_is_not_missing_in_the_layout():
    models = {"a": header(x=(1,)), "b": header(x=(1,), ids="I64 77"), "c": header(x=(1,), vae=(1,), y=(1,))}
    made = merged(models, beside="c", rules=[{"match": "x", "take": "c"}])
    assert made.left_out == {"b": ("ids",), "c": ("vae", "y")}
    made = merged({"a": header(x=(1,)), "b": header(x=(1,), y=(1,))}, rules=[{"match": "*", "take": "a"}])
    assert made.left_out == {"b": ("y",)}


def test_what_a_rule_takes_must_have_a_place_in_the_layout():
    models = {"a": header(x=(1,), vae__y=(1,)), "c": header(vae__y=(1,), vae__z=(1,))}
    with pytest.raises(PlanError, match=r"1 tensor is not in every model\n  vae\.z   in c, not in a\n"):
        merged(models, beside="c", rules=[{"match": "vae.*", "take": "c"}])
    made = merged(models, beside="c", rules=[{"match": "vae.*", "take": "c"}], on_missing="keep")
    assert list(made.tensors) == ["x", "vae.y"]


def test_rules_may_copy_everything_but_policies_may_not():
    models = {"a": header(x=(1,)), "b": header(y=(1,))}
    for policy in ("error", "keep", "drop"):
        with pytest.raises(PlanError, match="nothing is merged"):
            merged(models, on_missing=policy)
        made = merged(models, on_missing=policy, rules=[{"match": "*", "keep": True}])
        assert fates(made) == {"x": "copied: from a: kept by rule *"}


def test_what_merges_of_merges_leave_out_is_told():
    inner = merged({"a": header(x=(1,), y=(1,)), "b": header(x=(1,), z=(1,))}, on_missing="keep")
    made = merged({"in": inner, "c": header(x=(1,), y=(1,))})
    assert made.left_out == {"in/b": ("z",)}
    assert made.lacking == {"in/b": ("y",)}
