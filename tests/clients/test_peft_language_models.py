"""PEFT's own `merge_and_unload` of transformers' models: embeddings, heads, and tokens that were trained alone.

They run where peft and transformers are installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.cli.main import main
from tests.clients.test_peft_adapters import tensors_of
from tests.make.models import Tensors, load_model, merge_to, normal, save_model
from tests.models.adapters.baking import peft_folder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

LLAMA = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def llama(*, tied: bool = False) -> Any:
    transformers.set_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied))


def lora(targets: Sequence[str] = ("q_proj",), **keywords: Any) -> Any:
    return peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), **keywords)


CONFIGS = {
    "embeddings": lambda: lora(("q_proj", "embed_tokens")),
    "embeddings and the head": lambda: lora(("embed_tokens", "lm_head")),
    "DoRA of the head": lambda: lora(("q_proj", "lm_head"), use_dora=True),
    "saved modules": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "OFT of embeddings": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["embed_tokens"]),
    "tokens": lambda: lora(trainable_token_indices=[3, 1]),
    "tokens in a row": lambda: lora(trainable_token_indices=[0, 1, 2, 19]),
    "tokens of each": lambda: lora(trainable_token_indices={"embed_tokens": [5, 4, 9], "lm_head": [2]}),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[8, 1], target_modules=["embed_tokens"]),
}

SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

MODELS = {
    "a head that is saved": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, intermediate_size=24)
    ),
    "biases": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SMALL, intermediate_size=24, num_key_value_heads=2)
    ),
    "transposed": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    ),
    "tables of positions": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_an_extraction_of_full_rank_is_the_tuned_model(tmp_path, case):
    """With norms, biases and heads, which PEFT reads as whole tensors."""
    transformers.set_seed(0)
    model = MODELS[case]()
    model.save_pretrained(tmp_path / "base")
    for number, parameter in enumerate(model.parameters()):
        parameter.data += normal(parameter.shape, number, scale=0.05)
    model.save_pretrained(tmp_path / "tuned")
    words = [str(tmp_path / "tuned"), str(tmp_path / "base"), "-o", str(tmp_path / "adapter"), "--rank", "1000"]
    assert main(["extract", *words, "--biases", "-q"]) == 0
    base = type(model).from_pretrained(tmp_path / "base")
    made = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(made[name], tensor, atol=3e-6), name


OF_HEADS = ("embeddings and the head", "DoRA of the head", "saved modules", "tokens of each", "tokens alone")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CONFIGS)
def test_merge_and_unload(tmp_path, case, tied):
    if tied and case in OF_HEADS:
        pytest.skip("it changes the head, which the model has not as a tensor of its own")
    model = peft.get_peft_model(llama(tied=tied), CONFIGS[case]())
    for number, (_, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data = normal(parameter.shape, number, scale=0.3)
    model.save_pretrained(tmp_path / "adapter")
    right = tensors_of(peft.PeftModel.from_pretrained(llama(tied=tied), tmp_path / "adapter").merge_and_unload())
    before = tensors_of(llama(tied=tied))
    for tensors in (right, before) if tied else ():
        del tensors["lm_head.weight"]
    base = save_model(tmp_path / "base.safetensors", before)
    given = {"model": str(base), "adapters": [str(tmp_path / "adapter")]}
    made = merge_to(tmp_path / "out.safetensors", {"merge_method": "linear", "models": [given]})
    assert made.keys() == right.keys()
    assert any(not made[name].equal(before[name]) for name in made)
    for name, tensor in right.items():
        assert made[name].allclose(tensor, rtol=1e-5, atol=2e-6), name


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]])
def test_tokens_that_were_added(tmp_path, targets):
    """transformers loads what comes out, with as many rows."""
    llama().save_pretrained(tmp_path / "base")
    larger = llama()
    larger.resize_token_embeddings(24)
    saved = None if "lm_head" in targets else ["embed_tokens", "lm_head"]
    model = peft.get_peft_model(larger, lora(targets, modules_to_save=saved))
    for number, (_, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data = normal(parameter.shape, number, scale=0.3)
    model.save_pretrained(tmp_path / "adapter")
    right = tensors_of(model.merge_and_unload())
    words = ["bake", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]
    assert main(words) == 0
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert made.config.vocab_size == 24
    for name, tensor in tensors_of(made).items():
        assert right[name].allclose(tensor, rtol=1e-5, atol=2e-6), name


MIXTURE = {
    **LLAMA,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "head_dim": 8,
    "layer_types": ["full_attention"],
}
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
OF_PARAMETERS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "Qwen3 MoE": ("Qwen3Moe", [GATE_UP, DOWN], {}),
    "of one, and a module": ("Qwen3Moe", [DOWN], {"target_modules": ["q_proj"]}),
    "the router": ("Qwen3Moe", ["gate_up_proj", "mlp.gate.weight"], {"target_modules": ["q_proj"]}),
    "patterns": (
        "Qwen3Moe",
        [GATE_UP, DOWN],
        {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"mlp.experts.down_proj": 5}, "use_rslora": True},
    ),
    "Mixtral": ("Mixtral", [GATE_UP, DOWN], {}),
    "gpt-oss": ("GptOss", [GATE_UP, DOWN], {}),
    "gpt-oss, biases": ("GptOss", [GATE_UP, DOWN, f"{GATE_UP}_bias", f"{DOWN}_bias"], {}),
}


def mixture(kind: str) -> Any:
    transformers.set_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**MIXTURE))


def save_adapter(path: Path, kind: str, targets: list[str], seed: int = 0, **more: Any) -> Path:
    """An adapter of parameters of a mixture."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": targets, **more}
    model = peft.get_peft_model(mixture(kind), peft.LoraConfig(**config))
    for number, (_, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data = normal(parameter.shape, seed + number, scale=0.3)
    model.save_pretrained(path)
    return path


def merged(folder: Path, kind: str, *adapters: Path) -> Tensors:
    """What a model with adapters in it is, as PEFT has it, one after the other."""
    model = mixture(kind)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(folder)
    return load_model(folder / "model.safetensors")


@pytest.mark.parametrize("case", OF_PARAMETERS)
def test_parameters(tmp_path, case):
    """Qwen's and Mixtral's experts are one tensor for PEFT, and files have them each apart."""
    kind, targets, more = OF_PARAMETERS[case]
    before = merged(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "adapter", kind, targets, **more)
    right = merged(tmp_path / "right", kind, adapter)
    given = {"model": str(tmp_path / "base"), "adapters": [str(adapter)]}
    found = merge_to(tmp_path / "out", {"merge_method": "linear", "models": [given]})
    assert found.keys() == right.keys()
    assert sum(not right[name].equal(before[name]) for name in right) >= 2
    for name, tensor in right.items():
        assert found[name].allclose(tensor, rtol=1e-5, atol=2e-6), name


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_sums_of_parameters(tmp_path, kind):
    one = save_adapter(tmp_path / "one", kind, [GATE_UP, DOWN], target_modules=["q_proj"])
    two = save_adapter(tmp_path / "two", kind, [DOWN], 50, r=3, lora_alpha=1)
    merge_to(tmp_path / "sum", {"merge_method": "linear", "models": [str(one), str(two)]})
    found, right = merged(tmp_path / "a", kind, tmp_path / "sum"), merged(tmp_path / "b", kind, one, two)
    for name, tensor in right.items():
        assert found[name].allclose(tensor, rtol=1e-5, atol=2e-6), name


def test_adapters_of_experts_that_were_modules(tmp_path):
    """transformers 4 had each expert's matrices as modules; PEFT makes an adapter of parameters of such an adapter."""
    before = merged(tmp_path / "base", "Mixtral")
    old: Tensors = {}
    for number, (name, tensor) in enumerate(before.items()):
        if ".experts." in name or name.endswith("q_proj.weight"):
            module, (rows, columns) = f"base_model.model.{name.removesuffix('.weight')}", tensor.shape
            old[f"{module}.lora_A.weight"] = normal((2, columns), number, scale=0.3)
            old[f"{module}.lora_B.weight"] = normal((rows, 2), number + 50, scale=0.3)
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["w1", "w2", "w3", "q_proj"]}
    peft_folder(tmp_path / "old", old, task_type="CAUSAL_LM", **config)
    model = peft.PeftModel.from_pretrained(mixture("Mixtral"), tmp_path / "old")
    model.save_pretrained(tmp_path / "new")
    model.merge_and_unload().save_pretrained(tmp_path / "right")
    right = load_model(tmp_path / "right" / "model.safetensors")
    assert len(load_model(tmp_path / "new" / "adapter_model.safetensors")) < len(old)
    for adapter in ("old", "new"):
        given = {"model": str(tmp_path / "base"), "adapters": [str(tmp_path / adapter)]}
        found = merge_to(tmp_path / f"with {adapter}", {"merge_method": "linear", "models": [given]})
        for name, tensor in right.items():
            assert found[name].allclose(tensor, rtol=1e-5, atol=2e-6), name
