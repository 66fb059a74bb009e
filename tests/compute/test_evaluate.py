"""From expressions to numbers: nested merges against whole-tensor arithmetic, ranges, surveys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streammerge
import streammerge.models.merged
from streammerge.compute import costs
from streammerge.compute import evaluate as compute
from streammerge.compute.application import apply_method
from streammerge.compute.combining import combine
from streammerge.compute.expressions import Applied, ByBlock, External, Node, Stored, Term, Viewed, rounded
from streammerge.compute.lanes import Lane, torch_dtype
from streammerge.compute.reading import read_range, read_stored
from streammerge.compute.survey import Survey
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.formats.readers import PositionalReader
from streammerge.methods import find_method
from streammerge.methods.registry import BlockMethod, Statistics
from streammerge.methods.statistics.passes import Pass
from streammerge.models.decisions import Decision, Decisions
from streammerge.models.merged import Merged
from streammerge.models.shapes import placed, reshaped
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import MemoryModel, normal, raw_bytes, store_tensors
from tests.references import linear as references
from tests.references.closeness import relative_error
from tests.references.linear import Array

SHAPE = (7, 13)
TINY_BLOCK = 16


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Blocks of 16 elements, so that a small tensor has several."""
    monkeypatch.setattr(compute, "BLOCK", TINY_BLOCK)
    monkeypatch.setattr(costs, "BLOCK", TINY_BLOCK)
    monkeypatch.setattr(costs, "PIECE", TINY_BLOCK)


class Expression(NamedTuple):
    """An expression, and what it has to come to."""

    node: Node
    values: Array


