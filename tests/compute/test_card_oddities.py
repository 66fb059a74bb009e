"""Merges that are odd on a card, nested, of odd shapes and dtypes, of what isn't finite: the bytes are the CPU's."""

from __future__ import annotations

import pytest
import torch

import streammerge
from benchmarks.standin import Cards
from streammerge.compute.expressions import BLOCK, PIECE
from streammerge.methods.statistics.sending import FEW
from tests.make.models import Tensors, assert_same_bytes, merge_to, near, normal, save_models


def usual(dtype: torch.dtype = torch.float16) -> Tensors:
    """Of some blocks, and of nearly that."""
    return {
        "matrix": normal((700, 1100), 1, dtype),
        "block": normal((2 * BLOCK,), 2, dtype),
        "less": normal((BLOCK - 1,), 3, dtype),
        "more": normal((PIECE + 1,), 4, dtype),
        "number": normal((), 5, dtype),
        "nothing": normal((0, 7), 6, dtype),
    }


def slender() -> Tensors:
    """As many columns, or rows, as are not kept on a card."""
    return {"row": normal((1, FEW + 7), 1, torch.float16), "column": normal((FEW + 7, 1), 2, torch.float16)}


def spoilt() -> Tensors:
    """What isn't finite in the midst."""
    made = usual()
    made["matrix"][300, 5], made["matrix"][301, 6], made["block"][BLOCK + 3] = torch.nan, torch.inf, -torch.inf
    return made


CASES = {
    "whole beside products of blocks": lambda base, a, b: streammerge.linear(
        streammerge.crossover(a, streammerge.max(a, b)), streammerge.slerp(streammerge.max(a, b), b, t=0.3)
    ),
    "ranks of what is ranked": lambda base, a, b: streammerge.ties(
        streammerge.pcb(a, b, base=base, ratio=0.3, scope="tensor"),
        streammerge.trust_region(a, b, base=base, threshold_quantile=0.5, scope="tensor"),
        base=base,
        density=0.3,
    ),
    "neighbours of rows of columns": lambda base, a, b: streammerge.smooth_add(
        streammerge.add_cosine_a(a, b, alpha=0.1), streammerge.arcee_fusion(a, base=base), base=base
    ),
    "random numbers of products of rows": lambda base, a, b: streammerge.dare_ties(
        streammerge.nuslerp(a, b, nuslerp_flatten=False), streammerge.plus_random(b, alpha=0.1), base=base, density=0.5
    ),
    "of the whole model": lambda base, a, b: streammerge.linear(
        streammerge.cosine_a(a, b, alpha=0.2), streammerge.emr(a, b, base=base, task=1)
    ),
}


def compared(tmp_path, monkeypatch, made: Tensors, case: str, **options) -> None:
    """Merge on a card and on the CPU."""
    paths = save_models(tmp_path, base=made, a=near(made, 1, 0.1), b=near(made, 2, 0.1))
    merge = CASES[case](*paths.values())
    with Cards(apart=True).there() as cards:
        on_card = merge_to(tmp_path / "card.safetensors", merge, device="cuda", **options)
    assert cards.lanes
    monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    assert_same_bytes(on_card, merge_to(tmp_path / "cpu.safetensors", merge, **options))


@pytest.mark.parametrize("case", CASES)
def test_nested_merges(tmp_path, monkeypatch, case):
    compared(tmp_path, monkeypatch, usual(), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nested_merges_of_slender_matrices(tmp_path, monkeypatch, case):
    compared(tmp_path, monkeypatch, slender(), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ranks of what is ranked", "neighbours of rows of columns", "of the whole model"])
def test_nested_merges_of_what_is_not_finite(tmp_path, monkeypatch, case):
    compared(tmp_path, monkeypatch, spoilt(), case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["ranks of what is ranked", "of the whole model"])
def test_nested_merges_in_other_dtypes(tmp_path, monkeypatch, case, dtype):
    compared(tmp_path, monkeypatch, usual(dtype), case)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"compute_dtype": "fp16"}, {"compute_dtype": "fp64"}], ids=str)
def test_nested_merges_computed_otherwise(tmp_path, monkeypatch, options):
    compared(tmp_path, monkeypatch, usual(), "random numbers of products of rows", **options)
