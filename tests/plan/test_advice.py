"""What errors of names and shapes advise is tried on the merge that caused them, and has to do what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import streammerge
from streammerge.errors import PlanError
from streammerge.models.merged import Merged
from tests.make.headers import Header, header, merged
from tests.make.models import save_model

Way = dict[str, Any]
"""What is added to the recipe."""

POLICY = re.compile(r"(?:--on-shape-mismatch |, )(overlap|keep|pad|slice) \(")
MISSING = re.compile(r"(?:--layout (\S+) )?--on-missing (keep|drop) \(")
NAME = re.compile(r"^(\S+)   ")


def names_in(error: PlanError) -> list[str]:
    """The tensors that the error tells."""
    found = [NAME.match(line) for line in error.found]
    return [match[1] for match in found if match]


def ways_of(error: PlanError, models: dict[str, Header]) -> Iterator[tuple[str, Way]]:
    """Everything that the error advises, as changes to the recipe."""
    advice, names = error.advice, names_in(error)
    if larger := re.search(r"--layout (\S+) keeps that model's rest", advice):
        yield "larger", {"layout": larger[1], "on_shape_mismatch": "overlap"}
    for policy in POLICY.findall(advice):
        yield policy, {"on_shape_mismatch": policy}
    for layout, policy in MISSING.findall(advice):
        yield f"missing: {policy}", {"on_missing": policy, **({"layout": layout} if layout else {})}
    if "--keep GLOB" in advice:
        yield "rules", {"rules": [{"match": name, "keep": True} for name in names]}
    if "--drop GLOB" in advice:
        yield "rules", {"rules": [{"match": name, "drop": True} for name in names]}
    if "--take 'GLOB=MODEL'" in advice:
        holders = {name: next(model for model in models if name in models[model].tensors) for name in names}
        yield "rules", {"rules": [{"match": name, "take": holder} for name, holder in holders.items()]}


def try_advice(models: dict[str, Header], keys: dict[str, Any], error: PlanError) -> int:
    """Follow all of the error's advice, one after the other; how much there was."""
    ways = list(ways_of(error, models))
    for kind, way in ways:
        assert {**keys, **way} != keys, f"{kind} is what was asked for already"
        made = outcome(models, {**keys, **way, "rules": [*way.get("rules", []), *keys.get("rules", [])]})
        if isinstance(made, Merged):
            check(kind, way, names_in(error), made, models)
            continue
        assert kind_of(made) != kind_of(error), f"{kind}: {made}"
        assert "nothing is merged" not in made.what or kind == "rules", f"{kind}: {made}"
    return len(ways)


def outcome(models: dict[str, Header], keys: dict[str, Any]) -> Merged | PlanError:
    """The merge, or why there is none."""
    try:
        return merged(models, **keys)
    except PlanError as error:
        return error


def kind_of(error: PlanError) -> str:
    """What is wrong, whatever the number of tensors."""
    return re.sub(r"^[\d,]+ tensors? (is|are|differs?)?", "", error.what)


def check(kind: str, way: Way, names: list[str], made: Merged, models: dict[str, Header]) -> None:
    """What was advised does what the advice says."""
    fates = {decision.name: decision for decision in made.decisions}
    layout = way.get("layout", next(iter(models)))
    for name in names:
        if kind in ("overlap", "larger", "pad", "slice"):
            assert fates[name].action in ("merged", "copied")
            assert made.tensors[name].shape == models[layout].tensors[name].shape
        elif kind == "keep":
            assert made.node(name) is models[layout].node(name)
        elif kind == "missing: drop":
            assert name not in made.tensors
        elif kind == "missing: keep":
            assert (name in made.tensors) == (name in models[layout].tensors)


def failure(models: dict[str, Header], keys: dict[str, Any]) -> PlanError:
    with pytest.raises(PlanError) as caught:
        merged(models, **keys)
    return caught.value


