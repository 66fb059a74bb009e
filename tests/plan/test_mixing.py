"""Mixtures of experts that are built of dense models, tensor by tensor; gates against float64."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import PlanError, RecipeError
from streammerge.storage.fingerprint import can_be_told
from tests.make.folders import HIDDEN, TOKENIZER, llama_config, llama_tensors, save_folder
from tests.make.vocabularies import save_with_tokens, written_tokens

EXPERTS: list[dict[str, Any]] = [
    {"source_model": "b", "positive_prompts": ["one two two", "three"], "negative_prompts": ["four"]},
    {"source_model": "c", "positive_prompts": ["four five"], "residual_scale": 0.5},
]
RECIPE: dict[str, Any] = {"base_model": "a", "gate_mode": "cheap_embed", "dtype": "float32", "experts": EXPERTS}
WORDS = {"<s>": 1, "one": 3, "two": 4, "three": 5, "four": 6, "five": 7, "beyond": 99}


class Tokenizer:
    """Stands for Hugging Face's: words are tokens."""

    @classmethod
    def from_str(cls, text: str) -> Tokenizer:
        json.loads(text)
        return cls()

    def encode(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        words = text.replace("<s>", "<s> ").split()
        return SimpleNamespace(ids=[WORDS[word] for word in words])


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=Tokenizer))
    files = {**TOKENIZER, "tokenizer_config.json": json.dumps({"bos_token": {"content": "<s>"}})}
    for seed, name in enumerate("abc"):
        save_folder(tmp_path / name, llama_tensors(seed), llama_config(), files)
    return Path(tmp_path)


def build(recipe: dict[str, Any] | Path, output: str = "out", **options: Any) -> dict[str, torch.Tensor]:
    streammerge.merge(recipe, output=output, **options)
    return load_file(Path(output) / "model.safetensors")


def config_of(output: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(output) / "config.json").read_text())
    return found


def unit(vector: torch.Tensor) -> torch.Tensor:
    length: torch.Tensor = vector.norm()
    return vector / length


def gates() -> torch.Tensor:
    embedding = llama_tensors(0)["model.embed_tokens.weight"].double()

    def of(*ids: int) -> torch.Tensor:
        return unit(embedding[list(ids)].sum(0))

    return torch.stack([unit(of(1, 3, 4, 4, 1, 5) - of(1, 6)), of(1, 6, 7)])


def test_a_mixtral_has_the_base_all_experts_and_gates_of_prompts(models):
    found, (a, b, c) = build(RECIPE), (llama_tensors(seed) for seed in range(3))
    expected = {name: tensor for name, tensor in a.items() if ".mlp." not in name}
    for layer in range(2):
        for number, model in enumerate((b, c)):
            for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                tensor = model[f"model.layers.{layer}.mlp.{ours}.weight"]
                scaled = tensor * 0.5 if model is c and ours == "down_proj" else tensor
                expected[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{theirs}.weight"] = scaled
        expected[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = gates().float()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "moe.gate" in name:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2**-24)
        else:
            assert torch.equal(found[name], tensor), name
    config = config_of()
    assert config["model_type"] == "mixtral"
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 2)
    assert (config["rope_theta"], config["max_position_embeddings"]) == (10000.0, 2048), "a Llama's defaults"
    assert (Path("out") / "tokenizer.json").read_text() == TOKENIZER["tokenizer.json"]
    assert "- moe\n" in (Path("out") / "README.md").read_text()


def test_it_is_computed_again_from_its_metadata(models, capsys):
    Path("moe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["moe.yaml", "-o", "out", "--shard-size", "3kB", "-q"]) == 0
    assert main(["verify", "out", "base=a", "b=b", "c=c", "--all"]) == 0
    assert "Every byte is what the recipe gives." in capsys.readouterr().out
    assert main(["plan", "moe.yaml", "-o", "out2"]) == 0
    assert "gates: cheap_embed" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["cheap_embed", "random"])
