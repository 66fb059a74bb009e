"""mergekit's modules: each merged by its own definition, nothing lost, and names with other prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import MergeError, PlanError, RecipeError
from streammerge.models.modules import module_of, part_of
from streammerge.recipe.description import describe
from streammerge.recipe.parse import parse_recipe
from tests.make.folders import image_tensors, llama_tensors, save_images, save_llama

TEXT = {"models": [{"model": "A", "parameters": {"weight": 3}}, {"model": "B", "parameters": {"weight": 1}}]}
IMAGES = {"models": [{"model": "A"}, {"model": "B"}], "parameters": {"weight": 1}}
PROJECTOR = {"models": [{"model": "B"}], "merge_method": "passthrough"}


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(Path("A"), 1)
    save_images(Path("B"), 2)
    save_llama(Path("T"), 3)


def merged(output: str = "OUT", **recipe: Any) -> dict[str, torch.Tensor]:
    streammerge.merge({"merge_method": "linear", **recipe}, output=output)
    return load_file(f"{output}/model.safetensors")


def expected(text: float, images: float, projector: float) -> dict[str, torch.Tensor]:
    """The share that A has in each part, in float64."""
    a, b = image_tensors(1), image_tensors(2)
    share = {"text": text, "vision": images, "projector": projector}
    return {name: a[name].double() * (s := share[part_of(name)]) + b[name].double() * (1 - s) for name in a}


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "names",
    [("text_decoder", "vision_tower", "multi_modal_projector"), ("default", "visual", "model.multi_modal_projector")],
)
def test_each_module_has_its_own_definition(names):
    found = merged(modules=dict(zip(names, (TEXT, IMAGES, PROJECTOR), strict=True)))
    compare(found, expected(0.75, 0.5, 0.0))
    config = json.loads(Path("OUT/config.json").read_text())
    assert config == json.loads(Path("A/config.json").read_text())


def test_a_module_whose_method_has_no_base_has_none():
    text = {"models": [{"model": "B", "parameters": {"weight": 0.25}}]}
    found = merged(merge_method="task_arithmetic", base_model="A", modules={"text_decoder": text, "default": PROJECTOR})
    compare(found, expected(0.75, 0.0, 0.0))


def test_it_is_made_again_of_its_metadata():
    merged(modules={"text_decoder": TEXT, "default": IMAGES}, seed=3)
    assert main(["verify", "OUT", "--all", "A=A", "B=B"]) == 0
    assert main(["OUT", "--recipe-from-metadata", "A=A", "B=B", "-o", "AGAIN"]) == 0
    assert Path("AGAIN/model.safetensors").read_bytes() == Path("OUT/model.safetensors").read_bytes()


def test_what_is_in_no_module_is_an_error_until_somebody_says_what_to_do():
    with pytest.raises(PlanError, match="4 tensors are in no module") as error:
        merged(modules={"text_decoder": TEXT})
    assert "called default" in error.value.advice
    compare(merged(modules={"text_decoder": TEXT}, on_missing="keep"), expected(0.75, 1.0, 1.0))
    left = {name: value for name, value in expected(0.75, 0, 0).items() if part_of(name) == "text"}
    compare(merged("TEXT", modules={"text_decoder": TEXT}, on_missing="drop"), left)


def test_slices_of_a_module_are_numbered_anew_and_the_config_says_how_many_there_are():
    sources = [{"model": "A", "layer_range": [0, 2]}], [{"model": "B", "layer_range": [1, 2]}]
    text = {"slices": [{"sources": each} for each in sources]}
    found = merged(merge_method="passthrough", modules={"text_decoder": text, "default": {"models": ["B"]}})
    a, b = image_tensors(1), image_tensors(2)
    for name, value in b.items():
        if ".language_model.layers." in name:
            assert torch.equal(found[name], a[name])
            if ".layers.1." in name:
                assert torch.equal(found[name.replace(".1.", ".2.")], value)
    assert torch.equal(found["lm_head.weight"], b["lm_head.weight"])
    assert torch.equal(found["model.language_model.embed_tokens.weight"], a["model.language_model.embed_tokens.weight"])
    config = json.loads(Path("OUT/config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3
    assert config["vision_config"]["num_hidden_layers"] == 2


def test_a_text_model_in_a_module_by_its_prefix():
    text = {"models": ["A", {"model": "T", "prefix": {"model.": "model.language_model."}}]}
    found = merged(modules={"text_decoder": text, "default": {"models": ["A"]}}, parameters={"weight": 1})
    a, t = image_tensors(1), llama_tensors(3)
    for name, value in a.items():
        other = t.get(name.replace("model.language_model.", "model."), value)
        torch.testing.assert_close(found[name].double(), (value.double() + other.double()) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("prefix", "model", "layout"),
    [({"model.": "model.language_model."}, "T", "A"), ({"model.language_model.": "model."}, "A", "T")],
)
def test_prefixes_make_the_names_of_the_other(prefix, model, layout):
    policy = {"T": "keep", "A": "drop"}[model]
    merged(models=[{"model": model, "prefix": prefix}, layout], on_missing=policy)
    config = json.loads(Path("OUT/config.json").read_text())
    assert config == json.loads(Path(f"{layout}/config.json").read_text())
    found, a, t = load_file("OUT/model.safetensors"), image_tensors(1), llama_tensors(3)
    for name, value in t.items():
        inner = name.replace("model.", "model.language_model.", 1)
        mean = (value.double() + a[inner].double()) / 2
        torch.testing.assert_close(found[inner if layout == "A" else name].double(), mean, rtol=1e-6, atol=1e-6)
    assert len(found) == len(a if layout == "A" else t)
    assert main(["verify", "OUT", "--all", "A=A", "T=T"]) == 0


def test_who_wants_a_layout_under_other_names_is_told_of_its_config():
    recipe = {"models": [{"model": "A", "prefix": {"model.language_model.": "model."}}], "merge_method": "passthrough"}
    assert any("have other names here" in note for note in streammerge.make_plan(recipe, output="OUT").notes())


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"modules": {}}, "must be a map of 1 to 100 names"),
        ({"modules": ["A"]}, "must be a map"),
        ({"modules": {"text_decoder": {}}}, "one of models and slices is needed"),
        ({"modules": {"text_decoder": {**TEXT, "slices": [1]}}}, "and not both"),
        ({"modules": {"text_decoder": {**TEXT, "weight": 1}}}, "module text_decoder: unknown key 'weight'"),
        ({"modules": {"a/b": TEXT}}, "expected a map with models or slices"),
        ({"modules": {"text_decoder": TEXT}, "models": ["A"]}, "modules and models can't be combined"),
        ({"modules": {"text_decoder": TEXT}, "rules": []}, "modules and rules can't be combined"),
        ({"modules": {"tower": TEXT}}, "A has no tensor in the module 'tower'"),
        ({"modules": {"audio_tower": TEXT, "default": IMAGES}}, "A has no tensor in the module 'audio_tower'"),
        ({"modules": {"text_decoder": {"models": ["A", "T"]}, "default": {"models": ["A"]}}}, "lm_head|not in every"),
        ({"modules": {"text_decoder": TEXT, "language_model": TEXT}}, "is in the modules text_decoder, language_model"),
        ({"models": [{"model": "A", "prefix": {"model": "x."}}]}, "each ending with a dot"),
        ({"models": [{"model": "A", "prefix": []}]}, "prefix must be a map"),
        ({"models": [{"model": "A", "prefix": {"none.": ""}}]}, "no tensor's name begins with 'none.'"),
        (
            {"models": [{"model": "T", "prefix": {"model.layers.0.": "model.layers.1."}}]},
            "9 names would be those of two tensors",
        ),
    ],
)
def test_mistakes_are_told(recipe, said):
    with pytest.raises(MergeError, match=said):
        merged(**recipe)
    assert not Path("OUT").exists()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("decoder.block.0.layer.0.layer_norm.weight", "decoder"),
        ("lm_head.weight", "decoder"),
        ("encoder.block.0.layer.0.layer_norm.weight", "encoder"),
        ("model.encoder.layers.0.fc1.bias", "encoder"),
        ("model.visual.blocks.1.attn.proj.weight", "model.visual.blocks"),
        ("shared.weight", "default"),
    ],
)
def test_modules_by_what_names_begin_with(name, module):
    assert module_of(name, ("encoder", "decoder", "model.visual.blocks", "default")) == module


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("visual.merger.mlp.0.weight", "multi_modal_projector"),
        ("model.visual.deepstack_merger_list.0.norm.weight", "multi_modal_projector"),
        ("visual.blocks.0.norm1.weight", "vision_tower"),
        ("vision_model.model.layers.0.input_layernorm.weight", "vision_tower"),
        ("language_model.lm_head.weight", None),
    ],
)
def test_modules_by_what_their_names_mean(name, module):
    assert module_of(name, ("vision_tower", "multi_modal_projector")) == module


def test_a_recipe_with_modules_describes_itself():
    recipe = parse_recipe({"merge_method": "linear", "modules": {"text_decoder": TEXT, "default": PROJECTOR}}, Path())
    again = parse_recipe(describe(recipe), Path())
    assert describe(again) == describe(recipe)
    with pytest.raises(RecipeError, match="merge_method"):
        parse_recipe({"modules": {"text_decoder": TEXT}}, Path())
