"""An account of an adapter is of the output: what is not there is not called applied, nor lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.cli.main import main
from tests.make.diffusion import diffusion_model
from tests.make.models import Tensors, save_model
from tests.models.adapters.baking import numbers, parts, peft_folder

TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
UNET = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
MODULES = {
    TEXT: "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    UNET: "lora_unet_down_blocks_0_attentions_0_proj_in",
}


def module(name: str, shape: torch.Size) -> Tensors:
    up, down = numbers(shape[0], 2, *(1 for _ in shape[2:])), numbers(2, *shape[1:])
    return parts(MODULES[name], lora_up__weight=up, lora_down__weight=down, alpha=1.0)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    model = diffusion_model("sd1")
    both = {name: module(name, model[name].shape) for name in MODULES}
    weights = {name: tensor for name, tensor in model.items() if name.startswith("model.")}
    averages = {f"model_ema.{name[6:].replace('.', '')}": tensor.clone() for name, tensor in weights.items()}
    save_model(tmp_path / "model.safetensors", {**model, **averages})
    save_model(tmp_path / "other.safetensors", diffusion_model("sd1", 1))
    save_model(tmp_path / "both.safetensors", {**both[TEXT], **both[UNET]})
    save_model(tmp_path / "unet.safetensors", both[UNET])
    whole = parts(MODULES[UNET], set_weight=torch.ones_like(model[UNET]))
    save_model(tmp_path / "whole.safetensors", whole)
    monkeypatch.chdir(tmp_path)
    return Path(tmp_path)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], dict[str, Any]]:
    """What is said of adapters of a merge that is carried out, and the account in its report."""
    assert main([*words, "-o", "out.safetensors", "--force", "--report", "r.json"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "both" in line or "unet" in line]
    (account,) = json.loads(Path("r.json").read_text())["adapters"]
    return said, account


@pytest.mark.parametrize(
    "more",
    [["--only", "unet"], ["--only", "unet", "--names", "diffusers"], ["--drop", "*text_model*"]],
)
def test_what_the_output_lacks_is_not_applied(folder, capsys, more):
    said, account = told(capsys, "bake", "model.safetensors", "both.safetensors", *more)
    assert said == [
        "note: both in model: 1 of 2 modules applied, to 1 tensor: LoRA, rank 2, scale 0.5",
        "note: both: 1 module changes nothing: what it would change is not in the output: " + MODULES[TEXT],
    ]
    assert (account["modules"], account["applied"], account["not_in_output"]) == (2, 1, [MODULES[TEXT]])
    assert [(row["module"], row["tensors"]) for row in account["rows"]] == [(MODULES[UNET], [UNET])]


@pytest.mark.parametrize("more", [["--only", "vae"], ["--drop", "*.q_proj.*"], ["--ema", "use"]])
def test_an_adapter_of_which_nothing_is_in_the_output_is_refused(folder, capsys, more):
    adapter = "unet" if more == ["--ema", "use"] else "both"
    if more[0] == "--drop":
        more = [*more, "--take", "*.proj_in.*=other.safetensors"]
    assert main(["bake", "model.safetensors", f"{adapter}.safetensors", "-o", "out.safetensors", *more]) == 1
    said = capsys.readouterr().err
    assert "error: 1 adapter changes nothing that is in the output" in said
    assert f"{adapter} in model   " in said
    assert UNET in said
    assert not (folder / "out.safetensors").exists()


def test_what_may_be_missing_is_told_alone(folder, capsys):
    words = ["bake", "model.safetensors", "unet.safetensors", "--only", "vae", "--on-missing", "keep"]
    said, account = told(capsys, *words)
    assert said[0] == "note: unet in model: 0 of 1 module applied"
    assert said[1].startswith("note: unet: 1 module changes nothing: what it would change is not in the output")
    assert (account["applied"], account["rows"]) == (0, [])


@pytest.mark.parametrize(
    ("weight", "applied"),
    [
        (0.0, []),
        (1.0, [MODULES[TEXT], MODULES[UNET]]),
        ([{"filter": "text_model", "value": 0}, {"value": 1}], [MODULES[UNET]]),
    ],
)
def test_a_model_of_the_weight_0_takes_its_adapters_with_it(folder, capsys, weight, applied):
    model = {"model": "model.safetensors", "adapters": ["both.safetensors"], "parameters": {"weight": weight}}
    other = {"model": "other.safetensors", "parameters": {"weight": 1.0}}
    recipe = {"merge_method": "linear", "models": [model, other], "on_missing": "keep"}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    said, account = told(capsys, "recipe.yaml")
    assert said[0].startswith(f"note: both in model: {len(applied)} of 2 modules applied")
    assert sorted(row["module"] for row in account["rows"]) == sorted(applied)
    capsys.readouterr()
    assert main(["recipe.yaml", "-o", "x.safetensors", "--dry-run"]) == 0
    assert (f"{len(applied)}  merged: linear, with both" in capsys.readouterr().out) == bool(applied)


def test_adapters_of_nested_recipes_are_accounted_for_by_the_whole_output(folder, capsys):
    inner = {"merge_method": "linear", "models": [{"model": "model.safetensors", "adapters": ["both.safetensors"]}]}
    outer = {"merge_method": "linear", "models": [{"model": inner, "name": "styled"}, "other.safetensors"]}
    Path("recipe.yaml").write_text(json.dumps({**outer, "on_missing": "keep"}))
    said, _ = told(capsys, "recipe.yaml", "--only", "unet")
    assert said == [
        "note: both in model: 1 of 2 modules applied, to 1 tensor: LoRA, rank 2, scale 0.5",
        "note: both: 1 module changes nothing: what it would change is not in the output: " + MODULES[TEXT],
    ]
    Path("recipe.yaml").write_text(
        json.dumps({**outer, "on_missing": "keep", "rules": [{"match": "*q_proj*", "drop": True}]})
    )
    assert told(capsys, "recipe.yaml")[1]["not_in_output"] == [MODULES[TEXT]]


def test_what_stands_in_a_tensors_place_is_applied(folder, capsys):
    """Nothing of the model's tensor is read then."""
    assert main(["bake", "model.safetensors", "whole.safetensors", "-o", "out.safetensors", "--only", "unet"]) == 0
    assert "whole in model: 1 of 1 module applied, to 1 tensor: difference, scale 1" in capsys.readouterr().err


