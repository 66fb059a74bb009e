"""Lanes and devices: slots, staging, what is refused; and, where there is a CUDA device, the same numbers on it."""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import streammerge
from streammerge.compute import cuda, devices
from streammerge.compute.cuda import CudaLane, bytes_of
from streammerge.compute.devices import (
    available_devices,
    check_float64,
    find_device,
    is_out_of_memory,
    no_memory_left,
    open_lane,
    open_lanes,
    vram_limit,
)
from streammerge.compute.expressions import BLOCK
from streammerge.compute.lanes import Lane, StagedLane, torch_dtype
from streammerge.compute.machine import Allotment
from streammerge.errors import DeviceError, OutOfMemoryError, PlanError
from streammerge.formats.readers import MappedReader, PositionalReader
from streammerge.methods import METHODS
from streammerge.tensors import DTYPES
from tests.make.models import (
    DTYPE_NAMES,
    assert_same_bytes,
    make_tensors,
    merge_to,
    near,
    normal,
    raw_bytes,
    save_model,
    store_tensors,
    with_integers,
)
from tests.references.linear import CASES, ONE_CASE_EACH, mostly, relative_error, ulps_apart

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A base and three models near to it, in float16 and in float32, as tensors and as files."""
    families = {}
    for dtype in ("F16", "F32"):
        base = with_integers(make_tensors(0, DTYPE_NAMES[dtype]))
        tensors = [base, *(near(base, seed) for seed in (1, 2, 3))]
        folder = tmp_path_factory.mktemp(dtype)
        paths = [save_model(folder / f"{number}.safetensors", model) for number, model in enumerate(tensors)]
        families[dtype] = tensors, paths
    return families


# ── lanes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=[Lane, StagedLane])
def lane(request):
    return request.param(PositionalReader())


def test_a_slot_is_memory_that_is_used_again(lane):
    first = lane.slot(0, 100, torch.float32)
    again = lane.slot(0, 60, torch.float32)
    assert again.data_ptr() == first.data_ptr()
    assert (first.numel(), again.numel()) == (100, 60)
    assert lane.slot(1, 100, torch.float32).data_ptr() != first.data_ptr()
    assert lane.slot(0, 100, torch.float64).data_ptr() != first.data_ptr()


def test_a_slot_grows(lane):
    lane.slot(0, 10, torch.float32)
    assert lane.slot(0, 2 * BLOCK, torch.float32).fill_(1.0).sum() == 2 * BLOCK


@pytest.mark.parametrize("dtype", DTYPE_NAMES.values(), ids=str)
@pytest.mark.parametrize("computed", [torch.float32, torch.float64])
def test_what_is_loaded_is_the_stored_range_in_the_compute_dtype(lane, tmp_path, dtype, computed):
    values = normal((1000,), 1, dtype)
    nodes = store_tensors(tmp_path / "leaves", [torch.zeros(3, dtype=torch.uint8), values])
    loaded = lane.load(nodes[1], 10, 700, computed, 0)
    assert loaded.dtype == computed
    assert torch.equal(loaded, values[10:700].to(computed))
    assert lane.bytes_read == 690 * dtype.itemsize
    assert lane.load(nodes[1], 5, 5, computed, 0).shape == (0,)


@pytest.mark.parametrize("dtype", [*DTYPE_NAMES.values(), torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("elements", [0, 1, 63, BLOCK])
def test_what_is_stored_is_rounded_once_and_ready_to_write(lane, dtype, elements):
    values = normal((elements,), 2)
    stored = lane.store(values, dtype)
    expected = values.to(dtype)
    assert raw_bytes(stored) == bytes(lane.stored_bytes(stored)) == raw_bytes(expected)
    shorter = lane.store(values[: elements // 2], dtype)
    assert bytes(lane.stored_bytes(shorter)) == raw_bytes(expected[: elements // 2])


def test_a_staged_lane_leaves_main_memory_alone():
    lane = StagedLane(PositionalReader())
    values = normal((50,), 1)
    sent = lane.bring(values, torch.float32, 0)
    assert sent.data_ptr() != values.data_ptr()
    assert torch.equal(sent, values)
    assert Lane(PositionalReader()).bring(values, torch.float32, 0) is values


def test_a_running_lane_has_one_thread_and_keeps_no_gradients(lane):
    threads = torch.get_num_threads()
    try:
        with lane.running():
            assert torch.is_inference_mode_enabled()
            assert torch.get_num_threads() == 1
        assert not torch.is_inference_mode_enabled()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", mostly(ONE_CASE_EACH, CASES), ids=str)
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_a_staged_lane_gives_the_same_bytes(families, tmp_path, monkeypatch, case, dtype):
    _, paths = families[dtype]
    plain = merge_to(tmp_path / "plain.safetensors", case.merge(paths))
    used = []

    def open_staged(reader, device):
        used.append(device)
        return StagedLane(reader, device)

    monkeypatch.setattr(devices, "open_lane", open_staged)
    staged = merge_to(tmp_path / "staged.safetensors", case.merge(paths))
    assert used
    assert_same_bytes(staged, plain)


# ── memory that runs out ─────────────────────────────────────────────────────────────────────────────────────────────


class SmallCard(StagedLane):
    """A stand-in for a card with room for so many elements in all of its slots together."""

    room_for = 0
    refused = 0

    def slot(self, slot, elements, dtype):
        before = {key: buffer.numel() for key, buffer in self._slots.items()}
        found = super().slot(slot, elements, dtype)
        if sum(buffer.numel() for buffer in self._slots.values()) > self.room_for:
            SmallCard.refused += 1
            for key in set(self._slots) - set(before):
                del self._slots[key]
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB")
        return found


@pytest.fixture
def small_card(monkeypatch):
    """Makes every lane one of a card with room for so many elements."""

    def make(elements):
        monkeypatch.setattr(SmallCard, "room_for", elements)
        monkeypatch.setattr(SmallCard, "refused", 0)
        monkeypatch.setattr(devices, "open_lane", lambda reader, device: SmallCard(reader, device))

    return make


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_card_that_is_too_small_gets_smaller_windows_and_the_bytes_are_the_same(
    families, tmp_path, small_card, method, threads
):
    _, paths = families["F16"]
    base, a, b, _ = paths
    words = {
        "linear": {"merge_method": "linear", "models": [str(base), str(a), str(b)]},
        "slerp": {"merge_method": "slerp", "models": [str(a), str(b)], "parameters": {"t": 0.3}},
        "ties": {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [str(a), str(b)],
            "parameters": {"density": 0.5},
        },
    }[method]
    plain = merge_to(tmp_path / "plain.safetensors", words, threads=threads)
    room = {"linear": 4 * 2**14, "slerp": 5 * BLOCK, "ties": 8 * 2**17}[method]
    small_card(room)
    small = merge_to(tmp_path / "small.safetensors", words, threads=threads)
    assert SmallCard.refused or method != "linear"
    assert_same_bytes(small, plain)


def test_a_card_without_any_room_is_an_error_that_says_what_to_do(families, tmp_path, small_card):
    _, paths = families["F16"]
    small_card(100)
    words = {"merge_method": "linear", "models": [str(paths[0]), str(paths[1])]}
    with pytest.raises(OutOfMemoryError, match=r"has no memory left for this merge.*\n.*The unfinished output was"):
        merge_to(tmp_path / "out.safetensors", words)
    assert list(tmp_path.iterdir()) == []


def test_a_card_is_told_by_its_name_and_what_to_take_less_of():
    assert "cuda:1 has no memory left" in str(no_memory_left(torch.device("cuda:1")))
    assert "--max-vram" in str(no_memory_left(torch.device("cuda")))
    assert "--max-vram" not in str(no_memory_left(CPU))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_known(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_a_lane_with_less_room_takes_smaller_buffers(lane):
    lane.slot(0, 1000, torch.float32)
    lane.make_room(5000)
    assert not lane._slots
    lane.slot(0, 1000, torch.float32)
    assert {buffer.numel() for buffer in lane._slots.values()} == {5000}
    assert lane.slot(1, BLOCK, torch.float32).numel() == BLOCK  # what must be, must be


def test_lanes_are_opened_as_allotted():
    lanes = open_lanes(CPU, "mmap", Allotment(3, 4 << 20, 0))
    assert [type(lane) for lane in lanes] == [Lane] * 3
    readers = [lane.reader for lane in lanes]
    assert len({id(reader) for reader in readers}) == 3
    assert all(isinstance(reader, MappedReader) and reader.most == 2 for reader in readers)
    (lane,) = open_lanes(CPU, "pread", Allotment(1, 0, 0))
    assert isinstance(lane.reader, PositionalReader)
    assert type(open_lane(PositionalReader(), torch.device("mps"))) is StagedLane


# ── finding devices ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def machine(monkeypatch):
    """Pretend that the machine has so many devices of each kind."""

    def pretend(**counts: int) -> None:
        for kind in ("xpu", "mps", "cuda"):
            count = counts.get(kind, 0)
            monkeypatch.setattr(
                torch,
                kind,
                SimpleNamespace(is_available=lambda count=count: count > 0, device_count=lambda count=count: count),
            )

    return pretend


def test_a_machine_with_nothing_but_a_cpu(machine):
    machine()
    assert available_devices() == ["cpu"]
    assert find_device("auto") == find_device("cpu") == CPU


def test_auto_is_the_accelerator(machine):
    machine(cuda=2)
    assert available_devices() == ["cpu", "cuda:0", "cuda:1", "cuda"]
    assert find_device("auto") == find_device("cuda") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert find_device("cpu") == CPU
    machine(mps=1)
    assert available_devices() == ["cpu", "mps"]
    assert find_device("auto") == torch.device("mps")


@pytest.mark.parametrize("name", ["cuda", "cuda:2", "mps", "xpu", "gpu", "", "cpu:7", "CUDA:0", "cuda:", "cuda:0:0"])
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(machine, name):
    cards = 2 if name.startswith(("cuda:", "CUDA")) else 0
    machine(cuda=cards)
    there = "cpu, cuda:0, cuda:1, cuda" if cards else "cpu"
    with pytest.raises(DeviceError, match=rf"no device '{name}' on this machine\n  there is: {there}\n"):
        find_device(name)


def test_a_merge_on_a_device_that_is_not_there_writes_nothing(families, tmp_path):
    _, paths = families["F16"]
    with pytest.raises(DeviceError, match=r"no device 'cuda:99'.*\n.*\n.*Nothing was written\."):
        streammerge.merge(streammerge.linear(paths[0]), output=tmp_path / "out.safetensors", device="cuda:99")
    assert not list(tmp_path.iterdir())


def test_a_device_without_float64_is_refused_what_needs_it(families, tmp_path):
    _, paths = families["F16"]

    def jobs(merge, **options):
        return streammerge.make_plan(merge, output=tmp_path / "out.safetensors", **options).jobs

    linear, slerp = streammerge.linear(*paths[:2], dtype="fp32"), streammerge.slerp(*paths[:2], t=0.5)
    mps = torch.device("mps")
    check_float64(CPU, jobs(linear))
    check_float64(mps, jobs(streammerge.linear(*paths[:2])))
    check_float64(mps, jobs(linear, compute_dtype="fp32"))
    for given in (jobs(linear), jobs(slerp), jobs(slerp, compute_dtype="fp32")):
        with pytest.raises(DeviceError, match=r"mps has no float64, which 9 tensors need"):
            check_float64(mps, given)


# ── dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.torch_name])
def test_torch_has_the_dtype_and_it_is_as_large_as_it_should_be(name):
    dtype = DTYPES[name]
    if hasattr(torch, dtype.torch_name):
        assert torch_dtype(dtype).itemsize * 8 == dtype.bits
        assert torch_dtype(dtype).is_floating_point == (dtype.mergeable or name == "F8_E8M0")


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if not dtype.torch_name])
def test_what_torch_cannot_hold_is_an_error(name):
    with pytest.raises(DeviceError, match=rf"this torch \(.*\) has no {name} elements\n  Install a newer torch"):
        torch_dtype(DTYPES[name])


# ── CUDA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def merge_on_cuda(path: Path, merge, **options):
    return merge_to(path, merge, device="cuda", **options)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("case", CASES, ids=str)
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


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("case", ONE_CASE_EACH, ids=str)
def test_cuda_gives_the_same_bytes_however_it_is_run(families, tmp_path, case):
    _, paths = families["F16"]
    once = merge_on_cuda(tmp_path / "once.safetensors", case.merge(paths))
    variants: list[dict[str, Any]] = [{"threads": 1}, {"threads": 4}, {"io": "pread"}, {"max_vram": "64MiB"}]
    for number, options in enumerate(variants):
        assert_same_bytes(merge_on_cuda(tmp_path / f"{number}.safetensors", case.merge(paths), **options), once)


@pytest.mark.cuda
@needs_cuda
def test_cuda_memory_stays_within_its_limit(families, tmp_path):
    _, paths = families["F16"]
    for limit in (16 << 20, 64 << 20):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        merge = streammerge.ties(*paths[1:], base=paths[0], density=0.5)
        report = streammerge.merge(
            merge, output=tmp_path / "out.safetensors", device="cuda", max_vram=limit, sync=False, force=True
        )
        assert 0 < report.peak_vram_bytes <= limit
        assert report.device == "cuda"


@pytest.mark.cuda
@needs_cuda
def test_a_cuda_lane_can_be_asked_again_before_its_copies_have_arrived(tmp_path):
    tensors = [normal((BLOCK,), seed, torch.float16) for seed in range(20)]
    nodes = store_tensors(tmp_path / "leaves", tensors)
    lane = open_lane(PositionalReader(), torch.device("cuda"))
    assert isinstance(lane, CudaLane)
    with lane.running():
        sums = [lane.load(node, 0, BLOCK, torch.float32, 0).double().sum() for node in nodes]
        found = [float(total) for total in sums]
    assert found == pytest.approx([float(tensor.double().sum()) for tensor in tensors], rel=1e-9)


class FakeEvent:
    """An event of a device that is never ready before it is waited for."""

    def __init__(self) -> None:
        self.recorded = self.awaited = False

    def record(self, stream: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded
        self.awaited = True


class FakeStream:
    """A stream that notes when it is waited for."""

    def __init__(self, device: Any = None) -> None:
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def cuda_on_the_cpu(monkeypatch):
    """CUDA's calls as far as a lane makes them, with the CPU as the device; gives the events that were made."""
    events: list[FakeEvent] = []

    def event() -> FakeEvent:
        events.append(FakeEvent())
        return events[-1]

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "pinned_bytes", lambda nbytes: bytes_of(torch.zeros(max(nbytes, 1), dtype=torch.uint8)))
    return events


