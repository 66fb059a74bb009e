"""The diffusion tools' methods by examples: what each is about, zeros, and values that are no numbers."""

from __future__ import annotations

import math

import pytest
import torch

import streammerge
from streammerge.errors import RecipeError
from streammerge.methods import METHODS
from streammerge.methods.placed import Region
from streammerge.tensors import Model
from tests.make.models import SMALL, MemoryModel, Tensors, make_tensors, merge_to, near, normal, save_models
from tests.references.cases import CASES
from tests.references.diffusion import DIFFUSION
from tests.references.linear import Case

METHOD_CASES = [case for case in CASES if case.method in DIFFUSION]


def model(*values: float, dtype: torch.dtype = torch.float64) -> MemoryModel:
    return MemoryModel({"w": torch.tensor(values, dtype=dtype)})


def read(merged: Model) -> list[float]:
    found: list[float] = merged.read("w", 0, merged.tensors["w"].elements).tolist()
    return found


BASE = make_tensors(0, shapes=SMALL)
FAR = [make_tensors(seed, shapes=SMALL) for seed in (1, 2)]
NEAR = [near(BASE, seed) for seed in (1, 2)]

IDENTITIES = {
    "train_difference alpha 0": lambda x, a, b: (streammerge.train_difference(a, b, base=x, alpha=0.0), 1),
    "train_difference of what is there": lambda x, a, b: (streammerge.train_difference(a, a, base=x), 1),
    "train_difference of nothing": lambda x, a, b: (streammerge.train_difference(a, x, base=x), 1),
    "add_opposite of the same": lambda x, a, b: (streammerge.add_opposite(a, a, base=x), 1),
    "add_strict_opposite of the same": lambda x, a, b: (streammerge.add_strict_opposite(a, a, base=x), 1),
    "add_strict_opposite to the base": lambda x, a, b: (streammerge.add_strict_opposite(x, b, base=x), 0),
    "multiply_difference of twins": lambda x, a, b: (streammerge.multiply_difference(a, a, base=x), 1),
    "multiply_difference alpha 0": lambda x, a, b: (
        streammerge.multiply_difference(a, b, base=x, alpha=0.0, beta=0.0),
        1,
    ),
    "euclidean of twins": lambda x, a, b: (streammerge.euclidean_add_difference(a, a, base=x), 1),
    "euclidean alpha 1": lambda x, a, b: (streammerge.euclidean_add_difference(a, b, base=x, alpha=1.0), 2),
    "euclidean of the base": lambda x, a, b: (streammerge.euclidean_add_difference(x, x, base=x), 0),
    "similarity alpha 0": lambda x, a, b: (streammerge.similarity_add_difference(a, b, base=x, alpha=0.0), 1),
    "similarity of twins": lambda x, a, b: (streammerge.similarity_add_difference(a, a, base=x, beta=1.0), 1),
    "geometric_sum alpha 0": lambda x, a, b: (streammerge.geometric_sum(a, b, alpha=0.0), 1),
    "geometric_sum alpha 1": lambda x, a, b: (streammerge.geometric_sum(a, b, alpha=1.0), 2),
    "geometric_sum of twins": lambda x, a, b: (streammerge.geometric_sum(a, a, alpha=0.3), 1),
    "multiply_quotient alpha 0": lambda x, a, b: (streammerge.multiply_quotient(a, b, base=x, alpha=0.0), 1),
    "multiply_quotient of twins": lambda x, a, b: (streammerge.multiply_quotient(a, a, base=x), 1),
    "max of one": lambda x, a, b: (streammerge.max(b), 2),
    "max of twins": lambda x, a, b: (streammerge.max(a, a, a), 1),
    "clamp to itself": lambda x, a, b: (streammerge.clamp(a, b), 2),
    "clamp within": lambda x, a, b: (streammerge.clamp(a, a, b), 1),
    "clamp to one of equals, stiffly": lambda x, a, b: (streammerge.clamp(a, b, b, b, stiffness=1.0), 2),
    "tensor_sum of nothing": lambda x, a, b: (streammerge.tensor_sum(a, b, width=0.0), 1),
    "tensor_sum of everything": lambda x, a, b: (streammerge.tensor_sum(a, b, width=1.0, offset=0.4, axis=1), 2),
    "plus nothing at random": lambda x, a, b: (streammerge.plus_random(a, alpha=0.0), 1),
    "adjust nothing": lambda x, a, b: (streammerge.adjust(a), 1),
    "extract from the base": lambda x, a, b: (streammerge.extract(x, x, base=x), 0),
    "extract what is shared by twins": lambda x, a, b: (streammerge.extract(a, a, base=x, beta=0.0, gamma=0.0), 1),
    "add_cosine_a of twins": lambda x, a, b: (streammerge.add_cosine_a(a, a, alpha=0.0), 1),
    "add_cosine_a of different columns": lambda x, a, b: (streammerge.add_cosine_a(a, b, alpha=1.0), 2),
    "add_cosine_b of different columns": lambda x, a, b: (streammerge.add_cosine_b(a, b, alpha=1.0), 2),
}


