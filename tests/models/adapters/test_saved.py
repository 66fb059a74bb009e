"""What PEFT's adapters hold whole beside factors: norms, biases, and the heads of some tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.cli.main import main
from tests.make.models import Tensors, load_model, make_tensors, near, save_model

LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    f"{LAYER}self_attn.q_proj.weight": (16, 16),
    f"{LAYER}self_attn.q_proj.bias": (16,),
    f"{LAYER}input_layernorm.weight": (16,),
    "model.norm.weight": (16,),
    "model.norm.bias": (16,),
}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}
HEAD = {**SHAPES, "score.weight": (3, 16)}
PREFIX = "base_model.model."


def extracted(
    folder: Path, base: Tensors, tuned: Tensors, config: dict[str, Any], *words: str
) -> tuple[Tensors, dict[str, Any]]:
    """The adapter's tensors, without PEFT's prefix, and its config."""
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_model(folder / name / "model.safetensors", tensors)
        (folder / name / "config.json").write_text(json.dumps(config))
    given = [str(folder / "tuned"), str(folder / "base"), "-o", str(folder / "adapter"), "--rank", "1000"]
    assert main(["extract", *given, "--force", *words]) == 0
    found = load_model(folder / "adapter/adapter_model.safetensors")
    said = json.loads((folder / "adapter/adapter_config.json").read_text())
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}, said


def baked(folder: Path) -> Tensors:
    assert main(["bake", str(folder / "base"), str(folder / "adapter"), "-o", str(folder / "baked"), "-q"]) == 0
    return load_model(folder / "baked/model.safetensors")


def two(shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[Tensors, Tensors]:
    base = make_tensors(0, torch.float32, shapes)
    return base, near(base, 5, 0.1)


def test_norms_and_biases_are_held_whole(tmp_path):
    base, tuned = two()
    found, said = extracted(tmp_path, base, tuned, QWEN, "--biases")
    assert said["modules_to_save"] == [f"{LAYER}input_layernorm", "model.norm"]
    assert said["bias"] == "all"
    assert torch.equal(found["model.norm.bias"], tuned["model.norm.bias"])
    assert torch.equal(found[f"{LAYER}self_attn.q_proj.base_layer.bias"], tuned[f"{LAYER}self_attn.q_proj.bias"])
    made = baked(tmp_path)
    assert all(torch.allclose(made[name], tensor, atol=1e-6) for name, tensor in tuned.items())


def test_unless_they_are_asked_for_they_are_told(tmp_path, capsys):
    found, said = extracted(tmp_path, *two(), QWEN)
    assert said["modules_to_save"] is None
    assert said["bias"] == "none"
    assert not any("norm" in name or "bias" in name for name in found)
    assert "4 tensors differ, and are not in the adapter (biases, norms and other vectors: --biases)" in (
        capsys.readouterr().err
    )


def test_a_module_is_saved_with_all_that_it_has_and_none_if_no_vector_differs(tmp_path):
    """PEFT reads no adapter that has half a module."""
    base, tuned = two()
    vectors = {name: tensor for name, tensor in base.items() if tensor.ndim == 1}
    found, said = extracted(tmp_path, base, {**tuned, **vectors}, QWEN, "--biases")
    assert said["modules_to_save"] is None
    assert not any("norm" in name for name in found)
    one = {**tuned, **vectors, "model.norm.weight": tuned["model.norm.weight"]}
    found, said = extracted(tmp_path, base, one, QWEN, "--biases")
    assert "model.norm" in said["modules_to_save"]
    assert torch.equal(found["model.norm.bias"], base["model.norm.bias"])


def test_a_bias_whose_weight_has_no_factors_is_told(tmp_path, capsys):
    base, tuned = two()
    weight = f"{LAYER}self_attn.q_proj.weight"
    found, said = extracted(tmp_path, base, {**tuned, weight: base[weight]}, QWEN, "--biases")
    assert said["bias"] == "none"
    assert not any("q_proj" in name for name in found)
    assert "1 tensor differs, and is not in the adapter (PEFT has biases of modules that have factors)" in (
        capsys.readouterr().err
    )


def test_what_ends_as_another_module_does_is_not_saved(tmp_path, capsys):
    """PEFT would take `layers.0.post_norm` for one that is saved, too."""
    base, tuned = two({"layers.0.post_norm.weight": (16, 16), "embed.weight": (40, 16), "norm.weight": (16,)})
    _, said = extracted(tmp_path, base, tuned, QWEN, "--biases", "--names", "peft")
    assert said["modules_to_save"] is None
    assert "norm.weight" in capsys.readouterr().err


@pytest.mark.parametrize("differs", [True, False])
@pytest.mark.parametrize("head", [("score.weight",), ("classifier.dense.weight", "classifier.out_proj.bias")])
def test_heads_of_tasks_are_whole(tmp_path, head, differs):
    """PEFT's models for such tasks save them, and read no adapter without them."""
    base, tuned = two({**SHAPES, **{name: (3, 16) if "weight" in name else (3,) for name in head}})
    if not differs:
        tuned |= {name: base[name] for name in head}
    found, said = extracted(tmp_path, base, tuned, CLASSIFIER)
    assert said["task_type"] == "SEQ_CLS"
    assert said["modules_to_save"] == [head[0].partition(".")[0]]
    assert all(torch.equal(found[name], tuned[name]) for name in head)
    made = baked(tmp_path)
    assert all(torch.allclose(made[name], tensor, atol=1e-6) for name, tensor in tuned.items() if tensor.ndim > 1)


