"""The bytes of the output depend on the recipe alone: not on threads, reading, memory limits, shards or windows."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.compute import costs
from streammerge.compute.expressions import BLOCK
from streammerge.compute.machine import MIB
from streammerge.errors import PlanError
from streammerge.methods import METHODS, Target
from streammerge.methods.registry import WholeMethod
from streammerge.workers import machine
from tests.make.models import (
    SHAPES,
    Tensors,
    assert_same_bytes,
    load_model,
    make_tensors,
    merge_to,
    near,
    save_model,
    with_integers,
)
from tests.references.cases import ONE_CASE_EACH, ONE_OF_A_KIND, mostly

BASELINE = 400 * MIB
"""What the process is said to take before the merge, so that limits mean the same in every run."""

WINDOWED = {**SHAPES, "layers.3.several.windows": (3, BLOCK + BLOCK // 2)}
"""The largest tensor has 5 blocks: 3 windows of 2 blocks."""

CASES = {case.method: case for case in ONE_CASE_EACH}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(costs, "WINDOW", 2)
    monkeypatch.setattr(machine, "resident_bytes", lambda: BASELINE)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A base and three models near to it, in float16."""
    folder = tmp_path_factory.mktemp("models")
    base = with_integers(make_tensors(0, torch.float16, WINDOWED))
    models = [base, *(near(base, seed) for seed in (1, 2, 3))]
    return [save_model(folder / f"{number}.safetensors", model) for number, model in enumerate(models)]


@pytest.fixture(scope="module")
def plain(paths, tmp_path_factory):
    """The outputs by method, merged in the plainest way: one thread, positional reading, a window for each tensor."""
    outputs: dict[str, Tensors] = {}

    def output(method: str) -> Tensors:
        if method not in outputs:
            folder = tmp_path_factory.mktemp(method)
            outputs[method] = merge_to(folder / "out.safetensors", CASES[method].merge(paths), threads=1, io="pread")
        return outputs[method]

    return output


SINGLY: dict[str, dict[str, Any]] = {
    "mapped": {"threads": 1, "io": "mmap"},
    "2 threads": {"threads": 2, "io": "pread"},
    "8 threads": {"threads": 8, "io": "mmap"},
    "verified": {"threads": 2, "verify": True},
    "synced": {"threads": 2, "sync": True},
    "hashed, and refused if not finite": {"threads": 2, "hash": True, "on_nonfinite": "error"},
    "much memory": {"max_ram": "4GiB"},
    "little memory": {"threads": 8},
    "by torch": {"threads": 2},
}

TOGETHER: dict[str, dict[str, Any]] = {
    "mapped, verified, synced, hashed": {
        "threads": 2,
        "io": "mmap",
        "verify": True,
        "sync": True,
        "hash": True,
        "on_nonfinite": "error",
        "max_ram": "4GiB",
    },
    "8 threads, read": {"threads": 8, "io": "pread"},
    "by torch in little memory": {"threads": 8},
}
"""What is of no effect alone has none together: every method shows that, and some of every kind show each way."""


def whole_bytes(method: str) -> int:
    """What a method may take beside the little that is enough for others, because it needs whole tensors."""
    found, case = METHODS[method], CASES[method]
    if not isinstance(found, WholeMethod):
        return 0
    largest = max(map(math.prod, WINDOWED.values()))
    held = [found.held(Target("w", shape, case.models + 1), {}) for shape in WINDOWED.values()] if found.held else [0]
    return 4 * largest * (case.models + 2 + found.temporaries) + max(held)


@pytest.mark.parametrize("way", TOGETHER)
@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_do_not_depend_on_how_it_is_run(paths, plain, tmp_path, monkeypatch, method, way):
    assert_the_way_does_not_matter(paths, plain(method), tmp_path, monkeypatch, method, way)


@pytest.mark.parametrize("way", SINGLY)
@pytest.mark.parametrize("method", mostly(ONE_OF_A_KIND, METHODS))
def test_the_bytes_do_not_depend_on_any_one_way(paths, plain, tmp_path, monkeypatch, method, way):
    assert_the_way_does_not_matter(paths, plain(method), tmp_path, monkeypatch, method, way)


def assert_the_way_does_not_matter(paths, plainly: Tensors, tmp_path, monkeypatch, method: str, way: str) -> None:
    options = dict({**SINGLY, **TOGETHER}[way])
    if "by torch" in way:
        monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    if "little memory" in way:
        options["max_ram"] = least_ram(CASES[method].merge(paths), tmp_path / "least.safetensors")
    merged = merge_to(tmp_path / "out.safetensors", CASES[method].merge(paths), **options)
    assert_same_bytes(merged, plainly)


