"""Both readers give a file's bytes, whatever the windows, the limits and the order of asking."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.errors import CheckpointError
from streammerge.formats import readers as reading
from streammerge.formats.files import ByteFile
from streammerge.formats.readers import WINDOW_BYTES, MappedReader, PositionalReader, open_reader, page_aligned

SIZE = 100_003


@pytest.fixture(scope="module")
def content():
    return os.urandom(SIZE)


@pytest.fixture
def file(tmp_path, content):
    path = tmp_path / "bytes"
    path.write_bytes(content)
    opened = ByteFile(path)
    yield opened
    opened.close()


def files_of(folder: Path, count: int) -> list[ByteFile]:
    opened = []
    for number in range(count):
        (folder / str(number)).write_bytes(bytes([number]) * 50_000)
        opened.append(ByteFile(folder / str(number)))
    return opened


@pytest.fixture(params=["mmap", "pread"])
def io(request):
    return request.param


@pytest.mark.parametrize("limit", [0, 1, WINDOW_BYTES, 5 * WINDOW_BYTES])
@pytest.mark.parametrize("window", [1, 4096, 10_000, WINDOW_BYTES])
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE), st.integers(0, 3)), max_size=20))
def test_any_requests_give_the_files_bytes(file, content, io, limit, window, requests):
    original, reading.WINDOW_BYTES = reading.WINDOW_BYTES, window  # type: ignore[misc]
    try:
        reader = open_reader(io, limit)
        for start, count, slot in requests:
            stop = min(start + count, SIZE)
            assert bytes(reader.read(file, start, stop, slot)) == content[start:stop]
        reader.release()
    finally:
        reading.WINDOW_BYTES = original  # type: ignore[misc]


def test_the_modes_are_what_they_are_called():
    assert isinstance(open_reader("mmap", 1), MappedReader)
    assert isinstance(open_reader("pread", 1), PositionalReader)


def test_the_first_and_the_last_byte(file, content, io):
    reader = open_reader(io, 0)
    assert bytes(reader.read(file, 0, 1, 0)) == content[:1]
    assert bytes(reader.read(file, SIZE - 1, SIZE, 0)) == content[-1:]
    assert bytes(reader.read(file, 0, SIZE, 0)) == content


def test_slots_are_valid_side_by_side(file, content, io):
    reader = open_reader(io, 4 * WINDOW_BYTES)
    spans = [(0, 500), (70_000, 70_900), (123, 99_000)]
    views = [reader.read(file, start, stop, slot) for slot, (start, stop) in enumerate(spans)]
    assert [bytes(view) for view in views] == [content[start:stop] for start, stop in spans]


def test_releasing_allows_to_go_on(file, content, io):
    reader = open_reader(io, 4 * WINDOW_BYTES)
    for _ in range(3):
        assert bytes(reader.read(file, 10, 20, 0)) == content[10:20]
        reader.release()


# ── mapping ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_window_is_mapped_once_for_all_that_lies_in_it(file, content, monkeypatch):
    mapped = []
    original = mmap.mmap

    def counting(*args, **kwargs):
        mapped.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(mmap, "mmap", counting)
    monkeypatch.setattr(reading, "WINDOW_BYTES", 16_384)
    reader = MappedReader(2 * 16_384)
    for start in range(0, SIZE - 100, 100):
        assert bytes(reader.read(file, start, start + 100, 0)) == content[start : start + 100]
    assert SIZE / 16_384 <= len(mapped) <= SIZE / 12_000
    assert all(call["offset"] % mmap.ALLOCATIONGRANULARITY == 0 for call in mapped)
    assert all(call["access"] == mmap.ACCESS_READ for call in mapped)


def test_the_oldest_window_makes_room(tmp_path):
    reader = MappedReader(2 * WINDOW_BYTES)
    files = files_of(tmp_path, 5)
    for number, file in enumerate(files):
        assert reader.read(file, 0, 1, 0)[0] == number
    assert reader.most == 2
    assert list(reader._windows) == files[-2:]
    reader.release()
    assert not reader._windows


@pytest.mark.parametrize("limit", [0, 1, WINDOW_BYTES - 1])
def test_one_window_there_is_however_small_the_limit(tmp_path, limit):
    reader = MappedReader(limit)
    views = [reader.read(file, 5, 9, 0) for file in files_of(tmp_path, 4)]
    assert len(reader._windows) == 1
    assert [bytes(view) for view in views] == [bytes([number] * 4) for number in range(4)]


def test_bytes_outlive_their_window(file, content):
    reader = MappedReader(0)
    kept = reader.read(file, 40_000, 50_000, 0)
    reader.read(file, 0, 10, 0)
    reader.release()
    assert bytes(kept) == content[40_000:50_000]


def test_mapped_bytes_cannot_be_written_to(file):
    view = MappedReader().read(file, 0, 10, 0)
    assert view.readonly
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 0


@pytest.mark.skipif(sys.platform != "linux", reason="counts the process's mappings")
def test_released_windows_are_unmapped(file):
    def mappings() -> int:
        return Path("/proc/self/maps").read_text(encoding="utf-8").count(str(file.path))

    reader = MappedReader()
    view = reader.read(file, 0, SIZE, 0)
    assert mappings() == 1
    del view
    reader.release()
    assert mappings() == 0


# ── positional reading ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_slots_buffer_is_used_again(file, content):
    reader = PositionalReader()
    first = reader.read(file, 0, 1000, 0)
    second = reader.read(file, 1000, 1500, 0)
    assert bytes(second) == content[1000:1500]
    assert bytes(first[:500]) == content[1000:1500]  # the same memory


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    (file,) = files_of(tmp_path, 1)
    reader = PositionalReader()
    reader.read(file, 0, 10, 0)
    os.truncate(file.path, 20_000)
    with pytest.raises(CheckpointError, match=r"ended while it was read: 10000 bytes are missing at byte 20000"):
        reader.read(file, 10_000, 30_000, 0)


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 5000])
def test_page_aligned_memory(nbytes):
    memory = page_aligned(nbytes)
    assert len(memory) == nbytes
    assert bytes(memory) == bytes(nbytes)
    assert not memory.readonly
