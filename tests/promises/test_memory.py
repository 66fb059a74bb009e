"""The promise on memory, kept by whole processes: 64 MiB above a bare `import torch`, whatever the models' size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streammerge.compute.machine import MIB
from streammerge.methods import METHODS as METHODS_BY_NAME
from tests.make.large_models import MakeModels, models_of_sizes
from tests.make.models import normal

PROMISED = 64 * MIB
FLAT = 8 * MIB
METHODS: dict[str, list[str]] = {
    "linear": ["{a}:0.3", "{b}:0.3", "{base}:0.4"],
    "slerp": ["{a}", "{b}", "-p", "t=0.3"],
    "ties": ["{a}:0.5", "{b}:0.5", "--base", "{base}", "-p", "density=0.3"],
    "breadcrumbs_ties": ["{a}:0.5", "{b}:0.5", "--base", "{base}", "-p", "density=0.3", "-p", "rescale=true"],
    "della": ["{a}:0.5", "{b}:0.5", "--base", "{base}", "-p", "density=0.5"],
    "pcb": ["{a}", "{b}", "--base", "{base}"],
}


LONG = ("breadcrumbs_ties", "della", "pcb")
"""Methods that take more than some seconds."""


@pytest.fixture(scope="module")
def make_models(tmp_path_factory) -> Iterator[MakeModels]:
    """Writes `base`, `a` and `b` of a size; they are deleted when the module is done."""
    yield from models_of_sizes(tmp_path_factory)


@pytest.fixture(scope="module")
def bare() -> int:
    """What a process takes that only imports torch."""
    script = "import torch, psutil; print(psutil.Process().memory_info().rss)"
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


def run_merge(models: Mapping[str, Path], method: str, folder: Path, *options: str) -> dict[str, Any]:
    """Merge in a process of its own and return its report; the output is deleted."""
    words = [word.format(**models) for word in METHODS[method]]
    output, report = folder / "out.safetensors", folder / "report.json"
    command = [sys.executable, "-m", "streammerge", *words, "-m", method, "-o", str(output)]
    command += ["--report", str(report), "--no-sync", "-q", "--force", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output.unlink()
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def above(report: Mapping[str, Any], bare: int) -> int:
    """What the merge took at its peak above a bare `import torch`, by the report's own base line or by ours."""
    return int(report["peak_rss_bytes"]) - min(int(report["baseline_rss_bytes"]), bare)


def check_promise(make_models: Any, bare: int, folder: Path, method: str, size: int, options: Sequence[str]) -> None:
    large = run_merge(make_models(size), method, folder, *options)
    assert large["bytes_written"] > 0.9e6 * size
    assert above(large, bare) <= PROMISED
    # flatness is told by one worker: whether two are at their most at once is chance
    small, large = (
        run_merge(make_models(nbytes), method, folder, *options, "--threads", "1") for nbytes in (size // 4, size)
    )
    assert above(large, bare) - above(small, bare) <= FLAT


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in METHODS]
)
def test_memory_is_little_and_flat(make_models, bare, tmp_path, method):
    check_promise(make_models, bare, tmp_path, method, 200, [])


@pytest.mark.parametrize(
    "options", [("--io", "mmap"), ("--io", "pread", "--threads", "8", "--dtype", "fp32")], ids=" ".join
)
def test_memory_is_little_however_it_is_run(make_models, bare, tmp_path, options):
    assert above(run_merge(make_models(200), "ties", tmp_path, *options), bare) <= PROMISED


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """Mixtures of 75 MB in three forms, with matrices that are many blocks each: the base with gate and up by turns,
    which none of them lies like."""
    folder = tmp_path_factory.mktemp("mixtures")
    experts, wide, narrow, layer = 4, 1500, 2048, "model.layers.0.mlp."
    separate = {f"{layer}gate.weight": normal((experts, narrow), 9, torch.float16)}
    for number in range(experts):
        for seed, part in enumerate(("gate_proj", "up_proj")):
            separate[f"{layer}experts.{number}.{part}.weight"] = normal((wide, narrow), seed, torch.float16)
        separate[f"{layer}experts.{number}.down_proj.weight"] = normal((narrow, wide), 5, torch.float16)
    forms = {"a": separate}
    for form, (high, across), router in (
        ("b", (2 * wide, narrow), "gate"),
        ("base", (narrow, 2 * wide), "router"),
    ):
        out = (narrow, wide) if form == "b" else (wide, narrow)
        forms[form] = {
            f"{layer}{router}.weight": normal((experts, narrow), 7, torch.float16),
            f"{layer}experts.gate_up_proj": normal((experts, high, across), 8, torch.float16),
            f"{layer}experts.down_proj": normal((experts, *out), 9, torch.float16),
        }
    for form, tensors in forms.items():
        save_file(tensors, folder / f"{form}.safetensors")
    yield {form: folder / f"{form}.safetensors" for form in forms}
    for form in forms:
        (folder / f"{form}.safetensors").unlink()