def test_norms_alone_are_no_adapter_of_pefts(tmp_path, capsys):
    base, tuned = two()
    vectors = {name: tensor for name, tensor in tuned.items() if "norm" in name}
    for name, tensors in (("base", base), ("tuned", {**base, **vectors})):
        save_model(tmp_path / f"{name}.safetensors", tensors)
    words = ["extract", str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors"), "--rank", "2"]
    asked = ["--biases", "-o", str(tmp_path / "out")]
    assert main([*words, *asked]) == 1
    said = capsys.readouterr().err
    assert "PEFT reads no adapter of norms, biases and heads alone" in said
    assert "model.norm.weight" in said
    assert not (tmp_path / "out").exists()
    assert main([*words, *asked[:-1], str(tmp_path / "out.safetensors"), "--names", "comfy", "-q"]) == 0


def test_without_its_head_an_adapter_is_for_no_task(tmp_path):
    found, said = extracted(tmp_path, *two(HEAD), CLASSIFIER, "--drop", "score.*")
    assert said["task_type"] is None
    assert said["modules_to_save"] is None
    assert not any("score" in name for name in found)


def test_a_head_that_is_the_same_is_no_difference(tmp_path, capsys):
    base, _ = two(HEAD)
    for name in ("base", "tuned"):
        save_model(tmp_path / name / "model.safetensors", base)
        (tmp_path / name / "config.json").write_text(json.dumps(CLASSIFIER))
    words = [str(tmp_path / "tuned"), str(tmp_path / "base"), "-o", str(tmp_path / "adapter"), "--rank", "2"]
    assert main(["extract", *words]) == 1
    assert "nothing is left to be written" in capsys.readouterr().err


def test_mambas_have_no_factors_that_peft_refuses(tmp_path, capsys):
    base, tuned = two({"backbone.embeddings.weight": (40, 16), "backbone.layers.0.mixer.out_proj.weight": (16, 16)})
    found, _ = extracted(tmp_path, base, tuned, {"model_type": "mamba"})
    assert not any("out_proj" in name for name in found)
    assert "PEFT takes no factors of them in models of this type: --names comfy" in capsys.readouterr().err


def test_t5_as_a_language_model_has_pefts_names(tmp_path):
    attention = "block.0.layer.0.SelfAttention"
    base, tuned = two({
        "shared.weight": (40, 16),
        **{f"{part}.{attention}.{name}.weight": (16, 16) for part in ("encoder", "decoder") for name in "qkvo"},
        **{f"{part}.{attention}.relative_attention_bias.weight": (32, 4) for part in ("encoder", "decoder")},
    })  # fmt: skip
    found, _ = extracted(tmp_path, base, tuned, {"model_type": "t5"})
    assert f"decoder.{attention}.relative_attention_bias.lora_embedding_A" in found
    made = baked(tmp_path)
    assert all(torch.allclose(made[name], tensor, atol=1e-6) for name, tensor in tuned.items())


def resized(folder: Path, adapter: str = "adapter", *words: str) -> int:
    return main([str(folder / adapter), "-o", str(folder / "small"), "--force", "-q", *words])


@pytest.mark.parametrize("words", [("--rank", "3"), ("--energy", "0.6")])
def test_what_is_saved_stays_in_an_adapter_that_is_resized(tmp_path, words):
    """Also where it is 0, which factors would be left out for."""
    base, tuned = two({**HEAD, "score.bias": (3,)})
    tuned["score.bias"] = torch.zeros(3)
    before, said = extracted(tmp_path, base, tuned, CLASSIFIER, "--biases")
    assert resized(tmp_path, "adapter", *words) == 0
    after = load_model(tmp_path / "small/adapter_model.safetensors")
    config = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert {PREFIX + name for name in before} == after.keys()
    for name, tensor in before.items():
        if "lora_" not in name:
            assert torch.equal(after[PREFIX + name], tensor)
    assert after[f"{PREFIX}{LAYER}self_attn.q_proj.lora_A.weight"].shape[0] < 16
    assert all(config[key] == said[key] for key in ("modules_to_save", "bias", "task_type"))
    assert config["r"] < said["r"]


@pytest.mark.parametrize("words", [("--rank", "3", "-m", "ties"), ("--rank", "3", "-p", "weight=0.5")])
def test_what_is_saved_is_of_one_adapter_as_it_is(tmp_path, capsys, words):
    extracted(tmp_path, *two(HEAD), CLASSIFIER)
    assert resized(tmp_path, "adapter", *words) == 1
    assert "score   of adapter is saved whole, which one adapter that is resized keeps" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
