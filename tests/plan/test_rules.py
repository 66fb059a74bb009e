"""Rules: the first that matches wins, and does what it says."""

from __future__ import annotations

import pytest

from streammerge.compute.expressions import Combined
from streammerge.errors import PlanError
from tests.make.headers import header, merged
from tests.plan.fates import fates, pair


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
