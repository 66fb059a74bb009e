"""What a card has to hold of whole tensors, and what is planned with it."""

from __future__ import annotations

import pytest

import streammerge
from streammerge.compute import evaluate
from streammerge.compute.card_costs import LIBRARY_BYTES
from streammerge.compute.costs import card_bytes, holds_on
from streammerge.compute.expressions import Node
from streammerge.compute.machine import MIB
from streammerge.errors import PlanError
from streammerge.plan.allotting import allot_memory
from streammerge.plan.plan import Plan
from tests.make.models import make_tensors, near, normal, save_models

SIDE = 500


@pytest.fixture
def paths(tmp_path):
    base = {"w": normal((SIDE, SIDE), 1), "small": normal((30, 20), 2), **make_tensors(0)}
    return save_models(tmp_path, base=base, a=near(base, 1), b=near(base, 2))


def planned(merge, **options) -> Plan:
    return streammerge.make_plan(merge, output="out.safetensors", **options)


def nodes(made: Plan) -> list[Node]:
    return [job.node for job in made.jobs]


def test_only_methods_that_compute_anywhere_are_held_by_a_card(paths):
    on_card = planned(streammerge.iso_c(paths["a"], base=paths["base"]))
    elsewhere = planned(streammerge.crossover(paths["a"], paths["b"]))
    streamed = planned(streammerge.ties(paths["a"], base=paths["base"]))
    assert on_card.memory.card_bytes == on_card.memory.held_bytes >= 4 * 3 * SIDE**2
    assert elsewhere.memory.card_bytes == streamed.memory.card_bytes == 0
    assert elsewhere.memory.held_bytes > 0
    assert card_bytes(nodes(on_card)[-1]) > 0


@pytest.mark.parametrize(("device", "there"), [("cuda", "cuda"), ("mps", "cpu"), ("xpu", "cpu"), ("cpu", "cpu")])
def test_whole_tensors_are_given_where_they_can_be_decomposed(paths, device, there):
    import torch

    (node,) = {node for node in nodes(planned(streammerge.iso_c(paths["a"], base=paths["base"]))) if is_of(node, "w")}
    assert evaluate.device_for_whole(node, torch.device(device)).type == there  # type: ignore[arg-type]
    assert holds_on(device, node) == (there != "cpu")  # type: ignore[arg-type]
    (other,) = {node for node in nodes(planned(streammerge.crossover(paths["a"], paths["b"]))) if is_of(node, "w")}
    assert evaluate.device_for_whole(other, torch.device(device)).type == "cpu"  # type: ignore[arg-type]


def is_of(node: Node, name: str) -> bool:
    return getattr(node, "name", "") == name


def test_what_a_card_holds_has_to_fit_its_memory(paths):
    made = planned(streammerge.iso_c(paths["a"], base=paths["base"]), device="cuda", threads=4)
    held, lane = made.memory.card_bytes, made.memory.card_lane_bytes
    for short in (held + lane - 1, lane, MIB):
        with pytest.raises(
            PlanError, match=r"on the card is too small: .*, and whole tensors .*\n  .*MiB, or use --device cpu"
        ):
            allot_memory(made.memory, 0, short, card_bytes=held)
    tight = allot_memory(made.memory, 0, held + lane, card_bytes=held)
    assert (tight.threads, tight.held_bytes) == (1, held)
    for vram in (held + lane, 2 * held + 3 * lane, 10 * held):
        allotted = allot_memory(made.memory, 0, vram, card_bytes=held)
        assert allotted.threads * lane + allotted.held_bytes <= vram
        assert allotted.held_bytes >= held


def test_the_advice_of_what_is_too_small_is_enough(paths):
    made = planned(streammerge.tsv_m(paths["a"], paths["b"], base=paths["base"]), max_vram="1MiB")
    with pytest.raises(PlanError, match=r"--max-vram 1.05 MB is too small") as raised:
        allot_memory(made.memory, 0, MIB, card_bytes=made.memory.card_bytes)
    least = int(str(raised.value.advice).removeprefix("The least that works is ").partition("MiB")[0])
    assert allot_memory(made.memory, 0, least * MIB, card_bytes=made.memory.card_bytes).threads == 1
    with pytest.raises(PlanError):
        allot_memory(made.memory, 0, (least - 1) * MIB, card_bytes=made.memory.card_bytes)


def test_what_a_library_takes_of_a_card_is_counted_where_matrices_are_multiplied(paths):
    made = planned(streammerge.iso_c(paths["a"], base=paths["base"]), device="cuda", threads=4)
    held, own, lane = made.memory.card_bytes, made.memory.on_card.ranges, made.memory.card_lane_bytes
    assert lane == made.memory.on_card.least + LIBRARY_BYTES
    for vram, threads in ((held + lane, 1), (held + 2 * lane, 2), (2 * held + 9 * lane, 4), (512 * MIB, 4)):
        allotted = allot_memory(made.memory, 0, vram, card_bytes=held)
        assert allotted.threads == threads
        assert threads * (allotted.blocks * own + LIBRARY_BYTES) + allotted.held_bytes <= vram
    with pytest.raises(PlanError, match="too small"):
        allot_memory(made.memory, 0, held + lane - 1, card_bytes=held)
    streamed = planned(streammerge.ties(paths["a"], base=paths["base"]), device="cuda")
    assert streamed.memory.card_lane_bytes == streamed.memory.on_card.least


@pytest.mark.parametrize("models", range(2, 9))
def test_what_is_pinned_is_within_its_bound_when_torch_has_rounded_it(paths, models):
    merge = streammerge.linear(*[paths["a"], paths["b"]] * (models // 2), *[paths["base"]] * (models % 2))
    for limit in (100, 130, 170, 230, 300):
        made = planned(merge, device="cuda", max_ram=limit * MIB, threads=3)
        allotted = allot_memory(made.memory, 0, None)
        assert allotted.blocks.bit_count() == 1
        assert allotted.work_bytes <= limit * MIB


@pytest.mark.parametrize("method", ["linear", "ties", "breadcrumbs", "pcb"])
def test_three_workers_have_ranges_as_long_as_the_cards_memory_allows(tmp_path, monkeypatch, method):
    """Whatever their buffers would take of main memory."""
    import torch

    monkeypatch.setattr("streammerge.compute.machine.usable_cores", lambda: 64)
    base = {"w": normal((3000, 1000), 1, torch.float16)}
    paths = save_models(tmp_path, base=base, a=near(base, 1), b=near(base, 2))
    given = {"base": paths["base"]} if method != "linear" else {}
    made = planned(getattr(streammerge, method)(paths["a"], paths["b"], **given), device="cuda")
    allotted = allot_memory(made.memory, 0, None)
    assert allotted.threads == 3
    fitting = 512_000_000 // 3 // made.memory.on_card.ranges
    assert allotted.blocks == min(fitting, 8)
    assert (fitting >= 8) == (method == "linear")
    four = planned(getattr(streammerge, method)(paths["a"], paths["b"], **given), device="cuda", threads=4)
    assert allot_memory(four.memory, 0, None).blocks <= 4  # for what may be pinned
