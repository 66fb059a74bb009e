"""Long matrices by pieces, and their singular values by what is small of them: exact for matrices of any condition."""

from __future__ import annotations

import pytest
import torch

from streammerge.methods import matrices as tall
from streammerge.methods.matrices import Decomposition, Tall, above, beside, decompose, decompose_at_random, total
from tests.make.models import normal

F64 = torch.float64


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return normal((rows, columns), seed, F64)


def with_values(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    """A matrix of these singular values."""
    left, right = torch.linalg.qr(matrix(rows, columns, 1))[0], torch.linalg.qr(matrix(columns, columns, 2))[0]
    made: torch.Tensor = (left * values) @ right.T
    return made


def rebuilt(given: torch.Tensor, found: Decomposition) -> torch.Tensor:
    return ((given @ found.left) * found.values) @ found.right.T


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(tall, "PIECE", 64)


def test_what_is_made_of_pieces_is_what_is_made_of_all():
    a, b, right = matrix(41, 5, 1), matrix(41, 5, 2), matrix(5, 3, 3)
    one, other = Tall.held(a), Tall.held(b)
    assert len(list(one.cuts())) == 4
    for made, expected in (
        (one @ right, a @ right),
        (one * 2.5, 2.5 * a),
        (one + other, a + b),
        (one - other @ (right @ right.T), a - b @ right @ right.T),
        (total([one, other, one]), 2 * a + b),
        (beside([one, other @ right]), torch.cat([a, b @ right], 1)),
        (above([one, other, one]), torch.cat([a, b, a])),
    ):
        assert (made.rows, made.columns) == expected.shape
        torch.testing.assert_close(made.matrix(), expected)
    torch.testing.assert_close(one.gram(), a.T @ a)
    torch.testing.assert_close(one.gram(other @ right), a.T @ b @ right)
    torch.testing.assert_close(one.products(other), (a * b).sum(0))
    torch.testing.assert_close(one.column_means(), a.mean(0))


def test_the_inputs_stay_as_they_are():
    a = matrix(41, 5)
    copy = a.clone()
    one = Tall.held(a)
    decompose(one * 2.0 + one)
    assert torch.equal(a, copy)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 1e-6, 1e-7])
@pytest.mark.parametrize("shape", [(40, 40), (90, 20)], ids=str)
def test_singular_values_and_the_polar_factor_are_right_whatever_the_condition(shape, spread):
    values = torch.logspace(0, 1, shape[1], base=spread, dtype=F64) if spread < 1 else torch.ones(shape[1], dtype=F64)
    given = 3e-3 * with_values(shape[0], shape[1], values)
    found = decompose(Tall.held(given))
    left, expected, right = torch.linalg.svd(given, full_matrices=False)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-9 * float(expected[0]))
    torch.testing.assert_close(given @ found.nearest, left @ right, rtol=0, atol=2e-8)
    torch.testing.assert_close(rebuilt(given, found), given, rtol=0, atol=1e-9 * float(expected[0]))
    apart = (given @ found.left).T @ (given @ found.left) - torch.eye(shape[1], dtype=F64)
    assert float(apart.abs().max()) < 2e-8


@pytest.mark.parametrize("shape", [(30, 30), (90, 20), (10, 25)], ids=str)
def test_a_matrix_of_low_rank_has_no_direction_but_its_own(shape):
    given = matrix(shape[0], 4, 1) @ matrix(4, shape[1], 2)
    found = decompose(Tall.held(given))
    left, expected, right = torch.linalg.svd(given)
    assert int((found.values > 0).sum()) == 4
    torch.testing.assert_close(found.values[:4], expected[:4], rtol=1e-10, atol=0)
    assert not found.right[:, 4:].any()
    assert not (given @ found.left)[:, 4:].any()
    torch.testing.assert_close(given @ found.nearest, left[:, :4] @ right[:4], rtol=0, atol=1e-10)


def test_float32_noise_beside_a_low_rank_is_resolved():
    """What a merged LoRA looks like: a few directions, and rounding in all others."""
    base = normal((60, 40), 3)
    given = (base + (matrix(60, 3, 1) @ matrix(3, 40, 2)).float()).double() - base.double()
    left, expected, right = torch.linalg.svd(given, full_matrices=False)
    assert float(expected[-1] / expected[0]) < 1e-6
    found = decompose(Tall.held(given))
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(given @ found.nearest, left @ right, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (7, 1)], ids=str)
def test_nothing_has_no_directions(shape):
    found = decompose(Tall.held(torch.zeros(shape, dtype=F64)))
    assert not found.values.any()
    assert not found.nearest.any()


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
    assert torch.equal(at_random(given, rank).right, decompose(Tall.held(given)).largest(rank).right)
