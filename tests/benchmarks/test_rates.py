"""The bare loop does what it says: it reads all, writes all, and waits for a range before it writes it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import rates
from benchmarks.card import Rate
from benchmarks.cuda import ROOT, TRIED
from benchmarks.rates import Device, Files, Limits, Ranges, Request


@pytest.fixture
def request_of_three(tmp_path) -> Request:
    """Three small files of one layout."""
    files = []
    for seed in range(3):
        path = tmp_path / f"{seed}.safetensors"
        values = torch.randn(1000, 33, generator=torch.Generator().manual_seed(seed)).half()
        save_file({"w": values, "b": values[0].clone()}, path)
        files.append(str(path))
    return dataclasses.replace(TRIED, files=files, folder=str(tmp_path))


def merged(path: Path, like: Path) -> dict[str, torch.Tensor]:
    """What the loop wrote, with the header that it leaves out."""
    whole = like.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    made = path.with_name("merged.safetensors")
    made.write_bytes(whole[:start] + path.read_bytes()[start:])
    return load_file(made)


@pytest.mark.parametrize(("elements", "threads"), [(2**6, 1), (2**9 + 1, 3), (2**20, 2), (5, 4)])
def test_the_loop_merges_every_element(request_of_three, elements, threads):
    told: list[Rate] = []
    limits = Limits(request_of_three, told.append)
    rate = limits.loop(elements, threads)
    files = [Path(file) for file in request_of_three.files]
    inputs = [load_file(file) for file in files]
    for name, found in merged(limits.files.output, files[0]).items():
        a, b, c = (model[name].float() for model in inputs)
        expected = 0.1 * a + 0.5 * b + 0.4 * c
        assert torch.allclose(found.float(), expected, rtol=1e-3, atol=1e-4)
    assert rate.nbytes == 4 * limits.files.nbytes == 4 * 2 * (33_000 + 33)


def test_a_range_is_written_once_it_has_arrived(request_of_three, monkeypatch):
    waiting: list[int] = []
    order: list[tuple[str, int]] = []

    def mark(self):
        number = len(waiting)
        waiting.append(number)
        return lambda: order.append(("arrived", number))

    monkeypatch.setattr(Device, "mark", mark)
    monkeypatch.setattr(rates, "write_at", lambda file, start, view: order.append(("written", start)))
    limits = Limits(request_of_three, lambda rate: None)
    limits.loop(10_000, 1)
    assert [what for what, _ in order] == ["arrived", "written"] * len(waiting)
    assert sorted(start for what, start in order if what == "written") == [
        start for start, _ in Ranges(limits.files, 20_000)
    ]


def test_two_ranges_are_under_way(request_of_three, monkeypatch):
    under_way, most = [0], [0]

    def mark(self):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])

        def arrived() -> None:
            under_way[0] -= 1

        return arrived

    monkeypatch.setattr(Device, "mark", mark)
    Limits(request_of_three, lambda rate: None).loop(1000, 1)
    assert (most, under_way) == ([2], [0])


def test_every_byte_is_handed_out_once(request_of_three):
    files = Files.of(request_of_three)
    ranges = list(Ranges(files, 4096))
    assert ranges[0][0] == files.start
    assert all(start + nbytes == after for (start, nbytes), (after, _) in itertools.pairwise(ranges))
    assert sum(nbytes for _, nbytes in ranges) == files.nbytes


def test_what_fails_in_a_thread_is_raised_and_leaves_nothing(request_of_three, tmp_path, monkeypatch):
    def fail(file, start, view):
        raise OSError("no such disk")

    monkeypatch.setattr(rates, "write_at", fail)
    with pytest.raises(OSError, match="no such disk"):
        Limits(request_of_three, lambda rate: None).measure()
    assert not (tmp_path / "rates.tmp").exists()


def test_files_of_other_sizes_are_refused(request_of_three):
    save_file({"w": torch.ones(3)}, request_of_three.files[1])
    with pytest.raises(ValueError, match="not one layout"):
        Files.of(request_of_three)


def test_a_file_that_ends_early_is_told(tmp_path):
    (tmp_path / "short").write_bytes(b"123")
    with (tmp_path / "short").open("rb", buffering=0) as file, pytest.raises(EOFError):
        rates.read_at(file, 1, memoryview(bytearray(5)))


def test_it_is_a_program_that_prints_each_figure(request_of_three, tmp_path):
    asked = tmp_path / "request.json"
    asked.write_text(json.dumps(dataclasses.asdict(request_of_three)))
    words = [sys.executable, "-m", "benchmarks.rates", str(asked)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    found = [Rate(**json.loads(line)) for line in done.stdout.splitlines()]
    steps = ["to the card", "from the card", *["reading"] * 2, *["writing"] * 2, *["loop"] * 4]
    assert [rate.step for rate in found] == steps
    assert all(rate.seconds > 0 and rate.nbytes > 0 for rate in found)
