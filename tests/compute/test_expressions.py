"""Expressions before anything is read: what folds, what is never read, what it is computed in, its slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streammerge
from streammerge.compute.application import apply_method
from streammerge.compute.combining import combine
from streammerge.compute.costs import compute_dtype, is_copy, slots
from streammerge.compute.evaluate import Evaluator
from streammerge.compute.expressions import (
    ByBlock,
    ByGram,
    Combined,
    External,
    Node,
    Rounded,
    Stored,
    Term,
    Viewed,
    children,
    leaves,
    walk,
)
from streammerge.compute.lanes import Lane
from streammerge.compute.survey import Survey
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.formats.files import ByteFile
from streammerge.formats.readers import PositionalReader
from streammerge.methods import find_method
from streammerge.methods.results import net
from streammerge.models.merged import Merged
from streammerge.models.shapes import placed, reshaped
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import MemoryModel, normal, save_models, store_tensors

SHAPE = (3, 5)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "anything"
    path.write_bytes(bytes(4096))
    return ByteFile(path)


@pytest.fixture
def leaf(file):
    """Makes leaves of the file, each at a place of its own."""
    count = iter(range(100))

    def make(dtype: str = "F16", shape: tuple[int, ...] = SHAPE) -> Stored:
        return Stored(TensorInfo(DTYPES[dtype], shape), file, 64 * next(count))

    return make


def info(dtype: str = "F16") -> TensorInfo:
    return TensorInfo(DTYPES[dtype], SHAPE)


def coefficients(node: Node) -> dict[int, float]:
    assert isinstance(node, Combined)
    return {id(term.node): term.coefficient for term in node.terms}


def linear_of(*terms: tuple[float, Node]) -> Combined:
    return combine(info(), tuple(Term(coefficient, node) for coefficient, node in terms))


def slerp_of(a: Node, b: Node, t: float = 0.5) -> Node:
    return apply_method(find_method("slerp"), info(), {"t": t}, [a, b])


def ties_of(base: Node, *models: Node) -> Node:
    count = len(models)
    parameters = {"weight": (1.0,) * count, "density": (0.5,) * count}
    return apply_method(
        find_method("ties"),
        info(),
        {**parameters, "normalize": True, "lambda": 1.0, "rescale": False},
        [base, *models],
    )


# ── folding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nested_combinations_fold_into_one(leaf):
    a, b, c = leaf(), leaf(), leaf()
    inner = linear_of((0.5, a), (0.5, b))
    innermost = linear_of((2.0, inner), (1.0, c))
    assert coefficients(linear_of((0.25, innermost), (3.0, c))) == {id(a): 0.25, id(b): 0.25, id(c): 3.25}


def test_combinations_fold_however_deep_they_are(leaf):
    a, b = leaf(), leaf()
    inner = Combined(info(), (Term(0.5, a), Term(2.0, b)))
    middle = Combined(info(), (Term(4.0, inner), Term(1.0, b)))
    assert coefficients(linear_of((3.0, middle))) == {id(a): 6.0, id(b): 27.0}


def test_what_has_the_coefficient_zero_is_left_out(leaf):
    a, b = leaf(), leaf()
    assert coefficients(linear_of((0.0, a), (1.0, b))) == {id(b): 1.0}
    assert linear_of((0.0, a)).terms == ()
    assert linear_of().terms == ()
    assert linear_of((0.0, linear_of((1.0, a)))).terms == ()


@pytest.mark.parametrize("shares", [(0.1, 0.2, 0.7), (0.3, 0.3, 0.4), (1 / 3, 1 / 3, 1 / 3), (0.15, 0.35, 0.5)])
def test_decimal_weights_that_sum_to_one_leave_no_base(leaf, shares):
    base, models = leaf(), [leaf() for _ in shares]
    terms = [(1.0, base), *((share, model) for share, model in zip(shares, models, strict=True))]
    minus = [(-share, base) for share in shares]
    assert id(base) not in coefficients(linear_of(*terms, *minus))
    method = find_method("task_arithmetic")
    node = apply_method(method, info(), {"weight": shares, "lambda": 1.0, "normalize": False}, [base, *models])
    assert coefficients(node) == {id(model): share for model, share in zip(models, shares, strict=True)}


def test_a_small_base_is_still_read(leaf):
    base, model = leaf(), leaf()
    node = apply_method(
        find_method("task_arithmetic"),
        info(),
        {"weight": (1 - 1e-9,), "lambda": 1.0, "normalize": False},
        [base, model],
    )
    assert coefficients(node)[id(base)] == pytest.approx(1e-9, rel=1e-5)


def test_the_same_bytes_are_one_leaf(file):
    first, again = (Stored(info(), file, 64) for _ in range(2))
    node = linear_of((0.25, first), (0.5, again))
    assert [term.coefficient for term in node.terms] == [0.75]


def test_other_bytes_other_files_and_other_readings_of_bytes_are_not(file, tmp_path):
    (tmp_path / "other").write_bytes(bytes(4096))
    nodes = [
        Stored(info(), file, 64),
        Stored(info(), file, 128),
        Stored(info("BF16"), file, 64),
        Stored(TensorInfo(DTYPES["F16"], (15,)), file, 64),
        Stored(info(), ByteFile(tmp_path / "other"), 64),
    ]
    assert len(linear_of(*((1.0, node) for node in nodes)).terms) == len(nodes)


def test_external_tensors_and_views_are_one_only_if_they_are_the_same_node(leaf):
    model = MemoryModel({"w": torch.zeros(SHAPE)})
    one, other = (External(model.tensors["w"], model, "w") for _ in range(2))
    assert len(linear_of((1.0, one), (1.0, one), (1.0, other)).terms) == 2
    spread = Viewed(info(), leaf(), 0, (5, 1), SHAPE)
    assert coefficients(linear_of((1.0, spread), (2.0, spread))) == {id(spread): 3.0}


def test_terms_keep_the_order_in_which_they_come(leaf):
    a, b, c = leaf(), leaf(), leaf()
    node = linear_of((1.0, b), (1.0, linear_of((1.0, c), (1.0, b))), (1.0, a))
    assert [id(term.node) for term in node.terms] == [id(b), id(c), id(a)]


def test_other_methods_do_not_fold(leaf):
    a, b = leaf(), leaf()
    between = slerp_of(a, b)
    node = linear_of((0.5, between), (0.5, a))
    assert coefficients(node) == {id(between): 0.5, id(a): 0.5}


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(-10, 10))
def test_folding_multiplies_and_adds_coefficients(values, factor):
    models = [MemoryModel({"w": torch.zeros(1)}) for _ in values]
    nodes = [External(model.tensors["w"], model, "w") for model in models]
    inner = linear_of(*zip(values, nodes, strict=True))
    outer = linear_of((factor, inner), *((1.0, node) for node in nodes))
    expected = {id(node): net(factor * value, 1.0) for value, node in zip(values, nodes, strict=True) if value}
    expected |= {id(node): 1.0 for value, node in zip(values, nodes, strict=True) if not value}
    assert coefficients(outer) == {key: value for key, value in expected.items() if value}


def test_a_merge_of_merges_reads_only_what_is_left(tmp_path):
    paths = save_models(tmp_path, **{name: {"w": normal((5,), 1)} for name in ("base", "a", "b")})
    with (
        streammerge.open_model(paths["base"]) as base,
        streammerge.open_model(paths["a"]) as a,
        streammerge.open_model(paths["b"]) as b,
    ):
        tuned = streammerge.add_difference(a, b, base=base, alpha=0.5)
        back: Merged = streammerge.add_difference(tuned, base, base=b, alpha=0.5)
        (only,) = back.nodes["w"].terms  # type: ignore[union-attr]
        assert only.coefficient == 1.0
        expected = a.node("w")
        assert isinstance(only.node, Stored)
        assert isinstance(expected, Stored)
        assert (only.node.file, only.node.start) == (expected.file, expected.start)
        assert is_copy(back.nodes["w"], back.tensors["w"])


# ── trees ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_walking_meets_children_before_parents(leaf):
    a, b, c = leaf(), leaf(), leaf()
    between = slerp_of(a, b)
    spread = Viewed(info(), c, 0, (1, 3), SHAPE)
    whole = ties_of(spread, linear_of((0.5, between), (0.5, a)))
    order = list(walk(whole))
    assert order[-1] is whole
    for node in order:
        for child in children(node):
            assert order.index(child) < order.index(node)
    assert list(leaves(whole)) == [c, a, b, a]
    assert children(a) == ()


# ── the compute dtype ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("inputs", "stored", "combined", "other"),
    [
        (("F16", "F16"), "F16", "F32", "F32"),
        (("BF16", "F16"), "BF16", "F32", "F32"),
        (("F8_E4M3", "F16"), "F8_E4M3", "F32", "F32"),
        (("F32", "F32"), "F16", "F32", "F32"),
        (("F16", "F16"), "F32", "F64", "F32"),
        (("F32", "F32"), "F32", "F64", "F32"),
        (("F16", "F64"), "F16", "F64", "F64"),
        (("F16", "F16"), "F64", "F64", "F64"),
    ],
)
def test_what_a_tensor_is_computed_in(leaf, inputs, stored, combined, other):
    nodes = [leaf(dtype) for dtype in inputs]
    dtype = DTYPES[stored]
    assert compute_dtype(linear_of(*((0.5, node) for node in nodes)), dtype).name == combined
    assert compute_dtype(slerp_of(*nodes), dtype).name == combined
    assert compute_dtype(ties_of(*nodes), dtype).name == other
    nested = ties_of(linear_of(*((0.5, node) for node in nodes)), nodes[0])
    assert compute_dtype(nested, dtype).name == other


# ── slots ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class CountingLane(Lane):
    """A lane that notes the highest slot that anything was put in."""

    highest = -1

    def slot(self, slot: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
        self.highest = max(self.highest, slot)
        return super().slot(slot, elements, dtype)

    def read(self, node: Stored, start: int, stop: int, slot: int) -> torch.Tensor:
        self.highest = max(self.highest, slot)
        return super().read(node, start, stop, slot)


def linear_of_rows(*nodes: Node) -> Combined:
    rows = [reshaped(node, (2, 5)) for node in nodes]
    return combine(rows[0].info, tuple(Term(0.5, node) for node in rows))


TREES = {
    "leaf": lambda a, b, c: a,
    "combination": lambda a, b, c: linear_of((0.5, a), (0.25, b), (0.25, c)),
    "nothing": lambda a, b, c: linear_of(),
    "view": lambda a, b, c: Viewed(info(), a, 0, (1, 3), SHAPE),
    "slerp": lambda a, b, c: slerp_of(a, b),
    "ties": lambda a, b, c: ties_of(a, b, c),
    "sum of slerps": lambda a, b, c: linear_of((0.5, slerp_of(a, b)), (0.5, slerp_of(b, c))),
    "slerp of sums": lambda a, b, c: slerp_of(linear_of((2.0, a), (1.0, b)), linear_of((2.0, b), (1.0, c))),
    "slerp of a sum and a leaf": lambda a, b, c: slerp_of(linear_of((2.0, a), (1.0, b)), c),
    "slerp of slerps": lambda a, b, c: slerp_of(slerp_of(a, b), slerp_of(b, c)),
    "ties of slerps": lambda a, b, c: ties_of(slerp_of(a, b), slerp_of(b, c), slerp_of(a, c)),
    "slerp of ties": lambda a, b, c: slerp_of(ties_of(a, b, c), ties_of(c, b, a)),
    "rounded": lambda a, b, c: Rounded(info("F32"), a),
    "rounded sum": lambda a, b, c: Rounded(info(), linear_of((0.5, a), (0.5, b))),
    "sum of rounded": lambda a, b, c: linear_of((0.5, Rounded(info(), linear_of((0.5, a), (0.5, b)))), (0.5, c)),
    "placed": lambda a, b, c: placed(reshaped(a, (2, 5)), b, DTYPES["F16"]),
    "placed sum": lambda a, b, c: placed(linear_of_rows(a, b), c, DTYPES["F16"]),
    "placed in slerp": lambda a, b, c: placed(reshaped(c, (2, 5)), slerp_of(a, b), DTYPES["F16"]),
    "ties of placed": lambda a, b, c: ties_of(placed(linear_of_rows(a, b), c, DTYPES["F16"]), b),
    "view of a sum": lambda a, b, c: Viewed(info(), linear_of((0.5, a), (0.5, b)), 0, (1, 3), SHAPE),
    "ties of views": lambda a, b, c: ties_of(
        *(Viewed(info(), slerp_of(one, other), 0, (1, 3), SHAPE) for one, other in ((a, b), (b, c)))
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_a_tree_takes_as_many_slots_as_it_says(tmp_path, tree):
    a, b, c = store_tensors(tmp_path / "leaves", [normal(SHAPE, seed, torch.float16) for seed in (1, 2, 3)])
    node = TREES[tree](a, b, c)
    lane = CountingLane(PositionalReader())
    survey = Survey(node)
    while not survey.complete:
        survey.add(0, survey.measure(TensorMaker(lane), 0))
        survey.finish_pass()
    Evaluator(lane, torch.float32, survey.known).values(node, 0, node.info.elements)
    assert lane.highest + 1 == slots(node)


def test_how_many_slots_the_kinds_take(leaf):
    a, b, c = leaf(), leaf(), leaf()
    assert slots(a) == 1
    assert slots(linear_of((1.0, a), (1.0, b), (1.0, c))) == 2
    assert slots(slerp_of(a, b)) == 2
    assert slots(ties_of(a, b, c)) == 3
    assert slots(ties_of(a, b, linear_of((1.0, slerp_of(a, b)), (1.0, c)))) == 5


def test_kinds_follow_methods(leaf):
    a, b = leaf(), leaf()
    assert isinstance(slerp_of(a, b), ByGram)
    assert isinstance(ties_of(a, b), ByBlock)
    scaled = apply_method(find_method("scale"), info(), {"alpha": (2.0,)}, [a])
    assert coefficients(scaled) == {id(a): 2.0}
