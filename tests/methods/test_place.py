"""Random numbers depend on the seed, the tensor, the model and the block, and on nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.compute.expressions import BLOCK
from streammerge.methods.place import Target
from streammerge.plan.decide import merge_models
from streammerge.recipe.parse import parse_recipe
from tests.make.models import assert_same_bytes, load_model, make_tensors, merge_to, near, save_models

TARGET = Target("w", (3, BLOCK), 3, seed=1, step=BLOCK)


def numbers(target: Target = TARGET, block: int = 0, model: int = 0) -> torch.Tensor:
    return target.place(block).uniform(model, torch.empty(100))


def test_a_place_knows_where_it_is():
    place = TARGET.place(2)
    assert (place.start, place.counted, place.tensor.elements) == (2 * BLOCK, 2, 3 * BLOCK)
    assert Target("w", (), 1).elements == 1
    assert Target("w", (8,), 2, step=4, first_block=10).place(1).counted == 11


def test_numbers_come_again():
    assert torch.equal(numbers(), numbers())
    assert torch.equal(numbers(TARGET), numbers(Target("w", (7,), 9, seed=1, step=5)))


def test_every_part_of_the_key_matters():
    drawn = [
        numbers(),
        numbers(block=1),
        numbers(model=1),
        numbers(Target("v", (3, BLOCK), 3, seed=1)),
        numbers(Target("w", (3, BLOCK), 3, seed=2)),
        numbers(Target("w", (3, BLOCK), 3, seed=-1)),
        numbers(Target("w", (3, BLOCK), 3, seed=1, within=(0,))),
        numbers(Target("w", (3, BLOCK), 3, seed=1, within=(1,))),
        numbers(Target("w", (3, BLOCK), 3, seed=1, within=(0, 0))),
        numbers(Target("w", (3, BLOCK), 3, seed=1, within=("base",))),
    ]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


def test_numbers_are_uniform_and_have_the_shape_that_is_wanted():
    drawn = TARGET.place(0).uniform(0, torch.empty(500, 400))
    assert drawn.shape == (500, 400)
    assert drawn.dtype == torch.float32
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    histogram = torch.histc(drawn, 20, 0, 1) / drawn.numel()
    assert float((histogram - 0.05).abs().max()) < 0.003


# ── the seed ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def paths(tmp_path):
    base = make_tensors(0)
    return save_models(tmp_path, base=base, a=near(base, 1), b=near(base, 2))


def recipe(paths, **keys):
    return {
        "merge_method": "dare_linear",
        "base_model": str(paths["base"]),
        "models": [str(paths["a"]), str(paths["b"])],
        "parameters": {"density": 0.5},
        **keys,
    }


def nested_at(raw, *within):
    """The recipe's merge as it is at a place in another recipe, alone."""
    parsed = parse_recipe(raw, Path())
    models = {name: streammerge.open_model(str(entry.source)) for name, entry in parsed.named.items()}
    return merge_models(parsed, models, within)


def test_a_recipes_seed_is_that_of_the_option_and_of_the_function(paths, tmp_path):
    written = merge_to(tmp_path / "key.safetensors", recipe(paths, seed=7))
    assert_same_bytes(merge_to(tmp_path / "option.safetensors", recipe(paths), seed=7), written)
    assert_same_bytes(merge_to(tmp_path / "both.safetensors", recipe(paths, seed=1), seed=7), written)
    merged = streammerge.dare_linear(paths["a"], paths["b"], base=paths["base"], density=0.5, seed=7)
    assert_same_bytes(merge_to(tmp_path / "function.safetensors", merged), written)
    other = merge_to(tmp_path / "other.safetensors", recipe(paths))
    assert not torch.equal(other["layers.1.block"], written["layers.1.block"])
    assert_same_bytes(merge_to(tmp_path / "zero.safetensors", recipe(paths, seed=0)), other)


def test_a_seed_can_not_be_set_for_a_model_that_is_made_already(paths, tmp_path):
    merged = streammerge.dare_linear(paths["a"], base=paths["base"])
    with pytest.raises(TypeError, match="seed can be set for a recipe"):
        streammerge.merge(merged, output=tmp_path / "out.safetensors", seed=7)


@pytest.mark.parametrize("seed", ["x", 1.5, True, [1]])
def test_a_seed_is_a_whole_number(paths, tmp_path, seed):
    with pytest.raises(streammerge.RecipeError, match="recipe: seed must be a whole number, found"):
        parse_recipe(recipe(paths, seed=seed), tmp_path)


