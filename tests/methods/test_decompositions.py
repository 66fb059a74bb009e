"""Singular values by what is small of a matrix: as true decompositions give them, whatever the matrix is like."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.standin import Cards
from streammerge.methods import matrices as tall
from streammerge.methods.decompositions import (
    NOTHING,
    SQUARE,
    Decomposition,
    decompose,
    decompose_at_random,
    decomposed,
    triangle,
)
from streammerge.methods.matrices import Tall
from tests.make.models import normal

F64 = torch.float64


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return normal((rows, columns), seed, F64)


def with_values(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    """A matrix of these singular values."""
    left, right = torch.linalg.qr(matrix(rows, columns, 1))[0], torch.linalg.qr(matrix(columns, columns, 2))[0]
    made: torch.Tensor = (left * values) @ right.T
    return made


def spread(columns: int, least: float) -> torch.Tensor:
    """Singular values from 1 down to the least."""
    return torch.logspace(0, 1, columns, base=least, dtype=F64)


def rebuilt(given: torch.Tensor, found: Decomposition) -> torch.Tensor:
    return ((given @ found.left) * found.values) @ found.right.T


@pytest.fixture(params=["in one piece", "in many pieces"])
def sized_pieces(request, monkeypatch):
    if request.param == "in many pieces":
        monkeypatch.setattr(tall, "PIECE", 64)


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """Which way was gone: only the true decomposition is noted."""
    gone: list[str] = []
    svd = torch.linalg.svd

    def noted(*arguments: Any, **keywords: Any) -> Any:
        gone.append("svd")
        return svd(*arguments, **keywords)

    monkeypatch.setattr(torch.linalg, "svd", noted)
    return gone


@pytest.mark.usefixtures("sized_pieces")
@pytest.mark.parametrize("least", [1.0, 1e-2, 1e-4, 1.2e-5, 1e-5, 0.8e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("shape", [(40, 40), (90, 20)], ids=str)
def test_singular_values_and_the_polar_factor_are_right_whatever_the_condition(shape, least):
    given = 3e-3 * with_values(shape[0], shape[1], spread(shape[1], least))
    found = decompose(Tall.held(given))
    left, expected, right = torch.linalg.svd(given, full_matrices=False)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-10 * float(expected[0]))
    torch.testing.assert_close(given @ found.nearest, left @ right, rtol=0, atol=1e-7)
    torch.testing.assert_close(rebuilt(given, found), given, rtol=0, atol=1e-10 * float(expected[0]))
    apart = (given @ found.left).T @ (given @ found.left) - torch.eye(shape[1], dtype=F64)
    assert float(apart.abs().max()) < 1e-6


@pytest.mark.parametrize("least", [1e-8, 1e-9, 3e-10])
@pytest.mark.parametrize("shape", [(40, 40), (90, 20)], ids=str)
def test_beyond_that_it_is_as_right_as_float64_can_be(shape, least):
    given = with_values(shape[0], shape[1], spread(shape[1], least))
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    found = decompose(Tall.held(given))
    torch.testing.assert_close(given @ found.nearest, left @ right, rtol=0, atol=1e-15 / least)


@pytest.mark.parametrize(("share", "way"), [(1.5, []), (0.5, ["svd"])])
def test_what_the_gram_matrix_does_not_tell_is_decomposed(ways, share, way):
    """By the least square that is wanted, beside the greatest."""
    values = torch.cat([torch.ones(9, dtype=F64), torch.tensor([(share * SQUARE) ** 0.5], dtype=F64)])
    decompose(Tall.held(with_values(30, 10, values)))
    assert ways == way


def test_what_is_not_wanted_may_be_small(ways):
    given = matrix(30, 4, 1) @ matrix(4, 12, 2)
    assert int((decompose(Tall.held(given), 3).values > 0).sum()) == 3
    assert int((decompose(Tall.held(given), least=1e-4).values > 0).sum()) == 4
    assert ways == []
    assert int((decompose(Tall.held(given), 5).values > 0).sum()) == 4
    assert int((decompose(Tall.held(given), least=1e-6).values > 0).sum()) == 4
    assert ways == ["svd", "svd"]


@pytest.mark.parametrize("least", [1e-3, 1e-7])
@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_the_largest_are_those_of_all(count, least):
    given = Tall.held(with_values(50, 20, spread(20, least)))
    some, every = decompose(given, count), decompose(given).largest(count)
    assert (some.left.shape, some.values.shape, some.right.shape) == ((20, count), (count,), (20, count))
    torch.testing.assert_close(some.values, every.values, rtol=0, atol=1e-10)
    torch.testing.assert_close(some.nearest, every.nearest, rtol=1e-6, atol=1e-6 * float(every.nearest.abs().max()))


@pytest.mark.usefixtures("sized_pieces")
@pytest.mark.parametrize("shape", [(30, 30), (90, 20), (10, 25), (41, 20)], ids=str)
def test_a_matrix_of_low_rank_has_no_direction_but_its_own(shape):
    given = matrix(shape[0], 4, 1) @ matrix(4, shape[1], 2)
    found = decompose(Tall.held(given))
    left, expected, right = torch.linalg.svd(given)
    assert int((found.values > 0).sum()) == 4
    assert len(found.values) == shape[1]
    torch.testing.assert_close(found.values[:4], expected[:4], rtol=1e-10, atol=0)
    assert not found.right[:, 4:].any()
    assert not found.left[:, 4:].any()
    torch.testing.assert_close(given @ found.nearest, left[:, :4] @ right[:4], rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [2, 7, 40])
def test_what_is_just_above_nothing_is_there_and_what_is_below_is_not(size):
    for factor, there in ((3.0, size), (0.3, size - 1)):
        values = torch.cat([torch.ones(size - 1, dtype=F64), torch.tensor([factor * NOTHING], dtype=F64)])
        assert int((decompose(Tall.held(with_values(2 * size, size, values))).values > 0).sum()) == there


def test_float32_noise_beside_a_low_rank_is_resolved():
    """What a merged LoRA looks like: a few directions, and rounding in all others."""
    base = normal((60, 40), 3)
    given = (base + (matrix(60, 3, 1) @ matrix(3, 40, 2)).float()).double() - base.double()
    left, expected, right = torch.linalg.svd(given, full_matrices=False)
    assert float(expected[-1] / expected[0]) < 1e-6
    found = decompose(Tall.held(given))
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(given @ found.nearest, left @ right, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (7, 1), (1, 4)], ids=str)
def test_nothing_has_no_directions(shape):
    found = decompose(Tall.held(torch.zeros(shape, dtype=F64)))
    assert not found.values.any()
    assert not found.nearest.any()


@pytest.mark.parametrize("size", [1e-130, 1e-60, 1e-20, 1e20, 1e130])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (9, 1), (30, 12), (12, 12)], ids=str)
@pytest.mark.parametrize("least", [1e-2, 1e-6])
def test_the_size_of_the_numbers_does_not_matter(shape, size, least):
    rank = min(shape)
    given = matrix(*shape) if rank == 1 else with_values(shape[0], shape[1], spread(shape[1], least))
    found = decompose(Tall.held(size * given))
    torch.testing.assert_close(found.values[:rank] / size, torch.linalg.svdvals(given), rtol=0, atol=1e-9)
    torch.testing.assert_close(rebuilt(size * given, found) / size, given, rtol=0, atol=1e-9)


@pytest.mark.parametrize("values", [[1.0] * 8, [1.0, 1.0 - 1e-15, *[0.5] * 6], [3.0, 3.0, 1e-7, 1e-7, 1e-7]], ids=str)
def test_equal_singular_values_span_what_they_span(values):
    wanted = torch.tensor(values, dtype=F64)
    given = with_values(20, len(values), wanted)
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    found = decompose(Tall.held(given))
    torch.testing.assert_close(found.values, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(given @ found.nearest, left @ right, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(1, 1), (20, 5), (5, 5)], ids=str)
def test_what_is_no_number_is_never_decomposed_in_silence(shape, bad):
    given = matrix(*shape)
    given[0, 0] = bad
    with pytest.raises(RuntimeError):  # LinAlgError is one
        decompose(Tall.held(given))


def test_rows_and_columns_of_zeros_are_no_trouble():
    given = matrix(30, 12)
    given[5:9], given[:, 3] = 0.0, 0.0
    left, expected, right = torch.linalg.svd(given, full_matrices=False)
    found = decompose(Tall.held(given))
    torch.testing.assert_close(found.values, expected * (expected > 1e-12), rtol=0, atol=1e-12)
    torch.testing.assert_close(given @ found.nearest, left[:, :11] @ right[:11], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("sized_pieces")
@pytest.mark.parametrize("shape", [(10, 10), (11, 10), (20, 10), (21, 10), (97, 10), (3, 10), (300, 1)], ids=str)
def test_the_triangular_factor_has_the_matrix_singular_values(shape):
    given = matrix(*shape)
    made = triangle(Tall.held(given))
    assert made.shape == (shape[1], shape[1])
    torch.testing.assert_close(made.T @ made, given.T @ given)
    if shape == (10, 10):
        assert torch.equal(made, given)


# ── at random ────────────────────────────────────────────────────────────────────────────────────────────────────────


def at_random(given: torch.Tensor, rank: int, seed: int = 0) -> Decomposition:
    return decompose_at_random(Tall.held(given), rank, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("decay", [0.5, 0.95, 1.0])
def test_the_error_of_the_randomised_decomposition_is_as_stated(decay):
    values = decay ** torch.arange(60, dtype=F64)
    given, rank = with_values(100, 60, values), 8
    errors = [
        float(torch.linalg.matrix_norm(given - rebuilt(given, at_random(given, rank, seed)), 2)) for seed in range(5)
    ]
    bound = (1 + 4 * (2 * 60 / (rank - 1)) ** 0.5) ** (1 / 5)
    assert max(errors) <= bound * float(values[rank])
    assert max(errors) >= float(values[rank]) * (1 - 1e-9)


def test_the_randomised_decomposition_is_exact_where_the_rank_is_reached():
    given = matrix(50, 4, 1) @ matrix(4, 40, 2)
    found = at_random(given, 6)
    torch.testing.assert_close(rebuilt(given, found), given)
    assert int((found.values > 0).sum()) == 4


def test_the_randomised_decomposition_depends_on_the_seed_alone():
    given = matrix(50, 40)
    assert torch.equal(at_random(given, 3).right, at_random(given, 3).right)
    assert not torch.equal(at_random(given, 3).right, at_random(given, 3, seed=1).right)


@pytest.mark.parametrize("rank", [0, 35, 40])
def test_where_nothing_is_saved_it_is_exact(rank):
    given = matrix(50, 40)
    assert torch.equal(at_random(given, rank).right, decompose(Tall.held(given), rank).right)


class OnCard(torch.Tensor):
    """A matrix that lies on a card, as far as it tells."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")

    def cpu(self, memory_format: Any = None) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


SINGULAR = torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [SINGULAR, RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")])
@pytest.mark.parametrize("by", [torch.linalg.eigh, torch.linalg.eigvalsh, torch.linalg.svd])
def test_what_a_card_gives_up_the_cpu_decomposes(by, error):
    def on_a_card(given: torch.Tensor) -> Any:
        if isinstance(given, OnCard):
            raise error
        return by(given)

    square = matrix(8, 8) @ matrix(8, 8).T
    with Cards(everywhere=True).there():
        found = decomposed(on_a_card, square.as_subclass(OnCard))
    expected = by(square)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("words", ["cusolver error: CUSOLVER_STATUS_ALLOC_FAILED", "CUDA out of memory", "shapes"])
def test_what_is_no_failure_of_the_algorithm_is_none(words):
    def fails(given: torch.Tensor) -> Any:
        raise RuntimeError(words)

    with pytest.raises(RuntimeError, match=words):
        decomposed(fails, matrix(3, 3).as_subclass(OnCard))
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        decomposed(torch.linalg.eigh, torch.full((3, 3), torch.nan, dtype=F64))
