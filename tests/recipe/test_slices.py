"""mergekit's slices: layers under new numbers, gradients over each slice, parameters from source, slice and whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import MergeError, RecipeError
from tests.make.folders import llama_config, llama_tensors, save_folder, save_llama

LAYERS = 4
MIDDLE = "mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("AB"):
        save_llama(tmp_path / name, seed, layers=LAYERS)
    return {name: llama_tensors(seed, layers=LAYERS) for seed, name in enumerate("AB")}


def source(model, start, stop, **more):
    return {"model": model, "layer_range": [start, stop], **more}


def merge(*slices, method="passthrough", **keys):
    made = [each if isinstance(each, dict) else {"sources": each} for each in slices]
    streammerge.merge({"merge_method": method, "slices": made, **keys}, output="OUT", force=True)
    return load_file("OUT/model.safetensors")


def layer(number, name=MIDDLE):
    return f"model.layers.{number}.{name}"


def config(folder="OUT"):
    return json.loads(Path(folder, "config.json").read_text())


def test_layers_are_stacked(models):
    out = merge([source("A", 0, 3)], [source("B", 1, 4)])
    assert len(out) == len(llama_tensors(0, layers=6))
    origin = [("A", 0), ("A", 1), ("A", 2), ("B", 1), ("B", 2), ("B", 3)]
    for number, (model, own) in enumerate(origin):
        for name in (MIDDLE, "input_layernorm.weight", "self_attn.q_proj.weight"):
            assert torch.equal(out[layer(number, name)], models[model][layer(own, name)])
    assert torch.equal(out["model.embed_tokens.weight"], models["A"]["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(out[name], models["B"][name])
    assert config() == {**config("A"), "num_hidden_layers": 6}


def test_one_slice_may_repeat_and_leave_out(models):
    out = merge([source("A", 2, 3)], [source("A", 2, 4)], [source("A", 0, 1)])
    assert [int((out[layer(n)] == models["A"][layer(m)]).all()) for n, m in enumerate((2, 2, 3, 0))] == [1, 1, 1, 1]
    assert layer(4) not in out


def test_a_gradient_goes_over_each_slice(models):
    t = {"t": [0.0, 0.6]}
    both = [[source("A", 0, 3), source("B", 1, 4)], [source("A", 3, 4), source("B", 0, 1)]]
    out = merge(*both, method="slerp", base_model="A", parameters=t)
    ts = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.6}  # a slice of one layer is at its end
    for number, (a, b) in enumerate([(0, 1), (1, 2), (2, 3), (3, 0)]):
        x, y = models["A"][layer(a)].double(), models["B"][layer(b)].double()
        torch.testing.assert_close(out[layer(number)].double(), slerp(x, y, ts[number]), rtol=0, atol=1e-5)
    x, y = (models[name]["lm_head.weight"].double() for name in "AB")
    torch.testing.assert_close(out["lm_head.weight"].double(), slerp(x, y, 0.0), rtol=0, atol=1e-5)


def slerp(a, b, t):
    angle = torch.arccos((a * b).sum() / a.norm() / b.norm())
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def mean(a, b, weight):
    return (a.double() + weight * b.double()) / (1 + weight)


def test_parameters_are_looked_for_at_the_source_the_slice_and_the_whole(models):
    conditions = [{"filter": "mlp", "value": 3.0}]
    sources = [source("A", 0, 1, parameters={"weight": 1}), source("B", 0, 1, parameters={"weight": 7})]
    first = {"sources": sources, "parameters": {"weight": 9}}
    second = {"sources": [source("A", 1, 2), source("B", 1, 2)], "parameters": {"weight": [*conditions]}}
    third = {"sources": [source("A", 2, 3), source("B", 2, 3)]}
    whole = {"weight": [{"filter": "q_proj", "value": 5}, {"value": 2}]}
    out = merge(first, second, third, method="linear", parameters={**whole, "normalize": False})
    a, b, query = models["A"], models["B"], layer(1, "self_attn.q_proj.weight")
    for name, expected in (
        (layer(0), a[layer(0)] + 7 * b[layer(0)]),
        (layer(1), 3 * (a[layer(1)] + b[layer(1)])),
        (query, 5 * (a[query] + b[query])),
        (layer(2), 2 * (a[layer(2)] + b[layer(2)])),
        ("lm_head.weight", 2 * (a["lm_head.weight"] + b["lm_head.weight"])),
    ):
        torch.testing.assert_close(out[name].double(), expected.double(), rtol=0, atol=1e-5)


def test_filters_of_the_whole_see_the_output_s_numbers(models):
    pair = [source("A", 1, 3), source("B", 1, 3)]
    weights = {"weight": [{"filter": "layers.1.", "value": 3}, {"value": 1}], "normalize": False}
    out = merge(pair, method="linear", parameters=weights)
    a, b = (models[name] for name in "AB")
    torch.testing.assert_close(out[layer(0)], a[layer(1)] + b[layer(1)])
    torch.testing.assert_close(out[layer(1)], 3 * (a[layer(2)] + b[layer(2)]))


def test_random_numbers_differ_between_slices(models):
    pair = {"sources": [source("A", 0, 1), source("B", 0, 1)], "base_model": "A"}
    out = merge(pair, pair, method="dare_linear", parameters={"weight": 1, "density": 0.5})
    assert not torch.equal(out[layer(0)], out[layer(1)])


@pytest.mark.parametrize("base", ["whole", "slice"])
def test_the_base_is_one_of_the_sources(models, base):
    pair = {"sources": [source("A", 0, 2), source("B", 2, 4)], **({"base_model": "A"} if base == "slice" else {})}
    keys = {"base_model": "A"} if base == "whole" else {}
    out = merge(pair, method="task_arithmetic", parameters={"weight": 0.5}, **keys)
    for number in (0, 1):
        expected = (models["A"][layer(number)].double() + models["B"][layer(number + 2)].double()) / 2
        torch.testing.assert_close(out[layer(number)].double(), expected, rtol=0, atol=1e-6)


def test_it_is_merged_again_from_its_metadata(capsys):
    save_llama(Path("other/A"), 9, layers=LAYERS)
    merge([source("A", 0, 2)], [source("other/A", 1, 3)], dtype="float16")
    assert main(["verify", "OUT", "A=A", "A#2=other/A"]) == 0
    assert "are what the recipe gives" in capsys.readouterr().out
    card = Path("OUT/README.md").read_text()
    Path("again.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
    assert main(["verify", "OUT", "again.yaml"]) == 1  # the card calls them wd/A and other/A
    recipe = Path("again.yaml").read_text()
    Path("again.yaml").write_text(recipe.replace(f"model: {Path.cwd().name}/A", "model: A"))
    assert main(["verify", "OUT", "again.yaml"]) == 0


def test_what_is_listed_for_every_layer_follows(models):
    made = {**llama_config(layers=LAYERS), "layer_types": ["a", "b", "c", "d"], "mlp_only_layers": [1]}
    save_folder(Path("L"), models["A"], made, {})
    merge([source("L", 0, 2)], [source("L", 1, 4)])
    assert config()["layer_types"] == ["a", "b", "b", "c", "d"]
    assert main(["plan", *write([source("L", 0, 2)]), "-o", "X"]) == 0


def write(*slices, **keys):
    made = {"merge_method": "passthrough", "slices": [{"sources": each} for each in slices], **keys}
    Path("r.yaml").write_text(json.dumps(made))
    return ["r.yaml"]


def test_tied_models_are_sliced_too():
    for seed, name in ((5, "T"), (6, "U")):
        save_llama(Path(name), seed, layers=LAYERS, tie=True)
    out = merge([source("T", 0, 2)], [source("U", 0, 2)])
    assert "lm_head.weight" not in out
    out = merge([source("A", 0, 2)], [source("T", 0, 2)])
    assert torch.equal(out["lm_head.weight"], load_file("T/model.safetensors")["model.embed_tokens.weight"])
    assert config()["tie_word_embeddings"] is False


def test_a_slice_of_a_merge_and_within_one(models):
    inner = {"merge_method": "linear", "models": ["A", "B"], "parameters": {"weight": 1}}
    out = merge([source(inner, 0, 2)], [source("A", 2, 4)])
    expected = (models["A"][layer(1)].double() + models["B"][layer(1)].double()) / 2
    torch.testing.assert_close(out[layer(1)].double(), expected, rtol=0, atol=1e-6)
    stack = {"merge_method": "passthrough", "slices": [{"sources": [source("A", 0, 4)]}]}
    streammerge.merge({"merge_method": "linear", "models": [stack, "B"]}, output="N", force=True)
    torch.testing.assert_close(load_file("N/model.safetensors")[layer(1)].double(), expected, rtol=0, atol=1e-6)


WRONG: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "beyond the model": ([[source("A", 0, 5)]], {}, "layers 0 to 4 are asked for, and it has 4 layers"),
    "nothing": ([[source("A", 2, 2)]], {}, "layer_range must be two whole numbers"),
    "backwards": ([[source("A", 3, 1)]], {}, "layer_range must be two whole numbers"),
    "flags": ([[source("A", False, True)]], {}, "layer_range must be two whole numbers"),
    "one number": ([[{"model": "A", "layer_range": 3}]], {}, "layer_range must be two whole numbers"),
    "no range": ([[{"model": "A"}]], {}, "expected a map with model and layer_range"),
    "no sources": ([{"sources": []}], {}, "expected a map with sources"),
    "no slices": ([], {}, "slices must be a list"),
    "an unknown key": ([{"sources": [source("A", 0, 1)], "residual": 1}], {}, "unknown key 'residual'"),
    "models too": ([[source("A", 0, 1)]], {"models": ["A"]}, "slices and models can't be combined"),
    "rules": ([[source("A", 0, 1)]], {"rules": []}, "slices and rules can't be combined"),
    "parameters": ([{"sources": [source("A", 0, 1)], "parameters": 3}], {}, "parameters must be a map"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case):
    slices, keys, said = WRONG[case]
    with pytest.raises(MergeError, match=said):
        merge(*slices, **keys)
    assert not Path("OUT").exists()


def test_sources_of_a_slice_are_alike():
    with pytest.raises(RecipeError, match="its sources have 1, 2 layers"):
        merge([source("A", 0, 1), source("B", 0, 2)], method="linear", parameters={"weight": 1})
    weights = {"weight": [{"filter": "layers.0.", "value": 1}, {"value": 2}]}
    with pytest.raises(RecipeError, match="names a layer by its number"):
        merge([source("A", 0, 1, parameters=weights), source("B", 1, 2)], method="linear", parameters={"weight": 1})
    with pytest.raises(RecipeError, match="the base 'B' is not among its sources"):
        merge([source("A", 0, 1)], method="task_arithmetic", base_model="B")


def test_models_of_several_stacks_are_not_sliced(models):
    more = {"vision.blocks.0.w": torch.ones(2), **models["A"]}
    save_folder(Path("V"), more, llama_config(), {})
    with pytest.raises(MergeError, match=r"V: has several stacks of layers: model\.layers, vision\.blocks"):
        merge([source("V", 0, 1)])
    odd = {"strange.weight": torch.ones(2), **models["A"]}
    save_folder(Path("O"), odd, llama_config(), {})
    with pytest.raises(MergeError, match=r"nobody can tell whether strange\.weight comes before"):
        merge([source("O", 0, 1)], [source("O", 1, 2)])
    assert "strange.weight" in merge([source("O", 0, 1)])
