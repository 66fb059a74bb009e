"""Adapters and models whose names have in them what torch's wrappers put there, together and among each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.errors import MergeError
from tests.make.models import load_model, merge_to, save_model
from tests.models.adapters.baking import bake, numbers

MODULE, WEIGHT = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight"

MODELS: dict[str, Callable[[str], str]] = {
    "plain": lambda name: name,
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name.replace('layers.0.', 'layers.0._checkpoint_wrapped_module.')}",
    "divided": lambda name: f"_fsdp_wrapped_module.{name.replace('layers.0.', 'layers.0._fsdp_wrapped_module.')}",
    "around": lambda name: f"model.{name}",
}
ADAPTERS: dict[str, Callable[[str], str]] = {
    **{key: lambda name, key=key: f"base_model.model.{MODELS[key](name)}" for key in MODELS},  # type: ignore[misc]
    "outside": lambda name: f"module.base_model.model.{name}",
    "all around": lambda name: f"_orig_mod.module.base_model.model._orig_mod.{name}",
}


def model(wrapping: str) -> dict[str, torch.Tensor]:
    own = {WEIGHT: numbers(6, 5, seed=1), "model.norm.weight": numbers(5), "lm_head.weight": numbers(7, 5)}
    return {MODELS[wrapping](name): value for name, value in own.items()}


def adapter(folder: Path, wrapping: str, seed: int = 3, rank: int = 2, **config: Any) -> Path:
    folder.mkdir()
    wrap = ADAPTERS[wrapping]
    tensors = {
        wrap(f"{MODULE}.lora_A.weight"): numbers(rank, 5, seed=seed),
        wrap(f"{MODULE}.lora_B.weight"): numbers(6, rank, seed=seed + 1),
    }
    save_model(folder / "adapter_model.safetensors", tensors)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def product(seed: int = 3, rank: int = 2, alpha: float = 3) -> torch.Tensor:
    return alpha / rank * numbers(6, rank, seed=seed + 1).double() @ numbers(rank, 5, seed=seed).double()


@pytest.mark.parametrize("of_model", MODELS)
@pytest.mark.parametrize("of_adapter", ADAPTERS)
def test_an_adapter_finds_its_tensors(tmp_path, of_model, of_adapter):
    own = model(of_model)
    made = bake(tmp_path, own, adapter(tmp_path / "lora", of_adapter), weights=0.5)
    assert made.keys() == own.keys()
    name = MODELS[of_model](WEIGHT)
    assert torch.allclose(made[name].double(), own[name].double() + 0.5 * product(), atol=1e-6)


@pytest.mark.parametrize("wrapping", ADAPTERS)
@pytest.mark.parametrize("is_first", [True, False])
def test_adapters_that_are_wrapped_otherwise_add_up(tmp_path, wrapping, is_first):
    paths = [adapter(tmp_path / "a", "plain"), adapter(tmp_path / "b", wrapping, seed=7, rank=3)]
    paths = paths[::-1] if is_first else paths
    report = streammerge.merge({"merge_method": "linear", "models": list(map(str, paths))}, output=tmp_path / "sum")
    made = load_file(tmp_path / "sum/adapter_model.safetensors")
    assert made.keys() == {f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB"}
    up, down = (made[f"base_model.model.{MODULE}.lora_{side}.weight"].double() for side in "BA")
    assert torch.allclose(up @ down, product() + product(seed=7, rank=3), atol=1e-6)
    assert not any("no module that another has" in note for note in report.notes)


@pytest.mark.parametrize("wrapping", ADAPTERS)
def test_patterns_of_configs_mean_the_same_modules(tmp_path, wrapping):
    pattern = ADAPTERS[wrapping](MODULE).partition("base_model.model.")[2]
    lora = adapter(tmp_path / "lora", wrapping, alpha_pattern={pattern: 8})
    made = bake(tmp_path, model("plain"), lora)
    assert torch.allclose(made[WEIGHT].double(), model("plain")[WEIGHT].double() + product(alpha=8), atol=1e-6)


def test_kohyas_names_are_seen_through(tmp_path):
    own = {"double_blocks.0.img_attn.proj.weight": numbers(6, 5, seed=1), "img_in.weight": numbers(5)}
    for wrap in ("", "_orig_mod_"):
        module = f"lora_unet_{wrap}double_blocks_0_{wrap}img_attn_proj"
        factors = {"lora_down": numbers(2, 5, seed=3), "lora_up": numbers(6, 2, seed=4)}
        lora = {f"{module}.{role}.weight": value for role, value in factors.items()}
        made = bake(tmp_path, {f"module.{name}": value for name, value in own.items()}, lora)
        wanted = own["double_blocks.0.img_attn.proj.weight"].double() + product(alpha=2)
        assert torch.allclose(made["module.double_blocks.0.img_attn.proj.weight"].double(), wanted, atol=1e-6)


def test_a_module_of_that_name_is_no_wrapper(tmp_path):
    own = {"module.x.weight": numbers(6, 5, seed=1), "x.weight": numbers(6, 5, seed=2)}
    lora = {"lora_down": numbers(2, 5, seed=3), "lora_up": numbers(6, 2, seed=4)}
    made = bake(tmp_path, own, {f"module.x.{role}.weight": value for role, value in lora.items()})
    assert torch.allclose(
        made["module.x.weight"].double(), own["module.x.weight"].double() + product(alpha=2), atol=1e-6
    )
    assert torch.equal(made["x.weight"], own["x.weight"])


def test_a_module_under_two_wrappers_is_refused(tmp_path):
    lora: Mapping[str, torch.Tensor] = {
        f"{wrap}x.{role}.weight": value
        for wrap in ("", "_orig_mod.")
        for role, value in {"lora_down": numbers(2, 5), "lora_up": numbers(6, 2)}.items()
    }
    with pytest.raises(MergeError, match="is the same part of its module as"):
        bake(tmp_path, {"x.weight": numbers(6, 5)}, lora)


def test_weights_by_filter_are_of_the_models_own_names(tmp_path):
    lora = adapter(tmp_path / "lora", "plain")
    save_model(tmp_path / "model.safetensors", model("compiled"))
    weight = [{"filter": "_orig_mod.model.layers.0.", "value": 0.25}, {"value": 1}]
    models = [{"model": str(tmp_path / "model.safetensors"), "adapters": [{"adapter": str(lora), "weight": weight}]}]
    merge_to(tmp_path / "out.safetensors", {"merge_method": "linear", "models": models})
    made = load_model(tmp_path / "out.safetensors")[MODELS["compiled"](WEIGHT)]
    assert torch.allclose(made.double(), model("plain")[WEIGHT].double() + 0.25 * product(), atol=1e-6)
