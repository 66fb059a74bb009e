"""What a merge takes of a card's memory, temporaries too, and how often it waits for one: by tensors that count it."""

from __future__ import annotations

import pytest
import torch

import streammerge
from benchmarks.standin import Cards
from streammerge.compute.expressions import BLOCK, PIECE
from streammerge.compute.machine import MIB
from streammerge.methods import METHODS
from tests.make.models import near, normal, save_models
from tests.references.cases import ONE_CASE_EACH, mostly

CHOSEN = [case for case in ONE_CASE_EACH if case.method in ("slerp", "ties", "dare_linear", "cosine_a", "crossover")]


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Models of a matrix of many blocks, and of a vector."""
    base = {"matrix": normal((1500, 1700), 1, torch.float16), "vector": normal((PIECE // 8,), 2, torch.float16)}
    models = {f"m{number}": near(base, number, 0.1) for number in (1, 2, 3)}
    return list(save_models(tmp_path_factory.mktemp("long"), base=base, **models).values())


def merged(case, paths, folder, cards, **options):
    """Merge, and give what was taken at the most."""
    cards.peaks.clear()
    merge = case.merge(paths)
    streammerge.merge(merge, output=folder / "o.safetensors", device="cuda", sync=False, force=True, **options)
    return cards.peaks.get("cuda:0", 0)


@pytest.mark.parametrize("case", mostly(CHOSEN, ONE_CASE_EACH), ids=str)
def test_no_more_is_taken_than_is_allowed(long, tmp_path, case):
    with Cards(apart=True).there() as cards:
        plan = streammerge.make_plan(case.merge(long), output="o.safetensors", device="cuda")
        least, held = plan.memory.card_lane_bytes + plan.memory.card_bytes, plan.memory.card_bytes
        if least:
            assert merged(case, long, tmp_path, cards, threads=1, max_vram=least) <= least
        assert merged(case, long, tmp_path, cards, threads=2, max_vram=2 * least + 48 * MIB) <= 2 * least + 48 * MIB
        assert merged(case, long, tmp_path, cards, threads=1) <= 512_000_000 + held


STREAMING = [case for case in ONE_CASE_EACH if METHODS[case.method].kind != "whole"]


@pytest.mark.parametrize("case", mostly([case for case in CHOSEN if case in STREAMING], STREAMING), ids=str)
def test_a_card_is_waited_for_by_no_look_at_it(long, tmp_path, case):
    """But for what was measured of rows and columns: that is sent once to each worker."""
    with Cards(apart=True, blocks=1).there() as cards:
        merged(case, long, tmp_path, cards, threads=1)
    looks = sum((lane.late.looks for lane in cards.lanes), start=type(cards.lanes[0].late.looks)())
    assert not looks.keys() - {"to"}
    assert looks.total() <= 2  # tensors, of ten ranges and more
    assert 9 * BLOCK < 1500 * 1700
