"""Ranges of files read by one call: what reading one after the other gives, in what can't be read too."""

from __future__ import annotations

import os

import pytest

from streammerge.compute.kernels import library
from streammerge.compute.kernels.library import filled, kernels
from streammerge.errors import CheckpointError
from streammerge.formats.files import ByteFile
from streammerge.formats.readers import FileRange, PositionalReader

with_loops = pytest.mark.skipif(kernels() is None, reason="the compiled loops are not built")

SIZES = (1, 4096, 100_003, 0)


@pytest.fixture
def files(tmp_path):
    opened = []
    for number, size in enumerate(SIZES):
        (tmp_path / str(number)).write_bytes(os.urandom(size))
        opened.append(ByteFile(tmp_path / str(number)))
    yield opened
    for file in opened:
        file.close()


@pytest.mark.parametrize("fill", [None, filled])
@pytest.mark.parametrize("again", [1, 3])
def test_the_bytes_are_the_files(files, fill, again):
    reader = PositionalReader(fill=fill)
    ranges = [
        FileRange(file, start, max(size - 1, start))
        for file, size in zip(files, SIZES, strict=True)
        for start in (0, size // 3)
    ]
    for _ in range(again):
        found = reader.read_all(ranges)
        assert [bytes(block) for block in found] == [
            part.file.path.read_bytes()[part.start : part.stop] for part in ranges
        ]
        ranges = ranges[::-1]


@with_loops
def test_all_of_them_are_read_by_the_call(files):
    ranges = [FileRange(file, 0, size) for file, size in zip(files, SIZES, strict=True)]
    buffers = [memoryview(bytearray(size)) for size in SIZES]
    assert filled(ranges, buffers) == len(SIZES)
    assert bytes(buffers[2]) == files[2].path.read_bytes()


@pytest.mark.parametrize("fill", [None, filled])
def test_a_file_that_became_shorter_is_an_error(files, fill):
    ranges = [FileRange(file, 0, size) for file, size in zip(files, SIZES, strict=True)]
    assert files[2].descriptor
    os.truncate(files[2].path, 4096)
    with pytest.raises(CheckpointError, match="a file ended while it was read: 95907 bytes are missing at byte 4096"):
        PositionalReader(fill=fill).read_all(ranges)


@with_loops
def test_how_many_were_filled_is_told(files, monkeypatch):
    ranges = [FileRange(files[number], 0, SIZES[number]) for number in (0, 2, 1)]
    assert files[2].descriptor
    os.truncate(files[2].path, 0)
    buffers = [memoryview(bytearray(SIZES[number])) for number in (0, 2, 1)]
    assert filled(ranges, buffers) == 1
    monkeypatch.setattr(library, "kernels", lambda: None)
    assert filled(ranges, buffers) == 0
