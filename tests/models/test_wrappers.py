"""Names with what torch's wrappers put into them are read without, where others have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import MergeError
from streammerge.models.blocks import Blocks
from streammerge.models.wrappers import bare_names
from tests.make.folders import llama_config, llama_tensors, save_folder
from tests.make.headers import header

CHECKPOINTED = "_fsdp_wrapped_module._checkpoint_wrapped_module."

WRAPPINGS = {
    "plain": lambda name: name,
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "by layer": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "divided": lambda name: "_fsdp_wrapped_module." + name.replace("layers.1.", f"layers.1.{CHECKPOINTED}"),
    "around": lambda name: f"model.{name}",
}
WRAPPED = tuple(each for each in WRAPPINGS if each != "plain")


def save(name: str, seed: int, wrapping: str, **made: Any) -> dict[str, torch.Tensor]:
    tensors = llama_tensors(seed, **made)
    wrap = WRAPPINGS[wrapping]
    save_folder(Path(name), {wrap(each): value for each, value in tensors.items()}, llama_config(**made))
    return tensors


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("plain", "compiled"), ("compiled", "plain"), ("parallel", "plain"), ("both", "parallel")),
        *(("plain", "by layer"), ("divided", "around"), ("around", "plain"), ("by layer", "divided")),
    ],
)
def test_a_merge_has_names_without(one, other):
    a, b = save("a", 1, one), save("b", 2, other)
    report = streammerge.merge({"merge_method": "linear", "models": ["a", "b"]}, output="out")
    found = load_file("out/model.safetensors")
    assert found.keys() == a.keys()
    assert json.loads(Path("out/config.json").read_text()) == llama_config()
    for name in a:
        torch.testing.assert_close(found[name].double(), (a[name].double() + b[name].double()) / 2)
    wrapped = [name for name, wrapping in zip("ab", (one, other), strict=True) if wrapping != "plain"]
    assert [note.partition(":")[0] for note in report.notes if "read without" in note] == wrapped
    assert main(["verify", "out", "--all", "-q", "a=a", "b=b"]) == 0


def test_tied_models_get_their_heads():
    save("a", 1, "plain")
    b = save("b", 2, "compiled", tie=True)
    streammerge.merge({"merge_method": "passthrough", "models": ["b"], "layout": "a"}, output="out")
    found = load_file("out/model.safetensors")
    assert torch.equal(found["lm_head.weight"], b["model.embed_tokens.weight"])


def test_models_that_are_wrapped_alike_keep_their_names():
    a, b = save("a", 1, "parallel"), save("b", 2, "parallel")
    streammerge.merge({"merge_method": "linear", "models": ["a", "b"]}, output="out")
    assert load_file("out/model.safetensors").keys() == {f"module.{name}" for name in a.keys() | b.keys()}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_slices_are_of_models_that_are_wrapped_otherwise(wrapping):
    a, b = save("a", 1, "plain"), save("b", 2, wrapping)
    slices = [{"sources": [{"model": model, "layer_range": [n, n + 1]}]} for n, model in enumerate("ab")]
    report = streammerge.merge({"merge_method": "passthrough", "slices": slices}, output="out")
    found = load_file("out/model.safetensors")
    after = ("model.layers.1.", "model.norm.", "lm_head.")
    assert found.keys() == a.keys()
    assert all(torch.equal(found[name], (b if name.startswith(after) else a)[name]) for name in found)
    assert [note.partition(":")[0] for note in report.notes if "read without" in note] == ["b"]


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_modules_are_of_models_that_are_wrapped_otherwise(wrapping):
    wrap = WRAPPINGS[wrapping]
    names = ("model.text.layers.0.x", "model.text.layers.1.x", "model.eye.y")
    own = {name: torch.full((2, 2), float(n)) for n, name in enumerate(names)}
    save_folder(Path("a"), own, {})
    save_folder(Path("b"), {wrap(name): 3 * value for name, value in own.items()}, {})
    modules = {
        "text": {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}},
        "eye": {"models": [{"model": "b"}], "merge_method": "passthrough"},
    }
    report = streammerge.merge({"merge_method": "linear", "modules": modules}, output="out")
    found = load_file("out/model.safetensors")
    assert {name: float(value[0, 0]) for name, value in found.items()} == {
        "model.text.layers.0.x": 0.0,
        "model.text.layers.1.x": 2.0,
        "model.eye.y": 6.0,
    }
    assert [note.partition(":")[0] for note in report.notes if "read without" in note] == ["b"]


def test_experts_may_be_wrapped_otherwise():
    made = {}
    for output, wrapping in (("out", "plain"), ("wrapped", "both")):
        save("a", 1, "plain")
        save("b", 2, wrapping)
        experts = [{"source_model": name, "positive_prompts": ["x"]} for name in "ab"]
        recipe = {"base_model": "a", "gate_mode": "random", "dtype": "float32", "experts": experts}
        streammerge.merge(recipe, output=output)
        made[output] = load_file(f"{output}/model.safetensors")
    assert made["out"].keys() == made["wrapped"].keys()
    assert all(torch.equal(value, made["wrapped"][name]) for name, value in made["out"].items())


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_tensors_are_compared_under_names_without(wrapping, capsys):
    a, b = save("a", 1, "plain"), save("b", 2, wrapping)
    assert main(["compare", "a", "b", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[key] for key in ("only_in_a", "only_in_b")] == [[], []]
    for each in found["tensors"]:
        one, other = a[each["name"]].double(), b[each["name"]].double()
        assert each["cosine"] == pytest.approx(float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)))
    assert [remark.partition(":")[0] for remark in found["remarks"]] == ["B"]
    assert main(["compare", "b", "b", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in found["tensors"]} == set(map(WRAPPINGS[wrapping], b))


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_what_is_extracted_has_names_without(wrapping):
    for tuned, base in ((wrapping, wrapping), ("plain", wrapping)):
        save("tuned", 1, tuned)
        save("base", 2, base)
        assert main(["extract", "tuned", "base", "-o", "lora", "--rank", "2", "-q", "--force"]) == 0
        found = load_file("lora/adapter_model.safetensors")
        named = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in found}
        assert "model.layers.1.self_attn.q_proj" in named
        assert {f"{module}.weight" for module in named} < llama_tensors(1).keys()


def test_blocks_are_told_whatever_is_around_them():
    names = ("input_blocks.0.0.weight", "input_blocks.1.1.norm.weight", "output_blocks.11.0.x.weight", "out.2.weight")
    plain = header(**dict.fromkeys((f"model.diffusion_model.{name}" for name in names), "F16 1")).tensors
    wrapped = {f"module._orig_mod.{name}": info for name, info in plain.items()}
    assert list(Blocks.of(wrapped).places) == list(wrapped)
    assert list(Blocks.of(wrapped).places.values()) == list(Blocks.of(plain).places.values())
    assert Blocks.of(wrapped).order == Blocks.of(plain).order != ()


def test_globs_are_of_names_without(capsys):
    save("a", 1, "plain")
    save("b", 2, "parallel")
    assert main(["a", "b", "-o", "out", "--keep", "module.model.layers.0.*"]) == 1
    assert "1 rule matches no tensor of a" in capsys.readouterr().err
    assert not Path("out").exists()


def test_what_differs_beyond_wrappers_is_still_refused():
    save("a", 1, "plain")
    save("b", 2, "compiled", layers=3)
    with pytest.raises(MergeError, match=r"model\.layers\.2\.mlp\.down_proj\.weight   in b, not in a"):
        streammerge.merge({"merge_method": "linear", "models": ["a", "b"]}, output="out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("names", "bare"),
    [
        (["module.x", "module.y"], ["x", "y"]),
        (["module.x", "y"], []),
        (["x", "y"], []),
        (["_orig_mod.x", "x"], []),
        (["_orig_mod.module.module.x", "module.module._orig_mod.y"], ["x", "y"]),
        (["module."], []),
        (["model.model.x", "model.y"], ["model.x", "y"]),
        (["module.model.model.x", "module.model.y"], ["model.x", "y"]),
        (["model.model.x", "y"], []),
        (["model.x", "model.y"], []),
        (["my_orig_mod.x", "y"], []),
        (["a._orig_mod._checkpoint_wrapped_module.x"], ["a.x"]),
        ([], []),
    ],
)
def test_names_without_wrappers(names, bare):
    assert list(bare_names(header(**dict.fromkeys(names, "F16 1")).tensors)) == bare
