"""Products of matrices, and tensors in a row: any range of them, whatever it is cut into, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from streammerge.compute.combining import combine
from streammerge.compute.costs import (
    bytes_read,
    compute_dtype,
    held_bytes,
    is_copy,
    lane_bytes,
    passes,
    product_rows,
    slots,
    write_step,
)
from streammerge.compute.expressions import (
    BLOCK,
    ByWhole,
    Combined,
    Joined,
    Node,
    Product,
    Term,
    Viewed,
    is_merged,
    is_product_of_two,
)
from streammerge.compute.identity import Describer, kind_of
from streammerge.compute.kernels.library import kernels
from streammerge.compute.kernels.maker import is_compiled, is_summed
from streammerge.compute.lanes import Lane
from streammerge.compute.matrices import factors_of, products_of, rows_of, transposed
from streammerge.compute.parts import in_shape
from streammerge.compute.reading import read_range
from streammerge.formats.readers import PositionalReader
from streammerge.methods import METHODS
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import normal, store_tensors

F32, F64 = DTYPES["F32"], DTYPES["F64"]


def product(folder, shape: Sequence[int], *matrices: torch.Tensor) -> Product:
    """The product of matrices that are stored in a file."""
    left, *factors = store_tensors(folder / f"factors-{len(list(folder.iterdir()))}", matrices)
    return Product(TensorInfo(F32, tuple(shape)), left, tuple(factors))


def values(node: Node, start: int = 0, stop: int | None = None, dtype=F32) -> torch.Tensor:
    stop = node.info.elements if stop is None else stop
    return read_range(node, start, stop, Lane(PositionalReader()), dtype)


def expected(*matrices: torch.Tensor) -> torch.Tensor:
    made = matrices[0].double().reshape(-1, matrices[1].shape[0])
    for matrix in matrices[1:]:
        made = made @ matrix.double().reshape(matrix.shape[0], -1)
    return made.reshape(-1)


@pytest.mark.parametrize(
    ("shape", "shapes"),
    [
        ((1, 1), [(1, 1), (1, 1)]),
        ((5, 7), [(5, 3), (3, 7)]),
        ((6, 4, 3, 3), [(6, 2, 1, 1), (2, 4, 3, 3)]),
        ((700, 900), [(700, 8), (8, 900)]),
        ((3, 300_000), [(3, 2), (2, 300_000)]),
        ((300_000, 3), [(300_000, 2), (2, 3)]),
        ((40, 50), [(40, 60), (60, 3), (3, 50)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_product_is_what_matrices_multiply_to(tmp_path, shape, shapes, dtype):
    matrices = [normal(each, seed, dtype) for seed, each in enumerate(shapes)]
    node = product(tmp_path, shape, *matrices)
    exact = expected(*matrices)
    assert torch.allclose(values(node).double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.allclose(values(node, dtype=F64), exact, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("shape", [(1000, 900), (7, 100_000), (3, 600_000), (100_000, 7)])
def test_ranges_have_the_bits_of_the_whole(tmp_path, shape):
    rows, columns = shape
    node = product(tmp_path, shape, normal((rows, 6), 1, torch.float16), normal((6, columns), 2, torch.float16))
    whole = values(node)
    for start, stop in ((0, 1), (columns - 1, columns + 1), (BLOCK - 5, BLOCK + 5), (123_456, 234_567)):
        assert torch.equal(values(node, start, stop), whole[start:stop])
    assert torch.equal(values(node, node.info.elements - 3), whole[-3:])
    assert values(node, 9, 9).numel() == 0


def test_a_product_of_what_is_computed(tmp_path):
    """The factors may be expressions, products too, and so may be what is on the left."""
    a, b, c = normal((4, 3), 1), normal((3, 5), 2), normal((5, 6), 3)
    one, two, three = store_tensors(tmp_path / "file", [a, b, c])
    inner = Product(TensorInfo(F32, (3, 6)), two, (three,))
    turned = Viewed(TensorInfo(F32, (6, 3)), inner, 0, (1, 6), (6, 3))
    doubled = Combined(TensorInfo(F32, (4, 3)), (Term(2.0, one),))
    found = values(Product(TensorInfo(F32, (4, 6)), doubled, (inner,)))
    assert torch.allclose(found.double(), expected(2 * a, b, c), atol=1e-5)
    gram = values(Product(TensorInfo(F32, (6, 6)), turned, (inner,)))
    assert torch.allclose(gram.view(6, 6), (b @ c).T @ (b @ c), atol=1e-5)


def banded(folder, count: int, high: int, rank: int, width: int) -> tuple[Product, torch.Tensor]:
    """Many products of one size, one below the other, and what they come to in float64."""
    left, right = normal((count, high, rank), 1), normal((count, rank, width), 2)
    stored = store_tensors(folder / "bands", [left.view(count * high, rank), right.view(count * rank, width)])
    node = Product(TensorInfo(F32, (count, high, width)), stored[0], (stored[1],), bands=count)
    return node, (left.double() @ right.double()).reshape(-1)


SIZES = [(3, 5, 2, 7), (128, 300, 4, 70), (700, 1, 3, 2000), (4, 100_003, 2, 3), (2, 3, 1, 300_000), (5000, 2, 2, 3)]


@pytest.mark.parametrize("sizes", SIZES)
def test_bands_have_factors_of_their_own(tmp_path, sizes):
    node, exact = banded(tmp_path, *sizes)
    assert torch.allclose(values(node).double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.allclose(values(node, dtype=F64), exact, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("sizes", SIZES)
def test_ranges_of_bands_have_the_bits_of_the_whole(tmp_path, sizes):
    node, _ = banded(tmp_path, *sizes)
    whole, band = values(node), sizes[1] * sizes[3]
    for start, stop in ((0, 1), (band - 1, band + 1), (band, 2 * band), (BLOCK - 5, BLOCK + 5), (band + 3, 9 * band)):
        stop = min(stop, len(whole))
        start = min(start, stop)
        assert torch.equal(values(node, start, stop), whole[start:stop])


def test_a_band_multiplies_its_own_rows_alone(tmp_path, monkeypatch):
    """What lies in one band costs the product of that band."""
    node, _ = banded(tmp_path, 50, 2000, 4, 300)
    multiplied: list[int] = []
    mm = torch.mm

    def noted(rows, factor, *, out):
        multiplied.append(len(rows))
        return mm(rows, factor, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    values(node, 7 * 2000 * 300, 7 * 2000 * 300 + 10)
    assert sum(multiplied) == product_rows(node)
    assert len(multiplied) <= 2


def test_bands_are_seen_as_any_other_tensor(tmp_path):
    """Of such a product no rows are cut, and none is turned, by its factors."""
    node, exact = banded(tmp_path, 3, 4, 2, 6)
    matrix = exact.view(12, 6)
    assert torch.allclose(values(rows_of(in_shape(node, (12, 6)), 3, 9)).double(), matrix[3:9].reshape(-1), atol=1e-5)
    assert torch.allclose(values(rows_of(node, 1, 3)).double(), matrix[4:].reshape(-1), atol=1e-5)
    assert torch.allclose(values(transposed(node)).double(), exact.view(3, 24).T.reshape(-1), atol=1e-5)
    assert not is_product_of_two(node)
    assert products_of(node) is None
    with pytest.raises(ValueError, match="no product of two matrices"):
        factors_of(node)


def test_bands_are_told_apart(tmp_path):
    left, right = store_tensors(tmp_path / "bands", [normal((8, 3), 1), normal((12, 5), 2)])
    four, two = (
        Product(TensorInfo(F32, (8 * 5,)), left, (right,), bands=4),
        Product(TensorInfo(F32, (8 * 5,)), left, (right,), bands=2),
    )
    assert kind_of(four) != kind_of(two)
    assert Describer([]).node(four) != Describer([]).node(two)
    groups = Product(TensorInfo(F32, (8 * 5,)), left, (right,), groups=2)
    assert Describer([]).node(two) != Describer([]).node(groups)


def test_methods_below_a_product_leave_the_sum_to_loops(tmp_path):
    (weight,) = store_tensors(tmp_path / "weight", [normal((3, 4, 6), 5)])
    node, _ = banded(tmp_path, 3, 4, 2, 6)
    held = ByWhole(node.left.info, METHODS["rotate"], {}, (node.left,))  # type: ignore[arg-type]
    below = combine(weight.info, (Term(1.0, weight), Term(2.0, replace(node, left=held))))
    beside = combine(weight.info, (Term(1.0, ByWhole(weight.info, held.method, {}, (weight,))), Term(2.0, node)))
    assert is_summed(below, F32, F64) == (kernels() is not None)
    assert not is_summed(beside, F32, F64)


def test_a_difference_is_folded_into_a_combination(tmp_path):
    (weight,) = store_tensors(tmp_path / "weight", [normal((5, 7), 0)])
    difference = product(tmp_path, (5, 7), normal((5, 3), 1), normal((3, 7), 2))
    inner = Combined(weight.info, (Term(1.0, weight), Term(0.5, difference)))
    outer = combine(weight.info, (Term(2.0, inner), Term(-2.0, weight)))
    assert [(term.coefficient, term.node) for term in outer.terms] == [(1.0, difference)]


def test_what_a_product_costs(tmp_path):
    (weight,) = store_tensors(tmp_path / "weight", [normal((1280, 1280), 0, torch.float16)])
    node = product(tmp_path, (1280, 1280), normal((1280, 16), 1).half(), normal((16, 1280), 2).half())
    total = combine(weight.info, (Term(1.0, weight), Term(0.5, node)))
    assert held_bytes(total) == 16 * 1280 * 4
    assert held_bytes(total, F64) == 16 * 1280 * 8
    assert passes(total) == 1
    assert bytes_read(total) == weight.info.nbytes + 2 * 16 * 1280 * 2
    assert slots(total) == 3
    assert write_step(total) == BLOCK // 1280 * 1280
    assert product_rows(node) * node.width == 2 * write_step(total)
    assert lane_bytes(total, weight.info, F32) < 16 << 20
    assert is_merged(node)
    assert not is_compiled(total, weight.info.dtype, F32)
    assert is_summed(total, weight.info.dtype, F32) == (kernels() is not None)
    assert not is_summed(weight, weight.info.dtype, F32)
    assert compute_dtype(total, DTYPES["F16"]) == F32
    assert compute_dtype(total, F32) == F64


def test_products_are_told_apart(tmp_path):
    a, b = (product(tmp_path, (5, 7), normal((5, rank), 1), normal((rank, 7), 2)) for rank in (2, 3))
    assert kind_of(a) != kind_of(b)
    assert kind_of(a) == kind_of(product(tmp_path, (5, 7), normal((5, 2), 3), normal((2, 7), 4)))
    told = Describer([])
    assert told.node(a) != told.node(b)
    assert told.node(Joined(a.info, (a, b))) != told.node(Joined(a.info, (b, a)))
    assert kind_of(Joined(a.info, (a, b))) != kind_of(Joined(a.info, (b, a)))


def test_a_view_costs_what_lies_between_its_ends(tmp_path):
    """Of the rest of its source nothing is read; and what is read at once may be more than is shown."""
    (stored,) = store_tensors(tmp_path / "stored", [normal((2000, 500), 1)])
    column = Viewed(TensorInfo(F32, (300, 1)), stored, 100 * 500 + 7, (500, 1), (300, 1))
    assert bytes_read(column) == (299 * 500 + 1) * 4
    assert lane_bytes(column, column.info, F32) >= (299 * 500 + 1) * 4
    lane = Lane(PositionalReader())
    assert torch.equal(read_range(column, 0, 300, lane, F32), normal((2000, 500), 1)[100:400, 7])
    assert lane.bytes_read == bytes_read(column)
    empty = Viewed(TensorInfo(F32, (0, 5)), stored, 0, (500, 1), (0, 5))
    assert bytes_read(empty) == 0
    padded = Viewed(TensorInfo(F32, (4, 600)), stored, 0, (500, 1), (4, 500))
    assert bytes_read(padded) == 4 * 500 * 4
    other = Viewed(TensorInfo(F32, (300, 1)), stored, 0, (1, 1), (300, 1))
    assert kind_of(column) != kind_of(other)


# ── one after the other ──────────────────────────────────────────────────────────────────────────────────────────────


def test_tensors_in_a_row(tmp_path):
    parts = [normal(shape, seed) for seed, shape in enumerate([(2, 3), (0, 3), (1, 3), (100_000, 3), (1, 3)])]
    nodes = store_tensors(tmp_path / "parts", parts)
    node = Joined(TensorInfo(F32, (100_004, 3)), tuple(nodes))
    whole = torch.cat([part.reshape(-1) for part in parts])
    assert torch.equal(values(node), whole)
    for start, stop in ((0, 6), (5, 10), (6, 9), (3, 300_011), (300_008, 300_012)):
        assert torch.equal(values(node, start, stop), whole[start:stop])
    assert not is_copy(node, node.info)


def test_nothing_is_zero_where_others_have_something(tmp_path):
    (part,) = store_tensors(tmp_path / "part", [normal((1, 3), 1)])
    zero = Combined(TensorInfo(F32, (2, 3)), ())
    node = Joined(TensorInfo(F32, (4, 3)), (zero, part, Combined(TensorInfo(F32, (1, 3)), ())))
    assert torch.equal(values(node).view(4, 3)[[0, 1, 3]], torch.zeros(3, 3))
    assert torch.equal(values(node).view(4, 3)[2], normal((1, 3), 1)[0])
