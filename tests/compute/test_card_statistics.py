"""What a card measures of tensors in stretches of many blocks is what the CPU measures block by block, to the bit."""

from __future__ import annotations

import pytest
import torch

from benchmarks.standin import Cards
from streammerge.compute.ahead import StretchEvaluator
from streammerge.compute.expressions import BLOCK, PIECE
from streammerge.methods import METHODS
from streammerge.methods.place import Target
from streammerge.methods.registry import BlockMethod
from streammerge.methods.statistics.ranks import edges
from streammerge.methods.statistics.stretches import Stretch
from streammerge.methods.statistics.sums import totals
from streammerge.models.padding import SumsPass
from tests.make.models import assert_same_bytes, merge_to, near, normal, save_models
from tests.references.cases import CASES, ONE_CASE_EACH, mostly


def is_measured(name: str) -> bool:
    method = METHODS[name]
    return method.kind == "gram" or (isinstance(method, BlockMethod) and method.statistics is not None)


MEASURED = [case for case in CASES if is_measured(case.method)]


@pytest.fixture(scope="module")
def on_the_cpu(large, tmp_path_factory):
    """What torch makes of a case on the CPU; made once."""
    folder, made = tmp_path_factory.mktemp("cpu"), {}

    def merged(case):
        if str(case) not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("STREAMMERGE_KERNELS", "off")
                made[str(case)] = merge_to(folder / "out.safetensors", case.merge(large))
        return made[str(case)]

    return merged


@pytest.mark.parametrize("case", mostly([one for one in ONE_CASE_EACH if one in MEASURED], MEASURED), ids=str)
def test_stretches_give_the_bytes_of_blocks(large, on_the_cpu, tmp_path, case):
    with Cards(blocks=8, apart=True).there() as cards:
        made = merge_to(tmp_path / "card.safetensors", case.merge(large), device="cuda")
    assert cards.lanes
    assert_same_bytes(made, on_the_cpu(case))


@pytest.fixture
def begun(monkeypatch):
    """How many pieces every stretch had that was begun, and how often a card was waited for meanwhile."""
    found: list[tuple[int, int]] = []
    begin = StretchEvaluator._begin

    def counted(self, step, node, pieces, first_block):
        before = self.lane.late.looks.total()
        made = begin(self, step, node, pieces, first_block)
        if made is not None:
            found.append((len(pieces), self.lane.late.looks.total() - before))
        return made

    monkeypatch.setattr(StretchEvaluator, "_begin", counted)
    return found


@pytest.fixture
def alone(monkeypatch):
    """The blocks that were measured one by one."""
    found: list[int] = []
    measure = StretchEvaluator.measure

    def counted(self, step, node, piece, block):
        found.append(block)
        return measure(self, step, node, piece, block)

    monkeypatch.setattr(StretchEvaluator, "measure", counted)
    return found


@pytest.mark.parametrize("case", [one for one in ONE_CASE_EACH if one in MEASURED], ids=str)
def test_a_stretch_is_waited_for_once_when_all_of_it_is_measured(tmp_path, begun, alone, case):
    base = {"matrix": normal((520, 1010), 2, torch.float16), "filters": normal((130, 100, 5, 5), 3, torch.float16)}
    models = {f"m{number}": near(base, number, 0.1) for number in (1, 2, 3)}
    paths = save_models(tmp_path, base=base, **models)
    with Cards(blocks=8, apart=True).there():
        merge_to(tmp_path / "card.safetensors", case.merge(list(paths.values())), device="cuda", threads=1)
    # what was measured of rows is sent once for each tensor
    assert sum(looks for _, looks in begun) <= (2 if case.method == "arcee_fusion" else 0)
    assert not alone
    assert bool(begun) == (case.method != "dare_ties")  # which measures nothing unless it is asked to
    assert not begun or max(pieces for pieces, _ in begun) > 1


def test_blocks_that_need_float64_or_the_tensors_themselves_are_measured_alone(tmp_path, alone, monkeypatch):
    one = normal((4 * BLOCK,), 1)
    one[BLOCK : 2 * BLOCK] *= 1e-30  # whose squares float32 does not hold
    other = normal((4 * BLOCK,), 2)
    other[3 * BLOCK :] *= 1e-3  # so short that it is lost in the difference
    paths = save_models(tmp_path, one={"w": one.bfloat16()}, other={"w": other.bfloat16()})
    words = {"merge_method": "slerp", "models": [str(paths["one"]), str(paths["other"])], "parameters": {"t": 0.3}}
    with Cards(blocks=8).there():
        made = merge_to(tmp_path / "card.safetensors", words, device="cuda", threads=1)
    assert alone == [1]  # the fourth is told by the products of the tensors, which are taken with the others
    monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    assert_same_bytes(made, merge_to(tmp_path / "cpu.safetensors", words))