def test_it_can_be_resumed_for_everybody_can_tell_what_its_gates_are(models, mode):
    plan = streammerge.make_plan({**RECIPE, "gate_mode": mode}, output="out")
    assert can_be_told(plan)


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_random_gates_follow_from_the_seed_and_the_layer_alone(models, mode):
    recipe = {**RECIPE, "gate_mode": mode, "experts": [{"source_model": "a"}] * 64, "seed": 3}
    found, again = build(recipe), build(recipe, "again", threads=1, io="pread")
    other = build({**recipe, "seed": 4}, "other")
    names = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
    for name in names:
        assert found[name].shape == (64, HIDDEN)
        assert torch.equal(found[name], again[name])
        assert not torch.equal(found[name], other[name])
        assert abs(found[name].mean()) < 0.2
        bound = HIDDEN**-0.5
        assert (found[name].abs() <= bound).all() == (mode == "uniform_random")
        assert found[name].std() == pytest.approx(1 if mode == "random" else bound / 3**0.5, rel=0.2)
    assert not torch.equal(found[names[0]], found[names[1]])


def test_noise_is_as_large_as_is_asked_for_and_other_for_every_expert(models):
    experts = [{"source_model": "a", "noise_scale": 0.1}, {"source_model": "a", "noise_scale": 0.1}]
    found, a = build({**RECIPE, "gate_mode": "random", "experts": experts}), llama_tensors(0)
    layer = "model.layers.0.block_sparse_moe.experts"
    noise = [found[f"{layer}.{n}.w1.weight"] - a["model.layers.0.mlp.gate_proj.weight"] for n in range(2)]
    assert not torch.equal(*noise)
    for each in noise:
        assert each.std() == pytest.approx(0.1, rel=0.3)


def test_a_shared_expert_makes_another_architecture(models):
    shared = {"source_model": "a", "residual_scale": 0.1}
    found = build({**RECIPE, "shared_experts": [shared]})
    assert config_of()["model_type"] == "deepseek"
    assert config_of()["n_shared_experts"] == 1
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    torch.testing.assert_close(found[name], llama_tensors(0)["model.layers.1.mlp.down_proj.weight"] * 0.1)
    found = build({**RECIPE, "shared_experts": [{**shared, "positive_prompts": ["five"]}]}, "qwen")
    assert config_of("qwen")["model_type"] == "qwen2_moe"
    assert found["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, HIDDEN)
    assert torch.equal(found["model.layers.0.self_attn.q_proj.bias"], torch.zeros(HIDDEN))
    assert "model.layers.0.mlp.experts.1.down_proj.weight" in found


def test_experts_in_another_dtype_get_the_bases(models):
    save_folder(Path("b16"), llama_tensors(1, dtype=torch.bfloat16), llama_config(dtype=torch.bfloat16))
    experts = [{**EXPERTS[0], "source_model": "b16"}, EXPERTS[1]]
    found = build({key: value for key, value in {**RECIPE, "experts": experts}.items() if key != "dtype"})
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_a_tied_base_makes_a_tied_mixture(models):
    save_folder(Path("tied"), llama_tensors(5, tie=True), llama_config(tie=True))
    found = build({**RECIPE, "base_model": "tied", "gate_mode": "random"})
    assert "lm_head.weight" not in found
    assert config_of()["tie_word_embeddings"] is True


def as_documents(*recipes: dict[str, Any]) -> Path:
    path = Path("several.yaml")
    path.write_text(yaml.safe_dump_all(recipes))
    return path


HALVES = {"name": "one", "merge_method": "linear", "models": ["a", "b"]}


def test_merges_of_the_same_file_may_give_experts_and_the_base(models):
    experts = [{"source_model": "one"}, {"source_model": {"model": {"path": "one"}}, "residual_scale": 2}]
    own = {**RECIPE, "base_model": "one", "gate_mode": "random", "experts": [*experts, {"source_model": "c"}]}
    found = build(as_documents(HALVES, own))
    a, b, c = (llama_tensors(seed) for seed in range(3))
    layer = "model.layers.1"
    mean = {name: (a[name].double() + b[name].double()) / 2 for name in a}
    down = mean[f"{layer}.mlp.down_proj.weight"]
    for number, expected in enumerate((down, 2 * down, c[f"{layer}.mlp.down_proj.weight"].double())):
        experts_own = found[f"{layer}.block_sparse_moe.experts.{number}.w2.weight"].double()
        torch.testing.assert_close(experts_own, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["lm_head.weight"].double(), mean["lm_head.weight"], rtol=1e-6, atol=1e-6)
    assert main(["verify", "out", "a=a", "b=b", "c=c", "--all", "-q"]) == 0


def test_a_base_that_has_others_tokens_gives_them_to_the_mixture(models):
    save_with_tokens(Path("d"), 1, ["one", "two", "three"])
    save_with_tokens(Path("e"), 2, ["two", "one"])
    base = {"name": "both", "merge_method": "linear", "models": ["d", "e"], "tokenizer_source": "e"}
    found = build(as_documents(base, {**RECIPE, "base_model": "both", "gate_mode": "random"}))
    assert found["model.embed_tokens.weight"].shape[0] == 2
    assert list(written_tokens(Path("out"))) == ["two", "one"]
    assert config_of()["vocab_size"] == 2
    with pytest.raises(PlanError, match="a merge whose tokenizer is yet to be written"):
        build(as_documents(base, {**RECIPE, "base_model": "both"}))


def test_a_mixture_is_no_part_of_a_merge(models):
    inner = {**RECIPE, "name": "moe", "gate_mode": "random"}
    for outer in (
        {"merge_method": "linear", "models": ["moe", "a"]},
        {**RECIPE, "gate_mode": "random", "experts": [{"source_model": "moe"}, {"source_model": "a"}]},
    ):
        with pytest.raises(RecipeError, match="a mixture of experts can't be part of another recipe"):
            build(as_documents(inner, outer))


def change(name: str, config: dict[str, Any] | None = None, **tensors: Any) -> None:
    made = {**llama_tensors(1), **{key.replace("__", "."): value for key, value in tensors.items()}}
    kept = {key: value for key, value in made.items() if value is not None}
    save_folder(Path(name), kept, {**llama_config(), **(config or {})})


def shapes() -> None:
    change("d", model__layers__0__mlp__up_proj__weight=torch.ones(13, HIDDEN))


def lacking() -> None:
    change("d", model__layers__1__mlp__down_proj__weight=None)


def biased() -> None:
    change("d", model__layers__0__self_attn__q_proj__bias=torch.ones(HIDDEN))


def other_type() -> None:
    change("d", {"model_type": "gemma"})


def other_activation() -> None:
    change("d", {"hidden_act": "gelu"})


def deeper() -> None:
    save_folder(Path("d"), llama_tensors(1, layers=3), llama_config(layers=3))


def no_config() -> None:
    save_folder(Path("d"), llama_tensors(1), None)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (shapes, "F32 [13, 8], base: F32 [12, 8]"),
        (lacking, "d: lacks it"),
        (deeper, "model.layers.2.mlp   base: lacks it, and d has it"),
        (other_type, "no mixture is built of gemma, llama"),
        (other_activation, "different activations"),
        (no_config, "there is no config.json"),
    ],
)
def test_experts_that_do_not_fit_are_refused(models, make, told):
    make()
    with pytest.raises(PlanError) as caught:
        build({**RECIPE, "experts": [EXPERTS[0], {**EXPERTS[1], "source_model": "d"}]})
    assert told in f"{caught.value.what} {caught.value.found}"
    assert not Path("out").exists()


