"""How far adapters move a model, measured while it is made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from streammerge.cli.main import main
from tests.make.models import Tensors, load_model, save_model
from tests.models.adapters.baking import numbers, parts

UNET, CLIP = "model.diffusion_model.input_blocks.1.1.", "cond_stage_model.transformer.text_model.encoder.layers.0."
MODEL: Tensors = {
    f"{UNET}proj_in.weight": numbers(600, 500, seed=1),
    f"{UNET}proj_out.weight": numbers(30, 20, seed=2),
    f"{CLIP}mlp.fc1.weight": numbers(16, 12, seed=3),
    f"{CLIP}mlp.fc2.weight": numbers(12, 16, seed=4),
}
IN, OUT = "lora_unet_input_blocks_1_1_proj_in", "lora_unet_input_blocks_1_1_proj_out"
FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"
LORA = {
    **parts(IN, lora_up__weight=numbers(600, 3, seed=5), lora_down__weight=numbers(3, 500, seed=6), alpha=1.5),
    **parts(OUT, lora_up__weight=numbers(30, 3, seed=7), lora_down__weight=numbers(3, 20, seed=8)),
    **parts(FC1, lora_up__weight=numbers(16, 3, seed=9), lora_down__weight=numbers(3, 12, seed=10)),
}
DORA = parts(
    FC1,
    lora_up__weight=numbers(16, 3, seed=9),
    lora_down__weight=numbers(3, 12, seed=10),
    dora_scale=torch.full((16, 1), 2.0),
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    save_model(tmp_path / "model.safetensors", MODEL)
    save_model(tmp_path / "lora.safetensors", LORA)
    save_model(tmp_path / "dora.safetensors", DORA)
    save_model(tmp_path / "saved.safetensors", parts(FC1, set_weight=numbers(16, 12, seed=11)))
    monkeypatch.chdir(tmp_path)
    return Path(tmp_path)


def baked(*words: str) -> dict[str, dict[str, float]]:
    assert main(["bake", "model.safetensors", *words, "-o", "out.safetensors", "--force", "--report", "r.json"]) == 0
    found: dict[str, dict[str, float]] = json.loads(Path("r.json").read_text()).get("changes", {})
    return found


def relative(names: list[str]) -> float:
    out = load_model(Path("out.safetensors"))
    moved = torch.cat([(out[name].double() - MODEL[name].double()).flatten() for name in names])
    return float(moved.norm() / torch.cat([MODEL[name].double().flatten() for name in names]).norm())


@pytest.mark.parametrize("words", [["lora.safetensors:0.5"], ["lora.safetensors:-2", "--threads", "1"]])
def test_each_component_is_told(folder, words):
    found = baked(*words)
    assert {part: each["tensors"] for part, each in found.items()} == {"UNet": 2, "text encoder": 1}
    assert found["UNet"]["relative"] == pytest.approx(relative([name for name in MODEL if UNET in name]), rel=1e-4)
    assert found["text encoder"]["relative"] == pytest.approx(relative([f"{CLIP}mlp.fc1.weight"]), rel=1e-4)


def test_what_goes_by_the_weights_is_measured_too(folder):
    assert baked("dora.safetensors")["text encoder"]["relative"] == pytest.approx(
        relative([f"{CLIP}mlp.fc1.weight"]), rel=1e-4
    )


def test_differences_that_are_stored_whole_are_measured_each(folder):
    """Small ones that lie side by side are made as one where nothing is measured."""
    shapes = {IN: (600, 500), OUT: (30, 20), FC1: (16, 12)}
    whole = [parts(name, diff=numbers(*shape, seed=20 + n)) for n, (name, shape) in enumerate(shapes.items())]
    save_model(folder / "whole.safetensors", {name: tensor for each in whole for name, tensor in each.items()})
    found = baked("whole.safetensors:0.1")
    assert {part: each["tensors"] for part, each in found.items()} == {"UNet": 2, "text encoder": 1}
    assert found["UNet"]["relative"] == pytest.approx(relative([name for name in MODEL if UNET in name]), rel=1e-4)


def test_what_stands_in_a_tensors_place_is_not_measured(folder):
    assert baked("saved.safetensors") == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_is_read_twice_for_it(folder, dtype):
    for name, tensors in {"model": MODEL, "lora": LORA}.items():
        save_model(folder / f"{name}.safetensors", {name: tensor.to(dtype) for name, tensor in tensors.items()})
    used = [*MODEL.values(), *(tensor for name, tensor in LORA.items() if not name.endswith("alpha"))]
    baked("lora.safetensors")
    read = json.loads(Path("r.json").read_text())["bytes_read"]
    assert read <= sum(tensor.numel() for tensor in used) * dtype.itemsize


def test_what_is_no_number_is_no_small_change(folder, capsys):
    broken = {**LORA, f"{FC1}.lora_up.weight": torch.full((16, 3), float("nan"))}
    save_model(folder / "broken.safetensors", broken)
    found = baked("broken.safetensors")
    assert found["text encoder"] == {"tensors": 1, "change": None, "relative": None}
    assert found["UNet"]["relative"]
    assert "text encoder by values that are no numbers" in capsys.readouterr().out


@pytest.mark.parametrize(("weight", "is_told"), [("0", True), ("0.001", False)])
def test_a_weight_of_0_is_told(folder, capsys, weight, is_told):
    assert main(["bake", "model.safetensors", f"lora.safetensors:{weight}", "-o", "x.safetensors", "-v"]) == 0
    assert ("lora: its weight is 0 wherever it would change something" in capsys.readouterr().err) == is_told


def test_an_adapter_of_which_nothing_fits_is_refused_though_some_may_be_left_out(folder, capsys):
    """It would be the model itself, under another name."""
    alien = parts("lora_unet_elsewhere", lora_up__weight=numbers(8, 3), lora_down__weight=numbers(3, 8))
    save_model(folder / "alien.safetensors", alien)
    words = ["bake", "model.safetensors", "alien.safetensors", "-o", "x.safetensors", "--on-missing", "drop"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "error: alien: none of its modules (1) is in model" in said
    assert "Nothing was written" in said
    assert not (folder / "x.safetensors").exists()


def test_it_is_told_on_the_screen_and_changes_no_byte(folder, capsys):
    assert main(["bake", "model.safetensors", "lora.safetensors", "-o", "a.safetensors"]) == 0
    assert "changed by" not in capsys.readouterr().out
    assert main(["bake", "model.safetensors", "lora.safetensors", "-o", "b.safetensors", "-v"]) == 0
    assert re.search(r"changed by +.*UNet \d+\.\d\d%", capsys.readouterr().out)
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


def test_a_merge_of_models_is_not_measured(folder):
    words = ["model.safetensors", "model.safetensors", "-o", "m.safetensors", "--report", "r.json"]
    assert main(words) == 0
    assert "changes" not in json.loads(Path("r.json").read_text())


def test_a_filter_that_fits_no_tensor_is_told(folder, capsys):
    """Filters are parts of the model's names, and not of the adapter's."""
    weight = [{"filter": "lora_unet", "value": 0}, {"value": 1}]
    adapters = [{"adapter": str(folder / "lora.safetensors"), "weight": weight}]
    recipe = {"merge_method": "linear", "models": [{"model": str(folder / "model.safetensors"), "adapters": adapters}]}
    (folder / "r.yaml").write_text(json.dumps(recipe))
    assert main([str(folder / "r.yaml"), "-o", str(folder / "x.safetensors")]) == 0
    told = capsys.readouterr().err
    assert "note: lora: the filter 'lora_unet' of weight fits no tensor\n" in told
    assert "changes nothing" not in told


@pytest.mark.parametrize(
    "option",
    [
        *(["-m", "slerp"], ["--base", "m"], ["-p", "weight=2"], ["--recipe", "x"], ["--layout", "model.safetensors"]),
        *(["--seed", "0"], ["--on-shape-mismatch", "keep"], ["--on-prediction-mismatch", "merge"]),
    ],
)
def test_what_has_no_meaning_for_bake(folder, capsys, option):
    assert main(["bake", "model.safetensors", "lora.safetensors", "-o", "x.safetensors", *option]) == 1
    assert "has no meaning for bake" in capsys.readouterr().err
