"""Models of very many small tensors: nothing takes more than its share of steps, and a plan little memory."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.compute.machine import MIB, PROMISED_BYTES
from streammerge.formats.safetensors import build_header
from streammerge.formats.tables import Column, Names
from streammerge.models.checkpoints import Checkpoint
from streammerge.storage.copying import PIECE_RANGES, pieces
from streammerge.storage.ledger import Coverage, Ledger, Span
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.inspection import inspect_model, render
from streammerge.workers.checking import sample

SHAPES = ((4,), (2, 3), (1, 8), (5,))

BASE_LINE = 8 * MIB
"""How far the base line in a report may be from what a bare `import torch` takes in another process."""


def names(count: int) -> list[str]:
    """Names as long as those of a mixture of experts."""
    return [f"model.layers.{n // 768}.mlp.experts.{n // 3 % 256}.{'gdu'[n % 3]}_proj.weight" for n in range(count)]


def write_model(path: Path, wanted: list[str], fill: int) -> Path:
    """A file of small tensors of these names, every byte of them the same."""
    infos = {name: TensorInfo(DTYPES["F16"], SHAPES[number % 4]) for number, name in enumerate(wanted)}
    header = build_header(infos, {"format": "pt"})
    path.write_bytes(header.encoded + bytes([fill]) * (header.file_bytes - header.nbytes))
    return path


def write_shards(folder: Path, count: int, fill: int, shards: int = 2) -> Path:
    """The same in several files with their index."""
    folder.mkdir()
    size, whole = -(-count // shards), names(count)
    parts = {f"part-{number}.safetensors": whole[number * size : (number + 1) * size] for number in range(shards)}
    for name, part in parts.items():
        write_model(folder / name, part, fill)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def steps(action: Callable[[], Any]) -> int:
    """How many calls of functions the action makes, in all threads that it begins; generators count each time."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls


def opened(paths: list[Path]) -> list[Checkpoint]:
    return [streammerge.open_model(path) for path in paths]


def plan(paths: list[Path], method: str = "linear") -> Any:
    recipe = {"merge_method": method, "models": [str(path) for path in paths]}
    return streammerge.make_plan(recipe, output=paths[0].with_name("out.safetensors"))


def merge(paths: list[Path]) -> None:
    recipe = {"merge_method": "linear", "models": [str(path) for path in paths]}
    streammerge.merge(recipe, output=paths[0].with_name("out.safetensors"), force=True, sync=False, threads=1)


def inspect(paths: list[Path]) -> None:
    (model, *_) = opened(paths)
    inspection = inspect_model(model.tensors, path=model.path, nbytes=model.nbytes, container=model.container)
    render(inspection, tensors=True)
    inspection.to_json(tensors=True)


def compare(paths: list[Path]) -> None:
    from streammerge.tools.similarity import compare_models

    compare_models(*opened(paths), threads=1)


def view(paths: list[Path]) -> None:
    """Rename, decode and cast a model, and plan a merge of it."""
    model, other = opened(paths)
    seen = streammerge.Cast(streammerge.Renamed(model, {name: name for name in model.tensors}), "bf16")
    streammerge.make_plan(streammerge.linear(seen, other), output=paths[0].with_name("out.safetensors"))


