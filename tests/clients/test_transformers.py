"""Folders that we write, loaded by transformers: every key is there and wanted, and values are those of the merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.clients

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen3, tied": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8, "tie_word_embeddings": True}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "BERT": ("BertForMaskedLM", "BertConfig", SIZES),
    "T5": ("T5ForConditionalGeneration", "T5Config", {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48}),
}
SHARDED = "40kB"

Save = Callable[..., Any]


@pytest.fixture
def save(tmp_path, monkeypatch) -> Save:
    """Saves a model of random weights, and gives it."""
    monkeypatch.chdir(tmp_path)
    transformers.logging.set_verbosity_error()

    def saved(path: str, case: str, seed: int, *, sharded: bool = False, **more: Any) -> Any:
        architecture, config, sizes = MODELS[case]
        torch.manual_seed(seed)
        made = getattr(transformers, architecture)(getattr(transformers, config)(**{**sizes, **more}))
        made.save_pretrained(path, **({"max_shard_size": SHARDED} if sharded else {}))
        return made

    return saved


def load(path: str, case: str) -> Any:
    """The model in a folder, if transformers finds all that it looks for there, and nothing else."""
    found, told = getattr(transformers, MODELS[case][0]).from_pretrained(path, output_loading_info=True, dtype="auto")
    assert not any(told.values()), told
    return found


def check(found: Any, weights: dict[str, torch.Tensor], tolerance: float) -> None:
    state = found.state_dict()
    for name, expected in weights.items():
        torch.testing.assert_close(state[name].double(), expected.double(), rtol=tolerance, atol=1e-6)


def mean(*models: Any) -> dict[str, torch.Tensor]:
    states = [model.state_dict() for model in models]
    return {name: sum(state[name].double() for state in states) / len(states) for name in states[0]}


@pytest.mark.parametrize("shard_size", [None, SHARDED])
@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("case", MODELS)
def test_a_merge_is_a_model(save, case, dtype, shard_size):
    a, b = save("a", case, 1), save("b", case, 2, sharded=True)
    options = {} if dtype is None else {"dtype": dtype}
    streammerge.merge({"merge_method": "linear", "models": ["a", "b"]}, output="out", shard_size=shard_size, **options)
    found = load("out", case)
    assert found.dtype == (torch.bfloat16 if dtype else torch.float32)
    check(found, mean(a, b), 2**-8 if dtype else 1e-6)
    words = {"input_ids": torch.arange(8)[None]}
    words |= {"decoder_input_ids": torch.arange(4)[None]} if case == "T5" else {}
    assert torch.isfinite(found(**words).logits).all()


@pytest.mark.parametrize("order", [1, -1])
def test_tied_and_untied(save, order):
    tied, untied = save("tied", "Llama, tied", 1), save("untied", "Llama", 2)
    streammerge.merge({"merge_method": "linear", "models": ["tied", "untied"][::order]}, output="out")
    found = load("out", "Llama")
    check(found, mean(tied, untied), 1e-6)
    assert found.lm_head.weight is not found.model.embed_tokens.weight


@pytest.mark.parametrize("case", ["Llama", "Qwen3, tied", "Gemma 2", "GPT-2"])
def test_a_stack_of_layers_generates(save, case):
    a, b = save("a", case, 1), save("b", case, 2)
    slices = [[{"model": "a", "layer_range": [0, 3]}], [{"model": "b", "layer_range": [1, 3]}]]
    recipe = {"merge_method": "passthrough", "slices": [{"sources": sources} for sources in slices]}
    streammerge.merge(recipe, output="out")
    found = load("out", case)
    assert found.config.num_hidden_layers == 5
    for number, (model, own) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2)]):
        part = f".{number}."
        for name, value in found.state_dict().items():
            if part in name:
                assert torch.equal(value, model.state_dict()[name.replace(part, f".{own}.")])
    assert found.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_a_name_of_the_hub_is_found_where_its_library_looks(save, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    snapshot = Path("hf/hub/models--org--tiny/snapshots/abc")
    model = save(str(snapshot), "Llama", 3)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    streammerge.merge({"merge_method": "passthrough", "models": ["org/tiny"]}, output="out")
    check(load("out", "Llama"), model.state_dict(), 0)
