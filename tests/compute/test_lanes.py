"""Lanes: slots, staging, and memory that runs out."""

from __future__ import annotations

import pytest
import torch

from streammerge.compute import devices
from streammerge.compute.devices import is_out_of_memory, no_memory_left, open_lane, open_lanes
from streammerge.compute.expressions import BLOCK
from streammerge.compute.lanes import Lane, StagedLane
from streammerge.compute.machine import Allotment
from streammerge.errors import OutOfMemoryError
from streammerge.formats.readers import MappedReader, PositionalReader
from tests.make.models import DTYPE_NAMES, assert_same_bytes, merge_to, normal, raw_bytes, store_tensors
from tests.references.cases import CASES, ONE_CASE_EACH

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[] if case in ONE_CASE_EACH and dtype == "F16" else pytest.mark.slow)
        for case in CASES
        for dtype in ("F16", "F32")
    ],
    ids=str,
)
def test_a_staged_lane_gives_the_same_bytes(families, tmp_path, monkeypatch, case, dtype):
    _, paths = families[dtype]
    plain = merge_to(tmp_path / "plain.safetensors", case.merge(paths))
    monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    used = []

    def open_staged(reader, device, blocks):
        used.append(device)
        return StagedLane(reader, device)

    monkeypatch.setattr(devices, "open_lane", open_staged)
    staged = merge_to(tmp_path / "staged.safetensors", case.merge(paths))
    assert used
    assert_same_bytes(staged, plain)


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
        monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
        monkeypatch.setattr(SmallCard, "room_for", elements)
        monkeypatch.setattr(SmallCard, "refused", 0)
        monkeypatch.setattr(devices, "open_lane", lambda reader, device, blocks: SmallCard(reader, device))

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
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
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
    lanes = open_lanes([CPU], "mmap", Allotment(3, 4 << 20, 0))
    assert [type(lane) for lane in lanes] == [Lane] * 3
    readers = [lane.reader for lane in lanes]
    assert len({id(reader) for reader in readers}) == 3
    assert all(isinstance(reader, MappedReader) and reader.most == 2 for reader in readers)
    (lane,) = open_lanes([CPU], "pread", Allotment(1, 0, 0))
    assert isinstance(lane.reader, PositionalReader)
    assert type(open_lane(PositionalReader(), torch.device("mps"))) is StagedLane
