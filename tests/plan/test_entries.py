"""`--entry` and `entry:` choose the dict of a torch file that is the model; names that are none are usage errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import CheckpointError, OutputError, RecipeError

ONE, TWO, THREE = ({"l.w": torch.full((3,), value), "l.b": torch.full((2,), value)} for value in (1.0, 2.0, 3.0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"params": ONE, "params_ema": TWO, "step": torch.tensor(5)}, "a.pth")
    torch.save({"net": {"params_ema": THREE, "other": ONE}}, "b.pth")
    save_file(THREE, "c.safetensors")
    return tmp_path


def merged(*words: str) -> float:
    """The one value that the merge has in all places."""
    assert main([*words, "-o", "out.safetensors", "--force", "-q"]) == 0
    (value,) = {float(value) for tensor in load_file("out.safetensors").values() for value in tensor}
    return value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["a.pth", "c.safetensors", "--entry", "params"], 2.0),
        (["a.pth", "c.safetensors", "--entry", "params_ema"], 2.5),
        (["a.pth", "c.safetensors", "--entry", "a=params"], 2.0),
        (["a.pth", "b.pth", "--entry", "params", "--entry", "b=net.params_ema"], 2.0),
        (["x=a.pth", "y=b.pth", "--entry", "x=params_ema", "--entry", "y=net.other"], 1.5),
        (["c.safetensors", "--base", "a.pth", "-m", "task_arithmetic", "--entry", "base=params"], 3.0),
    ],
)
def test_the_command_line_chooses(folder, words, value):
    assert merged(*words) == value


def recipe(*models: Mapping[str, object], **keys: object) -> str:
    Path("r.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": [*map(dict, models)], **keys}))
    return "r.yaml"


def test_a_recipe_chooses_and_its_choice_comes_first(folder):
    a, c = {"model": "a.pth", "entry": "params"}, {"model": "c.safetensors"}
    assert merged(recipe(a, c)) == 2.0
    assert merged(recipe(a, {"model": "b.pth"}), "--entry", "net.params_ema") == 2.0


def test_two_entries_of_one_file_are_two_models(folder):
    both = [{"model": "a.pth", "entry": entry, "parameters": {"weight": 0.5}} for entry in ("params", "params_ema")]
    assert merged(recipe(*both)) == 1.5
    assert main(["verify", "out.safetensors", "--all"]) == 0


def test_nested_recipes_and_rules_have_entries(folder):
    inner = {"merge_method": "linear", "models": [{"model": "a.pth"}, {"model": "c.safetensors"}]}
    assert merged(recipe({"model": inner}, {"model": "c.safetensors"}), "--entry", "params") == 2.5
    rules = [{"match": "*", "take": {"model": "a.pth", "entry": "params_ema"}}]
    assert merged(recipe({"model": "c.safetensors"}, {"model": "c.safetensors"}, rules=rules)) == 2.0


def test_the_metadata_know_the_entry(folder, capsys):
    assert merged("a.pth", "c.safetensors", "--entry", "a=params_ema", "--hash-inputs") == 2.5
    Path("out.safetensors").rename("old.safetensors")
    assert merged("old.safetensors", "--recipe-from-metadata") == 2.5
    assert main(["verify", "old.safetensors", "--all"]) == 0
    assert "inputs: the sha256 of every file of 2 models is as recorded" in capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 1) -> str:
    capsys.readouterr()
    assert main(list(words)) == code
    output = capsys.readouterr()
    return output.err if code else output.out + output.err


def test_without_a_choice_the_error_says_how_to_choose_and_that_works(folder, capsys):
    said = told(capsys, "a.pth", "c.safetensors", "-o", "out.safetensors")
    assert (
        "a.pth: 2 dicts of tensors in it could be the model\n  params   2 tensors\n  params_ema   2 tensors\n" in said
    )
    assert "--entry params " in said
    assert merged("a.pth", "c.safetensors", "--entry", "params") == 2.0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--entry", "x=params"], "there is no model 'x' without an entry of its own\n  The models: a, c."),
        (["--entry", "params", "--entry", "c=params"], "is safetensors, which has no dicts"),
        (["--entry", "params", "--entry", "params_ema"], "expected KEY once"),
        (["--entry", "a=params", "--entry", "a=params_ema"], "NAME=KEY once for a model"),
        (["--entry", "ema"], "there is no dict 'ema' in it\n  .   1 tensor\n  params   2 tensors\n"),
    ],
)
def test_an_entry_that_chooses_nothing_is_an_error(folder, capsys, words, problem):
    assert problem in told(capsys, "a.pth", "c.safetensors", "-o", "out.safetensors", *words)
    assert not Path("out.safetensors").exists()


def test_an_entry_where_no_file_has_any_is_an_error(folder, capsys):
    said = told(capsys, "c.safetensors", "c.safetensors", "-o", "out.safetensors", "--entry", "params")
    assert "--entry params: none of the models is a torch file" in said


@pytest.mark.parametrize("entry", [True, "", ["a"], 1.5, {"a": 1}])
def test_an_entry_in_a_recipe_is_a_name(folder, entry):
    with pytest.raises(RecipeError, match="model 1: entry: expected a name"):
        streammerge.make_plan({"merge_method": "linear", "models": [{"model": "a.pth", "entry": entry}]}, output="x")


def test_a_nested_recipe_has_no_entry(folder):
    inner = {"merge_method": "linear", "models": ["c.safetensors"]}
    with pytest.raises(RecipeError, match="model 1: a nested recipe has no entry"):
        streammerge.make_plan({"merge_method": "linear", "models": [{"model": inner, "entry": "a"}]}, output="x")


def test_what_is_left_is_told_by_every_command(folder, capsys):
    left = "that are not the model's: params_ema.l.w, params_ema.l.b, step"
    assert f"beside the model: 3 tensors {left}" in told(capsys, "inspect", "a.pth", "--entry", "params", code=0)
    shown = json.loads(told(capsys, "inspect", "a.pth", "--entry", "params", "--json", code=0))
    assert shown["beside_model"] == {"count": 3, "first": ["params_ema.l.w", "params_ema.l.b", "step"]}
    words = ["a.pth", "c.safetensors", "--entry", "params"]
    assert f"note: a.pth holds 3 tensors {left}" in told(capsys, "plan", *words, code=0)
    planned = json.loads(told(capsys, "plan", *words, "--json", code=0))
    assert list(planned["beside_models"].values()) == [shown["beside_model"]]
    assert f"note: a.pth holds 3 tensors {left}" in told(capsys, *words, "-o", "out.safetensors", code=0)
    with streammerge.open_model("a.pth", entry="params") as model:
        assert str(model.left) == f"3 tensors {left}"


def test_compare_chooses_for_each(folder, capsys):
    words = ["compare", "a.pth", "b.pth", "--entry", "a=params", "--entry", "b=net.other", "--json"]
    assert json.loads(told(capsys, *words, code=0))
    assert "there is no model 'x'" in told(capsys, "compare", "a.pth", "c.safetensors", "--entry", "x=params")


# ── names that are none ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "words",
    [
        ["c.safetensors", "-o", ""],
        ["c.safetensors", "-o", "x.safetensors", "--report", ""],
        ["", "-o", "x.safetensors"],
        ["c.safetensors", "-o", "x.safetensors", "--base", ""],
        ["c.safetensors", "-o", "x.safetensors", "--layout", ""],
        ["c.safetensors", "-o", "x.safetensors", "--entry", ""],
        ["inspect", ""],
        ["compare", "", "c.safetensors"],
        ["compare", "c.safetensors", "c.safetensors", "--csv", ""],
        ["verify", ""],
        ["clean", ""],
        ["plan", ""],
    ],
)
def test_an_empty_name_is_a_usage_error(folder, capsys, words):
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    assert "expected a name, found an empty text" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_an_empty_name_is_an_error_in_python(folder):
    with pytest.raises(CheckpointError, match="the model's name is empty"):
        streammerge.open_model("")
    with pytest.raises(OutputError, match="the output's name is empty"):
        streammerge.merge({"merge_method": "linear", "models": ["c.safetensors"]}, output="")


@pytest.mark.parametrize("name", ["x.sft", "x.SFT", "x.Safetensors", "x.SAFETENSORS"])
def test_every_spelling_of_safetensors_is_a_file(folder, name):
    assert main(["c.safetensors", "-o", name, "-q"]) == 0
    assert Path(name).is_file()
    assert merged(name) == 3.0
    assert main(["c.safetensors", "-o", name, "-q"]) == 1
    assert main(["c.safetensors", "-o", name, "-q", "--force", "--shard-size", "16B"]) == 0
    assert not Path(name).exists()
    assert main(["verify", f"{name}.index.json", "--all"]) == 0


@pytest.mark.parametrize("name", ["x.ckpt", "x.PT", "x.Pth", "x.BIN", "x.GGUF", ".safetensors", ".sft"])
def test_names_of_other_formats_and_endings_alone_are_refused(folder, name):
    assert main(["c.safetensors", "-o", name, "-q"]) == 1
    assert not Path(name).exists()


@pytest.mark.parametrize("name", ["x.CKPT", "x.Pt", "x.PTH", "x.bin", "x.sft"])
def test_a_report_does_not_take_a_model_s_name(folder, capsys, name):
    assert "is named like a model" in told(capsys, "c.safetensors", "-o", "y.safetensors", "--report", name)


@pytest.mark.parametrize("name", ["only.SFT", "only.sft", "only.PTH", "only.Safetensors"])
def test_the_only_model_in_a_folder_is_found_by_every_ending(folder, name):
    (folder / "m").mkdir()
    (folder / "c.safetensors").rename(folder / "m" / name)
    assert merged("m") == 3.0
