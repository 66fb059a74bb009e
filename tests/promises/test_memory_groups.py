"""The plan's figure for memory, held by the system: in a control group of it and a tenth, every kind of merge passes.

The group feels page cache too, and has no swap. The base line is what a bare `import torch` takes that can't be
reclaimed, so that the memory of shared libraries doesn't make it easy.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.groups import memory_group
from benchmarks.tools import CannotRun
from streammerge.cli.main import main
from streammerge.compute.machine import MIB
from tests.make.large_models import models_of_sizes
from tests.make.models import make_tensors, save_models

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")

SHARE = 1.1

KINDS: dict[str, list[str]] = {
    "linear": ["{a}:0.3", "{b}:0.3", "{base}:0.4"],
    "gram": ["{a}", "{b}", "-m", "slerp", "-p", "t=0.3"],
    "block": ["{a}:0.5", "{b}:0.5", "-m", "ties", "--base", "{base}", "-p", "density=0.3", "-p", "scope=tensor"],
    "model scope": ["{a}:0.5", "{b}:0.5", "-m", "ties", "--base", "{base}", "-p", "density=0.3", "-p", "scope=model"],
    "whole": ["{a}", "-m", "truncate_rank", "--base", "{base}", "-p", "rank=8"],
}
"""A method of each kind."""


@pytest.fixture(scope="module")
def torch_bytes() -> int:
    """What a process that only imports torch takes and can't give back."""
    script = "import torch, re; print(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return int(done.stdout) * 1024


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes three models of a size, once."""
    yield from models_of_sizes(tmp_path_factory)


def run_in_group(words: Sequence[str], limit: int) -> subprocess.CompletedProcess[str]:
    """Run the program in a control group of so many bytes; skip where that is not permitted."""
    enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    try:
        with memory_group(limit) as group:
            command = ["sh", "-c", enter, str(group), sys.executable, "-m", "streammerge", *words]
            return subprocess.run(command, capture_output=True, text=True, check=False)
    except CannotRun as reason:
        pytest.skip(str(reason))


def planned_bytes(words: Sequence[str]) -> int:
    """The plan's own figure, above a bare `import torch`."""
    command = [sys.executable, "-m", "streammerge", "plan", *words, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout)["work_ram_bytes"])


def check_kind(kind: str, paths: dict[str, Path], output: Path, torch_bytes: int, *options: str) -> None:
    words = [*(word.format(**paths) for word in KINDS[kind]), *options]
    limit = round(SHARE * (torch_bytes + planned_bytes(words)))
    done = run_in_group([*words, "-o", str(output), "--no-sync", "-q"], limit)
    assert done.returncode == 0, f"{kind} in {limit / MIB:.0f} MiB: {done.returncode} {done.stderr}"
    assert output.exists()
    output.unlink()


def test_a_merge_passes_in_what_its_plan_says_and_a_tenth(models, tmp_path, torch_bytes):
    check_kind("linear", models(30), tmp_path / "out.safetensors", torch_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_merge_passes_in_what_its_plan_says_and_a_tenth(models, tmp_path, torch_bytes, kind, io):
    size = 20 if kind == "whole" else 250  # each model is larger than the group
    check_kind(kind, models(size), tmp_path / "out.safetensors", torch_bytes, "--io", io)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "gram", "block", "model scope"])
def test_the_least_that_works_works_in_a_group_of_it_and_a_tenth(models, tmp_path, kind):
    paths, output = models(100), tmp_path / "out.safetensors"
    words = [*(word.format(**paths) for word in KINDS[kind]), "-o", str(output), "--no-sync", "-q"]
    refused = subprocess.run(
        [sys.executable, "-m", "streammerge", *words, "--max-ram", "10MB"], capture_output=True, text=True, check=False
    )
    least = re.search(r"The least that works is (\d+)MiB", refused.stderr)
    assert least, refused.stderr
    limit = int(least[1]) + 2  # the base line differs by a page or two
    done = run_in_group([*words, "--max-ram", f"{limit}MiB"], round(SHARE * limit * MIB))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "whole"])
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_limit_below_the_least_is_an_error_before_anything_is_read(tmp_path, monkeypatch, capsys, kind, io):
    paths = save_models(tmp_path, base=make_tensors(0), a=make_tensors(1), b=make_tensors(2))

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a weight was read, or something was made")

    for place in (
        "streammerge.formats.readers.read_at",
        "streammerge.formats.readers.map_window",
        "streammerge.storage.writer.preallocate",
    ):
        monkeypatch.setattr(place, never)
    words = [word.format(**paths) for word in KINDS[kind]]
    assert main([*words, "-o", str(tmp_path / "new" / "out.safetensors"), "--io", io, "--max-ram", "10MB", "-q"]) == 1
    message = capsys.readouterr().err
    assert "--max-ram 10 MB is too small" in message
    assert re.search(r"The least that works is \d+MiB\. Nothing was written\.", message)
    assert not (tmp_path / "new").exists()
