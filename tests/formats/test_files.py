"""Files whose ranges are read and written: whole or not at all, and known to be the same file still."""

from __future__ import annotations

import importlib.util
import os
import threading

import pytest

from streammerge.errors import CheckpointError
from streammerge.formats import descriptors as positional
from streammerge.formats.files import ByteFile, identify, is_cached

CONTENT = bytes(range(256)) * 4


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def descriptor(path):
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def without_positional_calls(monkeypatch):
    """The module as it is where the system has neither preadv nor pwrite."""
    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(os, name, raising=False)
    spec = importlib.util.spec_from_file_location("positional_of_windows", positional.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ── reading and writing at a position ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (3, 700), (1000, 1024), (0, 1024)])
def test_a_range_is_read(descriptor, start, stop):
    buffer = bytearray(stop - start)
    positional.read_at(descriptor, memoryview(buffer), start)
    assert buffer == CONTENT[start:stop]


def test_reading_goes_on_after_short_reads(descriptor, monkeypatch):
    calls = []
    whole = os.preadv

    def short(file, buffers, offset):
        calls.append(offset)
        return whole(file, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", short)
    buffer = bytearray(100)
    positional.read_at(descriptor, memoryview(buffer), 50)
    assert buffer == CONTENT[50:150]
    assert calls == list(range(50, 150, 7))


def test_writing_goes_on_after_short_writes(descriptor, path, monkeypatch):
    calls = []
    whole = os.pwrite

    def short(file, data, offset):
        calls.append(offset)
        return whole(file, data[:7], offset)

    monkeypatch.setattr(os, "pwrite", short)
    positional.write_at(descriptor, memoryview(b"x" * 100), 50)
    assert path.read_bytes() == CONTENT[:50] + b"x" * 100 + CONTENT[150:]
    assert calls == list(range(50, 150, 7))


@pytest.mark.parametrize(
    ("offset", "size", "missing", "end"), [(1000, 30, 6, 1024), (1024, 1, 1, 1024), (5000, 9, 9, 5000)]
)
def test_a_file_that_ends_too_early_is_an_error(descriptor, offset, size, missing, end):
    problem = f"a file ended while it was read: {missing} bytes are missing at byte {end}"
    with pytest.raises(CheckpointError, match=problem):
        positional.read_at(descriptor, memoryview(bytearray(size)), offset)


def test_a_disk_that_fails_is_an_error_of_the_checkpoint(descriptor, monkeypatch):
    def failing(file, buffers, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match="can't be read at byte 12: Input/output error"):
        positional.read_at(descriptor, memoryview(bytearray(3)), 12)


def test_a_disk_that_is_full_stays_a_system_error_for_the_writer_to_name(descriptor, monkeypatch):
    def failing(file, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OSError, match="No space left"):
        positional.write_at(descriptor, memoryview(b"x"), 0)


def test_systems_without_positional_calls_seek(descriptor, path, monkeypatch):
    module = without_positional_calls(monkeypatch)
    buffer = bytearray(300)
    module.read_at(descriptor, memoryview(buffer), 17)
    assert buffer == CONTENT[17:317]
    module.write_at(descriptor, memoryview(b"abc"), 1022)
    assert path.read_bytes() == CONTENT[:1022] + b"abc"
    with pytest.raises(CheckpointError, match="1 bytes are missing at byte 1025"):
        module.read_at(descriptor, memoryview(bytearray(4)), 1022)


@pytest.mark.parametrize("fallback", [False, True])
def test_threads_do_not_disturb_each_other(descriptor, monkeypatch, fallback):
    module = without_positional_calls(monkeypatch) if fallback else positional
    wrong = []

    def work(number):
        for turn in range(200):
            start = (37 * number + 11 * turn) % 900
            buffer = bytearray(100)
            module.read_at(descriptor, memoryview(buffer), start)
            if buffer != CONTENT[start : start + 100]:
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ── the file's identity ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_opened_only_when_it_is_read(path):
    file = ByteFile(path)
    assert file.nbytes == len(CONTENT)
    assert file._descriptor is None
    assert os.pread(file.descriptor, 4, 1) == CONTENT[1:5]
    assert file.descriptor == file.descriptor
    file.close()
    assert file._descriptor is None
    file.close()  # once more does no harm
    assert str(path) in repr(file)


def change_size(path):
    with path.open("ab") as file:
        file.write(b"x")


def change_content(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replace_with_a_copy(path):
    status = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


@pytest.mark.parametrize("change", [change_size, change_content, replace_with_a_copy])
def test_a_file_that_changes_is_found_out(path, change):
    file = ByteFile(path)
    file.check_unchanged()
    change(path)
    with pytest.raises(CheckpointError, match=r"x.bin: the file changed while it was being merged"):
        file.check_unchanged()
    with pytest.raises(CheckpointError, match="the file changed"):
        _ = file.descriptor


def test_a_file_that_is_gone_is_found_out(path):
    file = ByteFile(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x.bin: can't be read: No such file"):
        file.check_unchanged()


def test_a_file_that_may_not_be_opened_is_an_error_that_names_it(path, monkeypatch):
    file = ByteFile(path)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"x.bin: can't be read: Permission denied"):
        _ = file.descriptor


def test_what_is_no_regular_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no regular file"):
        ByteFile(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe: is no regular file"):
        ByteFile(tmp_path / "pipe")


def test_a_missing_file_is_an_error_that_says_what_is_read(tmp_path):
    with pytest.raises(CheckpointError, match="missing: can't be read: No such file or directory\n  Check the path"):
        identify(tmp_path / "missing")


def test_a_link_is_known_by_what_it_points_to(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    assert identify(link) == identify(path)
    file = ByteFile(link)
    link.unlink()
    (tmp_path / "other").write_bytes(CONTENT)
    link.symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="link: the file changed"):
        file.check_unchanged()


def test_reading_ahead_is_only_a_wish(path, monkeypatch):
    file = ByteFile(path)
    file.will_need(0, 100)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    file.will_need(0, 100)
    file.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not tell")
def test_only_what_is_not_cached_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(100_000))
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, start, count, advice: asked.append((start, count)))
    file = ByteFile(tmp_path / "a")
    try:
        os.preadv(file.descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system does not tell")
    assert is_cached(file.descriptor, 10, 90_000)  # it has just been written
    file.will_need(10, 90_000)
    assert asked == []

    def would_wait(descriptor, buffers, place, flags):
        if place > 50_000:
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "preadv", would_wait)
    file.will_need(10, 90_000)
    assert asked == [(10, 89_990)]
    assert not is_cached(file.descriptor, 5, 5)
    file.close()


def test_what_can_not_be_told_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(100))
    file = ByteFile(tmp_path / "a")
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    assert not is_cached(file.descriptor, 0, 100)
    file.close()
