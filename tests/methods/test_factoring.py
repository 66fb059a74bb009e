"""Factors of the largest singular values, against numpy's decomposition of the whole matrix in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streammerge.errors import MethodError
from streammerge.methods import factoring
from streammerge.methods.contract import Parameters
from streammerge.methods.factoring import FACTORS, FACTORS_OF_PRODUCTS, TOLD, VALUES, VALUES_OF_PRODUCTS
from streammerge.methods.matrices import Tall
from streammerge.methods.place import Target
from tests.make.models import normal

SHAPES = [(40, 23), (23, 40), (31, 31), (1, 9), (9, 1), (300, 7), (7, 3000)]


def factors(matrix: torch.Tensor, rank: int, svd: str = "exact", **more):
    rows, columns = matrix.shape
    place = Target("w", tuple(matrix.shape), 1, seed=5).place(0)
    sizes: Parameters = {"rows": rows, "columns": columns, "rank": rank, "svd": svd, **more}
    return split(FACTORS.compute(place, [Tall.held(matrix)], sizes), rows, columns, rank)


def split(flat: torch.Tensor, rows: int, columns: int, rank: int):
    up, down, told = flat.split([rows * rank, rank * columns, TOLD])
    return up.view(rows, rank), down.view(rank, columns), told.tolist()


def of_products(products, coefficients, rank: int, **more):
    rows, columns = products[0].shape[0], products[1].shape[1]
    inner = sum(each.shape[0] for each in products[1::2])
    sizes: Parameters = {
        "rows": rows,
        "columns": columns,
        "rank": rank,
        "coefficients": coefficients,
        "inner": inner,
        **more,
    }
    place = Target("w", (rows, columns), len(products)).place(0)
    made = FACTORS_OF_PRODUCTS.compute(place, [Tall.held(each) for each in products], sizes)
    return split(made, rows, columns, rank)


def apart(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U S and Vᵀ of factors that share the singular values."""
    lengths = down.square().sum(1).sqrt()
    return up * lengths, down / lengths[:, None]


