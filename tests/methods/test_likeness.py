"""Cosines of columns: their range over the whole model, and what follows from a column's place in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.methods.likeness import LikenessPass, Range, held_by_likeness
from streammerge.methods.place import Target
from streammerge.plan.memory import SURVEY_BYTES
from tests.make.models import MemoryModel, load_model, make_tensors, merge_to, near, normal, save_models
from tests.references.diffusion import column_cosines, trimmed_range

# ── the range ────────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_trimmed(parts: list[np.ndarray]) -> None:
    found = Range.trimmed(lambda: map(torch.from_numpy, parts))
    assert (found.least, found.most) == trimmed_range(np.concatenate(parts))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=400), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_percentiles_are_numpys_midpoints_among_equals(numbers, step):
    values = np.array(numbers) / 7
    assert_trimmed([values[start::step] for start in range(min(step, len(values)))])


@pytest.mark.parametrize("count", [1, 2, 3, 50, 51, 100, 101, 102, 200, 201, 1000, 1001, 12_345])
def test_percentiles_are_numpys_midpoints(count):
    values = np.random.default_rng(count).normal(size=count)
    assert_trimmed([values])
    assert_trimmed([values[: count // 2], values[count // 2 :]])


def test_what_is_no_number_does_not_count():
    values = torch.tensor([math.nan, 0.5, math.nan, 0.25], dtype=torch.float64)
    assert Range.trimmed(lambda: [values]) == Range.trimmed(lambda: [values[[1, 3]]])
    assert Range.trimmed(lambda: [values[:1]]) == Range.trimmed(list) == Range(0.0, 0.0)


def test_places_in_a_range():
    values = torch.tensor([-1.0, 0.0, 1.0, 2.0, math.nan])
    assert Range(0.0, 2.0).place(values)[:4].tolist() == [-0.5, 0.0, 0.5, 1.0]
    assert Range(1.0, 1.0).place(values).tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


# ── the pass ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tensors_are_told_apart_by_their_blocks():
    shapes = [(6, 5), (0, 4), (3, 3, 2), (), (7,)]
    models = [[normal(shape, 10 * m + i) for i, shape in enumerate(shapes)] for m in range(2)]
    parts: list[Target] = []
    blocks: list[list[torch.Tensor]] = []
    for shape, *pair in zip(shapes, *models, strict=True):
        parts.append(Target("", shape, 2, step=8, first_block=len(blocks)))
        flat = [values.reshape(-1) for values in pair]
        blocks += [[values[start : start + 8] for values in flat] for start in range(0, flat[0].numel(), 8)]
    step = LikenessPass(Target("", (0,), 2, step=8, parts=tuple(parts)), dict)
    for number, block in enumerate(blocks):
        step.add(number, step.measure(number, block))
    found = step.finish()
    assert len(found) == 4
    for part, one, other in zip(parts, *models, strict=True):
        if one.numel():
            expected = column_cosines(one.double().numpy(), other.double().numpy())
            np.testing.assert_allclose(found[part.first_block].columns.numpy(), expected, rtol=1e-12)


def test_the_memory_is_that_of_all_columns_and_of_the_widest_tensors_sums():
    parts = (Target("", (10, 6), 2), Target("", (3, 4, 5), 2), Target("", (), 2), Target("", (0, 3), 2))
    assert held_by_likeness(Target("", (0,), 2, parts=parts), {}) == 8 * (6 * 20 + 6 + 20 + 1)
    assert held_by_likeness(Target("", (10, 6), 2), {}) == 8 * 7 * 6


def test_the_plan_counts_it_once(tmp_path):
    tensors = {str(number): normal((2, 3000), number) for number in range(5)}
    paths = save_models(tmp_path, a=tensors, b=near(tensors, 1))
    of_model, of_tensor = (
        streammerge.make_plan(
            streammerge.cosine_a(paths["a"], paths["b"], scope=scope), output=tmp_path / "out.safetensors"
        )
        for scope in ("model", "tensor")
    )
    assert of_model.memory.held_bytes == 8 * 3000 * (6 + 5) + 5 * SURVEY_BYTES
    assert of_tensor.memory.held_bytes == 8 * 3000 * 7
    assert of_model.bytes_before_writing == 2 * 5 * 2 * 3000 * 4
    assert of_tensor.bytes_before_writing == 0


# ── the methods ──────────────────────────────────────────────────────────────────────────────────────────────────────


def columns(*cosines: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices whose columns have these cosines."""
    first = torch.tensor([[1.0, 0.0]] * len(cosines), dtype=torch.float64).T
    second = torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines], dtype=torch.float64).T
    return first, 2.0 * second


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.25])
def test_the_more_alike_columns_are_the_more_of_the_first_is_kept(alpha):
    cosines = np.linspace(-0.5, 0.9, 500)
    first, second = columns(*cosines)
    merged = streammerge.cosine_a(MemoryModel({"w": first}), MemoryModel({"w": second}), alpha=alpha)
    found = merged.read("w", 0, 1000).reshape(2, 500)
    low, high = trimmed_range(cosines)
    alike = (cosines + cosines.sum() / 500) / 2
    share = torch.from_numpy(np.clip((alike - low) / (high - low) - abs(alpha), 0, 1))
    torch.testing.assert_close(found, share * first + (1 - share) * second)


