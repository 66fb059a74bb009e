"""What metadata tell ComfyUI of quantised layers is said of those that stay so, by their names, and of no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.recipe.inherited import QUANTISATION
from tests.make.diffusion import diffusion_model
from tests.make.models import Tensors, load_model, merge_to, near, save_model

LAYERS = ("double_blocks.0.img_mlp.0", "single_blocks.1.linear2")
FORMAT = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


def coded(seed: int = 1, prefix: str = "") -> tuple[Tensors, dict[str, str]]:
    """Flux with two layers in scaled fp8, of which its metadata alone tell, and the metadata."""
    made = {prefix + name: tensor for name, tensor in diffusion_model("flux", seed, torch.bfloat16).items()}
    for layer in LAYERS:
        weight = f"{prefix}{layer}.weight"
        scale = made[weight].float().abs().max() / 448
        made |= {weight: (made[weight].float() / scale).to(torch.float8_e4m3fn), f"{weight}_scale": scale}
    layers = {prefix + layer: FORMAT for layer in LAYERS}
    return made, {QUANTISATION: json.dumps({"format_version": "1.0", "layers": layers})}


@pytest.fixture
def path(tmp_path) -> Path:
    tensors, metadata = coded()
    return save_model(tmp_path / "a.safetensors", tensors, metadata)


def layers_of(path: Path) -> Any:
    with streammerge.open_model(path) as model:
        return json.loads(model.metadata.get(QUANTISATION, '{"layers": null}'))["layers"]


def made(folder: Path, *models: Any, **keys: Any) -> Any:
    options = {key: keys.pop(key) for key in ("names", "metadata") if key in keys}
    recipe = {"merge_method": "linear", "models": [str(each) for each in models], **keys}
    merge_to(folder / "out.safetensors", recipe, **options)
    return layers_of(folder / "out.safetensors")


KEEP: dict[str, Any] = {"rules": [{"match": "*", "keep": True}]}


def test_what_is_copied_stays_said(tmp_path, path):
    assert made(tmp_path, path, **KEEP) == dict.fromkeys(LAYERS, FORMAT)
    assert made(tmp_path, path, **KEEP, metadata=False) == dict.fromkeys(LAYERS, FORMAT)


def test_what_is_decoded_is_not_said(tmp_path, path):
    assert made(tmp_path, path, dtype="bfloat16") is None
    assert made(tmp_path, path, **KEEP, dtype="bfloat16") is None
    assert made(tmp_path, path, dtype="fp8_scaled") is None
    assert made(tmp_path, path, save_model(tmp_path / "b.safetensors", near(diffusion_model("flux"), 2))) is None


def test_scales_that_stay_with_weights_of_the_dtype_that_is_asked_for_are_told(tmp_path, path):
    """Nobody could tell from the output that its other tensors have lost bits, and its weights have not."""
    recipe = {"merge_method": "linear", "models": [str(path)], **KEEP}
    notes = {
        dtype: [
            note
            for note in streammerge.make_plan({**recipe, "dtype": dtype}, output=tmp_path / "out.safetensors").notes()
            if "scales" in note
        ]
        for dtype in ("keep", "bf16", "fp8_e5m2", "fp8_e4m3")
    }
    told = notes.pop("fp8_e4m3")
    assert not any(notes.values())
    assert [note.partition(";")[0] for note in told] == ["2 weights with scales are F8_E4M3 already, and keep them"]
    made(tmp_path, path, **KEEP, dtype="fp8_e4m3")
    before, after = load_model(path), load_model(tmp_path / "out.safetensors")
    scales = {f"{layer}.weight_scale" for layer in LAYERS}
    assert {name for name, tensor in after.items() if tensor.dtype != torch.float8_e4m3fn} == scales
    for name in scales | {f"{layer}.weight" for layer in LAYERS}:
        assert torch.equal(after[name].float(), before[name].float())


def test_of_what_is_decoded_in_part_the_rest_is_said(tmp_path, path):
    b = save_model(tmp_path / "b.safetensors", diffusion_model("flux", 2))
    rules = [{"match": f"{LAYERS[0]}.*", "keep": True}]
    assert made(tmp_path, path, b, rules=rules) == {LAYERS[0]: FORMAT}
    rules = [{"match": f"{LAYERS[0]}.*", "drop": True}, *KEEP["rules"]]
    assert made(tmp_path, path, rules=rules) == {LAYERS[1]: FORMAT}


def test_it_is_said_by_new_names(tmp_path):
    prefix = "model.diffusion_model."
    tensors, metadata = coded(prefix=prefix)
    path = save_model(tmp_path / "a.safetensors", tensors, metadata)
    assert made(tmp_path, path, **KEEP) == {prefix + layer: FORMAT for layer in LAYERS}
    assert made(tmp_path, path, **KEEP, names="bare") == dict.fromkeys(LAYERS, FORMAT)


def test_what_a_merge_in_a_merge_says_is_said(tmp_path, path):
    inner = {"merge_method": "linear", "models": [str(path)], **KEEP}
    recipe = {"merge_method": "linear", "models": [{"model": inner, "name": "x"}], **KEEP}
    merge_to(tmp_path / "out.safetensors", recipe)
    assert layers_of(tmp_path / "out.safetensors") == dict.fromkeys(LAYERS, FORMAT)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"layers": 3}', '{"layers": {"double_blocks.0.img_mlp.0": null}}'])
def test_odd_metadata_are_no_error(tmp_path, text):
    tensors, _ = coded()
    path = save_model(tmp_path / "a.safetensors", tensors, {QUANTISATION: text})
    made(tmp_path, path, **KEEP)
