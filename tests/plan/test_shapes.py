"""Shapes that differ are an error with all of them in it, or mended as asked."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.compute.expressions import Combined, Viewed
from streammerge.errors import PlanError
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.headers import Header, header, merged
from tests.plan.fates import CONVOLUTION, fates


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


def test_what_has_no_room_where_models_overlap_is_told():
    models = {"a": header(x=(3, 4), y=(2,)), "b": header(x=(3, 9), y=(2,)), "c": header(x=(2, 4), y=(2,))}
    told = "1 tensor of b is larger than a's (x [3, 9], not [3, 4]), and what is more is left out: --layout b keeps it"
    assert merged(models, on_shape_mismatch="overlap").remarks == (told,)
    assert not merged({"b": models["b"], "a": models["a"]}, on_shape_mismatch="overlap").remarks
    assert not merged({"a": models["a"], "b": models["b"]}, on_shape_mismatch="slice").remarks


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