CASES: dict[str, tuple[dict[str, Header], dict[str, Any], int]] = {
    "smaller first": ({"a": header(x=(4, 2), y=(1,)), "b": header(x=(6, 2), y=(1,))}, {}, 6),
    "larger first": ({"a": header(x=(6, 2), y=(1,)), "b": header(x=(4, 2), y=(1,))}, {}, 5),
    "neither is larger": ({"a": header(x=(6, 2), y=(1,)), "b": header(x=(4, 3), y=(1,))}, {}, 4),
    "of another rank": ({"a": header(x=(6, 2), y=(1,)), "b": header(x=(12,), y=(1,))}, {}, 3),
    "all are of other shapes": ({"a": header(x=(6, 2)), "b": header(x=(4, 2))}, {}, 4),
    "padding a larger one": (
        {"a": header(x=(4, 2), y=(1,)), "b": header(x=(6, 2), y=(1,))},
        {"on_shape_mismatch": "pad"},
        6,
    ),
    "cutting a smaller one": (
        {"a": header(x=(6, 2), y=(1,)), "b": header(x=(4, 2), y=(1,))},
        {"on_shape_mismatch": "slice"},
        5,
    ),
    "overlapping other ranks": (
        {"a": header(x=(6, 2), y=(1,)), "b": header(x=(12,), y=(1,))},
        {"on_shape_mismatch": "overlap"},
        3,
    ),
    "keeping all": ({"a": header(x=(6, 2)), "b": header(x=(4, 2))}, {"on_shape_mismatch": "keep"}, 4),
    "taken of another shape": (
        {"a": header(x=(6, 2), y=(1,)), "b": header(x=(4, 2), y=(1,))},
        {"rules": [{"match": "x", "take": "b"}]},
        3,
    ),
    "missing in the second": ({"a": header(x=(1,), y=(1,)), "b": header(x=(1,))}, {}, 4),
    "missing in the first": ({"a": header(x=(1,)), "b": header(x=(1,), y=(1,))}, {}, 3),
    "missing in both": ({"a": header(x=(1,), y=(1,)), "b": header(x=(1,), z=(1,))}, {}, 3),
    "taken and missing": (
        {"a": header(x=(1,), y=(1,)), "b": header(x=(1,))},
        {"rules": [{"match": "y", "take": "b"}]},
        2,
    ),
    "taken and missing in the layout": (
        {"a": header(x=(1,)), "b": header(x=(1,), y=(1,))},
        {"rules": [{"match": "y", "take": "b"}]},
        2,
    ),
    "of several kinds": ({"a": header(x=(4,), y=(1,)), "b": header(x="I8 4", y=(1,))}, {}, 2),
    "packed": ({"a": header(x="F4 8", y=(1,)), "b": header(x="F4 8", y=(1,))}, {}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_all_advice_does_what_it_says(case):
    models, keys, count = CASES[case]
    assert try_advice(models, keys, failure(models, keys)) == count


def test_no_policy_is_advised_where_no_name_matches():
    models = {
        "a": header("F16", **dict.fromkeys([f"unet__{n}" for n in range(9)], (1,))),
        "b": header("F16", **dict.fromkeys("012345678", (1,))),
    }
    for keys in ({}, {"on_missing": "keep"}, {"on_missing": "drop"}, {"layout": "b"}):
        error = failure(models, keys)
        assert error.what == "nothing is merged: no tensor that could be has the same name in every model"
        assert error.found[0].endswith("4 and 4 more")
        assert "--on-missing" not in error.advice


names = st.sampled_from(["x", "y", "z", "w"])
shape = st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)
some_model = st.dictionaries(names, shape, min_size=1).map(lambda shapes: header("F16", **shapes))
rule = st.fixed_dictionaries({"match": names, "take": st.sampled_from(["a", "b", "c"])})


@given(
    st.lists(some_model, min_size=3, max_size=3),
    st.sampled_from(["error", "keep", "pad", "slice", "overlap"]),
    st.sampled_from(["error", "keep", "drop"]),
    st.sampled_from(["a", "b", "c"]),
    st.lists(rule, max_size=1),
)
def test_advice_for_models_that_fit_badly_does_what_it_says(made, shapes, missing, layout, rules):
    models = dict(zip("abc", made, strict=True))
    models = {layout: models[layout], **models}
    keys = {"on_shape_mismatch": shapes, "on_missing": missing, "layout": layout, "rules": rules}
    error = outcome(models, keys)
    if isinstance(error, PlanError):
        assume("rule" not in error.what)
        try_advice(models, keys, error)


def parts(line: str) -> str:
    """The models that have a tensor and those that don't, whatever their order."""
    name, have, lack = re.split(r"   in |, not in ", line)
    return f"{name}: {sorted(have.split(', '))}, not {sorted(lack.split(', '))}"


@given(st.lists(some_model, min_size=2, max_size=3), st.sampled_from(["error", "keep", "drop"]))
def test_what_not_all_models_have_is_treated_alike_in_every_order(made, missing):
    models = dict(zip("abc", made, strict=False))
    outcomes = []
    for layout in models:
        found = outcome(models, {"on_missing": missing, "on_shape_mismatch": "keep", "layout": layout})
        if isinstance(found, PlanError):
            outcomes.append((found.what, sorted(map(parts, found.found)) if "not in every" in found.what else []))
        else:
            merges = [decision.name for decision in found.decisions if decision.action == "merged"]
            outcomes.append(("merged", sorted(merges)))
    if any("shape" in str(what) for what, _ in outcomes):
        return
    assert all(outcome == outcomes[0] for outcome in outcomes), outcomes


def test_a_nested_recipe_is_named_and_told_where_its_policy_stands(tmp_path):
    paths = [save_model(tmp_path / f"{n}.safetensors", {"x": torch.ones(2 + n), "y": torch.ones(1)}) for n in range(2)]
    inner: dict[str, Any] = {"merge_method": "linear", "models": list(map(str, paths))}
    middle = {"merge_method": "linear", "models": [{"model": inner, "name": "inner"}]}
    outer = {"merge_method": "linear", "models": [{"model": middle, "name": "middle"}], "on_shape_mismatch": "overlap"}
    with pytest.raises(PlanError, match=r"^middle: inner: 1 tensor differs in shape") as error:
        streammerge.make_plan(outer, output=tmp_path / "out.safetensors")
    assert error.value.advice.count("write them in this one, as keys") == 1
    assert "--on-shape-mismatch overlap" in error.value.advice
    inner["on_shape_mismatch"] = "overlap"
    assert streammerge.make_plan(outer, output=tmp_path / "out.safetensors").count("merged") == 2
