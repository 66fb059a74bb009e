"""Adapters of many experts: what they cost, and the same bytes whatever is cut how, stopped on the way or not."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.compute.costs import held_bytes, slots
from streammerge.compute.expressions import walk
from streammerge.compute.machine import MIB
from tests.make.models import Tensors, load_model, merge_to, save_model
from tests.models.adapters.baking import numbers, peft_folder
from tests.storage.outputs import digests
from tests.storage.stopped_merges import run, stop, whole

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FORMS = ["separate", "fused", "transposed"]


class Mixture:
    """A mixture's layers with an adapter of all their experts, as PEFT has it; and what it is with that in float64."""

    def __init__(
        self,
        form: str,
        experts: int,
        high: int,
        wide: int,
        rank: int,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.model: Tensors = {}
        self.adapter: Tensors = {}
        self.form, self.experts, self.wide, self.rank = form, experts, wide, rank
        for layer in range(layers):
            start = f"model.layers.{layer}.mlp."
            self.model[f"{start}gate.weight"] = numbers(experts, high, seed=layer)
            for name, (rows, columns) in {"gate_up_proj": (2 * wide, high), "down_proj": (high, wide)}.items():
                seed = 10 * layer + len(name)
                matrices = numbers(experts, rows, columns, seed=seed, dtype=dtype)
                self.model |= self.stored(f"{start}experts.", name, matrices)
                wrapper = f"{start}experts{'.base_layer' if name == 'gate_up_proj' else ''}"
                self.adapter[f"{wrapper}.lora_A.weight"] = numbers(rank * experts, columns, seed=seed + 1)
                self.adapter[f"{wrapper}.lora_B.weight"] = numbers(rows, rank * experts, seed=seed + 2)

    def stored(self, start: str, name: str, matrices: torch.Tensor) -> Tensors:
        """The matrices of all experts, in the model's form."""
        if self.form != "separate":
            return {f"{start}{name}": (matrices.mT if self.form == "transposed" else matrices).contiguous()}
        if name == "down_proj":
            return {f"{start}{e}.down_proj.weight": matrix.clone() for e, matrix in enumerate(matrices)}
        return {
            f"{start}{e}.{part}_proj.weight": matrix[rows].clone()
            for e, matrix in enumerate(matrices)
            for part, rows in (("gate", slice(self.wide)), ("up", slice(self.wide, None)))
        }

    def right(self, layer: int, strength: float) -> Tensors:
        """A layer's tensors, changed: W[e] + s Bₑ Aₑ."""
        found: Tensors = {}
        for name, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            start = f"model.layers.{layer}.mlp.experts"
            down, up = (self.adapter[f"{start}{inner}.lora_{part}.weight"].double() for part in "AB")
            each = up.view(len(up), self.rank, self.experts).permute(2, 0, 1) @ down.view(self.experts, self.rank, -1)
            found |= self.stored(f"{start}.", name, strength * each)
        return {name: self.model[name].double() + change for name, change in found.items()}

    def recipe(self, folder: Path, weight: Any = 1.0, **config: Any) -> dict[str, Any]:
        """Both written into a folder, and what merges them."""
        save_model(folder / "model.safetensors", self.model)
        config = {"r": self.rank, "lora_alpha": 3.0, "target_parameters": BOTH, "peft_version": "0.18.0", **config}
        adapter = {"adapter": str(peft_folder(folder / "lora", self.adapter, **config)), "weight": weight}
        given = {"model": str(folder / "model.safetensors"), "adapters": [adapter]}
        return {"merge_method": "linear", "models": [given]}


@pytest.mark.parametrize("form", FORMS)
def test_any_way_of_working_gives_the_same_bytes(tmp_path, form):
    """Experts of several blocks each, in several windows, none of which begins where a matrix does."""
    raw = Mixture(form, 5, 900, 500, 3).recipe(tmp_path / "models", weight=0.7)
    right = whole(raw, tmp_path / "right")
    ways: list[dict[str, Any]] = [
        *({"threads": threads, "io": io} for threads, io in ((1, "mmap"), (2, "mmap"), (3, "pread"), (4, "pread"))),
        {"max_ram": 4096 * MIB, "threads": 2},
    ]
    for number, way in enumerate(ways):
        merge_to(tmp_path / str(number) / "out.safetensors", raw, **way)
        assert digests(tmp_path / str(number)) == right, way


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_one_goes_on_to_the_same_bytes(tmp_path, monkeypatch, form):
    raw = Mixture(form, 5, 900, 500, 3).recipe(tmp_path / "models")
    right = whole(raw, tmp_path / "right")
    output = tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output, after=2)
    assert not output.exists()
    assert run(raw, output, resume=True).resumed_bytes > 0
    assert digests(tmp_path / "new") == right


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, (3 / math.sqrt(4), 3 / math.sqrt(4))),
        ({"alpha_pattern": {"down_proj": 8.0}}, (3 / 4, 8 / 4)),
        ({"alpha_pattern": {"mlp.experts.gate_up_proj": 2.0}, "use_rslora": True}, (1.0, 1.5)),
    ],
)
def test_scales_are_those_of_the_config(tmp_path, form, config, scale):
    mixture = Mixture(form, 6, 20, 12, 4, dtype=torch.float32)
    made = merge_to(tmp_path / "out.safetensors", mixture.recipe(tmp_path, **config))
    for strength, own in zip(scale, (r"gate|up", r"down"), strict=True):
        for name, right in mixture.right(0, strength).items():
            if re.search(rf"experts\.(\d+\.)?({own})_", name):
                assert torch.allclose(made[name].double(), right, atol=1e-6), name