@pytest.mark.parametrize("method", METHODS)
def test_the_file_is_the_same_to_the_last_byte(paths, tmp_path, method):
    files = []
    ways: list[dict[str, Any]] = [{"threads": 1}, {"threads": 3, "io": "pread"}]
    for number, options in enumerate(ways):
        files.append(tmp_path / f"{number}.safetensors")
        streammerge.merge(CASES[method].merge(paths), output=files[-1], sync=False, **options)
    assert files[0].read_bytes() == files[1].read_bytes()


def least_ram(merge: Any, output: Path) -> str:
    """The least memory that works, from the message that says so."""
    with pytest.raises(PlanError, match=r"--max-ram 1 kB is too small") as raised:
        streammerge.merge(merge, output=output, max_ram=1000, threads=8)
    found = re.search(r"The least that works is (\d+MiB)\.", str(raised.value))
    assert found
    assert not output.exists()
    return found[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_least_memory_that_works_works(paths, plain, tmp_path, method):
    merge = CASES[method].merge(paths)
    least = least_ram(merge, tmp_path / "out.safetensors")
    size = int(least.removesuffix("MiB"))
    assert 0 < (size - 1) * MIB - BASELINE <= 64 * MIB + whole_bytes(method)  # one is to spare
    with pytest.raises(PlanError, match=rf"--max-ram .* is too small.*\n  The least that works is {least}"):
        streammerge.merge(merge, output=tmp_path / "out.safetensors", max_ram=f"{size - 2}MiB")
    report = streammerge.merge(merge, output=tmp_path / "out.safetensors", max_ram=least, threads=8, sync=False)
    assert report.threads == 1 or "torch" not in report.loops  # else buffers may be smaller than what is to spare
    assert_same_bytes(load_model(tmp_path / "out.safetensors"), plain(method))


@pytest.mark.parametrize("method", mostly(ONE_OF_A_KIND, METHODS))
def test_shards_hold_the_same_tensors(paths, plain, tmp_path, method):
    merged = merge_to(tmp_path / "sharded", CASES[method].merge(paths), shard_size="700kB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) >= 3
    assert_same_bytes(merged, plain(method))
    with streammerge.open_model(tmp_path / "sharded") as opened:
        assert opened.tensors.keys() == plain(method).keys()


@pytest.mark.parametrize("method", mostly(ONE_OF_A_KIND, METHODS))
def test_sharded_inputs_give_the_same_bytes(paths, plain, tmp_path, method):
    sharded = []
    for number, path in enumerate(paths):
        merge_to(tmp_path / str(number), streammerge.passthrough(path), shard_size="900kB")
        sharded.append(tmp_path / str(number))
    assert_same_bytes(merge_to(tmp_path / "out.safetensors", CASES[method].merge(sharded)), plain(method))


@pytest.mark.parametrize("method", METHODS)
def test_the_length_of_windows_does_not_matter(paths, plain, tmp_path, monkeypatch, method):
    monkeypatch.setattr(costs, "WINDOW", 1)
    assert_same_bytes(merge_to(tmp_path / "out.safetensors", CASES[method].merge(paths), threads=3), plain(method))


@pytest.mark.parametrize("window", [3, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", mostly(ONE_OF_A_KIND, METHODS))
def test_no_other_length_of_windows_does_not_matter(paths, plain, tmp_path, monkeypatch, method, window):
    monkeypatch.setattr(costs, "WINDOW", window)
    assert_same_bytes(merge_to(tmp_path / "out.safetensors", CASES[method].merge(paths), threads=3), plain(method))


@pytest.mark.parametrize("method", mostly(ONE_OF_A_KIND, METHODS))
def test_the_models_order_in_their_files_does_not_matter(paths, plain, tmp_path, method):
    shuffled = []
    for number, path in enumerate(paths):
        tensors = load_model(path)
        parts = random.Random(number).sample(list(tensors), len(tensors))
        for part in (0, 1):
            half = {name: tensors[name] for name in parts[part::2]}
            save_model(tmp_path / str(number) / f"{part}.safetensors", half)
        index = {name: f"{part}.safetensors" for part in (0, 1) for name in parts[part::2]}
        text = '{"weight_map": {' + ", ".join(f'"{name}": "{file}"' for name, file in index.items()) + "}}"
        (tmp_path / str(number) / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        shuffled.append(tmp_path / str(number))
    assert_same_bytes(merge_to(tmp_path / "out.safetensors", CASES[method].merge(shuffled)), plain(method))


def test_reading_ranges_gives_the_same_bytes(paths, plain):
    for method, case in CASES.items():
        merge = case.merge(paths)
        for name in ("layers.3.several.windows", "layers.0.odd", "scalar"):
            elements = merge.tensors[name].elements
            start, stop = elements // 3, elements - elements // 4
            expected = plain(method)[name].reshape(-1)[start:stop]
            assert torch.equal(merge.read(name, start, stop), expected), (method, name)