def info(shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(DTYPES["F64"], shape)


def apply(name: str, inputs: Sequence[Expression], reference: dict[str, Any], **parameters: Any) -> Expression:
    """A method over expressions, and its reference over their values."""
    values = references.REFERENCES[name]([entry.values for entry in inputs], **reference)
    return Expression(
        apply_method(find_method(name), info(values.shape), parameters, [entry.node for entry in inputs]), values
    )


def linear(*terms: tuple[float, Expression]) -> Expression:
    values = references.weighted([entry.values for _, entry in terms], [share for share, _ in terms])
    return Expression(combine(info(values.shape), tuple(Term(c, entry.node) for c, entry in terms)), values)


def slerp(t: float, *inputs: Expression) -> Expression:
    return apply("slerp", inputs, {"t": t}, t=t)


def ties(density: float, base: Expression, *models: Expression) -> Expression:
    each = {"weight": (1.0, 0.75, 0.5)[: len(models)], "density": (density,) * len(models)}
    others = {"normalize": True, "lambda": 1.0, "rescale": False, "scope": "tensor"}
    return apply("ties", [base, *models], {**each, **others}, **each, **others)


def fitted(entry: Expression, shape: tuple[int, ...]) -> Expression:
    node = reshaped(entry.node, shape)
    assert isinstance(node, Viewed)
    values = np.zeros(shape)
    corner = tuple(slice(0, min(pair)) for pair in zip(shape, entry.values.shape, strict=True))
    values[corner] = entry.values[corner]
    return Expression(node, values)


def padded(entry: Expression) -> Expression:
    return fitted(entry, (11, 17))


def sliced(entry: Expression) -> Expression:
    return fitted(entry, (5, 4))


def overlapping(entry: Expression, around: Expression) -> Expression:
    """The first in the corner of the second."""
    values = around.values.copy()
    values[tuple(map(slice, entry.values.shape))] = entry.values
    return Expression(placed(entry.node, around.node, around.node.info.dtype), values)


def stored(entry: Expression) -> Expression:
    """As a file of float32 holds it."""
    info = TensorInfo(DTYPES["F32"], entry.node.info.shape)
    return Expression(rounded(entry.node, info), entry.values.astype(np.float32).astype(np.float64))


EXPRESSIONS = {
    "a": lambda a, b, c: a,
    "nothing": lambda a, b, c: linear((0.0, a)),
    "sum of sums": lambda a, b, c: linear((0.5, linear((0.2, a), (0.8, b))), (2.0, linear((1.0, c), (-0.5, a)))),
    "slerp of a sum": lambda a, b, c: slerp(0.3, a, linear((0.5, b), (0.7, c))),
    "sum of slerps": lambda a, b, c: linear((0.5, slerp(0.3, a, b)), (-1.5, slerp(0.6, b, c)), (1.0, a)),
    "slerp of slerps": lambda a, b, c: slerp(0.3, slerp(0.2, a, b), slerp(0.9, b, c)),
    "slerp of slerps of slerps": lambda a, b, c: slerp(
        0.4, slerp(0.3, slerp(0.2, a, b), c), slerp(0.7, slerp(0.2, b, c), a)
    ),
    "ties of ties": lambda a, b, c: ties(0.6, a, ties(0.3, a, b, c), c),
    "ties of slerps": lambda a, b, c: ties(0.4, slerp(0.5, a, b), b, slerp(0.2, b, c)),
    "slerp of ties": lambda a, b, c: slerp(0.7, ties(0.4, a, b, c), c),
    "ties of a slerp of ties": lambda a, b, c: ties(0.5, b, slerp(0.7, ties(0.4, a, b, c), c), a),
    "slerp of ties and slerp": lambda a, b, c: slerp(0.35, ties(0.4, a, b, c), slerp(0.5, a, c)),
    "padded": lambda a, b, c: padded(a),
    "sliced": lambda a, b, c: sliced(a),
    "sliced sum": lambda a, b, c: sliced(linear((0.5, a), (0.25, b))),
    "sum of sliced": lambda a, b, c: linear((0.5, sliced(a)), (0.25, sliced(b))),
    "padded slerp": lambda a, b, c: padded(slerp(0.3, a, b)),
    "sliced slerp": lambda a, b, c: sliced(slerp(0.3, a, b)),
    "sliced ties": lambda a, b, c: sliced(ties(0.3, a, b, c)),
    "slerp of padded slerps": lambda a, b, c: slerp(0.4, padded(slerp(0.3, a, b)), padded(slerp(0.8, b, c))),
    "slerp of sliced slerps": lambda a, b, c: slerp(0.4, sliced(slerp(0.3, a, b)), sliced(c)),
    "ties of padded": lambda a, b, c: ties(0.5, padded(a), padded(slerp(0.5, b, c)), padded(c)),
    "slerps of several lengths": lambda a, b, c: linear(
        (0.5, padded(slerp(0.3, a, b))), (0.5, slerp(0.6, padded(b), padded(c))), (1.0, padded(ties(0.3, a, b)))
    ),
    "sliced after padding": lambda a, b, c: fitted(padded(ties(0.3, a, b, c)), (9, 2)),
    "overlap of a sum": lambda a, b, c: overlapping(linear((0.5, sliced(a)), (0.25, sliced(b))), a),
    "overlap of slerp": lambda a, b, c: overlapping(slerp(0.3, sliced(a), sliced(b)), c),
    "overlap of ties": lambda a, b, c: overlapping(ties(0.3, *map(sliced, (a, b, c))), padded(a)),
    "overlap around slerp": lambda a, b, c: overlapping(sliced(c), slerp(0.3, a, b)),
    "overlap of rows": lambda a, b, c: overlapping(ties(0.3, *(fitted(x, (5, 13)) for x in (a, b, c))), a),
    "slerp of overlaps": lambda a, b, c: slerp(0.4, overlapping(slerp(0.2, sliced(a), sliced(b)), c), a),
    "ties of overlaps": lambda a, b, c: ties(
        0.5, a, overlapping(sliced(b), c), overlapping(ties(0.4, sliced(a), sliced(b)), c)
    ),
    "stored": lambda a, b, c: stored(a),
    "stored sum": lambda a, b, c: stored(linear((0.5, a), (0.25, b))),
    "sum of stored sums": lambda a, b, c: linear((0.5, stored(linear((0.1, a), (0.9, b)))), (2.0, c)),
    "ties of stored slerps": lambda a, b, c: ties(0.4, stored(slerp(0.5, a, b)), stored(b), stored(slerp(0.2, b, c))),
    "stored overlap of stored ties": lambda a, b, c: stored(
        overlapping(stored(ties(0.3, *map(sliced, (a, b, c)))), slerp(0.3, a, b))
    ),
}


@pytest.fixture
def inputs(tmp_path):
    tensors = [normal(SHAPE, seed, torch.float64) for seed in (1, 2, 3)]
    nodes = store_tensors(tmp_path / "leaves", tensors)
    return [Expression(node, tensor.numpy()) for node, tensor in zip(nodes, tensors, strict=True)]


def whole(node: Node, compute: str = "F64") -> torch.Tensor:
    return read_range(node, 0, node.info.elements, Lane(PositionalReader()), DTYPES[compute])


@pytest.mark.parametrize("blocks", ["one block", "several blocks"])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_nested_merges_come_to_what_whole_tensors_come_to(inputs, request, name, blocks):
    if blocks == "several blocks":
        request.getfixturevalue("tiny_blocks")
    entry = EXPRESSIONS[name](*inputs)
    assert relative_error(whole(entry.node), entry.values.reshape(-1)) < 1e-12
    assert relative_error(whole(entry.node, "F32"), entry.values.reshape(-1)) < 2e-6


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_engine_comes_to_the_same(inputs, tmp_path, name):
    entry = EXPRESSIONS[name](*inputs)
    merged = Merged(Decisions(["w"], lambda name: Decision(name, "merged", "", entry.node.info, entry.node)))
    streammerge.merge(merged, output=tmp_path / "out.safetensors", threads=2, sync=False)
    written = streammerge.open_model(tmp_path / "out.safetensors").read("w", 0, entry.node.info.elements)
    assert raw_bytes(written) == raw_bytes(whole(entry.node).to(torch_dtype(entry.node.info.dtype)))


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("name", EXPRESSIONS)
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_is_a_piece_of_the_whole(inputs, name, data):
    node = EXPRESSIONS[name](*inputs).node
    start = data.draw(st.integers(0, node.info.elements))
    stop = data.draw(st.integers(start, node.info.elements))
    piece = read_range(node, start, stop, Lane(PositionalReader()), DTYPES["F32"])
    assert raw_bytes(piece) == raw_bytes(whole(node, "F32")[start:stop])


class LoggingPass(Pass[Any]):
    """A pass over a tensor that writes down what it is asked."""

    def __init__(self, name: str, log: list[str], left: int) -> None:
        self.name, self.log, self.left = name, log, left

    def measure(self, block: int, inputs: Sequence[torch.Tensor]) -> int:
        self.log.append(f"{self.name}: {self.left} measure {block}")
        return block

    def add(self, block: int, measured: int) -> None:
        assert measured == block
        self.log.append(f"{self.name}: {self.left} add {block}")

    def finish(self) -> Any:
        self.log.append(f"{self.name}: {self.left} finish")
        return LoggingPass(self.name, self.log, self.left - 1) if self.left > 1 else f"known {self.name}"


def logged(name: str, log: list[str], passes: int, *inputs: Node) -> ByBlock:
    """A method that sums its inputs after so many passes, and insists on what they have found."""

    def add_up(*blocks: torch.Tensor, place: Any, statistics: Any) -> torch.Tensor:
        assert statistics == f"known {name}"
        return torch.stack(list(blocks)).sum(dim=0)

    def first(target: Any, parameters: Any) -> Any:
        return LoggingPass(name, log, passes) if passes else f"known {name}"

    method = BlockMethod(
        name=name,
        parameters=(),
        base="none",
        models=(1, None),
        doc="",
        function=add_up,
        statistics=Statistics(first, passes=passes),
    )
    return ByBlock(inputs[0].info, method, {}, inputs)


def run_survey(node: Node) -> list[set[str]]:
    """Carry out the survey of a one-block tensor: which names were measured in each pass."""
    survey, passes, maker = Survey(node, DTYPES["F64"]), [], TensorMaker(Lane(PositionalReader()))
    while not survey.complete:
        names = {entry.method.name for entry, _ in survey.passes.values() if isinstance(entry, Applied)}
        survey.add(0, survey.measure(maker, 0))
        survey.finish_pass()
        passes.append(names)
    return passes


def test_what_needs_no_statistics_needs_no_survey(inputs):
    a, b, _ = (entry.node for entry in inputs)
    assert Survey(a).complete
    assert Survey(combine(a.info, (Term(1.0, a), Term(2.0, b)))).complete
    assert Survey(logged("plain", [], 0, a, b)).complete


def test_nodes_are_measured_when_their_inputs_are_known_and_together_if_they_can_be(inputs):
    log: list[str] = []
    a, b, c = (entry.node for entry in inputs)
    first, second = logged("first", log, 1, a, b), logged("second", log, 2, b, c)
    top = logged("top", log, 1, first, second, logged("instant", log, 0, first))
    assert run_survey(top) == [{"first", "second"}, {"second"}, {"top"}]
    assert [line for line in log if "finish" in line] == [
        "first: 1 finish",
        "second: 2 finish",
        "second: 1 finish",
        "top: 1 finish",
    ]


def test_a_node_that_occurs_twice_is_measured_once(inputs):
    log: list[str] = []
    shared = logged("shared", log, 1, inputs[0].node)
    run_survey(logged("top", log, 1, shared, combine(shared.info, (Term(2.0, shared),))))
    assert log.count("shared: 1 measure 0") == 1


def test_a_pass_takes_each_block_once(inputs, tiny_blocks):
    log: list[str] = []
    node = logged("method", log, 2, inputs[0].node)
    assert torch.equal(whole(node), torch.from_numpy(inputs[0].values.reshape(-1)))
    blocks = math.ceil(math.prod(SHAPE) / TINY_BLOCK)
    for left in (2, 1):
        assert [line for line in log if line.startswith(f"method: {left} add")] == [
            f"method: {left} add {block}" for block in range(blocks)
        ]


def test_a_survey_is_ordered_if_any_of_its_passes_is(inputs):
    a, b, _ = inputs
    unordered = logged("unordered", [], 1, a.node)
    assert not Survey(unordered).ordered
    assert Survey(slerp(0.5, a, b).node).ordered
    assert Survey(combine(a.node.info, (Term(1.0, unordered), Term(1.0, slerp(0.5, a, b).node)))).ordered


def test_a_strided_tensor_is_read_in_its_stored_dtype(tmp_path):
    values = normal((6, 8), 1, torch.bfloat16)
    (stored,) = store_tensors(tmp_path / "storage", [values])
    storage = Stored(TensorInfo(stored.info.dtype, (48,)), stored.file, 0)
    node = Viewed(TensorInfo(stored.info.dtype, (8, 6)), storage, 0, (1, 8), (8, 6))
    piece = read_stored(node, 5, 33)
    assert piece.dtype == torch.bfloat16
    assert torch.equal(piece, values.T.reshape(-1)[5:33])


def test_a_padded_external_tensor_is_computed_with(tiny_blocks):
    values = normal((3, 4), 1, torch.float16)
    model = MemoryModel({"w": values})
    node = reshaped(External(model.tensors["w"], model, "w"), (5, 9))
    expected = torch.zeros(5, 9)
    expected[:3, :4] = values
    assert torch.equal(whole(node, "F32").reshape(5, 9), expected)
