"""The same numbers on a CUDA device, where there is one, and what can be said of it without.

Tests of a card are run on one, and on a stand-in for it, so that they are known to be right before a card sees them.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch

import streammerge
from benchmarks.standin import Cards
from streammerge.cli.main import main
from streammerge.compute import devices
from streammerge.compute.cuda import CudaLane, bytes_of
from streammerge.compute.devices import vram_limit
from streammerge.compute.expressions import BLOCK
from streammerge.compute.machine import MIB
from streammerge.errors import PlanError
from streammerge.formats.readers import PositionalReader
from streammerge.methods import METHODS
from streammerge.methods.place import Target
from tests.make.models import (
    Tensors,
    assert_same_bytes,
    load_model,
    merge_to,
    near,
    normal,
    save_models,
    store_tensors,
)
from tests.references.cases import CASES, ONE_CASE_EACH
from tests.references.closeness import relative_error, ulps_apart

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CARDS = [
    pytest.param(contextlib.nullcontext, marks=[pytest.mark.cuda, needs_cuda], id="card"),
    pytest.param(lambda: Cards(apart=True).there(), marks=pytest.mark.slow, id="stand-in"),
]


@pytest.fixture(params=CARDS)
def card(request):
    """A card, or what stands in for one."""
    with request.param():
        yield


ALL_CASES = {"F16": CASES, "F32": ONE_CASE_EACH}
"""What is tried of each dtype: all of it has to be done on a card in two minutes and a half."""

on_a_card = pytest.mark.usefixtures("card")


def merge_on_cuda(path: Path, merge, **options):
    return merge_to(path, merge, device="cuda", **options)


@on_a_card
@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, dtype, id=f"{case}-{dtype}") for dtype, cases in ALL_CASES.items() for case in cases],
)
def test_cuda_gives_the_cpus_numbers(families, tmp_path, case, dtype):
    tensors, paths = families[dtype]
    on_cpu = merge_to(tmp_path / "cpu.safetensors", case.merge(paths))
    on_cuda = merge_on_cuda(tmp_path / "cuda.safetensors", case.merge(paths))
    assert on_cuda.keys() == on_cpu.keys()
    for name, expected in case.expected(tensors).items():
        assert relative_error(on_cuda[name], expected) <= (2e-6 if dtype == "F32" else 6e-4), name
        if expected.size and (dtype == "F16" or METHODS[case.method].kind != "block"):
            assert int(ulps_apart(on_cuda[name], on_cpu[name].double().numpy()).max()) <= 1, name
    for name in ("positions", "mask"):
        assert torch.equal(on_cuda[name], on_cpu[name])


@on_a_card
@pytest.mark.parametrize("case", ONE_CASE_EACH, ids=str)
def test_cuda_gives_the_same_bytes_however_it_is_run(families, tmp_path, case):
    _, paths = families["F16"]
    once = merge_on_cuda(tmp_path / "once.safetensors", case.merge(paths))
    limit = least_of_whole(case.merge(paths)) + 64 * MIB
    variants: list[dict[str, Any]] = [{"threads": 1}, {"threads": 4}, {"io": "mmap"}, {"max_vram": limit}]
    for number, options in enumerate(variants):
        assert_same_bytes(merge_on_cuda(tmp_path / f"{number}.safetensors", case.merge(paths), **options), once)


def least_of_whole(merge) -> int:
    """What of a card whole tensors take at the least, beside a worker's buffers; 0 of what streams."""
    return int(streammerge.make_plan(merge, output="out.safetensors", device="cuda").memory.card_bytes)


def least_of_worker(merge) -> int:
    """What a worker takes of a card at the least, which torch takes in segments of 20 MiB for each stream."""
    return int(streammerge.make_plan(merge, output="out.safetensors", device="cuda").memory.card_lane_bytes) + 20 * MIB


LARGE = (
    *("linear", "slerp", "model_stock", "ties", "dare_ties", "breadcrumbs", "della", "sce", "arcee_fusion", "pcb"),
    *("trust_region", "emr", "ramplus_tl", "cosine_a", "iso_c", "tsv_m", "crossover"),
)
"""Of every kind of method, and of every way of measuring one."""


