"""Order statistics by radix histograms give what sorting gives, ties and signs included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.methods.statistics import brackets
from streammerge.methods.statistics.brackets import Gathering, Sample
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.ranking import begin_ranking
from streammerge.methods.statistics.ranks import Cut, Ranking, keys

STEP = 16
"""Elements per block in these tests."""


def settle(step: Any, vectors: Sequence[torch.Tensor], order: Sequence[int] | None = None) -> Any:
    """Carry out all passes over the vectors."""
    count = -(-vectors[0].numel() // STEP)
    while isinstance(step, Pass):
        for block in order or range(count):
            part = [vector[block * STEP : (block + 1) * STEP][: getattr(step, "part", STEP)] for vector in vectors]
            step.add(block, step.measure(block, part))
        step = step.finish()
    return step


def mask_of(cut: Cut, vector: torch.Tensor) -> torch.Tensor:
    """Which elements are in the cut."""
    parts = [cut.mask(vector[start : start + STEP], start // STEP) for start in range(0, vector.numel(), STEP)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.bool)


def rank(vectors: Sequence[torch.Tensor], ranks: Any, **options: Any) -> Any:
    return settle(
        begin_ranking(Ranking(vectors[0].numel(), ranks, lambda _, inputs: inputs, **options), len(vectors)), vectors
    )


def largest(vector: torch.Tensor, k: int, *, signed: bool) -> np.ndarray:
    """Which are the k largest by a stable sort."""
    values = vector.float().numpy() if signed else np.abs(vector.float().numpy())
    mask = np.zeros(values.size, dtype=bool)
    mask[np.argsort(-values, kind="stable")[:k]] = True
    return mask


VALUES = st.lists(
    st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40])),
    min_size=1,
    max_size=70,
)


@pytest.mark.parametrize("signed", [True, False])
@settings(deadline=None)
@given(data=st.data(), values=VALUES)
def test_the_k_largest_are_those_of_a_stable_sort(data, values, signed):
    vector = torch.tensor(values)
    ranks = data.draw(st.lists(st.integers(0, len(values)), min_size=1, max_size=3))
    (cuts,) = rank([vector], [ranks], signed=signed)
    for k, cut in zip(ranks, cuts, strict=True):
        assert mask_of(cut, vector).tolist() == largest(vector, k, signed=signed).tolist()


@pytest.mark.parametrize("signed", [True, False])
@settings(deadline=None)
@given(data=st.data(), values=VALUES)
def test_the_value_of_a_rank_is_that_of_a_sort(data, values, signed):
    vector = torch.tensor(values)
    k = data.draw(st.integers(1, len(values)))
    ((cut,),) = rank([vector], [[k]], signed=signed, exact=False)
    ordered = np.sort(values if signed else np.abs(values))[::-1]
    assert cut.value == np.float32(ordered[k - 1])
    assert mask_of(cut, vector).sum() >= k  # those that equal it are in it too


def test_several_vectors_are_ranked_together():
    vectors = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    ranks = [[1, 999], [500], []]
    for cuts, wanted, vector in zip(rank(vectors, ranks), ranks, vectors, strict=True):
        assert [mask_of(cut, vector).sum() for cut in cuts] == wanted


def test_blocks_may_come_in_any_order():
    vector = torch.randint(-3, 4, (200,), generator=torch.Generator().manual_seed(0)).float()
    ranking = Ranking(200, [[77]], lambda _, inputs: inputs)
    ((cut,),) = settle(begin_ranking(ranking, 1), [vector], order=list(reversed(range(13))))
    assert mask_of(cut, vector).tolist() == largest(vector, 77, signed=False).tolist()


def test_ranks_may_depend_on_what_is_not_zero():
    vector = torch.tensor([0.0, 3.0, 0.0, 1.0, 2.0, 0.0, 5.0])
    seen: list[int] = []

    def ranks(nonzero: Sequence[int]) -> list[list[int]]:
        seen.extend(nonzero)
        return [[nonzero[0] // 2]]

    ((cut,),) = rank([vector], ranks)
    assert seen[-1] == 4
    assert mask_of(cut, vector).nonzero().flatten().tolist() == [1, 6]


SHARES = [0.0, 0.001, 0.1, 0.5, 0.9, 0.999]


@pytest.mark.parametrize("way", [{}, {"SMALL": 4, "SAMPLE": 4, "LEAST": 2}, {"SMALL": 4, "ROOM": 1}])
@settings(deadline=None)
@given(values=VALUES, share=st.sampled_from(SHARES), zeros=st.sampled_from([0, 5, 300]))
def test_a_share_of_what_is_not_zero_is_that_of_a_stable_sort(way, values, share, zeros):
    vector = torch.tensor([0.0] * zeros + values)
    k = int(share * int(vector.count_nonzero()))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in way.items():
            patch.setattr(brackets, name, value)
        ((cut,),) = rank([vector], lambda nonzero: [[int(share * nonzero[0])]])
    assert mask_of(cut, vector).tolist() == largest(vector, k, signed=False).tolist()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.9999, 1.0])
def test_a_share_of_many_is_bracketed(share, zeros):
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(2**17 + 5, generator=generator) * (torch.rand(2**17 + 5, generator=generator) >= zeros)
    k, seen = int(share * int(vector.count_nonzero())), []
    step: Any = begin_ranking(
        Ranking(len(vector), lambda nonzero: [[int(share * nonzero[0])]], lambda _, inputs: inputs), 1
    )
    while isinstance(step, Pass):
        seen.append(type(step))
        for block, start in enumerate(range(0, len(vector), 2**15)):
            if step.wants(block):
                step.add(block, step.measure(block, [vector[start : start + (step.part or 2**15)][: 2**15]]))
        step = step.finish()
    ((cut,),) = step
    parts = [cut.mask(vector[start : start + 2**15], start // 2**15) for start in range(0, len(vector), 2**15)]
    assert torch.cat(parts).tolist() == largest(vector, k, signed=False).tolist()
    if zeros < 0.9 and 0.05 < share < 0.99:
        assert seen == [Sample, Gathering]


def test_nothing_is_counted_where_all_or_none_is_wanted():
    ((everything, nothing),) = begin_ranking(Ranking(5, [[5, 0]]), 1)
    values = torch.tensor([1.0, float("nan"), -2.0])
    assert everything.mask(values, 0).all()
    assert not nothing.mask(values, 0).any()
    assert (everything.value, nothing.value) == (float("-inf"), float("inf"))


@pytest.mark.parametrize("ranks", [[[0]], lambda nonzero: [[0] for _ in nonzero]])
def test_an_empty_vector_has_no_ranks(ranks):
    ((cut,),) = begin_ranking(Ranking(0, ranks, lambda _, inputs: inputs), 1)
    assert cut.mask(torch.empty(0), 0).shape == (0,)


def test_what_is_no_number_sorts_last_whatever_its_sign():
    values = torch.tensor([float("nan"), -float("nan"), float("inf"), 1.0, -float("inf")])
    for signed in (True, False):
        found = keys(values, signed=signed)
        assert found[:2].min() > found[2:].max()
    assert keys(torch.tensor([0.0, -0.0]), signed=True).unique().numel() == 1


def test_half_precision_and_float64_are_ranked_in_float32():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        vector = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        ((cut,),) = rank([vector], [[100]])
        assert mask_of(cut, vector).tolist() == largest(vector, 100, signed=False).tolist()


WIDE_VALUES = st.lists(
    st.one_of(
        st.floats(allow_nan=False),
        st.integers(-5, 5).map(lambda steps: 1.0 + steps * 2.0**-52),
        st.sampled_from([0.0, -0.0, 1e300, -1e300, 1e-300, 1e-60, 5e-324, -(2.0**-1073)]),
    ),
    min_size=1,
    max_size=70,
)


@pytest.mark.parametrize("signed", [True, False])
@settings(deadline=None)
@given(data=st.data(), values=WIDE_VALUES)
def test_float64_is_ranked_to_the_last_bit_if_it_is_to_be(data, values, signed):
    vector = torch.tensor(values, dtype=torch.float64)
    sizes = vector.numpy() if signed else vector.abs().numpy()
    order = np.argsort(-sizes, kind="stable")
    k = data.draw(st.integers(1, len(values)))
    ((cut,),) = rank([vector], [[k]], signed=signed, wide=True)
    assert sorted(mask_of(cut, vector).nonzero().flatten().tolist()) == sorted(order[:k].tolist())
    kept = torch.cat([cut.keep(vector[i : i + STEP], i // STEP) for i in range(0, len(values), STEP)])
    assert kept.ne(0).sum() <= k
    ((cut,),) = rank([vector], [[k]], signed=signed, exact=False, wide=True)
    assert cut.value == sizes[order[k - 1]]


def test_narrow_vectors_are_ranked_among_wide_ones():
    values = torch.randn(64, generator=torch.Generator().manual_seed(1))
    ((cut,),) = rank([values], [[20]], wide=True)
    assert mask_of(cut, values).tolist() == largest(values, 20, signed=False).tolist()
    kept = torch.cat([cut.keep(part, number) for number, part in enumerate(values.split(STEP))])
    assert torch.equal(kept, values.where(mask_of(cut, values), torch.zeros(())))