def test_a_bracket_that_is_too_narrow_for_what_is_in_it_measures_block_by_block(tmp_path, alone, monkeypatch):
    """Half of all magnitudes are the one at which the tensor is cut."""
    base = {"w": torch.zeros(6 * PIECE + 1)}
    value = normal((6 * PIECE + 1,), 3)
    value[::2] = 0.5
    paths = save_models(tmp_path, base=base, one={"w": value}, two={"w": value.flip(0)})
    density = float((value.abs() > 0.5).float().mean()) + 0.2
    words = {
        "merge_method": "ties",
        "base_model": str(paths["base"]),
        "models": [str(paths["one"]), str(paths["two"])],
        "parameters": {"density": density, "rescale": True},
    }
    with Cards(blocks=8).there():
        made = merge_to(tmp_path / "card.safetensors", words, device="cuda", threads=1)
    assert alone
    monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    assert_same_bytes(made, merge_to(tmp_path / "cpu.safetensors", words))


@pytest.mark.parametrize("method", ["slerp", "ties", "sce", "breadcrumbs"])
def test_a_card_whose_memory_runs_out_on_the_way_measures_the_same(large, on_the_cpu, tmp_path, monkeypatch, method):
    case = next(one for one in MEASURED if one.method == method)
    failures = iter([False, True, False, False, True] + [False] * 1000)
    begin = StretchEvaluator._begin

    def fails(self, *given):
        if next(failures):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB")
        return begin(self, *given)

    monkeypatch.setattr(StretchEvaluator, "_begin", fails)
    with Cards(blocks=4).there():
        made = merge_to(tmp_path / "card.safetensors", case.merge(large), device="cuda", threads=1)
    assert next(failures) is False
    assert_same_bytes(made, on_the_cpu(case))


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "sce", "dare_ties", "trust_region"])
def test_elements_are_made_in_ranges_of_many_pieces_but_for_those_in_which_a_cut_has_its_quota(
    tmp_path, monkeypatch, method
):
    values = (normal((19 * PIECE + 3,), 1) * 8).round() / 8  # of which many are the same
    paths = save_models(
        tmp_path,
        base={"w": torch.zeros(19 * PIECE + 3).half()},
        **{f"m{number}": {"w": (values * number).half()} for number in (1, 2, 3)},
    )
    case = next(one for one in ONE_CASE_EACH if one.method == method)
    merge, compute = case.merge(list(paths.values())), BlockMethod.compute
    given: list[tuple[int, int, frozenset[int]]] = []

    def noted(self, place, inputs, parameters, statistics):
        given.append((place.block, inputs[0].numel(), frozenset(edges(statistics))))
        return compute(self, place, inputs, parameters, statistics)

    monkeypatch.setattr(BlockMethod, "compute", noted)
    with Cards(blocks=8).there():
        made = merge_to(tmp_path / "card.safetensors", merge, device="cuda", threads=1)
    ranges, (split,) = {block: elements for block, elements, _ in given}, {found for _, _, found in given}
    assert sum(ranges.values()) == 19 * PIECE + 3
    assert all(ranges[block] == PIECE for block in split)
    assert bool(split) == (method in ("ties", "breadcrumbs", "sce"))
    alone = {"breadcrumbs": 4, "sce": 7}  # the longest that is between what stands alone
    assert max(ranges.values()) > alone.get(method, 8) * PIECE
    monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    assert_same_bytes(made, merge_to(tmp_path / "cpu.safetensors", merge))


def test_means_of_rows_are_measured_in_stretches():
    """Of which rows beyond a vocabulary are made."""
    values = normal((5 * PIECE // 300, 300), 1)
    step = SumsPass(Target("w", tuple(values.shape), 1, step=PIECE))
    stretch = Stretch(0, PIECE, values.numel())
    pending = step.begin(stretch, [values.reshape(-1)])
    found, alone = pending.take(pending.tensors)
    assert list(found) == list(stretch.blocks)
    assert not alone
    for block, parts in stretch.each([values.reshape(-1)]):
        for (first, sums), (same, expected) in zip(found[block], step.measure(block, parts), strict=True):
            assert first == same
            assert torch.equal(sums, expected)


@pytest.mark.parametrize("elements", [1, 7, 8, 15, 16, 17, 24])
@pytest.mark.parametrize("step", [8, 7])
def test_a_stretch_is_its_blocks(elements, step):
    stretch, values = Stretch(5, step, elements), torch.arange(1.0, elements + 1)
    parts = dict(stretch.each([values, values.view(-1, 1)]))
    assert list(parts) == list(stretch.blocks)
    assert torch.equal(torch.cat([one for one, _ in parts.values()]), values)
    assert stretch.counts(values > 3).tolist() == [int((one > 3).sum()) for one, _ in parts.values()]
    assert totals(values.double(), stretch).tolist() == [float(one.sum()) for one, _ in parts.values()]
