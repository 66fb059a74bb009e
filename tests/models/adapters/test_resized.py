"""Adapters that were trained with tokens of their own: their embeddings have other rows than the model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from streammerge.cli.main import main
from streammerge.errors import PlanError
from tests.make.models import Tensors, load_model, save_model
from tests.models.adapters.baking import bake, numbers, peft_folder

EMBEDDING, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
MODEL: Tensors = {
    EMBEDDING: numbers(20, 6, seed=1).bfloat16(),
    HEAD: numbers(20, 6, seed=2).bfloat16(),
    OTHER: numbers(5, 4, seed=3).bfloat16(),
}
TIED = {name: tensor for name, tensor in MODEL.items() if name != HEAD}


def adapter(folder: Path, rows: int, *names: str) -> tuple[Path, Tensors]:
    """An adapter with whole tensors of so many rows."""
    saved = {name: numbers(rows, 6, seed=number + 5) for number, name in enumerate(names)}
    return peft_folder(folder / f"adapter{rows}", saved, r=2, lora_alpha=2), saved


@pytest.mark.parametrize("rows", [24, 17])
@pytest.mark.parametrize("names", [(EMBEDDING, HEAD), (EMBEDDING,)])
def test_a_vocabulary_of_another_size(tmp_path, rows, names):
    folder, saved = adapter(tmp_path, rows, *names)
    model = MODEL if HEAD in names else TIED
    made = bake(tmp_path, model, folder)
    assert made.keys() == model.keys()
    for name, tensor in saved.items():
        assert torch.equal(made[name], tensor.bfloat16())
    assert torch.equal(made[OTHER], MODEL[OTHER])


def test_factors_on_a_vocabulary_of_another_size(tmp_path):
    saved, up, down = numbers(24, 6, seed=5), numbers(6, 2, seed=6), numbers(2, 24, seed=7)
    stem = EMBEDDING.removesuffix(".weight")
    tensors = {
        f"{stem}.base_layer.weight": saved,
        f"{stem}.lora_embedding_A": down,
        f"{stem}.lora_embedding_B": up,
    }
    made = bake(tmp_path, TIED, peft_folder(tmp_path / "adapter", tensors, r=2, lora_alpha=6))
    expected = saved.double() + 3 * (up.double() @ down.double()).T
    assert torch.allclose(made[EMBEDDING].double(), expected, atol=0.01)


def test_the_config_says_so_and_the_tokenizer_is_told_of(tmp_path, capsys):
    base = tmp_path / "base"
    save_model(base / "model.safetensors", MODEL)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 20, "num_hidden_layers": 1}))
    folder, _ = adapter(tmp_path, 24, EMBEDDING, HEAD)
    assert main(["bake", str(base), str(folder), "-o", str(tmp_path / "out"), "-v"]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 24
    assert load_model(tmp_path / "out/model.safetensors")[HEAD].shape == (24, 6)
    said = capsys.readouterr().err
    assert "lm_head.weight has 24 rows by it, and had 20: the tokenizer that goes with them is the adapter's" in said


def test_a_tied_head_is_told_of(tmp_path, capsys):
    save_model(tmp_path / "base.safetensors", TIED)
    folder, _ = adapter(tmp_path, 20, EMBEDDING)
    assert main(["bake", str(tmp_path / "base.safetensors"), str(folder), "-o", str(tmp_path / "o.safetensors")]) == 0
    assert "where a head is tied to that, so that it isn't stored, it changes too" in capsys.readouterr().err


def test_a_weight_of_0_leaves_the_models(tmp_path):
    folder, _ = adapter(tmp_path, 24, EMBEDDING, HEAD)
    made = bake(tmp_path, MODEL, folder, weights=0.0)
    assert all(torch.equal(made[name], tensor) for name, tensor in MODEL.items())


def test_what_has_no_meaning_is_refused(tmp_path):
    both, _ = adapter(tmp_path, 24, EMBEDDING, HEAD)
    one, _ = adapter(tmp_path, 23, EMBEDDING)
    other, _ = adapter(tmp_path, 7, OTHER)
    wide = peft_folder(tmp_path / "wide", {EMBEDDING: numbers(24, 7), HEAD: numbers(24, 7)}, r=2)
    with pytest.raises(PlanError, match=r"has 24 rows, and model.embed_tokens.weight 20: its weight has to be 1"):
        bake(tmp_path, MODEL, both, weights=0.5)
    with pytest.raises(PlanError, match=r"23 rows of model.embed_tokens.weight and 20 rows of lm_head.weight"):
        bake(tmp_path, MODEL, one)
    with pytest.raises(PlanError, match=r"another adapter has given model.embed_tokens.weight other rows"):
        bake(tmp_path, TIED, one, one)
    with pytest.raises(PlanError, match=r"changes \[7, 6\], and model.layers.0.mlp.up_proj.weight is \[5, 4\]"):
        bake(tmp_path, MODEL, other)
    with pytest.raises(PlanError, match=r"changes \[24, 7\], and model.embed_tokens.weight is \[20, 6\]"):
        bake(tmp_path, MODEL, wide)
