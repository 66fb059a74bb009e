"""Tensors that only some models have are an error, kept, dropped, or told."""

from __future__ import annotations

import pytest

from streammerge.errors import PlanError
from tests.make.headers import header, merged
from tests.plan.fates import fates

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
