"""Tensors of unequal shapes: which policies allow what, and what every kind of method makes of what they overlap in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streammerge
from streammerge.compute import costs
from streammerge.compute import evaluate as compute
from streammerge.compute.expressions import BLOCK
from streammerge.errors import PlanError
from streammerge.methods import METHODS
from streammerge.models.shapes import common_shape, fit
from tests.make.headers import header, merged
from tests.make.models import Tensors, assert_same_bytes, load_model, merge_to, normal, raw_bytes, save_model
from tests.references.cases import ONE_CASE_EACH
from tests.references.linear import Case

CASES = {case.method: case for case in ONE_CASE_EACH}
ONE_OF_A_KIND = ("linear", "slerp", "nuslerp", "ties", "della", "smooth_add", "cosine_a", "truncate_rank", "knots")

Shapes = dict[str, list[tuple[int, ...]]]

ORDERS = {"largest first": (0, 1, 2, 3), "smallest first": (3, 2, 1, 0), "no order": (2, 0, 3, 1)}
"""How much of a tensor the models have whose shapes are to be unequal; the base is the last one of them."""

SHAPES: Shapes = {
    "layers.0.embed": [(12, 6), (11, 6), (9, 6), (8, 6)],
    "layers.0.conv": [(4, 9, 3, 3), (4, 8, 3, 3), (4, 5, 3, 3), (4, 4, 3, 3)],
    "layers.1.both": [(7, 5), (5, 7), (6, 6), (5, 5)],
    "layers.1.bias": [(9,), (8,), (7,), (6,)],
    "layers.2.equal": [(5, 4)] * 4,
}
"""The shapes of four models; what all have is what the last one has."""


def models_of(shapes: Shapes, order: tuple[int, ...], dtype: torch.dtype) -> list[Tensors]:
    return [
        {name: normal(sizes[place], 31 * place + number, dtype) for number, (name, sizes) in enumerate(shapes.items())}
        for place in order
    ]


def corner(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(map(slice, shape))].clone()


def overlaps(models: list[Tensors]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(map(min, zip(*(model[name].shape for model in models), strict=True))) for name in models[0]}


def check_overlap(tmp_path: Any, case: Case, models: list[Tensors], layout: int, **options: Any) -> None:
    """What lies inside is what the models cut to the overlap give, and the rest the layout's."""
    used = models[: case.models + 1] if case.base else models[1 : case.models + 1]
    boxes = overlaps(used)
    cut = [{name: corner(tensor, boxes[name]) for name, tensor in model.items()} for model in used]
    cut = cut if case.base else [models[0], *cut]
    both = []
    for kind, tensors in (("whole", models), ("cut", cut)):
        paths = [save_model(tmp_path / f"{kind}{number}.safetensors", model) for number, model in enumerate(tensors)]
        merge = case.merge(paths, layout=layout, on_shape_mismatch="overlap")
        both.append(merge_to(tmp_path / f"{kind}.safetensors", merge, **options))
    made, inside = both
    around = models[1 + layout]
    assert {name: tensor.shape for name, tensor in made.items()} == {n: tensor.shape for n, tensor in around.items()}
    assert_same_bytes({name: corner(tensor, boxes[name]) for name, tensor in made.items()}, inside)
    for name, tensor in made.items():
        outside = torch.ones(tensor.shape, dtype=torch.bool)
        outside[tuple(map(slice, boxes[name]))] = False
        assert raw_bytes(tensor[outside]) == raw_bytes(around[name][outside])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_what_all_models_have_and_leaves_the_rest(tmp_path, method):
    check_overlap(tmp_path, CASES[method], models_of(SHAPES, (1, 0, 2, 3), torch.float16), 0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ONE_OF_A_KIND)
def test_the_order_of_the_models_decides_only_whose_rest_is_left(tmp_path, method, order):
    models = models_of(SHAPES, ORDERS[order], torch.bfloat16)
    for layout in range(CASES[method].models):
        check_overlap(tmp_path, CASES[method], models, layout)