def truncated(matrix: torch.Tensor, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest matrix of this rank, and all singular values."""
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank], values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_they_are_those_of_the_whole_matrix(shape, rank):
    matrix = normal(shape, 1, torch.float64)
    rank = min(rank, *shape)
    up, down, (whole, missed) = factors(matrix, rank)
    nearest, values = truncated(matrix, rank)
    assert np.allclose((up @ down).numpy(), nearest, atol=1e-12)
    assert whole == pytest.approx(np.linalg.norm(values), rel=1e-12)
    assert missed == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-9, abs=2e-7 * whole)
    directions = apart(up, down)[1]
    assert torch.allclose(directions @ directions.T, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    ratios = up.square().sum(0).sqrt() / down.square().sum(1).sqrt()
    assert bool(((ratios > 0.49) & (ratios < 4.01)).all())


def test_pieces_of_rows_make_no_difference(monkeypatch):
    for shape in ((400, 60), (60, 400)):
        matrix = normal(shape, 2, torch.float64)
        whole = factors(matrix, 5)
        monkeypatch.setattr(factoring, "PIECE", 900)
        monkeypatch.setattr("streammerge.methods.matrices.PIECE", 900)
        in_pieces = factors(matrix, 5)
        monkeypatch.undo()
        for one, other in zip(whole[:2], in_pieces[:2], strict=True):
            assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_at_full_rank_nothing_is_lost_whatever_the_condition(shape):
    """Squares of singular values over twelve decades are beyond float64; the factors' product is not."""
    left, _, right = np.linalg.svd(normal(shape, 3, torch.float64).numpy(), full_matrices=False)
    matrix = torch.from_numpy(left * np.logspace(0, -12, 40) @ right)
    up, down, _ = factors(matrix, 40)
    assert float((up @ down - matrix).abs().max()) < 1e-14


def test_what_has_fewer_directions_has_factors_of_zero_behind():
    matrix = normal((30, 2), 1, torch.float64) @ normal((2, 20), 2, torch.float64)
    up, down, (whole, missed) = factors(matrix, 6)
    assert torch.allclose(up @ down, matrix, atol=1e-12)
    assert not up[:, 2:].abs().max() > 1e-6 * whole
    assert missed < 1e-6 * whole
    for nothing in factors(torch.zeros(30, 20, dtype=torch.float64), 4)[:2]:
        assert not nothing.any()


def test_turned_ones_are_those_of_the_transpose():
    matrix = normal((30, 20), 1, torch.float64)
    rows, columns = matrix.shape
    place = Target("w", tuple(matrix.shape), 1).place(0)
    sizes: Parameters = {"rows": rows, "columns": columns, "rank": 5, "svd": "exact", "turned": True}
    up, down, _ = split(FACTORS.compute(place, [Tall.held(matrix)], sizes), columns, rows, 5)
    assert np.allclose((up @ down).numpy(), truncated(matrix, 5)[0].T, atol=1e-12)


@pytest.mark.parametrize("shape", [(200, 90), (90, 200)])
def test_those_at_random_are_near_and_say_how_near(shape):
    left, _, right = np.linalg.svd(normal(shape, 3, torch.float64).numpy(), full_matrices=False)
    matrix = torch.from_numpy(left * np.logspace(0, -3, 90) @ right)
    up, down, (whole, missed) = factors(matrix, 8, "randomized")
    error = float((up @ down - matrix).norm())
    best = np.linalg.norm(truncated(matrix, 8)[1][8:])
    assert missed == pytest.approx(error, rel=1e-6)
    assert whole == pytest.approx(float(matrix.norm()), rel=1e-12)
    assert best <= error < 1.01 * best
    again = factors(matrix, 8, "randomized")
    assert torch.equal(again[0], up)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_clamped_elements_are_those_within_a_quantile(svd):
    matrix = normal((50, 40), 1, torch.float64)
    plain, cut = factors(matrix, 5, svd), factors(matrix, 5, svd, clamp=0.9)
    left, right = apart(*plain[:2])
    most = float(torch.quantile(torch.cat([left.flatten(), right.flatten()]), 0.9))
    assert torch.allclose(cut[0] @ cut[1], left.clamp(-most, most) @ right.clamp(-most, most), atol=1e-12)
    assert cut[2][1] == pytest.approx(float((matrix - cut[0] @ cut[1]).norm()), rel=1e-12)


@pytest.mark.parametrize("shape", [(40, 23), (6, 40), (40, 6)])
@pytest.mark.parametrize("clamp", [1.0, 0.95])
def test_products_are_decomposed_between_their_factors(shape, clamp):
    rows, columns = shape
    sides = [
        normal(side, seed, torch.float64)
        for seed, side in enumerate([(rows, 3), (3, columns), (rows, 2), (2, columns)])
    ]
    matrix = 0.5 * sides[0] @ sides[1] - 2 * sides[2] @ sides[3]
    for rank in (1, 3, 5):
        up, down, (told, missed) = of_products(sides, (0.5, -2.0), rank, clamp=clamp)
        whole = factors(matrix, rank, clamp=clamp)
        assert torch.allclose(up @ down, whole[0] @ whole[1], atol=1e-10)
        assert missed == pytest.approx(float((matrix - up @ down).norm()), abs=1e-7)
        assert told == pytest.approx(float(matrix.norm()), rel=1e-9)


def test_values_are_those_of_the_whole_matrix():
    for shape in SHAPES:
        matrix, count = normal(shape, 4, torch.float64), min(shape)
        sizes: Parameters = {"rows": shape[0], "columns": shape[1], "count": count, "svd": "exact"}
        found = VALUES.compute(Target("w", shape, 1).place(0), [Tall.held(matrix)], sizes)
        assert found[:2].tolist() == pytest.approx([float(matrix.norm()), float(matrix.abs().max())], rel=1e-12)
        assert np.allclose(found[2:].numpy(), truncated(matrix, 1)[1], atol=1e-7)
    sides = [normal((40, 3), 1, torch.float64), normal((3, 30), 2, torch.float64)]
    sizes = {"rows": 40, "columns": 30, "count": 3, "coefficients": (2.0,), "inner": 3}
    found = VALUES_OF_PRODUCTS.compute(Target("w", (40, 30), 2).place(0), [Tall.held(each) for each in sides], sizes)
    assert np.allclose(found[2:].numpy(), truncated(2 * sides[0] @ sides[1], 1)[1][:3], atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_has_no_factors(bad):
    matrix = normal((20, 10), 1, torch.float64)
    matrix[3, 4] = bad
    with pytest.raises(MethodError, match="infinite values or NaNs"):
        factors(matrix, 3)
    with pytest.raises(MethodError, match="infinite values or NaNs"):
        of_products([matrix, normal((10, 12), 2, torch.float64)], (1.0,), 3)