@pytest.mark.parametrize("distance", ["near", "far"])
@pytest.mark.parametrize("identity", IDENTITIES)
def test_identities(identity, distance):
    tensors = [BASE, *(NEAR if distance == "near" else FAR)]
    merged, number = IDENTITIES[identity](*(MemoryModel(each) for each in tensors))
    for name, expected in tensors[number].items():
        actual = merged.read(name, 0, expected.numel()).reshape(expected.shape)
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("case", METHOD_CASES, ids=str)
@pytest.mark.parametrize("zeros", [(0,), (1,), (2,), (0, 1, 2, 3)], ids=str)
def test_zeros_have_a_result(case, zeros):
    tensors: list[Tensors] = [dict(each) for each in (BASE, *NEAR, near(BASE, 3))]
    for number in zeros:
        tensors[number] = {name: torch.zeros_like(values) for name, values in tensors[number].items()}
    merged = case.merge([MemoryModel(each) for each in tensors])
    for name, expected in case.expected(tensors).items():
        values = merged.read(name, 0, merged.tensors[name].elements)
        assert torch.isfinite(values).all(), name
        torch.testing.assert_close(values, torch.from_numpy(expected.reshape(-1).copy()).float(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", METHOD_CASES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_numbers_at_the_edge_of_float32_have_a_result(case, size):
    tensors = [{"w": normal((4, 8), seed) * size} for seed in range(4)]
    merged = case.merge([MemoryModel(each) for each in tensors])
    expected = torch.from_numpy(case.expected(tensors)["w"].reshape(-1).copy())
    torch.testing.assert_close(merged.read("w", 0, 32).double(), expected, rtol=1e-4, atol=1e-5 * size)


# ── by example ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_train_difference_adds_what_is_missing():
    found = streammerge.train_difference(model(0.0, 1.0, -1.0), model(1.0, 1.0, 1.0), base=model(0.0, 0.0, 0.0))
    assert read(found) == pytest.approx([1.8 * 0.5, 1.0, -1.0 + 1.8 * 2 / 3])


def test_opposites_are_added_where_signs_differ():
    base, a, b = model(0.0, 0.0, 0.0), model(2.0, -1.0, -2.0), model(1.0, 1.0, 1.0)
    assert read(streammerge.add_strict_opposite(a, b, base=base)) == pytest.approx([2.0, 1.0, -2.0 + 2 * 0.5])
    assert read(streammerge.add_opposite(a, b, base=base)) == pytest.approx([2 + 2 / 4, -1 + 2 * 1, -2 + 2 * 3 / 4])


def test_multiply_difference_is_the_geometric_mean_of_task_vectors():
    found = streammerge.multiply_difference(model(5.0, -3.0, 2.0), model(10.0, 10.0, 1.0), base=model(1.0, 1.0, 1.0))
    assert read(found) == pytest.approx([1 + 6, 1 + 6, 1.0])


def test_euclidean_difference_has_the_length_of_the_weighted_sum():
    base, a, b = (normal((60,), seed, torch.float64) for seed in (1, 2, 3))
    merged = streammerge.euclidean_add_difference(
        *(MemoryModel({"w": each}) for each in (a, b)), base=MemoryModel({"w": base}), alpha=0.3
    )
    moved = merged.read("w", 0, 60) - base
    along = 0.7 * (a - base) + 0.3 * (b - base)
    assert float(moved.norm()) == pytest.approx(float(along.norm()))
    assert torch.equal(moved.sign(), along.sign())


def test_similar_elements_are_averaged_and_opposite_ones_added():
    base, a, b = model(1.0, 1.0), model(2.0, 2.0), model(2.0, -2.0)
    assert read(streammerge.similarity_add_difference(a, b, base=base)) == pytest.approx([2.0, 2 - 3])


def test_geometric_sum_knows_signs():
    found = streammerge.geometric_sum(model(4.0, -4.0, 4.0, -4.0, 0.0), model(9.0, -9.0, -9.0, 9.0, 3.0))
    assert read(found) == pytest.approx([6.0, -6.0, 0.0, 0.0, 0.0])
    quarter = streammerge.geometric_sum(model(-16.0, 16.0), model(1.0, -1.0), alpha=0.25)
    assert read(quarter) == pytest.approx([8 * math.cos(0.75 * math.pi), 8 * math.cos(0.25 * math.pi)])


def test_multiply_quotient_multiplies_what_moved_the_other_way():
    base, a, b = model(1.0, 1.0, 1.0, 0.0), model(0.5, 2.0, 0.5, 3.0), model(2.0, 2.0, 4.0, 1.0)
    found = read(streammerge.multiply_quotient(a, b, base=base))
    assert found == pytest.approx([1.0, 2.0, 0.5 * 4**0.5, 3.0])


def test_multiply_quotient_of_another_sign_turns():
    found = read(streammerge.multiply_quotient(model(0.5), model(-2.0), base=model(1.0), alpha=0.5))
    assert found == pytest.approx([0.5 * 2**0.5 * math.cos(math.pi / 2)], abs=1e-12)


def test_the_greatest_is_not_that_of_the_greatest_magnitude():
    assert read(streammerge.max(model(-5.0, 1.0), model(-1.0, 3.0), model(-2.0, 2.0))) == [-1.0, 3.0]


def test_clamp_keeps_within_the_bounds_of_all_others():
    bounds = [model(0.0, 0.0, 0.0), model(1.0, 1.0, 1.0), model(4.0, 4.0, 4.0)]
    assert read(streammerge.clamp(model(-2.0, 2.0, 9.0), *bounds)) == [0.0, 2.0, 4.0]
    assert read(streammerge.clamp(model(-2.0, 2.0, 9.0), *bounds, stiffness=1.0)) == [1.0, 2.0, 4.0]
    assert read(streammerge.clamp(model(-2.0, 0.7, 9.0), *bounds, stiffness=0.5)) == [0.5, 0.7, 4.0]


def test_clamp_keeps_a_merge_within_its_models():
    a, b, base = model(1.0, 5.0), model(2.0, 4.0), model(0.0, 9.0)
    merged = streammerge.clamp(streammerge.add_difference(a, b, base=base), a, b)
    assert read(merged) == [2.0, 4.0]


# ── regions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def grid(offset: float) -> MemoryModel:
    return MemoryModel({"w": torch.arange(12.0).reshape(4, 3) + offset})


@pytest.mark.parametrize(
    ("width", "offset", "rows"),
    [
        (0.5, 0.0, {0, 1}),
        (0.5, 0.25, {1, 2}),
        (0.5, 0.75, {3, 0}),
        (-0.5, 0.5, {0, 1}),
        (-0.5, 0.25, {0, 3}),
        (0.25, -0.25, {3}),
        (3.0, 0.0, {0, 1, 2, 3}),
        (0.1, 0.0, set()),
    ],
)
def test_tensor_sum_takes_rows(width, offset, rows):
    found = read(streammerge.tensor_sum(grid(0), grid(100), width=width, offset=offset))
    assert {i // 3 for i, value in enumerate(found) if value >= 100} == rows
    assert sum(value >= 100 for value in found) == 3 * len(rows)


def test_tensor_sum_takes_columns():
    found = read(streammerge.tensor_sum(grid(0), grid(100), width=1 / 3, offset=1 / 3, axis=1))
    assert {i % 3 for i, value in enumerate(found) if value >= 100} == {1}
    assert sum(value >= 100 for value in found) == 4


@pytest.mark.parametrize(("width", "value"), [(0.5, 1.0), (0.51, 2.0)])
def test_tensor_sum_of_single_numbers(width, value):
    one, other = (MemoryModel({"w": torch.tensor(each)}) for each in (1.0, 2.0))
    assert read(streammerge.tensor_sum(one, other, width=width)) == [value]


def test_a_region_around_the_end_is_all_but_the_rest():
    assert Region.of(0.5, 0.75, 8) == Region(2, 6, inverted=True)
    assert Region.of(0.5, 0.5, 8) == Region(4, 8, inverted=False)


def test_other_axes_are_refused():
    with pytest.raises(RecipeError, match="whole number between 0 and 1, found 2"):
        streammerge.tensor_sum(grid(0), grid(1), axis=2)


# ── random numbers, names ────────────────────────────────────────────────────────────────────────────────────────────


def test_random_numbers_are_normal_and_follow_from_the_seed():
    zeros = MemoryModel({"w": torch.zeros(20_000), "v": torch.zeros(20_000)})
    noise = streammerge.plus_random(zeros, alpha=2.0, seed=1).read("w", 0, 20_000)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.06)
    assert float(noise.std()) == pytest.approx(2.0, rel=0.03)
    again = streammerge.plus_random(zeros, alpha=2.0, seed=1)
    assert torch.equal(again.read("w", 0, 20_000), noise)
    assert torch.equal(again.read("w", 300, 500), noise[300:500])
    assert not torch.equal(again.read("v", 0, 20_000), noise)
    assert not torch.equal(streammerge.plus_random(zeros, alpha=2.0, seed=2).read("w", 0, 20_000), noise)


def test_names_may_be_left_out_of_the_noise(tmp_path):
    names = ("block.to_out.weight", "block.to_q.weight")
    path = save_models(tmp_path, a={name: torch.zeros(50) for name in names})["a"]
    recipe = {
        "merge_method": "plus_random",
        "models": [str(path)],
        "parameters": {"alpha": [{"filter": "to_out", "value": 0.0}, {"value": 1.0}]},
    }
    merged = merge_to(tmp_path / "out.safetensors", recipe)
    assert not merged[names[0]].any()
    assert merged[names[1]].all()


def unet(prefix: str) -> Tensors:
    return {
        f"{prefix}input_blocks.0.0.weight": torch.ones(2, 4, 3, 3),
        f"{prefix}input_blocks.0.0.bias": torch.ones(2),
        f"{prefix}out.0.weight": torch.ones(3),
        f"{prefix}out.0.bias": torch.ones(3),
        f"{prefix}out.2.weight": torch.ones(4, 2, 3, 3),
        f"{prefix}out.2.bias": torch.zeros(4),
        f"{prefix}input_blocks.1.0.to_out.0.weight": torch.ones(3),
    }


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_adjust_changes_six_tensors(prefix):
    values = {"detail": 1.0, "detail2": 2.0, "detail3": 3.0, "contrast": 4.0, "brightness": 5.0}
    colors = {"color1": 6.0, "color2": 7.0, "color3": 8.0}
    merged = streammerge.adjust(MemoryModel(unet(prefix)), **values, **colors)
    found = [merged.read(name, 0, 1).item() for name in merged.tensors]
    assert found == pytest.approx([0.99, 1.02, 0.98, 1.04, 0.97, 0.08, 1.0])
    shifts = merged.read(f"{prefix}out.2.bias", 0, 4).tolist()
    assert shifts == pytest.approx([0.02 * x for x in (4, -5 + 6 + 8, 5 / 3 + 6 - 7, 10 / 3 - 7 + 8)])


def test_adjust_knows_the_channels_of_xl():
    merged = streammerge.adjust(MemoryModel(unet("")), brightness=1.0, color2=2.0, latents="xl")
    assert merged.read("out.2.bias", 0, 4).tolist() == pytest.approx([0.0, -0.04, -0.04, 0.02])


def test_adjust_leaves_other_last_convolutions_alone():
    five = MemoryModel({"out.2.bias": torch.ones(5)})
    assert streammerge.adjust(five, contrast=3.0).read("out.2.bias", 0, 5).tolist() == [1.0] * 5


# ── cosines ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_extract_takes_what_rows_share_or_do_not():
    def rows(*values: list[float]) -> MemoryModel:
        return MemoryModel({"w": torch.tensor(values, dtype=torch.float64)})

    base, a = rows([0.0, 0.0], [0.0, 0.0]), rows([1.0, 0.0], [1.0, 0.0])
    b = rows([1.0, 0.0], [-1.0, 0.0])
    shared = streammerge.extract(a, b, base=base, alpha=0.0, beta=0.0, gamma=1.0)
    assert read(shared) == [1.0, 0.0, 0.0, 0.0]
    other = streammerge.extract(a, b, base=base, alpha=0.0, beta=1.0, gamma=1.0)
    assert read(other) == [0.0, 0.0, 1.0, 0.0]


def test_columns_that_differ_are_taken_from_the_second():
    first = MemoryModel({"w": torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)})
    second = MemoryModel({"w": torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)})
    assert read(streammerge.add_cosine_a(first, second, alpha=0.0)) == [1.0, 0.0, 0.0, 2.0]
    whole = 2 / (math.sqrt(2) * math.sqrt(8))
    shares = [1 - (1 + whole) / 2, 1 - whole / 2]
    found = read(streammerge.add_cosine_b(first, second, alpha=0.0))
    assert found == pytest.approx([1 + shares[0], 1 - shares[1], 0.0, 2 * shares[1]])


def test_every_method_of_the_family_is_tried():
    assert {case.method for case in METHOD_CASES} == set(DIFFUSION)
    assert all(isinstance(case, Case) and METHODS[case.method].kind in ("block", "whole") for case in METHOD_CASES)