@pytest.mark.parametrize("method", ONE_OF_A_KIND)
def test_overlaps_of_many_blocks_are_streamed(tmp_path, monkeypatch, method):
    for module in (compute, costs):
        monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(costs, "PIECE", 32)
    shapes: Shapes = {"w": [(41, 23), (37, 29), (40, 19), (33, 31)], "x": [(150,), (140,), (130,), (129,)]}
    check_overlap(tmp_path, CASES[method], models_of(shapes, (0, 1, 2, 3), torch.float32), 0, threads=3)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_an_overlap_of_more_than_a_block_is_right(tmp_path, method):
    shapes: Shapes = {"w": [(700, 513), (701, 512), (650, 514), (600, 520)]}
    assert BLOCK < 600 * 512
    check_overlap(tmp_path, CASES[method], models_of(shapes, (0, 1, 2, 3), torch.float16), 0)


def test_the_inpainting_models_other_channels_stay(tmp_path):
    """A + (B − C) with a convolution of 9 channels in A and 4 in B and C, and the same of a weighted sum."""
    a, b, c = (normal((6, channels, 3, 3), seed) for seed, channels in enumerate((9, 4, 4)))
    paths = [save_model(tmp_path / f"{n}.safetensors", {"w": x, "y": torch.ones(2)}) for n, x in enumerate((a, b, c))]
    merge = streammerge.add_difference(paths[0], paths[1], base=paths[2], on_shape_mismatch="overlap")
    made = merge_to(tmp_path / "out.safetensors", merge)["w"]
    assert torch.allclose(made[:, :4], a[:, :4] + (b - c), rtol=0, atol=1e-6)
    assert torch.equal(made[:, 4:], a[:, 4:])
    half = merge_to(tmp_path / "out.safetensors", streammerge.linear(*paths[:2], on_shape_mismatch="overlap"))["w"]
    assert torch.allclose(half[:, :4], (a[:, :4] + b) / 2, rtol=0, atol=1e-6)
    assert torch.equal(half[:, 4:], a[:, 4:])
    padded = merge_to(tmp_path / "out.safetensors", streammerge.linear(*paths[:2], on_shape_mismatch="pad"))["w"]
    assert torch.equal(padded[:, 4:], a[:, 4:] / 2)


@pytest.mark.parametrize("layout", [0, 1])
def test_quantised_tensors_are_decoded_where_they_overlap(tmp_path, layout):
    codes = torch.randint(-8, 8, (6, 4)).float()
    small = torch.randint(-8, 8, (5, 4)).float()
    coded = {"x.weight": codes.to(torch.float8_e4m3fn), "x.scale_weight": torch.tensor(0.25)}
    paths = [
        save_model(tmp_path / "coded.safetensors", coded),
        save_model(tmp_path / "plain.safetensors", {"x.weight": small.half()}),
    ]
    merge = streammerge.linear(*paths, layout=layout, on_shape_mismatch="overlap", dtype="fp32")
    made = merge_to(tmp_path / "out.safetensors", merge)["x.weight"]
    assert torch.equal(made[:5], (codes[:5] / 4 + small) / 2)
    assert torch.equal(made[5:], codes[5:] / 4 if layout == 0 else made[5:])
    assert len(made) == (6, 5)[layout]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "keep"])
def test_what_is_taken_is_put_into_the_layouts(tmp_path, dtype):
    a, b = normal((6, 4), 1, torch.float16), normal((5, 3), 2, torch.float16)
    paths = [save_model(tmp_path / f"{n}.safetensors", {"x": x, "y": torch.ones(2)}) for n, x in enumerate((a, b))]
    rules = [streammerge.recipe.recipe.Rule(("x",), "take", "1")]
    merge = streammerge.linear(*paths, on_shape_mismatch="overlap", rules=rules, dtype=dtype)
    made = merge_to(tmp_path / "out.safetensors", merge)["x"]
    expected = a.clone()
    expected[:5, :3] = b
    assert torch.equal(made, expected.to(made.dtype))
    assert made.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "keep": torch.float16}[dtype]


