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
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "Qwen3 MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "BERT": ("BertForMaskedLM", "BertConfig", SIZES),
    "LLaVA": ("LlavaForConditionalGeneration", "LlavaConfig", {"image_token_index": 63, "image_seq_length": 16}),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "num_mel_bins": 16,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0},
    ),
}
IMAGES = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SPARSE = ("Mixtral", "Qwen3 MoE")
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
        if case == "LLaVA":
            images = transformers.CLIPVisionConfig(**IMAGES, num_attention_heads=4)
            more |= {"vision_config": images, "text_config": transformers.LlamaConfig(**GROUPED)}
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


def words_for(case: str) -> dict[str, Any]:
    """What a model of this kind is given."""
    words = torch.arange(3, 11)[None]
    drawn = torch.Generator().manual_seed(7)
    if case == "Whisper":
        return {"input_features": torch.randn(1, 16, 40, generator=drawn), "decoder_input_ids": words}
    if case == "LLaVA":
        seen = torch.cat([torch.full((1, 16), 63), words], 1)
        return {"input_ids": seen, "pixel_values": torch.randn(1, 3, 32, 32, generator=drawn)}
    return {"input_ids": words, **({"decoder_input_ids": words[:, :4]} if case == "T5" else {})}


def logits(model: Any, case: str) -> torch.Tensor:
    """What it answers, in float64; torch multiplies matrices of experts in float32 at most."""
    dtype = torch.float32 if case in SPARSE else torch.float64
    words = {name: value.to(dtype) if value.is_floating_point() else value for name, value in words_for(case).items()}
    with torch.no_grad():
        answer: torch.Tensor = model.eval().to(dtype)(**words).logits
    return answer.double()


@pytest.mark.parametrize("shard_size", [None, SHARDED])
@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("case", MODELS)
def test_a_merge_is_a_model(save, case, dtype, shard_size):
    a, b = save("a", case, 1), save("b", case, 2, sharded=True)
    options = {} if dtype is None else {"dtype": dtype}
    streammerge.merge({"merge_method": "linear", "models": ["a", "b"]}, output="out", shard_size=shard_size, **options)
    found, weights = load("out", case), mean(a, b)
    assert found.dtype == (torch.bfloat16 if dtype else torch.float32)
    check(found, weights, 2**-8 if dtype else 1e-6)
    if case != "BERT":
        given = {name: value for name, value in words_for(case).items() if name != "decoder_input_ids"}
        given = {name: value.to(found.dtype) if value.is_floating_point() else value for name, value in given.items()}
        assert found.generate(**given, max_new_tokens=3, do_sample=False).shape[1] > 1
    exact = a.double()
    exact.load_state_dict({name: value.to(found.dtype).double() for name, value in weights.items()})
    torch.testing.assert_close(logits(found, case), logits(exact, case), rtol=1e-4, atol=2e-3 if dtype else 1e-5)


MODULES = {
    "LLaVA": {"text_decoder": 0.75, "vision_tower": 0.5, "multi_modal_projector": 0.0},
    "Whisper": {"encoder": 0.75, "decoder": 0.25},
    "T5": {"encoder": 0.75, "decoder": 0.25, "shared": 0.5},
}


@pytest.mark.parametrize("case", MODULES)
def test_modules_are_merged_each_by_its_own_definition_and_nothing_is_lost(save, case):
    a, b = (save(name, case, seed).state_dict() for seed, name in enumerate("ab", 1))
    modules = {
        name: {
            "models": [{"model": "a", "parameters": {"weight": own}}, {"model": "b", "parameters": {"weight": 1 - own}}]
        }
        for name, own in MODULES[case].items()
    }
    streammerge.merge({"merge_method": "linear", "modules": modules}, output="out")
    found = load("out", case).state_dict()
    parts = {"vision_tower": "vision_tower", "multi_modal_projector": "multi_modal_projector"}
    for name, value in found.items():
        inner = next((part for part in (*parts, *MODULES[case]) if f"{part}." in name), None)
        tied = {"LLaVA": "text_decoder", "Whisper": "decoder", "T5": "shared"}[case]
        own = MODULES[case][inner or tied]
        if case == "T5" and ("embed_tokens" in name or "lm_head" in name):
            own = MODULES[case]["shared"]
        wanted = own * a[name].double() + (1 - own) * b[name].double()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_text_model_is_merged_with_the_language_model_of_one_with_images(save):
    images, text = save("images", "LLaVA", 1), save("text", "Llama", 2)
    own = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    recipe = {"merge_method": "linear", "models": ["images", {"model": "text", "prefix": own}], "on_missing": "keep"}
    streammerge.merge(recipe, output="out")
    found, given = load("out", "LLaVA").state_dict(), images.state_dict()
    for name, value in text.state_dict().items():
        inner = name.replace("model.", "model.language_model.", 1)
        torch.testing.assert_close(found.pop(inner), (value + given[inner]) / 2)
    assert all(torch.equal(value, given[name]) for name, value in found.items())


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
