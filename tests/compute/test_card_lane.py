"""What can be said of a card's lane without a card: the CPU stands in for one that is late with every copy.

What is on its way into main memory is noise until it is waited for, and what is on its way to the card must not be
written to before: a lane that doesn't wait where it has to gives wrong bytes, or is told.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.standin import CPU, Cards, LateCard
from streammerge.compute import tensor_maker
from streammerge.compute.card_costs import RING
from streammerge.compute.combining import combine
from streammerge.compute.cuda import CudaLane
from streammerge.compute.expressions import BLOCK, PIECE, Term
from streammerge.compute.makers import Wanted
from streammerge.compute.tensor_maker import BlocksAhead, TensorMaker
from streammerge.formats.readers import MappedReader, PositionalReader
from streammerge.tensors import DTYPES
from tests.make.models import assert_same_bytes, merge_to, normal, raw_bytes, save_models, store_tensors
from tests.references.cases import CASES, ONE_CASE_EACH, ONE_OF_A_KIND, mostly


@pytest.fixture
def cards():
    """One late card."""
    with Cards().there() as found:
        yield found


@pytest.fixture
def card(cards):
    """What is on its way to it, and from it, in this thread."""
    return cards.late


def card_lane(late: LateCard, room: int = BLOCK, *, mapped: bool = False) -> CudaLane:
    lane = CudaLane(MappedReader() if mapped else PositionalReader(), CPU)
    lane.room = room
    return lane


@pytest.mark.parametrize("mapped", [False, True])
def test_a_buffer_is_waited_for_before_it_is_filled_again(tmp_path, card, mapped):
    tensors = [normal((1000,), seed, torch.float16) for seed in range(2 * RING)]
    nodes = store_tensors(tmp_path / "leaves", tensors)
    lane = card_lane(card, mapped=mapped)
    with lane.running():
        for number, (node, tensor) in enumerate(zip(nodes, tensors, strict=True)):
            assert torch.equal(lane.load(node, 0, 1000, torch.float32, 0), tensor.float())
            assert card.waits == max(number + 1 - RING, 0)
        assert torch.equal(lane.bring(tensors[0][:7], torch.float16, 3), tensors[0][:7])
        assert lane.bring(tensors[0][:0], torch.float32, 3).numel() == 0


def test_what_is_gathered_in_main_memory_is_not_read_into_what_is_being_sent(tmp_path, cards, monkeypatch):
    shapes = {"a": (600, 1100), "b": (600, 1100), "wider": (600, 1101)}
    models = {name: {"w": normal(shape, seed, torch.float16)} for seed, (name, shape) in enumerate(shapes.items())}
    words = {
        "merge_method": "linear",
        "models": [str(path) for path in save_models(tmp_path, **models).values()],
        "on_shape_mismatch": "slice",
    }
    cards.blocks = 1
    made = merge_to(tmp_path / "card.safetensors", words, device="cuda", io="pread", threads=1)
    monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    assert_same_bytes(made, merge_to(tmp_path / "cpu.safetensors", words))


def test_pinned_memory_is_made_for_a_range_at_once(tmp_path, card):
    """torch keeps what is outgrown, in powers of two: buffers that grow with each tensor would be twice as much."""
    room, sizes = 2 * BLOCK, [1, 70, 1500, PIECE - 1, PIECE, PIECE + 1, BLOCK - 5, BLOCK, BLOCK + 1, 2 * BLOCK]
    tensors = [normal((size,), seed, torch.float16) for seed, size in enumerate(sizes)]
    nodes, lane = store_tensors(tmp_path / "leaves", tensors), card_lane(card, room)
    with lane.running():
        for node, tensor in zip(nodes, tensors, strict=True):
            for _ in range(RING):
                lane.load(node, 0, tensor.numel(), torch.float16, 0)
                lane.fetch([tensor]).arrived()
    usual = 2 * (RING + 2) * room  # two bytes each
    assert usual <= sum(memory.numel() for memory in card.pinned) <= 1.3 * usual


def test_a_cuda_lane_hands_out_what_has_arrived(card):
    lane, values = card_lane(card), normal((300,), 1)
    with lane.running():
        stored = lane.store(values, torch.bfloat16)
        assert bytes(lane.stored_bytes(stored)) == raw_bytes(values.bfloat16())
        fetched = [lane.fetch([values[:100].half(), values[:0]]), lane.fetch([values[200:]])]
        assert bytes(fetched[0].bytes[0]) != raw_bytes(values[:100].half())
        assert [bytes(part) for part in fetched[0].arrived()] == [raw_bytes(values[:100].half()), b""]
        assert [bytes(part) for part in fetched[1].arrived()] == [raw_bytes(values[200:])]


def test_what_is_cut_short_waits_for_what_is_on_its_way(card):
    """Else it would arrive in memory that is another's by then."""
    lane, begun = card_lane(card), []

    def is_cut_short() -> None:
        with lane.running():
            begun.append(lane.fetch([normal((300,), 1)]))
            raise ValueError("meanwhile")

    with pytest.raises(ValueError, match="meanwhile"):
        is_cut_short()
    assert bytes(begun[0].bytes[0]) == raw_bytes(normal((300,), 1))


