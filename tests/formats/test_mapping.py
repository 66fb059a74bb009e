"""Mapped windows whose file shrinks, or whose disk fails: an error, and the process lives on."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from streammerge.cli.main import main
from streammerge.errors import CheckpointError
from streammerge.formats import mapping
from streammerge.formats.files import ByteFile
from streammerge.formats.mapping import address_of, bus_errors_are_caught, check_windows, map_window
from streammerge.formats.readers import MappedReader
from tests.make.models import load_model, make_tensors, save_models

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="there is no SIGBUS here"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # torch says so once, to whoever is first
]

SIZE = 1 << 20
PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(range(256)) * (SIZE // 256))
    opened = ByteFile(tmp_path / "weights")
    yield opened
    opened.close()


def touch(view: memoryview) -> int:
    """Read every byte in a loop of torch's, which holds no lock on the interpreter."""
    return int(torch.frombuffer(view, dtype=torch.uint8).long().sum())


def test_the_address_is_where_the_bytes_are(file):
    mapped = map_window(file, 0, SIZE)
    assert ctypes.string_at(address_of(mapped), 300) == bytes(mapped[:300])


def test_a_file_that_shrinks_while_it_is_mapped_is_an_error(file):
    reader = MappedReader()
    with bus_errors_are_caught():
        view = reader.read(file, 0, SIZE, 0)
        assert touch(view) == sum(range(256)) * (SIZE // 256)
        os.truncate(file.path, 0)
        assert touch(view) == 0  # zeros are in its place, and nobody is to use them
        with pytest.raises(CheckpointError, match="weights: the file changed while it was being merged"):
            reader.read(file, 0, 10, 0)
        check_windows()  # it is told once


def test_python_itself_may_read_what_is_gone(file):
    """Copying bytes keeps the lock on the interpreter, unlike torch."""
    reader = MappedReader()
    with bus_errors_are_caught():
        view = reader.read(file, 0, SIZE, 0)
        os.truncate(file.path, 0)
        assert bytes(view[PAGE:]) == bytes(SIZE - PAGE)
        with pytest.raises(CheckpointError, match="the file changed"):
            reader.release()


def test_bytes_that_outlive_their_window_are_guarded_too(file, tmp_path):
    reader = MappedReader(0)
    (tmp_path / "other").write_bytes(bytes(100))
    other = ByteFile(tmp_path / "other")
    with bus_errors_are_caught():
        view = reader.read(file, 0, SIZE, 0)
        reader.read(other, 0, 10, 0)  # there is room for one window
        os.truncate(file.path, 0)
        assert touch(view) == 0
        with pytest.raises(CheckpointError, match="the file changed"):
            reader.release()
    other.close()


def test_a_disk_that_fails_is_told_apart_from_a_file_that_changed(file):
    """The file is long again when it is looked at, so it is the disk that is to blame."""
    status = file.path.stat()
    reader = MappedReader()
    with bus_errors_are_caught():
        view = reader.read(file, 0, SIZE, 0)
        os.truncate(file.path, 0)
        touch(view)
        os.truncate(file.path, SIZE)
        os.utime(file.path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(CheckpointError, match=r"weights: can't be read where it is mapped.*the disk or the"):
            reader.release()


def test_every_thread_answers_for_its_own_windows(file):
    """Two threads read the same file, one another: only the two get the error."""
    problems: dict[str, bool] = {}
    mapped, shortened = threading.Barrier(4), threading.Event()

    def work(name: str, path: ByteFile) -> None:
        reader = MappedReader()
        view = reader.read(path, 0, SIZE, 0)
        mapped.wait()
        shortened.wait()
        touch(view)
        try:
            reader.release()
        except CheckpointError:
            problems[name] = True
        else:
            problems[name] = False

    (file.path.with_name("untouched")).write_bytes(bytes(SIZE))
    untouched = ByteFile(file.path.with_name("untouched"))
    with bus_errors_are_caught():
        threads = [
            threading.Thread(target=work, args=(name, path))
            for name, path in (("a", file), ("b", file), ("c", untouched))
        ]
        for thread in threads:
            thread.start()
        mapped.wait()
        os.truncate(file.path, PAGE)
        shortened.set()
        for thread in threads:
            thread.join()
    untouched.close()
    assert problems == {"a": True, "b": True, "c": False}


def test_a_file_that_is_too_short_to_be_mapped_is_an_error(file):
    assert file.descriptor
    os.truncate(file.path, 10)
    with pytest.raises(CheckpointError, match="weights: the file changed"):
        map_window(file, PAGE, PAGE)


@pytest.mark.parametrize("number", [12, 19])
def test_a_file_system_that_does_not_map_is_an_error_that_names_the_file(file, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(CheckpointError, match=f"weights: can't be read: {os.strerror(number)}"):
        map_window(file, 0, PAGE)


def test_the_handler_before_is_given_back():
    def current() -> bytes:
        action = ctypes.create_string_buffer(mapping.ACTION_BYTES)
        ctypes.CDLL(None).sigaction(signal.SIGBUS, None, action)
        return action.raw[: ctypes.sizeof(ctypes.c_void_p)]  # the handler's address comes first everywhere

    before = current()
    with bus_errors_are_caught():
        within = current()
        with bus_errors_are_caught():
            assert current() == within
        assert current() == within
    assert current() == before != within


def test_other_bus_errors_kill_as_they_always_did(tmp_path):
    """Memory that is none of our windows: the process dies of the signal."""
    script = f"""
import mmap, os, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from streammerge.formats.mapping import bus_errors_are_caught
path = {str(tmp_path / "x")!r}
open(path, "wb").write(bytes(10_000))
with open(path, "r+b") as file, bus_errors_are_caught():
    mapped = mmap.mmap(file.fileno(), 10_000)
    os.truncate(path, 0)
    mapped[9_000]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGBUS


@pytest.mark.parametrize("loops", ["on", "off"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_merge_of_a_file_that_shrinks_fails_with_words_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, threads, loops
):
    """The file is shortened under a window that is mapped and about to be read: without the handler the tests die."""
    paths = save_models(tmp_path, a=make_tensors(1), b=make_tensors(2))
    whole, hits = MappedReader.read, []

    def shortening(reader, file, start, stop, slot):
        values = whole(reader, file, start, stop, slot)
        if file.path == paths["b"] and len(values) > 400_000:
            os.truncate(paths["b"], 1000)
            hits.append(file)
        return values

    monkeypatch.setenv("STREAMMERGE_KERNELS", loops)
    monkeypatch.setattr(MappedReader, "read", shortening)
    words = [str(paths["a"]), str(paths["b"]), "-o", str(tmp_path / "out.safetensors"), "--io", "mmap", "-q"]
    assert main([*words, "--threads", str(threads)]) == 1
    assert hits
    message = capsys.readouterr().err
    assert "b.safetensors: the file changed while it was being merged" in message
    assert "The unfinished output was removed." in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_merge_goes_on_to_guard_after_one_that_failed(tmp_path):
    paths = save_models(tmp_path, a=make_tensors(1), b=make_tensors(2))
    assert mapping._guards == 0
    words = [str(paths["a"]), str(paths["b"]), "-o", str(tmp_path / "out.safetensors"), "--io", "mmap", "-q"]
    assert main(words) == 0
    assert load_model(tmp_path / "out.safetensors").keys() == make_tensors(1).keys()
    assert mapping._guards == 0
