"""Long matrices by pieces: what is made of some rows at a time is what is made of all."""

from __future__ import annotations

import pytest
import torch

from streammerge.methods import matrices as tall
from streammerge.methods.matrices import BAND, Tall, above, beside, total
from tests.make.models import normal

F64 = torch.float64


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return normal((rows, columns), seed, F64)


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
    torch.testing.assert_close(one.inner(other @ right), a.T @ b @ right)
    torch.testing.assert_close(one.products(other), (a * b).sum(0))
    torch.testing.assert_close(one.column_means(), a.mean(0))


def test_the_inputs_stay_as_they_are():
    a = matrix(41, 5)
    copy = a.clone()
    one = Tall.held(a)
    (one * 2.0 + one).gram()
    assert torch.equal(a, copy)


@pytest.mark.parametrize("columns", [1, BAND - 1, BAND, BAND + 1, 2 * BAND + 7])
def test_a_gram_matrix_is_made_by_bands_of_its_columns(columns):
    given = matrix(300, columns)
    made = Tall.held(given).gram()
    assert torch.equal(made, made.T)
    torch.testing.assert_close(made, given.T @ given)
    assert torch.equal(made, Tall.held(given).gram())