def test_the_length_of_columns_matters_to_cosine_b_alone():
    first, second = columns(*np.linspace(0.1, 0.9, 50))
    longer = second * torch.linspace(1, 9, 50)
    beside = columns(*np.linspace(-0.5, 0.2, 50))  # in a tensor of its own the whole's cosine is on both sides
    shares = {}
    for method in ("cosine_a", "cosine_b"):
        for name, other in (("plain", second), ("longer", longer)):
            models = MemoryModel({"v": beside[0], "w": first}), MemoryModel({"v": beside[1], "w": other})
            found = getattr(streammerge, method)(*models, alpha=0.0).read("w", 0, 100).reshape(2, 50)
            shares[method, name] = 1 - found[1] / other[1]
    torch.testing.assert_close(shares["cosine_a", "plain"], shares["cosine_a", "longer"])
    assert (shares["cosine_b", "plain"] - shares["cosine_b", "longer"]).abs().max() > 1e-3


def test_a_negative_alpha_adds_to_cosine_b():
    a, b = (MemoryModel({"w": normal((20, 30), seed)}) for seed in (1, 2))
    assert torch.equal(streammerge.cosine_b(a, b, alpha=-3.0).read("w", 0, 600), a.read("w", 0, 600))
    assert torch.equal(streammerge.cosine_a(a, b, alpha=-3.0).read("w", 0, 600), b.read("w", 0, 600))


@pytest.mark.parametrize("method", ["cosine_a", "cosine_b"])
def test_where_all_are_equally_alike_it_is_a_weighted_sum(method):
    a, b = (MemoryModel({"w": torch.tensor(values)}) for values in ([1.0, 2.0], [2.0, 2.0]))
    found = getattr(streammerge, method)(a, b, alpha=0.25)
    assert found.read("w", 0, 2).tolist() == [1.25, 2.0]


@pytest.mark.parametrize("method", ["cosine_a", "cosine_b", "cosine_sum"])
def test_twins_stay_as_they_are(method):
    tensors = make_tensors(0, shapes={"w": (9, 11), "bias": (7,), "one": ()})
    a, b = MemoryModel(tensors), MemoryModel(tensors)
    for name, values in tensors.items():
        found = getattr(streammerge, method)(a, b).read(name, 0, values.numel())
        torch.testing.assert_close(found, values.reshape(-1))


def test_what_is_kept_has_no_say_in_the_range(tmp_path):
    tensors = [{"model.w": normal((9, 40), seed), "vae.w": normal((9, 3), 5) * (1 - 2 * seed)} for seed in (0, 1)]
    paths = save_models(tmp_path, a=tensors[0], b=tensors[1])
    recipe = {
        "merge_method": "cosine_a",
        "models": [str(paths["a"]), str(paths["b"])],
        "rules": [{"match": "vae.*", "keep": True}],
    }
    kept = merge_to(tmp_path / "1.safetensors", recipe)
    everything = merge_to(tmp_path / "2.safetensors", {**recipe, "rules": []})
    assert torch.equal(kept["vae.w"], load_model(paths["a"])["vae.w"])
    alone = streammerge.cosine_a(*(MemoryModel({"w": each["model.w"]}) for each in tensors))
    assert torch.equal(kept["model.w"].reshape(-1), alone.read("w", 0, 360))
    assert not torch.equal(kept["model.w"], everything["model.w"])


def test_what_is_infinite_spoils_its_column_alone():
    first, second = normal((8, 40), 1), normal((8, 40), 2)
    first[3, 5] = math.inf
    for method in ("cosine_a", "cosine_b"):
        merged = getattr(streammerge, method)(MemoryModel({"w": first}), MemoryModel({"w": second}))
        found = merged.read("w", 0, 320).reshape(8, 40)
        assert found.isfinite().all(0).tolist() == [column != 5 for column in range(40)]


def test_calc_modes_weigh_the_difference_by_the_cosines_size():
    cosines = np.linspace(-0.9, 0.5, 400)
    first, second = columns(*cosines)
    models = MemoryModel({"w": first}), MemoryModel({"w": second})
    low, high = trimmed_range(np.abs(cosines))
    share = torch.from_numpy(np.clip((np.abs(cosines) - low) / (high - low), 0, 1))
    for settings_, expected in (
        ({}, share),
        ({"inverse": True}, 1 - share),
        ({"mean": True}, share.mean()),
        ({"mean": True, "inverse": True}, 1 - share.mean()),
    ):
        found = streammerge.cosine_sum(*models, alpha=0.5, **settings_).read("w", 0, 800).reshape(2, 400)
        torch.testing.assert_close(found, first + 0.5 * expected * (second - first))
    base = normal((2, 400), 7, torch.float64)
    found = streammerge.cosine_sum(*models, base=MemoryModel({"w": base}), alpha=0.5).read("w", 0, 800)
    torch.testing.assert_close(found.reshape(2, 400), first + 0.5 * share * (second - base))