def test_integers_and_numbers_are_not_put_together():
    models = {"a": header(x=(6,), y=(1,)), "b": header(x="I64 5", y=(1,)), "c": header(x="I64 6", y=(1,))}
    rules = [{"match": "x", "take": "b"}]
    for policy in ("error", "overlap"):
        with pytest.raises(PlanError, match="1 tensor differs in shape") as error:
            merged(models, on_shape_mismatch=policy, rules=rules)
        assert "overlap" not in error.value.advice
    made = merged(models, layout="c", on_shape_mismatch="overlap", rules=rules)
    assert [str(info) for info in made.tensors.values()] == ["I64 [6]", "F16 [1]"]


# ── which policy allows what ─────────────────────────────────────────────────────────────────────────────────────────

sizes = st.integers(0, 4)
shapes = st.lists(sizes, max_size=3).map(tuple)


@given(st.lists(shapes, min_size=1, max_size=3), shapes, st.sampled_from(["error", "keep", "pad", "slice", "overlap"]))
def test_the_common_shape_is_the_layouts_or_what_all_have(models, layout, policy):
    found = common_shape(models, layout, policy)
    if all(shape == layout for shape in models):
        assert found == layout
    elif found is None:
        ranks = {len(shape) for shape in (*models, layout)}
        smaller = any(a < b for shape in models for a, b in zip(shape, layout, strict=False))
        larger = any(a > b for shape in models for a, b in zip(shape, layout, strict=False))
        empty = any(0 in shape for shape in (*models, layout))
        refused = {"pad": larger, "slice": smaller, "overlap": empty}
        assert len(ranks) > 1 or refused.get(policy, True)
    else:
        assert policy in ("pad", "slice", "overlap")
        assert found == (layout if policy != "overlap" else tuple(map(min, layout, *models)))


def test_what_fits_stays_as_it_is():
    node = header(x=(2, 3)).node("x")
    for policy in ("error", "keep", "pad", "slice", "overlap"):
        fitting = fit({"a": node}, node.info, policy)
        assert fitting is not None
        assert fitting.nodes == {"a": node}
        assert fitting.why == ""
    other = header(x=(3, 3)).tensors["x"]
    assert fit({"a": node}, other, "error") is None
    assert fit({"a": node}, other, "keep") is None


@pytest.mark.parametrize(
    ("policy", "layout", "why"),
    [
        ("pad", (4, 3), "linear, b and c padded with zeros"),
        ("slice", (1, 3), "linear, b and c cut"),
        ("overlap", (1, 3), "linear, b and c cut"),
        ("overlap", (4, 2), "linear, where they overlap: [2, 2] of [4, 2]"),
    ],
)
def test_the_reason_says_what_was_done_to_whose(policy, layout, why):
    made = merged({"a": header(x=layout), "b": header(x=(2, 3)), "c": header(x=(2, 3))}, on_shape_mismatch=policy)
    assert [decision.why for decision in made.decisions] == [why]


def test_an_overlap_reaches_the_files_through_a_nested_merge(tmp_path):
    a, b = normal((6, 4), 1), normal((5, 4), 2)
    paths = [save_model(tmp_path / f"{n}.safetensors", {"x": x, "y": torch.ones(2)}) for n, x in enumerate((a, b))]
    inner = streammerge.linear(*paths, on_shape_mismatch="overlap")
    outer = streammerge.scale(inner, alpha=2.0)
    streammerge.merge(outer, output=tmp_path / "out.safetensors", sync=False)
    made = load_model(tmp_path / "out.safetensors")["x"]
    assert torch.allclose(made[:5], a[:5] + b, rtol=0, atol=1e-6)
    assert torch.equal(made[5:], 2 * a[5:])
