"""Words that can be read in two ways, or in none: said to the user, and never guessed in silence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.cli.words import _take_rule
from tests.cli.small_models import UNET, value, write_recipe


@pytest.mark.parametrize("behind", ["x", "", "1,5", "0x1", "b=c"])
def test_what_is_no_weight_is_said_to_be_none(folder, run, behind):
    result = run("plan", f"a.safetensors:{behind}", "b.safetensors")
    assert result.code == 1
    assert result.err.startswith(
        f"error: a.safetensors:{behind}: there is no such file, and {behind!r} is no weight\n"
        "  A weight is a decimal number: a.safetensors:0.5."
    )
    write_recipe(inputs={"a": "a model"}, models=["a", "b.safetensors"])
    assert "is no weight" in run("plan", "recipe.yaml", f"a=a.safetensors:{behind}").err


@pytest.mark.parametrize(
    ("word", "glob", "model"),
    [
        ("t.*=a", "t.*", "a"),
        ("t=1=a", "t=1", "a"),
        ("t=a=b", "t=a", "b"),
        ("t=a=c", "t", "a=c"),
        ("t==a", "t=", "a"),
        ("*=dir/x=1.ckpt", "*", "dir/x=1.ckpt"),
        ("t=1=file.ckpt", "t=1", "file.ckpt"),
    ],
)
def test_what_is_taken_ends_at_the_last_sign_that_a_model_follows(tmp_path, monkeypatch, word, glob, model):
    monkeypatch.chdir(tmp_path)
    Path("file.ckpt").touch()
    found = _take_rule(word, {"a", "b"})
    assert found["match"] == glob
    assert found["take"] in (model, str(Path(model).absolute()))


def test_a_tensor_with_a_sign_in_its_name_is_taken(folder, run):
    for name, number in (("one", 1.0), ("two", 2.0)):
        save_file({"w=1": torch.full((2,), number), "w": torch.full((2,), number)}, f"{name}.safetensors")
    words = ("one.safetensors", "two.safetensors", "-o", "out.safetensors", "-q")
    assert run(*words, "--take", "w=1=two").code == 0
    assert load_file("out.safetensors")["w=1"].tolist() == [2.0, 2.0]
    assert load_file("out.safetensors")["w"].tolist() == [1.5, 1.5]


def test_a_name_that_two_files_have_is_not_taken_for_the_first(folder, run):
    Path("x").mkdir()
    shutil.copy("b.safetensors", "x/a.safetensors")
    words = ("a.safetensors", "x/a.safetensors", "-o", "out.safetensors", "-q", "--take")
    result = run(*words, "*=a")
    assert result.code == 1
    assert result.err.startswith("error: recipe: rule 1: 2 models are called 'a'\n  a   a.safetensors\n  a#2   ")
    assert run(*words, "*=x/a.safetensors").code == 0
    assert value() == 3.0


def test_a_line_break_in_a_path_breaks_no_line(folder, run):
    evil = "new\nerror: all is lost.safetensors"
    try:
        shutil.copy("a.safetensors", evil)
    except OSError:
        pytest.skip("there are no such names here")
    for words in (
        [evil, "b.safetensors", "-o", "out\nput.safetensors"],
        [evil, "b.safetensors", "-o", "out\nput.safetensors"],
        [evil, "b.safetensors", "-o", evil],
        ["plan", evil, "none\nsuch.safetensors"],
        ["plan", evil, "b.safetensors", "-o", "other\nput.safetensors"],
        ["inspect", evil],
        ["verify", "out\nput.safetensors", evil, "b.safetensors"],
        ["clean", "no\nfolder"],
    ):
        result = run(*words)
        lines = (result.out + result.err).splitlines()
        assert any("\\n" in line for line in lines) or words[0] == "clean", words
        assert not any(line.startswith(("error: all is lost", "put", "such", "folder")) for line in lines), words


def test_values_by_block_that_do_not_fit_are_said_with_the_recipes_file(folder, run):
    result = run("plan", write_recipe(parameters={"weight": {"blocks": [1, 2]}}))
    assert result.err.startswith("error: recipe.yaml: parameter 'weight': ")
    inner = {"merge_method": "linear", "models": ["a.safetensors"], "parameters": {"weight": {"blocks": [1, 2]}}}
    result = run("plan", write_recipe(models=[{"model": inner}, "b.safetensors"]))
    assert result.err.startswith("error: recipe.yaml: model 1: nested recipe: parameter 'weight': ")


def test_what_can_not_be_resumed_is_said_to_be_of_another_merge(folder, run):
    words = ("a.safetensors", "b.safetensors", "-o", "out.safetensors")
    assert run(*words, "-q").code == 0
    result = run(*words, "--dtype", "fp16", "--resume", "-q")
    assert result.code == 1
    assert "out.safetensors: the output exists, and is not this merge's, so there is nothing to resume\n" in result.err
    assert "Use --force to replace it" in result.err
    assert load_file("out.safetensors")[UNET].dtype == torch.float32
