"""A model with adapters in it, stopped on the way, and in how little memory it is made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.compute.machine import MIB
from streammerge.errors import OutputError
from tests.make.models import Tensors, normal, save_model
from tests.models.adapters.baking import numbers, parts
from tests.storage.outputs import digests
from tests.storage.stopped_merges import run, stop, whole

ROWS, COLUMNS, RANK = 512, 300, 4


def recipe(folder: Path) -> dict[str, Any]:
    """Twelve weights, each with a module: LoRA, and DoRA of both kinds, which is measured before it is made."""
    model = {f"layers.{n}.w.weight": normal((ROWS, COLUMNS), n, torch.float16) for n in range(12)}
    adapter: Tensors = {}
    for n in range(12):
        lengths = [{}, {"dora_scale": torch.ones(ROWS, 1)}, {"dora_scale": torch.ones(1, COLUMNS)}][n % 3]
        up, down = numbers(ROWS, RANK, seed=n), numbers(RANK, COLUMNS, seed=n + 20)
        adapter |= parts(f"lora_unet_layers_{n}_w", lora_up__weight=up, lora_down__weight=down, alpha=2.0, **lengths)
    save_model(folder / "model.safetensors", {**model, "norm": normal((63,), 5)})
    save_model(folder / "adapter.safetensors", adapter)
    given = {"model": str(folder / "model.safetensors"), "adapters": [str(folder / "adapter.safetensors")]}
    return {"merge_method": "linear", "models": [given]}


def test_a_stopped_one_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    raw = recipe(tmp_path / "models")
    right = whole(raw, tmp_path / "right")
    output = tmp_path / "new" / "out.safetensors"
    first = stop(monkeypatch, raw, output, after=5)
    assert not output.exists()
    report = run(raw, output, resume=True)
    assert len(first.windows) == 5
    assert report.resumed_bytes >= 5 * ROWS * COLUMNS * 2
    assert digests(tmp_path / "new") == right


def test_another_weight_or_adapter_is_another_merge(tmp_path, monkeypatch):
    """What was made of other factors, or with another strength, is never gone on with."""
    raw = recipe(tmp_path / "models")
    output = tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output, after=5)
    (given,) = raw["models"]
    other = {**raw, "models": [{**given, "adapters": [{"adapter": given["adapters"][0], "weight": 0.5}]}]}
    with pytest.raises(OutputError, match=r"adapters.0.parameters.weight: was 1.0, is 0.5"):
        run(other, output, resume=True)


@pytest.mark.parametrize("size", [2048, 4096])
def test_memory_does_not_grow_with_the_model(tmp_path, size):
    """A rank of 64: the factors of the largest tensor are all that is held."""
    rank = 64
    shapes = {f"layers.{n}.w.weight": (size, size) for n in range(4)}
    model = {name: normal((size, size), n, torch.float16) for n, name in enumerate(shapes)}
    adapter: Tensors = {}
    for n in range(4):
        up, down = numbers(size, rank, seed=n).half(), numbers(rank, size, seed=n + 9).half()
        adapter |= parts(f"lora_unet_layers_{n}_w", lora_up__weight=up, lora_down__weight=down)
    save_model(tmp_path / "model.safetensors", model)
    save_model(tmp_path / "adapter.safetensors", adapter)
    words = ["bake", "model.safetensors", "adapter.safetensors", "-o", "out.safetensors", "--report", "report.json"]
    command = [sys.executable, "-m", "streammerge", *words, "--no-sync", "-q"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["peak_rss_bytes"] - report["baseline_rss_bytes"] < 64 * MIB
