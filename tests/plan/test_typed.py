"""What is typed has the effect that is meant, or is refused: names with `=`, weights, rules, numbers, parameters."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from streammerge.cli.main import main
from streammerge.errors import RecipeError
from streammerge.recipe.files import parse_yaml
from streammerge.recipe.scalars import number_of_text, scalar
from tests.make.models import load_model, make_tensors, near, save_models

SHAPES = {"layers.0.w": (4, 6), "layers.1.w": (4, 6), "norm": (5,)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    base = make_tensors(0, shapes=SHAPES)
    save_models(tmp_path, x=base, a=near(base, 1), b=near(base, 2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(*words: str) -> dict[str, torch.Tensor]:
    assert main([*words, "-o", "out.safetensors", "--force", "-q"]) == 0
    return load_model(Path("out.safetensors"))


def refused(capsys, *words: str) -> str:
    assert main([*words, "-o", "refused.safetensors"]) == 1
    assert not Path("refused.safetensors").exists()
    return str(capsys.readouterr().err)


@pytest.mark.parametrize("stem", ["epoch=000004", "e=1:2", "n=a", "step=3,loss=0.1"])
@pytest.mark.parametrize("weight", ["", ":0.25"])
@pytest.mark.parametrize("name", ["", "first="])
def test_a_file_with_an_equals_sign_is_a_file(folder, stem, weight, name):
    Path("a.safetensors").rename(f"{stem}.safetensors")
    found = merged(f"{name}{stem}.safetensors{weight}", "b.safetensors:0.5")
    a, b = load_model(Path(f"{stem}.safetensors")), load_model(Path("b.safetensors"))
    first = float(weight[1:] or 1) / (float(weight[1:] or 1) + 0.5)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, first * a[key] + (1 - first) * b[key])


def test_the_base_may_be_one_of_a_fixed_number_of_models(folder):
    found = merged(
        "a.safetensors", "b.safetensors", "-m", "add_difference", "--base", "a.safetensors", "-p", "alpha=0.3"
    )
    a, b = load_model(Path("a.safetensors")), load_model(Path("b.safetensors"))
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, a[key] + 0.3 * (b[key] - a[key]))


def test_a_base_that_leaves_no_model_is_told(folder, capsys):
    told = refused(capsys, "a.safetensors", "-m", "ties", "--base", "a.safetensors")
    assert "takes at least 1 model beside the base, found 0\n  One of the models is the same as the base" in told


@pytest.mark.parametrize("base", ["folder", "folder/model.safetensors", "link.safetensors"])
def test_a_base_that_is_a_model_under_another_name_is_refused(folder, capsys, base):
    """It would count as one more model, of which the task vector is zero."""
    Path("folder").mkdir()
    Path("a.safetensors").replace("folder/model.safetensors")
    Path("a.safetensors").symlink_to("folder/model.safetensors")
    Path("link.safetensors").symlink_to("a.safetensors")
    words = ("a.safetensors", "b.safetensors", "x.safetensors", "-m", "model_stock")
    told = refused(capsys, *words, "--base", base)
    assert f"the base is the same model as a, under another name\n  base   {Path(base).absolute()}\n  a   " in told
    listed = refused(capsys, "b.safetensors", "a.safetensors", base, "-m", "model_stock", "--base", "a.safetensors")
    assert "the base is the same model as" in listed


@pytest.mark.parametrize(
    "words", [*itertools.permutations([("--drop", "*"), ("--keep", "norm"), ("--keep", "layers.1.*")])]
)
def test_a_keep_wins_over_a_drop_in_any_order(folder, words):
    assert set(merged("a.safetensors", "b.safetensors", *itertools.chain.from_iterable(words))) == {
        "norm",
        "layers.1.w",
    }


AMBIGUOUS = ["010", "1:30", "1_000", "0x10", "0b11", "-010", "+07", "1:30:5", "1_0.5", "1:30.5", "00"]


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_numbers_that_yaml_reads_otherwise_than_people_are_refused(folder, capsys, text):
    assert f"{text} may be read as another number than is meant" in refused(
        capsys, "a.safetensors", "b.safetensors", "-m", "weighted_sum", "-p", f"alpha={text}"
    )
    for place in (f"{{a: {text}}}", f"[1, {text}]", f"{{{text}: a}}", f"a:\n  - b: {text}\n"):
        with pytest.raises(RecipeError, match=re.escape(text)):
            parse_yaml(place, "recipe")
    assert parse_yaml(f"{{a: '{text}'}}", "recipe") == {"a": text}


@pytest.mark.parametrize("text", ["0", "10", "-0.5", ".5", "5.", "0.010", "1e-3", "1.5e+3", ".5e3", "100", "0.0", "+1"])
def test_decimal_numbers_are_read_as_they_stand(text):
    assert scalar(parse_yaml(text, "recipe"), "x") == float(text)
    assert number_of_text(text, "x") == float(text)


@pytest.mark.parametrize("weight", ["010", "00.5"[:2] + "5"])
def test_a_weight_with_leading_zeros_is_refused(folder, capsys, weight):
    assert "expected a decimal number" in refused(capsys, f"a.safetensors:{weight}", "b.safetensors")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a.safetensors:1", "b.safetensors:1", "-p", "weight=2"], "-p weight would have no effect: every model has"),
        (["a.safetensors", "b.safetensors", "-p", "density=1"], "method 'linear' has no parameter 'density'"),
        (["a.safetensors", "b.safetensors", "-m", "sce", "--base", "x.safetensors", "-p", "weight=1"], "no parameter"),
        (["a.safetensors:0.5", "b.safetensors", "-m", "slerp", "-p", "t=0.5"], "method 'slerp' has no parameter 'wei"),
        (["a.safetensors:1", "b.safetensors", "-m", "ties", "--base", "a.safetensors"], "no effect on the base"),
        (["r.yaml", "-p", "int8_mask=true"], "method 'ties' has no parameter 'int8_mask'"),
        (["r.yaml", "-p", "weight=1"], "-p weight would have no effect"),
        (["r.yaml", "-p", "alpha=1"], "method 'ties' has no parameter 'alpha'"),
        (["inputs.yaml", "base=x.safetensors:2", "m=a.safetensors"], "'base' is the base"),
    ],
)
def test_what_is_typed_without_effect_is_refused(folder, capsys, words, problem):
    Path("r.yaml").write_text(
        "merge_method: ties\nbase_model: x.safetensors\nmodels: [{model: a.safetensors, parameters: {weight: 1}}]\n"
    )
    Path("inputs.yaml").write_text("merge_method: ties\ninputs: {base: x, m: y}\nbase_model: base\nmodels: [base, m]\n")
    assert problem in refused(capsys, *words)


def test_a_recipe_of_mergekits_runs_with_a_note(folder, capsys):
    Path("r.yaml").write_text(
        "merge_method: slerp\nbase_model: a.safetensors\nmodels: [a.safetensors, {model: b.safetensors, parameters: "
        "{weight: 1}}]\nparameters: {t: 0.5, int8_mask: true}\n"
    )
    note = "note: method 'slerp' has no int8_mask, weight: taken without effect, as in mergekit"
    assert main(["plan", "r.yaml"]) == 0
    assert capsys.readouterr().out.count(note) == 1
    assert main(["r.yaml", "-o", "out.safetensors"]) == 0
    assert capsys.readouterr().err.count(note) == 1


FLAGS = ["'false'", "'no'", "'off'", "0", "1", "'0'", "''", "null", "None", "[0]", "{}", "'true'", "0.0"]


@pytest.mark.parametrize("value", FLAGS)
@pytest.mark.parametrize("action", ["drop", "keep"])
def test_what_is_no_flag_is_none(folder, capsys, action, value):
    Path("r.yaml").write_text(
        f"merge_method: linear\nmodels: [a.safetensors, b.safetensors]\nrules: [{{match: norm, {action}: {value}}}]\n"
    )
    assert f"r.yaml: rule 1: {action} must be true or false, found" in refused(capsys, "r.yaml")


@pytest.mark.parametrize("value", ["false", "no", "off", "False", "NO"])
@pytest.mark.parametrize("action", ["drop", "keep"])
def test_a_flag_that_is_false_does_nothing(folder, action, value):
    recipe = (
        f"merge_method: linear\nmodels: [a.safetensors, b.safetensors]\nrules: [{{match: norm, {action}: {value}}}]\n"
    )
    Path("r.yaml").write_text(recipe)
    plain = merged("a.safetensors", "b.safetensors")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in merged("r.yaml").items())


@pytest.mark.parametrize("value", ["false", "0", "''", "[]", "{}", "'None'", "no", "0.0", "2001-01-01"])
@pytest.mark.parametrize(
    "key",
    [
        "merge_method",
        "models",
        "dtype",
        "out_dtype",
        "layout",
        "seed",
        "rules",
        "on_missing",
        "on_shape_mismatch",
        "name",
    ],
)
def test_no_key_of_a_recipe_takes_a_value_for_nothing(folder, capsys, key, value):
    if (key, value) in {("seed", "0"), ("rules", "[]"), ("name", "'None'")}:
        return  # these are what they say
    keys = {"merge_method": "linear", "models": "[a.safetensors, {model: b.safetensors}]", key: value}
    if key == "name":
        keys = {"merge_method": "linear", "models": f"[a.safetensors, {{model: b.safetensors, name: {value}}}]"}
    Path("r.yaml").write_text("".join(f"{name}: {each}\n" for name, each in keys.items()))
    is_file = (key, value) == ("layout", "'None'")
    assert refused(capsys, "r.yaml").startswith("error: None: can't be read" if is_file else "error: r.yaml")


@pytest.mark.parametrize("value", ["false", "0", "[]", "3"])
def test_a_filter_is_text(folder, capsys, value):
    Path("r.yaml").write_text(
        "merge_method: slerp\nmodels: [a.safetensors, b.safetensors]\n"
        f"parameters: {{t: [{{filter: {value}, value: 1}}, {{value: 0}}]}}\n"
    )
    assert "a filter is a part of tensor names, found" in refused(capsys, "r.yaml")


@pytest.mark.parametrize("key", ["parameters", "rules"])
def test_options_are_not_added_to_what_is_none(folder, capsys, key):
    Path("r.yaml").write_text(f"merge_method: linear\nmodels: [a.safetensors, b.safetensors]\n{key}: 5\n")
    assert f"{key} must be a" in refused(capsys, "r.yaml", "-p", "normalize=false", "--keep", "norm")