def test_a_difference_of_two_models_is_that_of_the_adapter(folder, capsys):
    styled = {"model": "model.safetensors", "adapters": ["both.safetensors"], "name": "styled"}
    plain = {"model": "model.safetensors", "name": "plain", "parameters": {"weight": -1.0}}
    recipe = {"merge_method": "linear", "models": [{**styled, "parameters": {"weight": 1.0}}, plain]}
    Path("recipe.yaml").write_text(json.dumps({**recipe, "parameters": {"normalize": False}, "on_missing": "keep"}))
    assert told(capsys, "recipe.yaml")[1]["applied"] == 2


def test_of_rows_of_a_tensor_those_that_are_there_are_told(tmp_path, monkeypatch, capsys):
    """A module of queries, keys and values that are three tensors in the model, of which one is left out."""
    model = diffusion_model("flux")
    save_model(tmp_path / "model.safetensors", model)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "model.safetensors", "--names", "diffusers", "-o", "theirs.safetensors", "-q"]) == 0
    fused = next(name for name in model if name.endswith("double_blocks.0.img_attn.qkv.weight"))
    rows, columns = model[fused].shape
    up, down = numbers(rows, 2), numbers(2, columns)
    stem = fused.removeprefix("model.diffusion_model.").removesuffix(".weight")
    both = parts(f"diffusion_model.{stem}", lora_up__weight=up, lora_down__weight=down, alpha=1.0)
    save_model(tmp_path / "both.safetensors", both)
    _, account = told(capsys, "bake", "theirs.safetensors", "both.safetensors", "--drop", "*attn.to_k.*")
    (row,) = account["rows"]
    assert [name.rsplit(".", 2)[-2] for name in row["tensors"]] == ["to_q", "to_v"]


def test_adalora_whose_ranks_were_pruned_is_applied_though_it_has_nothing(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "model.safetensors", {"x.weight": numbers(6, 4), "y.weight": numbers(6, 4, seed=1)})
    pruned = {"x.lora_A": torch.zeros(0, 4), "x.lora_B": torch.zeros(6, 0), "x.lora_E": torch.zeros(0, 1)}
    kept = {"y.lora_A": numbers(2, 4), "y.lora_B": numbers(6, 2), "y.lora_E": numbers(2, 1)}
    peft_folder(tmp_path / "unet", {**pruned, **kept}, peft_type="ADALORA", init_r=4, lora_alpha=8)
    monkeypatch.chdir(tmp_path)
    assert told(capsys, "bake", "model.safetensors", "unet")[1]["applied"] == 2
