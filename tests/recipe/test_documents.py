"""Several recipes in a file: nested in each other, nothing written in between; and keys that only hold anchors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import RecipeError
from streammerge.recipe.files import as_recipe, read_recipe_file
from streammerge.recipe.recipe import Recipe
from streammerge.recipe.vocabulary import Vocabulary
from tests.make.folders import llama_tensors, save_llama

CHAIN = """
name: one
merge_method: linear
models: [A, B]
---
name: two
merge_method: task_arithmetic
base_model: one
models: [{model: B, parameters: {weight: 0.5}}]
---
merge_method: linear
models:
  - {model: two, parameters: {weight: 1}}
  - {model: {model: {path: one}}, parameters: {weight: 3}}
"""


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("AB", 1):
        save_llama(Path(name), seed)


def written(text: str) -> Path:
    path = Path("r.yaml")
    path.write_text(text)
    return path


def test_documents_are_merges_of_each_other():
    streammerge.merge(written(CHAIN), output="OUT")
    a, b, found = llama_tensors(1), llama_tensors(2), load_file("OUT/model.safetensors")
    for name in a:
        one = (a[name].double() + b[name].double()) / 2
        two = one + 0.5 * (b[name].double() - one)
        torch.testing.assert_close(found[name].double(), (two + 3 * one) / 4, rtol=1e-6, atol=1e-6)
    assert {path.name for path in Path().iterdir()} == {"A", "B", "OUT", "r.yaml"}
    assert main(["verify", "OUT", "--all", "A=A", "B=B"]) == 0


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_is_nobody_s_business_and_a_last_one_may_have_a_name(order):
    parts = CHAIN.split("---")[::order]
    named = [part if "name:" in part else f"\nname: last{part}" for part in parts]
    first, second = (read_recipe_file(written("---".join(each))) for each in (parts, named))
    assert first["models"] == second["models"]
    assert first["models"][0]["model"].name == "two"
    assert first["models"][0]["model"]["base_model"] is first["models"][1]["model"]["model"]


def test_a_document_is_called_by_its_name():
    recipe = streammerge.make_plan(written(CHAIN), output="OUT").description
    assert [model["name"] for model in recipe["models"]] == ["two", "one"]


def test_documents_may_be_sources_of_slices_and_have_adapters_put_in():
    text = "name: one\nmerge_method: linear\nmodels: [A, B]\n---\nmerge_method: passthrough\n"
    slices = "slices: [{sources: [{model: one, layer_range: [0, 2]}]}, {sources: [{model: B, layer_range: [0, 1]}]}]\n"
    streammerge.merge(written(text + slices), output="OUT")
    a, b, found = llama_tensors(1), llama_tensors(2), load_file("OUT/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found[name], (a[name] + b[name]) / 2)
    assert torch.equal(found[name.replace(".1.", ".2.")], b[name.replace(".1.", ".0.")])
    found = read_recipe_file(written(f"{text}models: [one+lora]\n"))
    assert found["models"][0]["lora"] == "lora"
    assert found["models"][0]["model"].name == "one"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: a\nmerge_method: linear\nmodels: [b]\n---\nname: b\nmerge_method: linear\nmodels: [a]\n",
            "a of b of a",
        ),
        ("name: a\nmerge_method: linear\nmodels: [a]\n---\nmerge_method: linear\nmodels: [a]\n", "a of a"),
        ("merge_method: linear\nmodels: [A]\n---\nmerge_method: linear\nmodels: [B]\n", "2 documents have no name"),
        ("name: a\nmodels: [A]\n---\nname: b\nmodels: [B]\n", "2 of these merges are used by no other: a, b"),
        ("name: a\nmodels: [A]\n---\nmodels: [B]\n", "used by no other: a, the one without a name"),
        ("name: a\nmodels: [A]\n---\nname: a\nmodels: [B]\n", "document 2: another is named 'a'"),
        ("name: 3\nmodels: [A]\n---\nmodels: [B]\n", "document 1: name must be text"),
        ("models: [A]\n---\n5\n", "document 2: expected a recipe, found int"),
        ("name: a\nmodels: [A]\n---\nmodels: [{model: {path: a, revision: x}}]\n", "has no revisions"),
        ("name: a\nmodels: [A]\n" * 0 + "---\n{}\n" * 101, "100 of the documents between --- are read at most"),
    ],
)
def test_mistakes_are_told(text, said):
    with pytest.raises(RecipeError, match=said):
        read_recipe_file(written(text))


def test_a_document_that_is_empty_is_none():
    assert read_recipe_file(written("---\n---\nmerge_method: linear\n---\n")) == {"merge_method": "linear"}
    assert read_recipe_file(written("---\n---\n")) is None


@pytest.mark.parametrize(
    "text",
    [
        "{}: &M A\nmodels: [*M, B]\n",
        "models: [&M A]\n{}: [*M, *M]\n",
        "{}: {{deep: [&M A]}}\nmodels: [*M, B]\n",
        "one: &O A\n{}: &M [*O]\nmodels: *M\n",
        "{}: &M {{weight: 1}}\nparameters: {{<<: *M}}\nmodels: [A]\n",
    ],
)
def test_anchors_may_stand_under_any_key(text):
    assert "mine" not in read_recipe_file(written("merge_method: linear\n" + text.format("mine")))


def test_a_key_that_nobody_refers_to_is_a_mistake():
    recipe = written("merge_method: linear\ncnst: &M A\nmodels: [A, B]\n")
    with pytest.raises(RecipeError, match="unknown key 'cnst'"):
        streammerge.make_plan(recipe, output="OUT")


TOKENS = """
name: one
merge_method: linear
models: [A, B]
---
merge_method: linear
models: [{model: one, name: first}, B]
"""


def vocabulary_of(text: str) -> Vocabulary:
    recipe = as_recipe(written(text), {})
    assert isinstance(recipe, Recipe)
    assert recipe.vocabulary is not None
    return recipe.vocabulary


@pytest.mark.parametrize("source", ["one", "{model: {path: one}}", "{path: one}"])
def test_a_document_may_be_where_tokens_come_from(source):
    assert vocabulary_of(f"{TOKENS}tokenizer_source: {source}\n") == Vocabulary("first", is_model=True)


@pytest.mark.parametrize("row", ["one", "{kind: model_token, model: one, token: x}"])
def test_a_document_may_be_where_a_token_s_row_comes_from(row):
    text = f"{TOKENS}tokenizer: {{source: base, tokens: {{one: {{source: {row}}}, source: {{source: A}}}}}}\n"
    with pytest.raises(RecipeError, match="token 'source': source: 'A' is none of the models"):
        vocabulary_of(text)
    rows = vocabulary_of(text.replace("source: A", "source: B")).tokens
    assert [(each.token, each.model) for each in rows] == [("one", "first"), ("source", "B")]


def test_a_document_is_not_used_by_giving_tokens():
    text = TOKENS.replace("{model: one, name: first}", "A")
    with pytest.raises(RecipeError, match="2 of these merges are used by no other"):
        vocabulary_of(f"{text}tokenizer_source: one\n")