@pytest.mark.parametrize("reader", [PositionalReader(), MappedReader()], ids=["pread", "mmap"])
def test_a_cuda_lane_waits_for_a_buffer_before_it_fills_it_again(tmp_path, cuda_on_the_cpu, reader):
    tensors = [normal((1000,), seed, torch.float16) for seed in range(6)]
    nodes = store_tensors(tmp_path / "leaves", tensors)
    lane = CudaLane(reader, torch.device("cpu"))
    with lane.running():
        for number, (node, tensor) in enumerate(zip(nodes, tensors, strict=True)):
            assert torch.equal(lane.load(node, 0, 1000, torch.float32, 0), tensor.float())
            awaited = [event.awaited for event in cuda_on_the_cpu]
            assert awaited == [True] * max(number - 1, 0) + [False] * min(number + 1, 2)
        assert torch.equal(lane.bring(tensors[0][:7], torch.float16, 3), tensors[0][:7])
        assert lane.bring(tensors[0][:0], torch.float32, 3).numel() == 0


def test_a_cuda_lane_hands_out_what_has_arrived(cuda_on_the_cpu):
    lane = CudaLane(PositionalReader(), torch.device("cpu"))
    values = normal((300,), 1)
    with lane.running():
        stored = lane.store(values, torch.bfloat16)
    assert lane.stream.waits == 1  # type: ignore[attr-defined]
    assert bytes(lane.stored_bytes(stored)) == raw_bytes(values.bfloat16())


@pytest.mark.parametrize(
    ("free", "wanted", "limit"),
    [(80 * 10**9, None, 512_000_000), (10**8, None, 9 * 10**7), (10**8, 10**6, 10**6), (10**9, 10**10, 9 * 10**8)],
)
def test_no_more_is_taken_of_a_card_than_is_free(monkeypatch, free, wanted, limit):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    assert vram_limit(torch.device("cuda"), wanted) == limit
    assert vram_limit(torch.device("cpu"), wanted) == wanted


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
