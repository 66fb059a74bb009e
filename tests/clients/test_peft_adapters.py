"""PEFT's own `merge_and_unload` and LyCORIS' own merge give what baking gives, kind by kind.

They run where peft, or lycoris-lora, is installed; the project itself depends on neither.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.make.models import Tensors, merge_to, normal, save_model

pytestmark = pytest.mark.clients


class Net(nn.Module):
    """A module of each kind that adapters change."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)
        self.conv, self.point = nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 1)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Called by nobody but the libraries, to look at it."""
        made: torch.Tensor = self.head(self.b(self.a(self.norm(self.emb(x)))))
        return made


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def tensors_of(module: nn.Module) -> Tensors:
    return {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}


def baked(folder: Path, adapter: Path, weight: float = 1.0) -> Tensors:
    base = save_model(folder / "base.safetensors", tensors_of(net()))
    given = {"model": str(base), "adapters": [{"adapter": str(adapter), "weight": weight}]}
    return merge_to(folder / "out.safetensors", {"merge_method": "linear", "models": [given]})


def assert_near(made: Tensors, expected: Tensors) -> None:
    assert made.keys() == expected.keys()
    before = tensors_of(net())
    assert any(not torch.equal(made[name], before[name]) for name in made)
    for name, tensor in expected.items():
        assert torch.allclose(made[name], tensor, rtol=1e-5, atol=2e-6), name


LORA = {"r": 4, "lora_alpha": 8}
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {**LORA, "target_modules": ["a", "b", "emb", "conv", "point"]}),
    "rank-stabilised": ("LoraConfig", {**LORA, "use_rslora": True, "target_modules": ["a", "b"]}),
    "patterns": (
        "LoraConfig",
        {**LORA, "rank_pattern": {"a": 2}, "alpha_pattern": {"a": 6}, "target_modules": ["a", "b"]},
    ),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True, "target_modules": ["a", "b", "conv"]}),
    "its bias": ("LoraConfig", {**LORA, "lora_bias": True, "target_modules": ["a"]}),
    "biases": ("LoraConfig", {**LORA, "bias": "all", "target_modules": ["a"]}),
    "saved modules": ("LoraConfig", {**LORA, "modules_to_save": ["head"], "target_modules": ["a"]}),
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 8, "target_modules": ["a", "b", "conv"]}),
    "LoHa with cores": ("LoHaConfig", {"r": 4, "alpha": 8, "use_effective_conv2d": True, "target_modules": ["conv"]}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 8, "target_modules": ["a", "b", "conv"]}),
    "LoKr, factored": ("LoKrConfig", {"r": 2, "alpha": 8, "decompose_both": True, "target_modules": ["a", "conv"]}),
    "(IA)³": ("IA3Config", {"target_modules": ["a", "b"], "feedforward_modules": ["b"]}),
    "VeRA": ("VeraConfig", {"r": 4, "save_projection": True, "target_modules": ["a"]}),
    "OFT": (
        "OFTConfig",
        {"oft_block_size": 4, "target_modules": ["a", "b", "emb", "conv"]},
    ),
    "OFT, exact": ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False, "target_modules": ["a", "emb"]}),
    "OFT, shared": ("OFTConfig", {"oft_block_size": 4, "block_share": True, "target_modules": ["a", "conv"]}),
    "OFT, of few terms": (
        "OFTConfig",
        {"oft_block_size": 3, "num_cayley_neumann_terms": 3, "target_modules": ["a", "conv"]},
    ),
    "OFT, of two terms": ("OFTConfig", {"oft_block_size": 3, "num_cayley_neumann_terms": 2, "target_modules": ["a"]}),
    "OFT, bounded": ("OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.4, "target_modules": ["a", "b"]}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, "target_modules": ["a", "b"]}),
    "BOFT of kernels": ("BOFTConfig", {"boft_block_size": 6, "target_modules": ["conv"]}),
    "AdaLoRA": (
        "AdaLoraConfig",
        {"init_r": 6, "lora_alpha": 9, "total_step": 9, "target_modules": ["a", "b"]},
    ),
}


@pytest.mark.parametrize("case", PEFT)
def test_pefts_merge_and_unload(tmp_path, case):
    peft = pytest.importorskip("peft")
    kind, keywords = PEFT[case]
    model = peft.get_peft_model(net(), getattr(peft, kind)(**keywords))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad or "vera" in name:
            parameter.data = normal(parameter.shape, number, scale=0.3) + ("ia3" in name or "magnitude" in name)
    model.save_pretrained(tmp_path / "adapter")
    expected = peft.PeftModel.from_pretrained(net(), tmp_path / "adapter").merge_and_unload()
    assert_near(baked(tmp_path, tmp_path / "adapter"), tensors_of(expected))


KINDS = ["Linear", "Conv2d", "LayerNorm"]
LYCORIS: dict[str, dict[str, Any]] = {
    "LoRA": {"algo": "lora"},
    "LoRA with cores": {"algo": "lora", "use_tucker": True},
    "rank-stabilised": {"algo": "lora", "rs_lora": True},
    "a scalar": {"algo": "lora", "use_scalar": True},
    "norms": {"algo": "lora", "train_norm": True},
    "DoRA": {"algo": "lora", "dora_wd": True},
    "LoHa": {"algo": "loha", "linear_alpha": 4.0, "conv_alpha": 4.0},  # its merge takes the scale twice: here it is 1
    "LoHa with cores": {"algo": "loha", "use_tucker": True, "linear_alpha": 4.0, "conv_alpha": 4.0},
    "LoKr": {"algo": "lokr"},
    "LoKr, both factored": {"algo": "lokr", "decompose_both": True, "factor": 4},
    "LoKr, both whole": {"algo": "lokr", "full_matrix": True},
    "differences": {"algo": "full"},
    "GLoRA": {"algo": "glora"},
    "OFT": {"algo": "diag-oft"},
    "OFT, bounded": {"algo": "diag-oft", "constraint": 0.05},
    "OFT, rescaled": {"algo": "diag-oft", "rescaled": True},
    "BOFT": {"algo": "boft"},
    "BOFT, rescaled": {"algo": "boft", "rescaled": True},
}


@pytest.mark.parametrize("weight", [1.0, 0.6])
@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris_own_merge(tmp_path, case, weight):
    lycoris = pytest.importorskip("lycoris")
    if case in ("DoRA", "OFT, rescaled", "BOFT", "BOFT, rescaled") and weight != 1:
        pytest.skip("LyCORIS interpolates lengths, or the rotation of every stage, and not weights")
    logging.disable(logging.CRITICAL)
    settings = {"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 2.0, **LYCORIS[case]}
    lycoris.LycorisNetwork.apply_preset(
        # butterflies want sizes that are halved again and again
        {"enable_conv": True, "target_module": ["Conv2d"] if "BOFT" in case else KINDS, "target_name": []}
    )
    network = lycoris.create_lycoris(net(), 1.0, settings.pop("linear_dim"), settings.pop("linear_alpha"), **settings)
    network.apply_to()
    for number, (name, parameter) in enumerate(network.named_parameters()):
        parameter.data = normal(parameter.shape, number, scale=0.3) + ("dora" in name)
    weights = tensors_of(network)
    save_file(weights, tmp_path / "adapter.safetensors")
    merged = net()
    again, _ = lycoris.create_lycoris_from_weights(weight, None, merged, weights_sd=weights)
    again.merge_to(weight)
    logging.disable(logging.NOTSET)
    assert_near(baked(tmp_path, tmp_path / "adapter.safetensors", weight), tensors_of(merged))


@pytest.mark.parametrize("weight", [1.0, -0.6])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16])
def test_lycoris_own_ia3(tmp_path, on_input, weight, dtype):
    """Its loader makes no module that was trained on inputs: here the module itself tells what it merges to."""
    module = pytest.importorskip("lycoris.modules.ia3").IA3Module
    for name, layer in ({"a": net().a, "conv": net().conv}).items():
        one = module(f"lora_unet_{name}", layer, train_on_input=on_input)
        one.weight.data = normal(one.weight.shape, 1, scale=0.3)
        tensors = {"weight": one.weight.data, "on_input": one.on_input.to(dtype)}
        save_file({f"lora_unet_{name}.{role}": tensor for role, tensor in tensors.items()}, tmp_path / "a.safetensors")
        found = baked(tmp_path, tmp_path / "a.safetensors", weight)[f"{name}.weight"]
        assert torch.allclose(found, one.get_merged_weight(multiplier=weight)[0], atol=1e-6)