def test_the_output_says_with_which_seed_it_was_made(paths, tmp_path):
    merge_to(tmp_path / "out.safetensors", recipe(paths, seed=7))
    with streammerge.open_model(tmp_path / "out.safetensors") as model:
        assert '"seed":7' in model.metadata["streammerge.recipe"]


def test_a_nested_recipe_has_the_seed_of_the_whole_unless_it_has_its_own(paths, tmp_path):
    def nested(**keys):
        return {"merge_method": "linear", "models": [recipe(paths, **keys)]}

    alone = merge_to(tmp_path / "alone.safetensors", nested_at(recipe(paths, seed=7), 0))
    ways: list[tuple[Any, dict[str, int]]] = [
        ({**nested(), "seed": 7}, {}),
        ({**nested(seed=7), "seed": 3}, {}),
        (nested(), {"seed": 7}),
    ]
    for number, (raw, options) in enumerate(ways):
        for name, tensor in merge_to(tmp_path / f"{number}.safetensors", raw, **options).items():
            torch.testing.assert_close(tensor, alone[name])  # in float64, because the outer method is linear


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
@pytest.mark.parametrize("outer", ["linear", "dare_linear", "della", "slerp"])
def test_nested_random_merges_are_those_that_are_written_first(paths, tmp_path, method, outer):
    inner = {**recipe(paths), "merge_method": method, "dtype": "fp32"}
    whole = {
        "merge_method": outer,
        "base_model": str(paths["base"]),
        "models": [{"model": inner, "name": "inner"}, str(paths["b"])],
        "parameters": {"density": 0.5} if outer.startswith("d") else {"t": 0.3} if outer == "slerp" else {},
    }
    if outer in ("linear", "slerp"):
        del whole["base_model"]
    merge_to(tmp_path / "inner.safetensors", nested_at(inner, 0))
    stepwise = {**whole, "models": [{"model": str(tmp_path / "inner.safetensors"), "name": "inner"}, str(paths["b"])]}
    expected = merge_to(tmp_path / "stepwise.safetensors", stepwise)
    for name, tensor in merge_to(tmp_path / "nested.safetensors", whole, threads=3).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=2e-6, msg=f"{method} in {outer}: {name}")


def test_della_drops_what_its_ranks_say(paths):
    """The larger an element in its row, the likelier it stays."""
    base, a = load_model(paths["base"])["layers.1.block"], load_model(paths["a"])["layers.1.block"]
    merged = streammerge.della_linear(paths["a"], base=paths["base"], density=0.5, epsilon=0.4, rescale=False)
    kept = merged.read("layers.1.block", 0, BLOCK) != base
    order = (a - base).abs().argsort()
    shares = kept[order].float().view(16, -1).mean(1)
    expected = torch.linspace(0.1, 0.9, 2 * 16 + 1)[1::2]
    assert float((shares - expected).abs().max()) < 0.02


def inner_masks(paths, tmp_path, outer: dict[str, Any], count: int) -> list[torch.Tensor]:
    """Which elements each of the nested merges of `outer`, alone, leaves as they are in the base."""
    base = load_model(paths["base"])["layers.1.block"]
    masks = []
    for number in range(count):
        models = outer["models"]
        weights = [1.0 if each == number else 0.0 for each in range(len(models))]
        entries = [{**entry, "parameters": {"weight": w}} for entry, w in zip(models, weights, strict=True)]
        made = merge_to(tmp_path / "one.safetensors", {**outer, "models": entries})
        masks.append(made["layers.1.block"] != base)
    return masks


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_the_same_random_merge_at_two_places_draws_twice(paths, tmp_path, method):
    inner = {**recipe(paths), "merge_method": method, "models": [str(paths["a"])]}
    deeper = {"merge_method": "linear", "models": [inner]}
    models = [{"model": inner}, {"model": dict(inner)}, {"model": deeper}]
    outer = {"merge_method": "task_arithmetic", "base_model": str(paths["base"]), "models": models}
    masks = inner_masks(paths, tmp_path, outer, 3)
    again = inner_masks(paths, tmp_path, outer, 3)
    assert all(torch.equal(one, other) for one, other in zip(masks, again, strict=True))
    for one, other in itertools.combinations(masks, 2):
        assert abs(float((one == other).float().mean()) - 0.5) < 0.05  # as of coins; della's lean by rank
