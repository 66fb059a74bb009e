"""PEFT's `add_weighted_adapter`, where it combines products: cat, svd and the `_svd` forms; and its reading of ours.

They run where peft is installed. What PEFT makes of averaged factors (linear, ties, dare_linear, dare_ties,
magnitude_prune without `_svd`) has terms in which one adapter's factors meet another's: shown below, and not imitated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import streammerge
from tests.make.models import normal, save_model

pytestmark = pytest.mark.clients

RANKS = {"one": 4, "two": 6}
WEIGHTS = [0.8, 0.5]


class Net(nn.Module):
    """A module of each kind that LoRAs change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)
        self.conv, self.emb = nn.Conv2d(6, 8, 3), nn.Embedding(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Called by nobody."""
        made: torch.Tensor = self.b(self.a(x))
        return made


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft")


def adapted(peft: Any, folder: Path, targets: list[str]) -> Any:
    """A model with two adapters, each saved to its folder; the second is rank-stabilised."""
    torch.manual_seed(0)
    base = Net()
    config = peft.LoraConfig(r=RANKS["one"], lora_alpha=8, target_modules=targets)
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=RANKS["two"], lora_alpha=3, target_modules=targets, use_rslora=True))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = normal(parameter.shape, number, scale=0.3)
    model.save_pretrained(str(folder))
    return model


def deltas(model: Any, adapter: str) -> Mapping[str, torch.Tensor]:
    return {
        name: module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def merged(peft: Any, folder: Path, method: str, rank: int, **keys: Any) -> Mapping[str, torch.Tensor]:
    """What our merge of the two folders changes, as PEFT reads it."""
    models = [
        {"model": str(folder / name), "parameters": {"weight": weight}}
        for name, weight in zip(RANKS, keys.pop("weights", WEIGHTS), strict=True)
    ]
    recipe = {"merge_method": method, "models": models, "low_rank": {"rank": rank, **keys.pop("low_rank", {})}, **keys}
    streammerge.merge(recipe, output=folder / "ours", sync=False, force=True)
    torch.manual_seed(0)
    return deltas(peft.PeftModel.from_pretrained(Net(), str(folder / "ours"), adapter_name="ours"), "ours")


def assert_near(made: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert made.keys() == right.keys()
    assert len(made) > 1
    for name, tensor in right.items():
        assert tensor.abs().max() > 0.01
        assert torch.allclose(made[name], tensor, rtol=1e-4, atol=5e-6), name


TARGETS = ["a", "b"]


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("targets", [TARGETS, ["a", "b", "conv", "emb"]])
def test_svd(peft, tmp_path, rank, targets):
    model = adapted(peft, tmp_path, targets)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "theirs", combination_type="svd", svd_rank=rank)
    assert_near(merged(peft, tmp_path, "linear", rank), deltas(model, "theirs"))


def test_svd_with_elements_that_are_clamped(peft, tmp_path):
    model = adapted(peft, tmp_path, TARGETS)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "theirs", combination_type="svd", svd_rank=5, svd_clamp=0.95)
    ours, theirs = merged(peft, tmp_path, "linear", 5, low_rank={"clamp_quantile": 0.95}), deltas(model, "theirs")
    for name, tensor in theirs.items():  # which elements are cut hangs on the singular vectors' signs
        assert float((ours[name] - tensor).norm() / tensor.norm()) < 0.2


def test_cat(peft, tmp_path):
    """The sum itself: a rank that holds all of it."""
    model = adapted(peft, tmp_path, TARGETS)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "theirs", combination_type="cat")
    assert_near(merged(peft, tmp_path, "linear", 1000), deltas(model, "theirs"))


@pytest.mark.parametrize("rank", [4, 12])
def test_ties_svd(peft, tmp_path, rank):
    """Of weights that are 1: with others PEFT elects signs without them, and divides by counts."""
    model = adapted(peft, tmp_path, TARGETS)
    options = {"combination_type": "ties_svd", "density": 0.5, "svd_rank": rank}
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "theirs", **options)
    ours = merged(peft, tmp_path, "ties", rank, weights=[1.0, 1.0], parameters={"density": 0.5, "normalize": True})
    assert_near(ours, deltas(model, "theirs"))


def test_magnitude_prune_svd(peft, tmp_path):
    model = adapted(peft, tmp_path, TARGETS)
    options = {"combination_type": "magnitude_prune_svd", "density": 0.5, "svd_rank": 8}
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "theirs", **options)
    ours = merged(peft, tmp_path, "breadcrumbs", 8, parameters={"density": 0.5, "gamma": 0.0, "normalize": False})
    assert_near(ours, deltas(model, "theirs"))


@pytest.mark.parametrize("form", ["dare_linear", "dare_ties"])
def test_dare_svd(peft, tmp_path, form):
    """Of a density of 1, at which nothing is drawn: the random numbers are others."""
    model = adapted(peft, tmp_path, TARGETS)
    options = {"combination_type": f"{form}_svd", "density": 1.0, "svd_rank": 8}
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "theirs", **options)
    normalize = form == "dare_ties"
    ours = merged(peft, tmp_path, form, 8, weights=[1.0, 1.0], parameters={"density": 1.0, "normalize": normalize})
    assert_near(ours, deltas(model, "theirs"))


def test_averaged_factors_are_no_merge(peft, tmp_path):
    """PEFT's `linear`, for two adapters of one rank, is not the sum of what they do."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)
    model = peft.get_peft_model(Net(), config, adapter_name="one")
    model.add_adapter("two", config)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = normal(parameter.shape, number, scale=0.3)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "theirs", combination_type="linear")
    one, two, theirs = (deltas(model, name) for name in ("one", "two", "theirs"))
    for name, tensor in theirs.items():
        mean = (one[name] + two[name]) / 2
        assert float((tensor - mean).norm() / mean.norm()) > 0.3


def test_an_extracted_adapter_is_read_by_peft(peft, tmp_path):
    """Of full rank it is the tuned model; ranks differ from module to module."""
    torch.manual_seed(0)
    base = Net()
    before = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
    after = {
        name: tensor + normal(tensor.shape, n, scale=0.1) if tensor.ndim > 1 else tensor
        for n, (name, tensor) in enumerate(before.items())
    }
    save_model(tmp_path / "base.safetensors", before)
    save_model(tmp_path / "tuned.safetensors", after)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [str(tmp_path / "tuned.safetensors")],
        "low_rank": {"rank": 1000, "names": "peft"},
    }
    streammerge.merge(recipe, output=tmp_path / "adapter", sync=False)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in found.items() if "lora_A" in name}
    assert len(ranks) > 1
    made = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    for name, tensor in after.items():
        assert torch.allclose(made[name], tensor, atol=1e-6), name