ACTIONS: dict[str, Callable[[list[Path]], Any]] = {
    "open": opened,
    "plan": plan,
    "plan, as JSON": lambda paths: plan(paths).to_json(),
    "merge": merge,
    "copy": lambda paths: merge(paths[:1]),
    "inspect": inspect,
    "compare": compare,
    "view": view,
    "write a header": lambda paths: build_header(opened(paths)[0].tensors, {}).encoded,
    "choose samples": lambda paths: sample(plan(paths).jobs),
    "copy, piece by piece": lambda paths: list(pieces(plan(paths[:1]).jobs, None, Ledger())),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("action", ACTIONS)
def test_twice_as_many_tensors_take_twice_the_steps(tmp_path, action):
    taken = []
    for count in (100, 100, 300, 700):  # the first time something is made for all
        paths = [write_model(tmp_path / f"{name}.safetensors", names(count), 60) for name in "ab"]
        taken.append(steps(functools.partial(ACTIONS[action], paths)))
    _, few, more, most = taken
    assert more > few
    assert most - more <= 1.3 * 2 * (more - few)


def test_counted_steps_would_tell_what_is_quadratic():
    def quadratic(count: int) -> int:
        return steps(lambda: [sum(1 for _ in range(number)) for number in range(count)])

    few, more, most = map(quadratic, (100, 300, 700))
    assert most - more > 1.3 * 2 * (more - few)


def test_what_is_finished_in_order_is_one_span():
    coverage = Coverage(Span(0, start, start + 3) for start in range(0, 3000, 3))
    assert list(coverage) == [Span(0, 0, 3000)]


def test_no_more_than_some_thousand_tensors_are_copied_at_once(tmp_path):
    path = write_model(tmp_path / "a.safetensors", names(PIECE_RANGES + 10), 60)
    made = list(pieces(plan([path], "passthrough").jobs, None, Ledger()))  # type: ignore[arg-type]
    assert [len(piece.ranges) for piece in made] == [PIECE_RANGES, 10]


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_are_kept_once_for_all_models_that_have_the_same(tmp_path):
    a, b = opened([write_model(tmp_path / f"{name}.safetensors", names(50), 60) for name in "ab"])
    other = streammerge.open_model(write_model(tmp_path / "c.safetensors", names(51), 60))
    assert isinstance(a.tensors, Column)
    assert isinstance(b.tensors, Column)
    assert isinstance(other.tensors, Column)
    assert a.tensors.names is b.tensors.names
    assert a.tensors.names is not other.tensors.names
    assert next(iter(a.tensors.values())) is next(iter(b.tensors.values()))


def test_columns_are_equal_where_names_and_values_are():
    names, others = Names.of(["b", "a"]), Names.of(["a", "b"])
    assert Column(names, [1, 2]) == Column(names, (1, 2)) == Column(others, [2, 1])
    assert Column(names, [1, 2]) != Column(names, [1, 3])
    assert Column(names, [1, 2]) != {"b": 1}


def test_a_column_is_a_mapping():
    column = Column(Names.of(["b", "a"]), [1, 2])
    assert dict(column) == {"b": 1, "a": 2} == dict(column.items())
    assert column == {"a": 2, "b": 1}
    assert list(column.items()) == [("b", 1), ("a", 2)]
    assert ("a", 2) in column.items()
    assert "c" not in column
    assert column.get("c") is None
    with pytest.raises(KeyError):
        column["c"]


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def bare_import() -> int:
    """What a process takes that only imports torch."""
    script = "import torch, psutil; print(psutil.Process().memory_info().rss)"
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


def run(*words: object) -> str:
    command = [sys.executable, "-m", "streammerge", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def report_of_merge(folder: Path, *words: object) -> dict[str, Any]:
    report = folder / "report.json"
    run(*words, "-o", folder / "out", "--report", report, "--no-sync", "--force", "-q")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def check_memory(folder: Path, count: int, most: int, *options: str) -> None:
    """Merge two models of so many tensors: within this much above what it is counted from, and what the plan says."""
    models = [write_shards(folder / name, count, fill) for name, fill in (("a", 60), ("b", 61))]
    bare, planned = bare_import(), json.loads(run("plan", *models, "-o", folder / "out", *options, "--json"))
    report = report_of_merge(folder, *models, *options)
    is_torch_there = report["baseline_rss_bytes"] > 0
    above = report["peak_rss_bytes"] - bare * is_torch_there
    assert report["tensors"]["merged"] == count
    assert above <= min(most if is_torch_there else PROMISED_BYTES, planned["work_ram_bytes"])
    assert planned["work_ram_bytes"] <= PROMISED_BYTES
    assert not is_torch_there or abs(report["baseline_rss_bytes"] - bare) <= BASE_LINE


def test_a_merge_of_many_tensors_takes_little_above_a_bare_import_of_torch(tmp_path):
    check_memory(tmp_path, 20_000, 40 * MIB)


@pytest.mark.slow
@pytest.mark.parametrize("count", [30_000, 50_000, 100_000])
@pytest.mark.parametrize("shards", [2, 20])
def test_a_merge_of_very_many_tensors_takes_what_the_plan_says(tmp_path, count, shards):
    """Beyond the promise: reading headers leaves memory behind in pieces that Python can't give back."""
    models = [write_shards(tmp_path / name, count, fill, shards) for name, fill in (("a", 60), ("b", 61))]
    words = [*models, "--shard-size", "500kB"]
    planned = json.loads(run("plan", *words, "-o", tmp_path / "out", "--json"))["work_ram_bytes"]
    report = report_of_merge(tmp_path, *words)
    assert report["tensors"]["merged"] == count
    assert report["peak_rss_bytes"] - bare_import() * (report["baseline_rss_bytes"] > 0) <= planned <= 120 * MIB


def test_the_plan_counts_what_it_keeps_of_the_models(tmp_path):
    few, many = ([write_model(tmp_path / f"{count}.safetensors", names(count), 60)] for count in (10, 30_000))
    small, large, both = plan(few), plan(many), plan([*many, *many])
    kept = large.described_bytes - small.described_bytes
    assert 30_000 * (50 + 100) <= kept <= 30_000 * 400
    assert large.work_bytes - small.work_bytes == kept + large.reading_bytes
    assert small.reading_bytes == 0 < large.reading_bytes <= 2 * kept
    assert both.described_bytes == large.described_bytes  # it is one file


def test_less_is_left_for_workers_where_much_is_kept_of_the_models(tmp_path):
    made = plan([write_model(tmp_path / "a.safetensors", names(10), 60)])
    kept = PROMISED_BYTES - made.memory.fixed_bytes - made.memory.lane_bytes - 2 * MIB
    assert replace(made, described_bytes=kept).work_bytes <= PROMISED_BYTES
    assert replace(made, described_bytes=2 * kept).memory.allot().work_bytes <= 3 * MIB