@pytest.mark.slow
def test_memory_is_little_for_mixtures_in_other_forms(mixtures, bare, tmp_path):
    assert above(run_merge(mixtures, "ties", tmp_path), bare) <= PROMISED


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_memory_is_flat_for_gigabytes(make_models, bare, tmp_path, method, io):
    check_promise(make_models, bare, tmp_path, method, 2000, ["--io", io])


ON_COLUMNS = ("cosine_sum", "trust_region")
"""Methods that hold more than others beside what they are given, as some of them do only for rows of great length."""

NEEDED = {
    "scale": ["alpha=0.5"],
    "sigmoid": ["alpha=0.5"],
    "plus_random": ["alpha=0.1"],
    "nearswap": ["t=0.001"],
    "slerp": ["t=0.3"],
}
"""Parameters of methods that have to be given."""


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory) -> list[Path]:
    """Models of matrices that are wide, long, and of a single row, with filters and a vector."""
    folder = tmp_path_factory.mktemp("odd")
    shapes = {"w": (700, 1000), "filters": (64, 64, 3, 3), "row": (1, 300_000), "column": (300_000, 1), "b": (1000,)}
    for seed in range(4):
        save_file({name: normal(shape, seed) for name, shape in shapes.items()}, folder / f"{seed}.safetensors")
    return [folder / f"{seed}.safetensors" for seed in range(4)]


@pytest.mark.parametrize(
    "name", [name if name in ON_COLUMNS else pytest.param(name, marks=pytest.mark.slow) for name in METHODS_BY_NAME]
)
def test_every_method_keeps_to_the_least_that_an_error_names(odd_models, tmp_path, name):
    method = METHODS_BY_NAME[name]
    least, most = method.models
    models = odd_models[: max(least, 2 if most is None or most > 1 else 1)]
    words = [*map(str, models), "-m", name, *(f"-p{setting}" for setting in NEEDED.get(name, []))]
    words += ["--base", str(odd_models[3])] if method.base == "required" else []
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "streammerge", *words, "-o", str(tmp_path / "out.safetensors"), "--no-sync", "-q"]
    refused = subprocess.run([*command, "--max-ram", "10MB"], capture_output=True, text=True, check=False)
    found = re.search(r"The least that works is (\d+)MiB", refused.stderr)
    assert found, refused.stderr
    command += ["--max-ram", f"{found[1]}MiB", "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text(encoding="utf-8"))["peak_rss_bytes"] <= int(found[1]) * MIB


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_limit_on_memory_is_kept(make_models, tmp_path, method):
    models = make_models(50)
    words = [word.format(**models) for word in METHODS[method]]
    command = [sys.executable, "-m", "streammerge", *words, "-m", method, "-o", str(tmp_path / "out.safetensors")]
    refused = subprocess.run([*command, "--max-ram", "10MB"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    found = re.search(r"The least that works is (\d+)MiB", refused.stderr)
    assert found, refused.stderr
    assert not (tmp_path / "out.safetensors").exists()
    limit = int(found[1]) + 2  # the base line is not the same to the page in every process
    report = run_merge(models, method, tmp_path, "--max-ram", f"{limit}MiB")
    assert report["peak_rss_bytes"] <= limit * MIB
    assert report["threads"] <= 2
