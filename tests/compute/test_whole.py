"""Methods on whole tensors: what they are given, what they may give, and how much memory they are allowed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import streammerge
from streammerge.compute.expressions import BLOCK
from streammerge.compute.machine import MIB
from streammerge.errors import MethodError, PlanError
from streammerge.methods import METHODS, Place, WholeMethod, matrices, method
from streammerge.plan import memory
from streammerge.recipe.options import parse_size
from tests.make.models import assert_same_bytes, load_model, make_tensors, merge_to, near, normal, save_models

SEEN: list[tuple[str, tuple[int, ...], int]] = []


@pytest.fixture(autouse=True)
def turned() -> Iterator[None]:
    SEEN.clear()

    @method(WholeMethod, temporaries=1)
    def turned(*models: torch.Tensor, place: Place, wrong: bool = False) -> torch.Tensor:
        """θ₁ in reverse order along its first dimension, and nothing of the others"""
        SEEN.append((place.tensor.name, tuple(models[0].shape), torch.get_num_threads()))
        assert all(model.shape == place.tensor.shape for model in models)
        return models[0].reshape(-1)[:1] if wrong else models[0].flip(0) if models[0].ndim else models[0]

    yield
    del METHODS["turned"]


@pytest.fixture
def paths(tmp_path):
    base = {**make_tensors(0), "layers.3.several.windows": normal((40, BLOCK // 2), 9)}
    return save_models(tmp_path, base=base, a=near(base, 1))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_tensor_is_given_once_and_whole(paths, tmp_path, threads):
    merged = merge_to(tmp_path / "out.safetensors", streammerge.turned(paths["a"]), threads=threads)
    a = load_model(paths["a"])
    for name, tensor in merged.items():
        assert torch.equal(tensor, a[name].flip(0) if a[name].ndim else a[name])
    assert sorted(name for name, _, _ in SEEN) == sorted(name for name, tensor in a.items() if tensor.numel())
    assert {count for _, _, count in SEEN} == {1}


def test_a_range_is_computed_in_one_thread_and_leaves_the_number_as_it_was(paths):
    torch.set_num_threads(2)
    try:
        streammerge.turned(paths["a"]).read("layers.0.odd", 3, 5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert [count for _, _, count in SEEN] == [1]


def test_what_has_another_shape_is_refused(paths, tmp_path):
    with pytest.raises(MethodError, match=r"method 'turned' made a block of shape \[1\] of blocks of \["):
        streammerge.merge(streammerge.turned(paths["a"], wrong=True), output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_plan_counts_whole_tensors(paths, tmp_path):
    largest = 40 * (BLOCK // 2) * 4
    one = streammerge.make_plan(streammerge.turned(paths["a"]), output=tmp_path / "x.safetensors")
    two = streammerge.make_plan(streammerge.turned(paths["a"], paths["base"]), output=tmp_path / "x.safetensors")
    assert (one.memory.held_bytes, two.memory.held_bytes) == (3 * largest, 4 * largest)
    assert one.work_bytes >= 3 * largest
    assert one.bytes_to_read == sum(tensor.nbytes for tensor in load_model(paths["a"]).values())
    assert one.passes == 1


def test_the_plan_counts_whole_tensors_as_they_are_computed(paths, tmp_path):
    model, output = streammerge.turned(paths["a"]), tmp_path / "x.safetensors"
    single, double = (streammerge.make_plan(model, output=output, compute_dtype=dtype) for dtype in ("fp32", "fp64"))
    assert double.memory.held_bytes == 2 * single.memory.held_bytes


def test_too_little_memory_is_refused_with_what_is_enough(paths, tmp_path):
    merge, output = streammerge.turned(paths["a"]), tmp_path / "out.safetensors"
    with pytest.raises(PlanError, match=r"--max-ram .* is too small") as raised:
        streammerge.merge(merge, output=output, max_ram=MIB)
    assert raised.value.advice is not None
    least = raised.value.advice.removeprefix("The least that works is ").rstrip(".")
    with pytest.raises(PlanError, match="is too small"):
        streammerge.merge(merge, output=output, max_ram=parse_size(least) - 40 * MIB)
    assert streammerge.merge(merge, output=output, max_ram=parse_size(least) + 8 * MIB, threads=4, sync=False).merged


@pytest.mark.parametrize(
    ("limit", "promised", "free", "together"),
    [
        (None, 64 * MIB, 0, 3),  # the promise leaves room for all
        (None, 27 * MIB, 2**40, 3),  # it can't be, with 16 MiB of the process's own, and of the lanes what remains
        (None, 27 * MIB, 4 * 3 * 2 * 360_000, 2),  # a quarter of this is room for two tensors, each three times
        (None, 27 * MIB, 0, 1),
        ("8GiB", 64 * MIB, 0, 3),
    ],
)
def test_only_as_many_whole_tensors_as_fit_are_under_way(tmp_path, monkeypatch, limit, promised, free, together):
    monkeypatch.setattr(memory, "PROMISED_BYTES", promised)
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    lock = threading.Lock()
    inside, most = 0, 0
    gate = threading.Barrier(together)

    @method(WholeMethod, temporaries=1)
    def counted(model: torch.Tensor) -> torch.Tensor:
        """θ₁"""
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        gate.wait(timeout=20)  # nobody leaves before so many are here
        with lock:
            inside -= 1
        return model

    try:
        tensors = {str(number): normal((300, 300), number) for number in range(6)}
        path = save_models(tmp_path, a=tensors)["a"]
        merged = merge_to(tmp_path / "out.safetensors", streammerge.counted(path), threads=3, max_ram=limit)
    finally:
        del METHODS["counted"]
    assert_same_bytes(merged, tensors)
    assert most == together


@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "truncate_rank"])
def test_the_bytes_do_not_depend_on_how_many_are_under_way(tmp_path, monkeypatch, method):
    """Of matrices that are decomposed either way, in several pieces and bands."""
    monkeypatch.setattr(matrices, "PIECE", 10_000)
    monkeypatch.setattr(matrices, "BAND", 64)
    shapes = [(100, 90), (90, 300), (300, 90), (130, 130), (70, 5, 3, 3), (40,)]
    base = {str(number): normal(shape, number, torch.float16) for number, shape in enumerate(shapes * 2)}
    paths = save_models(tmp_path, base=base, a=near(base, 1), b={**near(base, 2), "3": base["3"], "0": base["0"]})
    models = [paths["a"]] if method == "truncate_rank" else [paths["a"], paths["b"]]
    settings = {"rank": 60} if method == "truncate_rank" else {}
    merge = getattr(streammerge, method)(*models, base=paths["base"], **settings)
    once = merge_to(tmp_path / "once.safetensors", merge, threads=1)
    with pytest.raises(PlanError) as raised:
        streammerge.merge(merge, output=tmp_path / "out.safetensors", max_ram=MIB)
    least = parse_size(str(raised.value.advice).removeprefix("The least that works is ").rstrip("."))
    for threads in (2, 4):
        for limit in (None, least + 30 * MIB, least + 200 * MIB, "8GiB"):
            out = tmp_path / f"{threads}-{limit}.safetensors"
            assert_same_bytes(merge_to(out, merge, threads=threads, max_ram=limit), once)


@pytest.mark.parametrize("outer", ["linear", "slerp", "ties", "della", "truncate_rank"])
def test_whole_merges_nest(paths, tmp_path, outer):
    settings: dict[str, object] = {"slerp": {"t": 0.3}, "truncate_rank": {"rank": 2}}.get(outer, {})  # type: ignore[assignment]
    base = {"base": paths["base"]} if outer in ("ties", "della", "truncate_rank") else {}
    others = [] if outer == "truncate_rank" else [paths["a"]]

    def merge(inner: object) -> object:
        return getattr(streammerge, outer)(inner, *others, **base, **settings)

    inner = streammerge.truncate_rank(paths["a"], base=paths["base"], rank=3)
    merge_to(tmp_path / "inner.safetensors", inner)
    expected = merge_to(tmp_path / "stepwise.safetensors", merge(tmp_path / "inner.safetensors"))
    for name, tensor in merge_to(tmp_path / "nested.safetensors", merge(inner), threads=3).items():
        apart = (tensor - expected[name]).double().norm()
        assert float(apart) <= 1e-5 * max(float(expected[name].double().norm()), 1.0), name


def test_the_rank_is_what_was_asked_for(tmp_path):
    base = {"w": normal((40, 30), 1), "conv": normal((8, 3, 3, 3), 2), "bias": normal((5,), 3)}
    paths = save_models(
        tmp_path, base=base, a={name: tensor + normal(tensor.shape, 4) for name, tensor in base.items()}
    )
    merged = merge_to(tmp_path / "out.safetensors", streammerge.truncate_rank(paths["a"], base=paths["base"], rank=4))
    for name in ("w", "conv"):
        delta = (merged[name].double() - base[name].double()).flatten(1)
        assert int((torch.linalg.svdvals(delta) > 1e-4).sum()) == 4
    assert torch.equal(merged["bias"], load_model(paths["a"])["bias"])


def test_memory_that_runs_out_is_no_fault_of_the_numbers(tmp_path):
    """Also where some of these are infinite: the tensor is given once more."""
    failures = iter([True, False])

    @method(WholeMethod, temporaries=1)
    def short(*models: torch.Tensor) -> torch.Tensor:
        """θ₁"""
        if next(failures):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB")
        return models[0]

    paths = save_models(tmp_path, a={"w": torch.tensor([[1.0, torch.inf], [2.0, 3.0]])})
    try:
        merged = merge_to(tmp_path / "out.safetensors", streammerge.short(paths["a"]))
    finally:
        del METHODS["short"]
    assert_same_bytes(merged, load_model(paths["a"]))
    assert not list(failures)
