"""Models of other vocabularies, merged, in the program that they are for: transformers loads model and tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import streammerge

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.clients

TEXT = "the cat and the dog sat on the mat at noon; is it the log? no, this is a hat, and that is the end of it. "
OWN = {
    "a": "the cat ran to the hat shop in july, quick as a fox. ",
    "b": "the rain in spain stays mainly on the plain. ",
}


def tokenizer(name: str, special: list[str]) -> Any:
    """A byte-level BPE of its own text, as a fast tokenizer."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT * 4 + OWN[name] * 3], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>")
    fast.add_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformers.logging.set_verbosity_error()
    found = {}
    for seed, (name, special) in enumerate({"a": [], "b": ["<|im_start|>", "<|im_end|>"]}.items()):
        fast = tokenizer(name, special)
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(
            vocab_size=len(fast),
            **sizes,
            eos_token_id=fast.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=name == "a",
        )
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(name)
        fast.save_pretrained(name)
        found[name] = model, fast
    return found


@pytest.mark.parametrize("source", ["base", "union", "b"])
def test_it_loads_generates_and_encodes(models, source):
    keys: dict[str, Any] = {"merge_method": "slerp", "base_model": "a", "models": ["a", "b"], "parameters": {"t": 0.4}}
    streammerge.merge({**keys, "tokenizer_source": source}, output="out")
    model, told = transformers.AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(told.values()), told
    fast = transformers.AutoTokenizer.from_pretrained("out")
    assert len(fast) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert model.config.eos_token_id == fast.eos_token_id == fast.convert_tokens_to_ids("<|end|>")
    assert model.generation_config.eos_token_id == fast.eos_token_id
    own = {name: each for name, (_, each) in models.items()}
    alike = 0
    for word in sorted({word for text in (TEXT, *OWN.values()) for word in text.split()}):
        tokens = {name: each.tokenize(f" {word}") for name, each in own.items()}
        if tokens["a"] == tokens["b"]:
            alike += 1
            assert fast.tokenize(f" {word}") == tokens["a"]
            assert fast.decode(fast(f" {word}").input_ids) == f" {word}"
    assert alike > 10
    if source != "base":
        assert len(fast.tokenize("<|im_start|>the cat<|im_end|>")) == 2 + len(fast.tokenize("the cat"))
    made = model.generate(**fast("the cat", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert made.shape[1] > 2
    assert torch.isfinite(model(**fast(TEXT, return_tensors="pt")).logits).all()
    assert fast.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False) == "the cat"
