"""Crossovers by frequency and by rank: what is taken from which model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import streammerge
from streammerge.errors import RecipeError
from streammerge.methods.filters import crossing, radial_frequencies
from tests.make.models import MemoryModel, normal


def model(values: torch.Tensor) -> MemoryModel:
    return MemoryModel({"w": values})


def read(merged: object) -> torch.Tensor:
    info = merged.tensors["w"]  # type: ignore[attr-defined]
    found: torch.Tensor = merged.read("w", 0, info.elements)  # type: ignore[attr-defined]
    return found.reshape(info.shape)


def wave(turns: int, count: int = 64) -> torch.Tensor:
    return torch.cos(2 * math.pi * turns * torch.arange(count, dtype=torch.float64) / count)


# ── crossover ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_high_frequencies_are_the_seconds_and_low_ones_the_firsts():
    first, second = 3 * wave(4) + 5 * wave(25), 7 * wave(4) + 11 * wave(25)
    torch.testing.assert_close(read(streammerge.crossover(model(first), model(second))), 3 * wave(4) + 11 * wave(25))
    turned = read(streammerge.crossover(model(first), model(second), tilt=2.0))
    torch.testing.assert_close(turned, 7 * wave(4) + 5 * wave(25))


@pytest.mark.parametrize("shape", [(8,), (9,), (1,), (6, 7), (5, 1), (4, 3, 3, 3), (2, 5, 4)], ids=str)
def test_frequencies_are_shares_of_the_highest(shape):
    spectrum = torch.fft.rfftn(normal(shape, 1))
    found = radial_frequencies(spectrum.shape, torch.zeros((), dtype=torch.float64))
    assert found.shape == spectrum.shape
    axes = [np.abs(np.fft.fftfreq(count)) * count for count in shape]
    axes[-1] = axes[-1][: shape[-1] // 2 + 1]
    grids = np.meshgrid(*(axis / max(axis.max(), 1) for axis in axes), indexing="ij")
    np.testing.assert_allclose(found.numpy(), np.sqrt(sum(grid**2 for grid in grids) / len(shape)), atol=1e-15)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("tilt", [0.0, 1.0, 2.0, 3.0, 4.0])
def test_the_crossing_turns_without_a_jump(alpha, tilt):
    frequencies = torch.linspace(0, 1, 1001, dtype=torch.float64)
    found = [crossing(frequencies.clone(), alpha, turned % 4.0) for turned in (tilt - 1e-5, tilt + 1e-5)]
    assert (found[0] - found[1]).abs().mean() < 1e-3
    if tilt in (0.0, 2.0, 4.0):
        assert (found[0] - crossing(frequencies.clone(), alpha, tilt % 4.0)).abs().mean() < 2e-3
    else:
        torch.testing.assert_close(found[0], torch.full_like(found[0], alpha), rtol=0, atol=1e-3)


def test_at_half_a_turn_the_slope_is_45_degrees():
    frequencies = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = (frequencies - 0.7 + 0.3).clamp(0, 1)
    torch.testing.assert_close(crossing(frequencies.clone(), 0.3, 0.5), expected)


@pytest.mark.parametrize("tilt", [0.0, 0.7, 1.0, 2.0, 3.0])
def test_the_ends_are_the_models(tilt):
    one, other = normal((6, 7), 1), normal((6, 7), 2)
    assert torch.equal(read(streammerge.crossover(model(one), model(other), alpha=0.0, tilt=tilt)), one)
    assert torch.equal(read(streammerge.crossover(model(one), model(other), alpha=1.0, tilt=tilt)), other)
    torch.testing.assert_close(read(streammerge.crossover(model(one), model(one), alpha=0.4, tilt=tilt)), one)


def test_nearly_equal_models_are_crossed_too():
    one = 1 + normal((64,), 1, torch.float64)
    other = one + 1e-9 * wave(30)
    torch.testing.assert_close(read(streammerge.crossover(model(one), model(other))), other, rtol=0, atol=1e-14)


def test_what_is_rounded_away_is_a_part_of_the_difference():
    one = 1000 + normal((50, 60), 1)
    other = one + 1e-2 * normal((50, 60), 2)
    found = read(streammerge.crossover(model(one), model(other), alpha=0.999999))
    assert (found - other).abs().max() < 2e-4  # one unit in the last place of 1000 is 6e-5


def test_single_numbers_are_averaged():
    found = streammerge.crossover(model(torch.tensor(1.0)), model(torch.tensor(3.0)), alpha=0.25)
    assert read(found).item() == 1.5


# ── distribution crossover ───────────────────────────────────────────────────────────────────────────────────────────


def test_frequencies_are_those_of_the_bases_order():
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    base, one, other = torch.empty(64), torch.empty(64).double(), torch.empty(64).double()
    base[order] = torch.arange(64.0)
    one[order], other[order] = 3 * wave(4) + 5 * wave(25), 7 * wave(4) + 11 * wave(25)
    expected = torch.empty(64).double()
    expected[order] = 3 * wave(4) + 11 * wave(25)
    found = streammerge.distribution_crossover(model(one), model(other), base=model(base.double()))
    torch.testing.assert_close(read(found), expected)


def test_equal_elements_of_the_base_are_in_their_own_order():
    one, other = normal((60,), 1, torch.float64), normal((60,), 2, torch.float64)
    merged = [
        read(streammerge.distribution_crossover(model(one), model(other), base=model(base.double())))
        for base in (torch.zeros(60), torch.arange(60.0))
    ]
    assert torch.equal(*merged)


@pytest.mark.parametrize(("alpha", "number"), [(0.0, 1), (1.0, 0)])
def test_its_ends_are_the_models(alpha, number):
    models = [normal((7, 9), seed, torch.float64) for seed in (1, 2)]
    found = streammerge.distribution_crossover(*map(model, models), base=model(normal((7, 9), 3).double()), alpha=alpha)
    torch.testing.assert_close(read(found), models[number])


def test_a_single_number_is_the_first_by_alpha():
    numbers = [torch.tensor(value) for value in (1.0, 3.0, 0.0)]
    found = streammerge.distribution_crossover(*map(model, numbers[:2]), base=model(numbers[2]), alpha=0.75)
    assert read(found).item() == 1.5


def test_a_negative_slope_is_refused():
    with pytest.raises(RecipeError, match=r"beta.*at least 0"):
        streammerge.distribution_crossover(*map(model, [torch.zeros(1)] * 2), base=model(torch.zeros(1)), beta=-1.0)


# ── top k tensor sum ─────────────────────────────────────────────────────────────────────────────────────────────────


def top_k(one: list[float], other: list[float], **parameters: float) -> list[float]:
    found: list[float] = read(
        streammerge.top_k_tensor_sum(*(model(torch.tensor(values)) for values in (one, other)), **parameters)
    ).tolist()
    return found


def test_all_values_of_the_first_in_the_order_of_the_second():
    assert top_k([3.0, -1.0, 2.0, -4.0], [10.0, 30.0, 20.0, 40.0], width=1.0) == [-4.0, 2.0, -1.0, 3.0]
    assert top_k([3.0, -1.0, 2.0, -4.0], [10.0, 30.0, 20.0, 40.0], width=0.0) == [3.0, -1.0, 2.0, -4.0]


def test_only_values_whose_magnitudes_are_in_the_region_go_elsewhere():
    one, other = [3.0, -1.0, 2.0, -4.0], [10.0, 30.0, 20.0, 40.0]
    assert top_k(one, other, width=0.5) == [3.0, 2.0, -1.0, -4.0]
    assert top_k(one, other, width=0.5, offset=0.5) == [-4.0, -1.0, 2.0, 3.0]
    assert top_k(one, other, width=0.5, offset=0.75) == [-4.0, -1.0, -1.0, -4.0]


def test_exactly_so_many_are_in_the_region_and_of_equals_the_first():
    one = [1.0, -1.0, 1.0, -1.0]
    assert top_k(one, [4.0, 3.0, 2.0, 1.0], width=0.25) == [1.0, 1.0, 1.0, -1.0]
    assert top_k([1.0, 1.0, 2.0], [3.0, 2.0, 1.0], width=1 / 3) == [1.0, 1.0, 1.0]
    assert top_k([1.0, 1.0, 2.0], [3.0, 2.0, 1.0], width=1.0) == [2.0, 1.0, 1.0]


def test_single_numbers_and_nan():
    assert top_k([5.0], [7.0], width=1.0) == [5.0]
    found = top_k([math.nan, 1.0, 2.0], [1.0, 2.0, 3.0], width=1.0)
    assert found[:2] == [1.0, 2.0]
    assert math.isnan(found[2])