@pytest.mark.parametrize("form", FORMS)
def test_weights_may_differ_by_layer(tmp_path, form):
    mixture = Mixture(form, 4, 16, 10, 2, layers=3, dtype=torch.float32)
    weight = [{"filter": "layers.1.", "value": -0.5}, {"filter": "down", "value": 0.25}, {"value": 0.0}]
    made = merge_to(tmp_path / "out.safetensors", mixture.recipe(tmp_path, weight))
    assert made.keys() == mixture.model.keys()
    for layer in range(3):
        whole_, quarter = (mixture.right(layer, 1.5 * weight) for weight in (-0.5, 0.25))
        for name in whole_:
            is_down = "down" in name
            right = whole_ if layer == 1 else quarter if is_down else mixture.model
            assert torch.allclose(made[name].double(), right[name].double(), atol=1e-6), name


@pytest.mark.parametrize("form", ["fused", "transposed"])
def test_the_expression_is_small_however_many_experts_there_are(tmp_path, form):
    """It is walked for every block; and no expert but those of a block is held beside the factors."""
    mixture = Mixture(form, 128, 64, 16, 2)
    plan = streammerge.make_plan(mixture.recipe(tmp_path), output=str(tmp_path / "out.safetensors"), threads=1)
    for job in plan.jobs:
        assert len(list(walk(job.node))) <= 10
        assert slots(job.node) <= 5
        if "experts" in job.name:
            up, down = 2 * (2 * 16 if "gate" in job.name else 64) * 128, 2 * (64 if "gate" in job.name else 16) * 128
            assert job.compute is not None
            held = held_bytes(job.node, job.compute) * 8 // job.compute.bits
            assert held == 2 * up + (up if form == "transposed" else down)
    assert plan.memory.lane_bytes < 12 * MIB


@pytest.mark.parametrize("form", FORMS)
def test_what_is_told_to_be_read_is_read(tmp_path, form):
    mixture = Mixture(form, 40, 64, 48, 2)
    raw, output = mixture.recipe(tmp_path), tmp_path / "out.safetensors"
    told = streammerge.make_plan(raw, output=str(output), threads=1)
    found = run(raw, output)
    assert found.bytes_read <= told.bytes_to_read <= 1.01 * found.bytes_read
    made = load_model(output)
    for name, right in mixture.right(0, 1.5).items():
        assert torch.allclose(made[name].double(), right, rtol=2**-8, atol=1e-6), name


@pytest.mark.parametrize("form", ["separate", "fused"])
def test_the_least_memory_that_is_told_is_enough(tmp_path, form):
    Mixture(form, 128, 256, 128, 8).recipe(tmp_path)
    command = [sys.executable, "-m", "streammerge", "bake", "model.safetensors", "lora", "-o", "out.safetensors"]
    command += ["--no-sync", "-q", "--report", "report.json", "--threads", "1", "--max-ram"]
    refused = subprocess.run([*command, "1MiB"], cwd=tmp_path, capture_output=True, text=True, check=False)
    found = re.search(r"The least that works is (\d+)MiB", refused.stderr)
    assert found, refused.stderr
    subprocess.run([*command, f"{found[1]}MiB"], cwd=tmp_path, capture_output=True, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["peak_rss_bytes"] <= int(found[1]) * MIB <= report["baseline_rss_bytes"] + 64 * MIB