@on_a_card
@pytest.mark.parametrize("method", LARGE)
def test_cuda_gives_tensors_of_many_blocks_the_same_bytes_in_any_memory(large, tmp_path, method):
    case = next(one for one in ONE_CASE_EACH if one.method == method)
    on_cpu = merge_to(tmp_path / "cpu.safetensors", case.merge(large))
    once = merge_on_cuda(tmp_path / "once.safetensors", case.merge(large))
    for name, tensor in once.items():
        assert int(ulps_apart(tensor, on_cpu[name].double().numpy()).max()) <= 1, name
    with memory_of(256 * MIB if METHODS[method].kind == "whole" else 2 * least_of_worker(case.merge(large))):
        made = merge_on_cuda(tmp_path / "short.safetensors", case.merge(large), max_vram="1GiB", threads=2)
    assert_same_bytes(made, once)
    limit = least_of_whole(case.merge(large)) + 96 * MIB
    variants: list[dict[str, Any]] = [{"io": "mmap", "threads": 3}, {"max_vram": limit}]
    for number, options in enumerate(variants):
        assert_same_bytes(merge_on_cuda(tmp_path / f"{number}.safetensors", case.merge(large), **options), once)


@contextlib.contextmanager
def memory_of(nbytes: int):
    """As long as this lasts torch may take no more of the card."""
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(nbytes / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@on_a_card
@pytest.mark.parametrize("first", [0, 1, 2**33 + 1])
def test_cuda_draws_the_cpus_random_numbers(first):
    """To the last bit, by whole numbers and by operations that are rounded once."""
    stream, count = Target("w", (1,), 2).stream(0), 2**20 + 3
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert torch.equal(stream.uniform(first, count, card).cpu(), stream.uniform(first, count, cpu))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(stream.normal(first, count, card, dtype).cpu(), stream.normal(first, count, cpu, dtype))


@on_a_card
def test_cuda_memory_stays_within_its_limit(families, tmp_path):
    _, paths = families["F16"]
    for limit in (16 * MIB, 64 * MIB):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        merge = streammerge.ties(*paths[1:], base=paths[0], density=0.5)
        report = streammerge.merge(
            merge, output=tmp_path / "out.safetensors", device="cuda", max_vram=limit, sync=False, force=True
        )
        assert 0 < report.peak_vram_bytes <= limit
        assert report.device == "cuda"


@on_a_card
def test_a_cuda_lane_can_be_asked_again_before_its_copies_have_arrived(tmp_path):
    tensors = [normal((BLOCK,), seed, torch.float16) for seed in range(20)]
    nodes = store_tensors(tmp_path / "leaves", tensors)
    lane = devices.open_lane(PositionalReader(), torch.device("cuda"))
    assert isinstance(lane, CudaLane)
    with lane.running():
        sums = [lane.load(node, 0, BLOCK, torch.float32, 0).double().sum() for node in nodes]
        found = [float(total) for total in sums]
    assert found == pytest.approx([float(tensor.double().sum()) for tensor in tensors], rel=1e-9)


@pytest.mark.parametrize(
    ("free", "wanted", "held", "limit"),
    [
        (80 * 10**9, None, 0, 512_000_000),
        (80 * 10**9, None, 10**9, 1_512_000_000),
        (10**8, None, 10**9, 9 * 10**7),
        (10**8, 10**6, 10**9, 10**6),
        (10**9, 10**10, 0, 9 * 10**8),
    ],
)
def test_no_more_is_taken_of_a_card_than_is_free(monkeypatch, free, wanted, held, limit):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    assert vram_limit([torch.device("cuda")], wanted, held) == limit
    assert vram_limit([torch.device("cpu")], wanted, held) == wanted


@on_a_card
@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
def test_whole_tensors_are_decomposed_on_the_card_within_its_limit(tmp_path, method):
    base = {"w": normal((700, 900), 1, torch.float16), "square": normal((400, 400), 2, torch.float16)}
    paths = save_models(tmp_path, base=base, a=near(base, 1), b=near(base, 2))
    merge = getattr(streammerge, method)(paths["a"], paths["b"], base=paths["base"])
    on_cpu = merge_to(tmp_path / "cpu.safetensors", merge)
    limit = least_of_whole(merge) + 64 * MIB
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    report = streammerge.merge(
        merge, output=tmp_path / "cuda.safetensors", device="cuda", max_vram=limit, sync=False, threads=4
    )
    assert 4 * 700 * 900 < report.peak_vram_bytes <= limit
    for name, tensor in load_model(tmp_path / "cuda.safetensors").items():
        assert int(ulps_apart(tensor, on_cpu[name].double().numpy()).max()) <= 1


def test_the_memory_of_a_tensor_lives_as_long_as_a_view_of_it():
    values = torch.arange(50)
    gone, view = weakref.ref(values), bytes_of(values)[8:16]
    del values
    gc.collect()
    assert gone() is not None
    assert int.from_bytes(view, "little") == 1
    del view
    gc.collect()
    assert gone() is None


def test_too_little_vram_is_an_error_that_names_the_least(families, tmp_path):
    _, paths = families["F16"]
    merge = streammerge.linear(*paths[:2])
    with pytest.raises(
        PlanError, match=r"--max-vram 1 kB is too small.*\n  The least that works is (\d+)MiB"
    ) as raised:
        streammerge.merge(merge, output=tmp_path / "out.safetensors", max_vram="1kB")
    least = raised.value.advice.rpartition(" ")[2].rstrip(".")
    merge_to(tmp_path / "out.safetensors", merge, max_vram=least)


OTHERWISE: Final[Mapping[str, Sequence[str]]] = {
    "cut": ("a", "wider", "b", "--on-shape-mismatch", "slice"),
    "padded": ("wider", "a", "b", "--on-shape-mismatch", "pad"),
    "with codes": ("a", "codes", "b"),
    "as codes": ("a", "b", "--dtype", "fp8_e4m3"),
    "in float64": ("a", "b", "--compute-dtype", "fp64", "--dtype", "fp32"),
    "in float16": ("a", "b", "--compute-dtype", "fp16"),
    "an adapter made": ("extract", "b", "a", "--rank", "4", "--dtype", "fp32"),
    "an adapter put in": ("bake", "a", "adapter"),
}
"""Merges on which more hangs than the method, as they are typed; models by their names."""


@on_a_card
@pytest.mark.parametrize("words", OTHERWISE.values(), ids=OTHERWISE)
def test_cuda_makes_what_is_more_than_a_method(tmp_path, words):
    a = {"w.weight": normal((600, 1000), 1, torch.float16), "x.weight": normal((300, 300), 2, torch.float16)}
    up, down = normal((600, 8), 3), normal((8, 1000), 4)
    paths = save_models(
        tmp_path,
        a=a,
        b=near(a, 5, 0.1),
        wider={**near(a, 6, 0.1), "w.weight": normal((600, 1001), 7, torch.float16)},
        codes={name: (tensor.float() * 50).to(torch.float8_e4m3fn) for name, tensor in a.items()},
        adapter={"w.lora_B.weight": up, "w.lora_A.weight": down},
    )
    typed = [str(paths.get(word, word)) for word in words]

    def made(*options: str) -> Tensors:
        assert main([*typed, "-o", str(tmp_path / "out.safetensors"), "--force", "-q", *options]) == 0
        return load_model(tmp_path / "out.safetensors")

    on_cpu, once = made("--device", "cpu"), made("--device", "cuda")
    for io, threads in (("mmap", "1"), ("pread", "3")):
        assert_same_bytes(made("--device", "cuda", "--io", io, "--threads", threads), once)
    for name, tensor in once.items():
        if words[0] == "extract":
            assert torch.allclose(tensor, on_cpu[name], rtol=1e-4, atol=1e-5), name
        else:
            assert int(ulps_apart(tensor, on_cpu[name].double().numpy()).max()) <= 1, name