@pytest.mark.parametrize("case", mostly(ONE_CASE_EACH, CASES), ids=str)
def test_the_bytes_are_the_cpus(families, tmp_path, monkeypatch, case):
    assert_the_bytes_are_the_cpus(families, tmp_path, monkeypatch, case, blocks=8)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(
    "case", mostly([case for case in ONE_CASE_EACH if case.method in ONE_OF_A_KIND], CASES), ids=str
)
def test_they_are_however_little_a_card_takes_at_once(families, tmp_path, monkeypatch, case, blocks):
    assert_the_bytes_are_the_cpus(families, tmp_path, monkeypatch, case, blocks)


def assert_the_bytes_are_the_cpus(families, tmp_path, monkeypatch, case, blocks):
    _, paths = families["F16"]
    with Cards(blocks=blocks, apart=True).there() as cards:
        made = merge_to(tmp_path / "card.safetensors", case.merge(paths), device="cuda")
    assert {lane.card for lane in cards.lanes} == {"cuda:0"}
    monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    assert_same_bytes(made, merge_to(tmp_path / "cpu.safetensors", case.merge(paths)))


def wanted_of(folder, tensors, stored="F16"):
    nodes = store_tensors(folder, tensors)
    info = nodes[0].info
    return Wanted(combine(info, tuple(Term(0.5, node) for node in nodes)), DTYPES["F32"], DTYPES[stored])


def test_a_range_is_waited_for_once_and_the_next_is_under_way_by_then(tmp_path, card):
    tensors = [normal((10_000,), seed, torch.float16) for seed in range(3)]
    maker = TensorMaker(card_lane(card))
    ranges = [(start, start + 1000) for start in range(0, 10_000, 1000)]
    with maker.running():
        blocks = maker.blocks(wanted_of(tmp_path / "leaves", tensors), {})
        assert isinstance(blocks, BlocksAhead)
        each, found = blocks.each(ranges), b""
        for number, made in enumerate(each):
            found += bytes(made.data)
            assert maker.bytes_read == 3 * 2 * 1000 * min(number + 2, len(ranges))
        assert isinstance(maker.lane, CudaLane)
        assert maker.lane.stream.waits == 0  # type: ignore[attr-defined]
    loads = 3 * len(ranges)
    assert card.waits == len(ranges) + loads - RING
    assert found == raw_bytes((0.5 * torch.stack(tensors).float().sum(0)).half())


@pytest.mark.parametrize("place", [0, 999, 1000, 5555, 9999])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 60000.0])
def test_what_is_not_finite_is_found_in_its_range_and_the_others_are_what_they_were(tmp_path, card, place, value):
    tensors = [normal((10_000,), seed, torch.float16) for seed in range(3)]
    for tensor in tensors:
        tensor[place] = value
    maker = TensorMaker(card_lane(card))
    ranges = [(start, start + 1000) for start in range(0, 10_000, 1000)]
    with maker.running():
        each = maker.blocks(wanted_of(tmp_path / "leaves", tensors), {}).each(ranges)
        made = [(bytes(block.data), block.finding) for block in each]
    expected = (0.5 * torch.stack(tensors).float().sum(0)).half()
    expected[place] = (
        expected[place] if not expected[place].isnan() else torch.tensor([0x7E00]).short().view(torch.half)[0]
    )
    assert b"".join(data for data, _ in made) == raw_bytes(expected)
    assert [number for number, (_, finding) in enumerate(made) if finding] == [place // 1000]
    finding = made[place // 1000][1]
    assert finding is not None
    assert (finding.nonfinite, finding.overflowed) == (1, int(value == 60000.0))


@pytest.mark.parametrize("stored", ["F8_E4M3", "I64"])
def test_what_shows_in_no_extreme_is_not_begun_ahead(tmp_path, card, stored):
    maker = TensorMaker(card_lane(card))
    wanted = wanted_of(tmp_path / "leaves", [normal((100,), 1, torch.float16)], stored)
    assert not isinstance(maker.blocks(wanted, {}), BlocksAhead)
    assert not isinstance(maker.blocks(wanted_of(tmp_path / "b", [normal((9,), 1)]), {}, suspicious=True), BlocksAhead)
    assert tensor_maker.can_be_begun_ahead(wanted_of(tmp_path / "c", [normal((9,), 1)], "BF16"))
