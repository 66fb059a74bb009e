"""A config says of tensors what is so, and nothing of it is changed that was right or that they don't tell."""

from __future__ import annotations

import json

import pytest

from streammerge.errors import CheckpointError
from streammerge.models.configs import adapt, config_in, main_dtype
from streammerge.tensors import DTYPES, TensorInfo

F32, F16, BF16, F8 = (DTYPES[name] for name in ("F32", "F16", "BF16", "F8_E4M3"))


def model(dtype=BF16, layers=2, vocab=32, *, head=True, prefix="model.", norm=None):
    tensors = {f"{prefix}embed_tokens.weight": TensorInfo(dtype, (vocab, 8))}
    tensors |= {f"{prefix}layers.{number}.mlp.up_proj.weight": TensorInfo(dtype, (8, 8)) for number in range(layers)}
    tensors |= {f"{prefix}norm.weight": TensorInfo(norm or dtype, (8,))}
    return {**tensors, **({"lm_head.weight": TensorInfo(dtype, (vocab, 8))} if head else {})}


CONFIG = {"num_hidden_layers": 2, "vocab_size": 32, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


def changed(config, before, after, **how):
    """What of the config is another, by its path."""
    made = adapt(config, before, after, **how)
    assert bool(made.changed) == (made.values != config)
    return {key: value for key, value in made.values.items() if config.get(key, "nothing") != value}


def test_what_is_right_stays():
    assert changed(CONFIG, model(), model()) == {}
    assert changed({}, model(), model()) == {}
    assert changed({"torch_dtype": "torch.bfloat16"}, model(), model()) == {}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_dtype_is_what_most_bytes_are(key):
    assert changed({key: "bfloat16"}, model(), model(F16, norm=F32)) == {key: "float16"}
    assert changed({key: "float32"}, model(), model()) == {key: "bfloat16"}  # it was wrong before


def test_a_dtype_that_changes_is_told_where_none_was():
    assert changed({"hidden_size": 8}, model(), model(F32)) == {"torch_dtype": "float32"}


def test_no_model_is_made_in_8_bits():
    assert main_dtype(model(F8)) == ""
    assert changed(CONFIG, model(), model(F8)) == {}
    assert changed(CONFIG, model(F8, norm=BF16), model(F8, norm=F32)) == {"torch_dtype": "float32"}


def test_parts_have_the_dtype_too():
    config = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "vision_config": {"dtype": "float32"}}
    mixed = model(F16, norm=F32)
    found = changed(config, model(), mixed)
    assert found == {"torch_dtype": "float16", "text_config": {"dtype": "float16"}}
    found = changed(config, model(), model(F16))
    assert found["vision_config"] == {"dtype": "float16"}


def test_sizes_follow_the_tensors_where_they_did_before():
    assert changed(CONFIG, model(), model(vocab=40)) == {"vocab_size": 40}
    assert changed(CONFIG, model(), model(layers=5)) == {"num_hidden_layers": 5}
    assert changed({"n_layer": 2}, model(), model(layers=1)) == {"n_layer": 1}
    assert changed({**CONFIG, "vocab_size": 31}, model(), model(vocab=40)) == {}
    assert changed({**CONFIG, "num_hidden_layers": 9}, model(), model(layers=5)) == {}
    nested = {"text_config": dict(CONFIG), "num_hidden_layers": True}
    assert changed(nested, model(), model(layers=5, vocab=7))["text_config"] == {
        **CONFIG, "num_hidden_layers": 5, "vocab_size": 7,
    }  # fmt: skip


def test_a_head_of_its_own_is_not_tied():
    tied = {"tie_word_embeddings": True}
    assert changed(tied, model(head=False), model(head=False)) == {}
    assert changed(tied, model(head=False), model()) == {"tie_word_embeddings": False}
    assert changed(tied, model(), model()) == {}
    assert changed(tied, model(), model(), untied=True) == {"tie_word_embeddings": False}
    assert adapt({"text_config": dict(tied)}, model(head=False), model()).values["text_config"] == {
        "tie_word_embeddings": False
    }
    assert adapt({}, model(head=False), model()).values == {"tie_word_embeddings": False}


def test_a_tied_t5_can_not_be_untied():
    made = adapt({"is_encoder_decoder": True, "tie_word_embeddings": True}, model(head=False), model())
    assert made.values["tie_word_embeddings"] is True
    assert made.notes


def test_nothing_is_said_of_codes_that_are_decoded():
    config = {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "bfloat16"}
    name = "model.layers.0.mlp.up_proj.weight"
    coded = {**model(), name: TensorInfo(F8, (8, 8)), f"{name}_scale_inv": TensorInfo(F32, (1, 1))}
    assert "quantization_config" not in adapt(config, coded, model()).values
    assert changed(config, coded, coded) == {}
    assert changed(config, model(), model()) == {}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 100_000, "\xff"])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"(?s)config\.json: can't be read as the model's.*--no-companions"):
        config_in(tmp_path)


def test_a_config_is_written_as_the_libraries_do():
    config = {"rms_norm_eps": 1e-05, "name": "ü", "big": 10**20, "torch_dtype": "bfloat16"}
    made = adapt(config, model(), model(F16))
    assert json.loads(made.encoded()) == {**config, "torch_dtype": "float16"}
    assert b'"rms_norm_eps": 1e-05,\n  "name": "\xc3\xbc"' in made.encoded()