def test_a_base_with_biases_that_the_mixture_has_no_place_for_is_refused(models):
    biased()
    with pytest.raises(PlanError) as caught:
        build({**RECIPE, "base_model": "d"})
    assert "Mixtral has no such tensor" in str(caught.value.found)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "qwen3"}, "no mixture is built of llama"),
        ({"architecture": "gpt"}, "there is no architecture 'gpt'"),
        ({"shared_experts": [{"source_model": "a"}] * 2}, "with 2 shared experts"),
        ({"experts": [EXPERTS[0], {**EXPERTS[1], "positive_prompts": ["beyond"]}]}, "the embedding has 16 rows"),
    ],
)
def test_what_is_no_mixture_is_refused(models, changes, told):
    with pytest.raises(PlanError) as caught:
        build({**RECIPE, **changes})
    assert told.replace("the embedding", "embedding") in caught.value.what.replace("the base's embedding", "embedding")


def test_gates_of_prompts_want_a_tokenizer(models, monkeypatch):
    (Path("a") / "tokenizer.json").write_text("{")
    with pytest.raises(PlanError, match="is no tokenizer"):
        build(RECIPE)
    (Path("a") / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match=r"there is no tokenizer\.json"):
        build(RECIPE)
    (Path("a") / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(PlanError, match="isn't installed") as caught:
        build(RECIPE)
    assert "pip install" in caught.value.advice
    build({**RECIPE, "gate_mode": "random"})
