"""Mixtures that we build, loaded by transformers: of one model's own layers they compute what that model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.clients

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "Llama": ("Llama", {"rms_norm_eps": 1e-3}, {}, "MixtralForCausalLM"),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}, {}, "MixtralForCausalLM"),
    "Mistral": ("Mistral", {}, {}, "MixtralForCausalLM"),
    "Qwen2": ("Qwen2", {}, {"shared_experts": True}, "Qwen2MoeForCausalLM"),
    "Llama, shared": ("Llama", {}, {"shared_experts": True, "architecture": "qwen"}, "Qwen2MoeForCausalLM"),
    "Qwen3": ("Qwen3", {"head_dim": 8}, {}, "Qwen3MoeForCausalLM"),
}


@pytest.mark.parametrize("plain", [False, True], ids=["", "with an old config"])
@pytest.mark.parametrize("case", CASES)
def test_a_mixture_of_one_model_is_that_model(tmp_path, monkeypatch, case, plain):
    monkeypatch.chdir(tmp_path)
    transformers.logging.set_verbosity_error()
    kind, sizes, more, expected = CASES[case]
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes})
    dense = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    dense.save_pretrained("dense")
    if plain:  # what is at its default was not written once
        path = Path("dense") / "config.json"
        said = json.loads(path.read_text())
        for key in ("rope_parameters", "hidden_act", "max_position_embeddings", "layer_types", "head_dim"):
            said.pop(key, None) if (key, kind) != ("head_dim", "Qwen3") else None
        path.write_text(json.dumps(said))
    recipe: dict[str, Any] = {"base_model": "dense", "gate_mode": "random", "seed": 1}
    recipe["experts"] = [{"source_model": "dense"}] * 4
    if more.get("shared_experts"):
        recipe["shared_experts"] = [{"source_model": "dense", "residual_scale": 0.0}]
    recipe |= {key: value for key, value in more.items() if key != "shared_experts"}
    if more.get("shared_experts"):
        recipe["architecture"] = "qwen"
    streammerge.merge(recipe, output="mixture")
    found, told = transformers.AutoModelForCausalLM.from_pretrained("mixture", output_loading_info=True, dtype="auto")
    assert type(found).__name__ == expected
    assert not any(told.values()), told
    tokens = torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
    assert found.generate(tokens[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
