"""The commands beside the merge: what is listed, described, inspected and compared."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from streammerge.methods import METHODS
from streammerge.recipe.files import packaged_recipes
from tests.cli.small_models import UNET, VAE


def test_methods_are_listed(run):
    result = run("methods")
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(METHODS)
    assert all(METHODS[line.split()[0]].formula in line for line in lines)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_described_with_a_command_that_works(folder, run, name):
    result = run("methods", name)
    assert result.code == 0
    method = METHODS[name]
    assert result.out.startswith(f"{name} ({method.kind})\n\n{method.formula}\n")
    for parameter in method.parameters:
        assert f"-p {parameter.name} " in result.out
    example = result.out.splitlines()[-1].split()
    assert example[0] == "streammerge"
    merged = run(*example[1:], "-q")
    assert (merged.code, merged.err) == (0, "")
    assert Path("merged.safetensors").is_file()


def test_methods_as_json(run):
    described = json.loads(run("methods", "--json").out)
    assert [method["name"] for method in described] == sorted(METHODS)
    (ties,) = json.loads(run("methods", "ties", "--json").out)
    assert ties["base"] == "required"
    assert ties["parameters"][0] == {
        "name": "weight",
        "type": "number",
        "takes": "a number",
        "per_model": True,
        "default": 1.0,
    }


def test_an_unknown_method_is_an_error(run):
    result = run("methods", "tyes")
    assert result.code == 1
    assert result.err.startswith("error: unknown merge method 'tyes'\n  Did you mean 'ties'? Known methods: ")


def test_recipes_are_listed_and_shown(run):
    listed = run("recipes").out
    assert (
        "sd2-depth\n  streammerge --recipe sd2-depth depth=DEPTH base=BASE waifu=WAIFU -o OUT.safetensors\n" in listed
    )
    assert all(f"\n{name}\n" in f"\n{listed}" for name in packaged_recipes())
    assert run("recipes", "sd2-depth").out.strip() == packaged_recipes()["sd2-depth"].strip()
    result = run("recipes", "sd3")
    assert result.code == 1
    assert "There are: add-difference, sd2-depth, weighted-sum." in result.err


def test_a_model_is_inspected(folder, run):
    shown = run("inspect", "depth.safetensors")
    assert shown.code == 0
    assert shown.out.startswith("depth.safetensors   safetensors, ")
    assert "4 tensors" in shown.out
    assert UNET in run("inspect", "depth.safetensors", "--tensors").out
    plain = json.loads(run("inspect", "depth.safetensors", "--json", "--match", "depth*").out)
    assert plain["tensors"] == [{"name": "depth_model.x", "dtype": "F32", "shape": [3]}]
    assert plain["metadata"] == {"format": "pt"}


def test_models_are_compared(folder, run):
    result = run("compare", "a.safetensors", "depth.safetensors", "--csv", "out.csv", "-q")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("A  a.safetensors\nB  depth.safetensors\n2 tensors compared")
    with Path("out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"]: float(row["cosine"]) for row in rows} == pytest.approx({UNET: 1.0, VAE: 1.0})
    plain = json.loads(run("compare", "a.safetensors", "b.safetensors", "--json", "--match", "model*", "-q").out)
    assert plain["compared"] == 1
    assert plain["tensors"][0]["name"] == UNET


@pytest.mark.parametrize("option", ["--csv", "--plot"])
@pytest.mark.parametrize("path", ["a.safetensors", "no/where.csv", "."])
def test_a_comparison_does_not_replace_a_model(folder, run, option, path):
    before = Path("a.safetensors").read_bytes()
    result = run("compare", "a.safetensors", "b.safetensors", option, path, "-q")
    assert (result.code, result.out) == (1, "")
    assert Path("a.safetensors").read_bytes() == before
