"""Products of matrices, and tensors in a row: any range of them, whatever it is cut into, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence

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
from streammerge.compute.expressions import BLOCK, Combined, Joined, Node, Product, Term, Viewed, is_merged
from streammerge.compute.identity import Describer, kind_of
from streammerge.compute.kernels.library import kernels
from streammerge.compute.kernels.maker import is_compiled, is_summed
from streammerge.compute.lanes import Lane
from streammerge.compute.reading import read_range
from streammerge.formats.readers import PositionalReader
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
