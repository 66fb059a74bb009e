"""The floor reads and writes what it says, and leaves nothing behind."""

import os
import sys
from pathlib import Path

import pytest

from streammerge.tools.bench import floor
from streammerge.tools.bench.floor import (
    DiskRate,
    Floor,
    chill,
    measure_floor,
    probe_disk,
    read_rate_uncached,
    read_through,
    warm,
)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / name for name in ("a", "b")]
    for number, path in enumerate(paths, 1):
        path.write_bytes(os.urandom(number * 3_000_001))
    return paths


@pytest.mark.parametrize("programs", [True, False])
def test_the_floor_takes_time_and_leaves_nothing(files, tmp_path, monkeypatch, programs):
    if not programs:
        monkeypatch.setattr("shutil.which", lambda name: None)
    place = tmp_path / "place"
    place.mkdir()
    found = measure_floor(files, files[1:], place)
    assert found.read > 0
    assert found.write > 0
    assert found.seconds == found.read + found.write
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("programs", [True, False])
def test_the_copy_is_whole(files, tmp_path, monkeypatch, programs):
    if not programs:
        monkeypatch.setattr("shutil.which", lambda name: None)
    place = tmp_path / "place"
    place.mkdir()
    floor._copy_all(files, place)
    for path in files:
        assert (place / path.name).read_bytes() == path.read_bytes()


def test_an_input_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FileNotFoundError):
        measure_floor([tmp_path / "none"], [], tmp_path)


def test_the_copies_are_removed_when_copying_fails(files, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FileNotFoundError):
        measure_floor(files, [tmp_path / "none"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_all_bytes_are_read(files):
    assert [read_through(path) for path in files] == [3_000_001, 6_000_002]
    warm(files)


def test_the_disk_probe_is_cleaned_up(tmp_path):
    rate = probe_disk(tmp_path, 4 << 20)
    assert rate.write > 1e5
    assert rate.read > 1e5 or sys.platform != "linux"
    assert list(tmp_path.iterdir()) == []


def test_chilling_changes_no_bytes(files):
    before = [path.read_bytes() for path in files]
    chill(files)
    assert [path.read_bytes() for path in files] == before


def test_where_caches_cannot_be_dropped_it_is_said(files, monkeypatch, tmp_path):
    monkeypatch.delattr("os.posix_fadvise", raising=False)
    monkeypatch.setattr(floor, "DROP_CACHES", tmp_path / "no" / "such" / "file")
    assert chill(files) is False
    assert read_rate_uncached(files) == 0.0
    assert probe_disk(tmp_path, 1 << 20).read == 0.0


def test_plain_values():
    assert Floor(1.0, 2.0).seconds == 3.0
    assert DiskRate(1.0, 0.0).read == 0.0
