"""Random numbers: those of the paper, the same for any range of them, evenly distributed and independent."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.methods.place import Target
from streammerge.methods.random_numbers import Stream, normal_number
from tests.references.sparse import half_words

CPU = torch.device("cpu")
GOLDEN = 0x9E3779B97F4A7C15
"""The step of SplitMix64 where it has one stream."""


def stream(seed: int = 0, name: str = "w", model: int = 0) -> Stream:
    return Target(name, (1,), 2, seed=seed).stream(model)


def uniform(count: int, seed: int = 0, layer: int = 0, model: int = 0) -> torch.Tensor:
    return stream(seed, f"layers.{layer}", model).uniform(0, count, CPU)


def normal(first: int, count: int) -> torch.Tensor:
    return stream().normal(first, count, CPU, torch.float32)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]),
        (
            1234567,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423,
                4593380528125082431,
                16408922859458223821,
            ],
        ),
    ],
)
def test_words_are_those_that_are_published(start, words):
    assert [word % 2**64 for word in Stream(start, GOLDEN).words(0, 5, CPU).tolist()] == words


def test_an_element_has_half_a_word_the_lower_one_first():
    first, second = 6457827717110365317, 3203168211198807973
    halves = [first % 2**32, first >> 32, second % 2**32, second >> 32]
    made = Stream(1234567, GOLDEN).uniform(0, 4, CPU)
    assert made.dtype == torch.float32
    assert made.tolist() == [(half >> 8) / 2**24 for half in halves]


def test_a_tensors_numbers_follow_from_what_names_it():
    drawn = stream(3, "layers.1.w", 2).halves(0, 1001, CPU)
    assert [half % 2**32 for half in drawn.tolist()] == half_words("layers.1.w", 2, 1001, 3).tolist()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 100_000), st.integers(0, 70_000))
def test_any_range_has_the_numbers_of_the_whole(first, count):
    last = first + count
    assert torch.equal(stream().uniform(first, count, CPU), stream().uniform(0, last, CPU)[first:])
    assert torch.equal(normal(first, count), normal(0, last)[first:])


def test_what_lies_far_behind_has_numbers_too():
    far = 2**36 + 1
    drawn = stream().uniform(far, 3, CPU)
    assert torch.equal(drawn[1:], stream().uniform(far + 1, 2, CPU))
    assert len({*drawn.tolist(), *stream().uniform(1, 3, CPU).tolist()}) == 6


def test_steps_are_odd_and_change_many_bits():
    for seed in range(3000):
        step = stream(seed).step
        assert step % 2
        assert (step ^ step >> 1).bit_count() >= 24


# ── distribution ─────────────────────────────────────────────────────────────────────────────────────────────────────

COUNT = 2**20


def deviations(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """By how many standard deviations χ² is off what it should be."""
    freedom = observed.numel() - 1
    return float(((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def off(share: float, probability: float, count: int) -> float:
    """By how many standard deviations a share of so many is off."""
    return abs(share - probability) / math.sqrt(probability * (1 - probability) / count)


@pytest.mark.parametrize("seed", range(4))
def test_uniform_numbers_are_spread_evenly(seed):
    drawn = uniform(COUNT, seed)
    assert 0 <= float(drawn.min()) < 1e-5
    assert 1 - 1e-5 < float(drawn.max()) < 1
    whole = (drawn * 2**24).long()
    for shift in (0, 8, 16):  # each of the three bytes
        counts = torch.bincount(whole >> shift & 255, minlength=256).double()
        assert abs(deviations(counts, torch.full((256,), COUNT / 256, dtype=torch.float64))) < 5


@pytest.mark.parametrize("density", [0.001, 0.1, 0.3, 0.5, 0.75, 0.9, 0.999])
def test_masks_have_the_density_that_was_wanted(density):
    for seed in range(8):
        assert off(float((uniform(COUNT, seed) < density).double().mean()), density, COUNT) < 5


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 63, 64, 1024, 4096])
def test_neighbours_are_independent(distance):
    drawn = uniform(COUNT, 1)
    assert independent(drawn[:-distance], drawn[distance:])


def independent(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether 16 by 16 classes of pairs are equally full, and neither values nor masks correlate."""
    count = one.numel()
    pairs = ((one * 16).long() * 16 + (other * 16).long()).bincount(minlength=256).double()
    even = abs(deviations(pairs, torch.full((256,), count / 256, dtype=torch.float64))) < 5
    correlation = float(((one.double() - 0.5) * (other.double() - 0.5)).mean()) * 12
    both = float(((one < 0.1) & (other < 0.1)).double().mean())
    return even and abs(correlation) * math.sqrt(count) < 5 and off(both, 0.01, count) < 5


