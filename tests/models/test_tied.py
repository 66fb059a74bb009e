"""Tied and untied models in one merge: a head that is not written is the embedding, or nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import MergeError
from tests.make.folders import llama_config, llama_tensors, save_folder, save_llama

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, (name, tie) in enumerate([("tied", True), ("untied", False), ("tied too", True)]):
        save_llama(tmp_path / name, seed, tie=tie)
    return tmp_path


def merge(*names, **keys):
    recipe = {"merge_method": "linear", "models": list(names), **keys}
    return streammerge.merge(recipe, output="OUT", force=True)


def config():
    return json.loads(Path("OUT/config.json").read_text())


@pytest.mark.parametrize("names", [("tied", "untied"), ("untied", "tied"), ("tied", "untied", "tied too")])
def test_in_either_order(models, names):
    merge(*names)
    out, inputs = load_file("OUT/model.safetensors"), [load_file(f"{name}/model.safetensors") for name in names]
    head = torch.stack([each.get(HEAD, each[EMBEDDING]).double() for each in inputs]).mean(0)
    torch.testing.assert_close(out[HEAD].double(), head, rtol=0, atol=1e-6)
    assert len(out) == len(llama_tensors(0))
    assert config()["tie_word_embeddings"] is False


def test_models_that_are_all_tied_stay_so(models):
    merge("tied", "tied too")
    assert HEAD not in load_file("OUT/model.safetensors")
    assert config()["tie_word_embeddings"] is True


@pytest.mark.parametrize("names", [("untied", "tied"), ("tied", "untied")])
def test_where_missing_tensors_are_kept_only_a_layout_with_a_head_has_one(models, names):
    more = load_file(f"{names[0]}/model.safetensors") | {"model.vision.weight": torch.ones(2)}
    save_folder(Path("more"), more, json.loads(Path(names[0], "config.json").read_text()))
    merge("more", names[1], on_missing="keep")
    out, other = load_file("OUT/model.safetensors"), load_file(f"{names[1]}/model.safetensors")
    assert torch.equal(out["model.vision.weight"], torch.ones(2))
    assert (HEAD in out) == (HEAD in more)
    if HEAD in out:
        head = (more[HEAD].double() + other[EMBEDDING].double()) / 2
        torch.testing.assert_close(out[HEAD].double(), head, rtol=0, atol=1e-6)


def test_it_is_told(models, capsys):
    assert main(["plan", "tied", "untied", "-o", "OUT"]) == 0
    told = capsys.readouterr().out
    assert "tied ties its output to its input: its lm_head.weight is its model.embed_tokens.weight" in told
    assert "tie_word_embeddings: true → false" in told


def test_with_a_base_and_within_another_recipe(models):
    merge({"merge_method": "linear", "models": ["tied", "tied too"]}, "untied")
    a, b, c = (load_file(f"{name}/model.safetensors") for name in ("tied", "tied too", "untied"))
    expected = (a[EMBEDDING].double() + b[EMBEDDING].double()) / 4 + c[HEAD].double() / 2
    torch.testing.assert_close(load_file("OUT/model.safetensors")[HEAD].double(), expected, rtol=0, atol=1e-6)
    merge("untied", merge_method="task_arithmetic", base_model="tied", parameters={"weight": 0.5})
    expected = a[EMBEDDING].double() / 2 + c[HEAD].double() / 2
    torch.testing.assert_close(load_file("OUT/model.safetensors")[HEAD].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"architectures": ["LlamaModel"]},
        {"architectures": None},
        {"text_config": {"tie_word_embeddings": False}},
        None,
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_what_no_config_says_is_refused(models, changes, order):
    made = None if changes is None else {**llama_config(tie=True), **changes}
    save_folder(models / "odd", llama_tensors(5, tie=True), made, {})
    with pytest.raises(MergeError, match=HEAD):
        merge(*["odd", "untied"][::order])
    assert not Path("OUT").exists()


def test_who_asks_for_something_else_gets_that(models):
    merge("tied", "untied", on_missing="drop")
    assert HEAD not in load_file("OUT/model.safetensors")
    assert config()["tie_word_embeddings"] is True
    merge("untied", "tied", rules=[{"match": HEAD, "take": "untied"}])
    assert torch.equal(load_file("OUT/model.safetensors")[HEAD], load_file("untied/model.safetensors")[HEAD])


def test_a_head_that_was_written_though_it_is_tied(models):
    for name, seed in (("a", 7), ("b", 8)):
        tensors = llama_tensors(seed, tie=True)
        save_folder(models / name, {**tensors, HEAD: tensors[EMBEDDING].clone()}, llama_config(tie=True), {})
    merge("a", "b")
    assert config()["tie_word_embeddings"] is True
    merge("a", "untied")
    assert config()["tie_word_embeddings"] is False
    weights = [{"filter": "lm_head", "value": 0.9}, {"value": 0.5}]
    merge({"model": "a", "parameters": {"weight": weights}}, "b")
    assert config()["tie_word_embeddings"] is False