KEYS = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 2, 0), (1, 0, 0), (2, 0, 0), (-1, 0, 0), (2**62, 0, 0)]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(KEYS, 2)))
def test_seeds_tensors_and_models_are_independent(one, other):
    assert independent(uniform(2**18, *one), uniform(2**18, *other))


def test_first_numbers_of_many_tensors_are_spread_evenly():
    """Small tensors have few numbers each: those of many are as good as one long sequence."""
    drawn = torch.tensor([stream(0, f"{n}").uniform(0, 1, CPU).item() for n in range(20_000)])
    counts = torch.bincount((drawn * 64).long(), minlength=64).double()
    assert abs(deviations(counts, torch.full((64,), 20_000 / 64, dtype=torch.float64))) < 5
    assert independent(drawn[:-1], drawn[1:])


def test_normal_numbers_are_normally_distributed():
    drawn = normal(0, COUNT).double()
    moments = [float((drawn**power).mean()) for power in range(1, 7)]
    for power, (moment, expected, spread) in enumerate(
        zip(moments, (0, 1, 0, 3, 0, 15), (1, 2, 15, 96, 945, 10170), strict=True), 1
    ):
        assert abs(moment - expected) < 5 * math.sqrt(spread / COUNT), power
    edges = torch.linspace(-4, 4, 81, dtype=torch.float64)
    shares = torch.special.ndtr(edges).diff()
    observed = torch.histogram(drawn, edges)[0]
    assert abs(deviations(observed, shares * COUNT)) < 5


@pytest.mark.parametrize(("half", "expected"), [(-(2**31), -6.338), (2**31 - 1, 6.338), (0, 2.9e-10), (-1, -2.9e-10)])
def test_the_ends_and_the_middle_of_normal_numbers(half, expected):
    assert float(normal_number(torch.tensor([half], dtype=torch.int32))) == pytest.approx(expected, rel=0.01)


def test_normal_numbers_are_the_inverse_of_the_distribution():
    halves = torch.linspace(-(2**31), 2**31 - 1, 100_001, dtype=torch.float64).long().to(torch.int32)
    expected = torch.special.ndtri((halves.double() + 2**31 + 0.5) / 2**32)
    assert float((normal_number(halves) - expected).abs().max()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_long_sequences_are_random(seed):
    """2²⁶ numbers: the bits of each, triples of neighbours, runs of a mask, and how often numbers come again."""
    count = 2**26
    halves = stream(seed, "long").halves(0, count, CPU)
    for bit in range(8, 32):
        assert off(float((halves >> bit & 1).double().mean()), 0.5, count) < 5, bit
    tops = (halves >> 27 & 31).long()
    triples = ((tops[:-2] * 32 + tops[1:-1]) * 32 + tops[2:]).bincount(minlength=2**15).double()
    assert abs(deviations(triples, torch.full((2**15,), count / 2**15, dtype=torch.float64))) < 6
    mask = (halves >> 8 & 0xFFFFFF) < int(0.3 * 2**24)
    changes = float((mask[1:] != mask[:-1]).double().mean())
    assert off(changes, 2 * 0.3 * 0.7, count) < 6
    again = count - halves.unique().numel()
    expected = count - 2**32 * -math.expm1(count * math.log1p(-(2.0**-32)))
    assert abs(again - expected) < 6 * math.sqrt(expected)
