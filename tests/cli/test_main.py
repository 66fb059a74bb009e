"""The command line: models and recipes are merged as the words say, and every command has a help."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge
from streammerge import __version__
from streammerge.cli.main import COMMANDS
from tests.cli.small_models import UNET, VAE, VALUES, value, write_recipe

# ── models on the command line ───────────────────────────────────────────────────────────────────────────────────────


def test_models_are_averaged(folder, run):
    result = run("a.safetensors", "b.safetensors", "-o", "out.safetensors")
    assert (result.code, result.err) == (0, "")
    assert value() == 2.0
    assert load_file("out.safetensors")["steps"] == 1
    labels = [line.split("  ")[0] for line in result.out.splitlines()]
    assert labels == ["output", "tensors", "bytes", "time", "rate", "peak RAM", "run on"]
    assert "2 merged, 1 copied, 0 dropped" in result.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.safetensors:0.25", "b.safetensors:0.75"], 2.5),
        (["a.safetensors:1", "b.safetensors:.5", "-p", "normalize=false"], 2.5),
        (["a.safetensors:-1", "b.safetensors:+2"], 5.0),
        (["a.safetensors:1e-3", "b.safetensors:1", "-p", "normalize=false"], 3.001),
        (["a.safetensors", "b.safetensors:3"], 2.5),
        (["first=a.safetensors:0.25", "b.safetensors:0.75"], 2.5),
        (["a.safetensors", "b.safetensors", "-m", "weighted_sum", "-p", "alpha=0.25"], 1.5),
        (["-m", "weighted_sum", "a.safetensors", "-p", "alpha=1e-1", "b.safetensors"], 1.2),
        (["a.safetensors", "--base", "base.safetensors", "-m", "task_arithmetic", "b.safetensors:0"], 1.0),
        (["depth.safetensors:.5", "waifu.safetensors:.5", "--base", "base.safetensors", "-m", "task_arithmetic"], 15.5),
        (["a.safetensors", "b.safetensors", "--method", "task_arithmetic", "--base", "a.safetensors"], 3.0),
        (["a.safetensors", "b.safetensors", "-m", "ties", "--base=base.safetensors", "-p", "density=1"], 2.0),
        (["a.safetensors", "-m", "passthrough", "-p", "scale=[{filter: diffusion, value: 2}, {value: 1}]"], 2.0),
        (["a.safetensors", "-m", "scale", "--parameter", "alpha=3"], 3.0),
    ],
)
def test_weights_methods_and_parameters(folder, run, words, expected):
    result = run("-o", "out.safetensors", *words, "-q", "--on-missing", "drop")
    assert (result.code, result.out) == (0, ""), result.err
    assert value() == pytest.approx(expected)


def test_options_may_stand_anywhere(folder, run):
    words = ["--device", "cpu", "a.safetensors", "--dtype", "fp16", "b.safetensors", "-o", "out.safetensors", "-q"]
    for start in (0, 2, 3, 5):
        turned = words[start:] + words[:start]
        assert run(*turned, "--force").code == 0, turned
        assert load_file("out.safetensors")[UNET].dtype == torch.float16


def test_a_command_is_one_only_as_the_first_word(folder, run):
    shutil.copytree(folder, folder / "plan", ignore=shutil.ignore_patterns("[!a]*", "base*"))
    assert run("-q", "plan", "b.safetensors", "-o", "out.safetensors").code == 0
    assert "     2  merged: linear\n" in run("plan", "a.safetensors", "b.safetensors").out
    assert not Path("merged.safetensors").exists()


# ── recipes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_recipe_finds_its_models_beside_itself(folder, run, monkeypatch):
    (folder / "elsewhere").mkdir()
    write_recipe()
    monkeypatch.chdir(folder / "elsewhere")
    assert run("../recipe.yaml", "-o", "out.safetensors", "-q").code == 0
    assert value() == 2.0


def test_options_change_what_a_recipe_says(folder, run):
    recipe = write_recipe(dtype="float32", out_dtype="float32", rules=[{"match": "first*", "take": "a"}])
    words = ("--dtype", "fp16", "-m", "weighted_sum", "-p", "alpha=1", "--take", "first*=b.safetensors", "-q")
    result = run(recipe, *words, "--drop", "steps", "-o", "out.safetensors")
    assert result.code == 1
    assert (
        "1 rule matches no tensor of a that an earlier rule left\n  first*" in result.err
    )  # the recipe's own, idle now
    recipe = write_recipe(dtype="float32", out_dtype="float32")
    assert run(recipe, *words, "--drop", "steps", "-o", "out.safetensors").code == 0
    assert (value(), value(name=VAE)) == (3.0, 3.0)
    assert set(load_file("out.safetensors")) == {UNET, VAE}
    assert load_file("out.safetensors")[UNET].dtype == torch.float16


def test_a_packaged_recipe_is_bound_to_files(folder, run):
    words = ("--recipe", "weighted-sum", "a=a.safetensors", "b=b.safetensors", "-q", "-o", "out.safetensors")
    assert run(*words).code == 0
    assert value() == 2.0
    assert run(*words, "--force", "-p", "alpha=0.25").code == 0
    assert value() == 1.5


def test_the_founding_job_from_the_packaged_recipe(folder, run):
    """The first convolution is a tensor of its own in the recipe, so the files need one."""
    convolution = "model.diffusion_model.input_blocks.0.0.weight"
    for name, channels in (("depth", 5), ("base", 4), ("waifu", 4)):
        tensors = load_file(f"{name}.safetensors")
        tensors[convolution] = torch.full((2, channels, 3, 3), VALUES[name])
        save_file(tensors, f"{name}.safetensors")
    result = run(
        *("--recipe", "sd2-depth", "-o", "out.safetensors"),
        *("depth=depth.safetensors", "base=base.safetensors", "waifu=waifu.safetensors"),
    )
    assert result.code == 0, result.err
    assert value() == 15.5
    assert value(name=VAE) == 20.0
    assert value(name="depth_model.x") == 11.0
    assert load_file("out.safetensors")[convolution].shape == (2, 5, 3, 3)
    result = run(
        *("--recipe", "sd2-depth", "-o", "out.safetensors", "--force", "-q"),
        *("depth=depth.safetensors:1", "base=base.safetensors", "waifu=waifu.safetensors:0.1"),
    )
    assert result.code == 0, result.err
    assert value() == 12.0


def test_no_words_print_the_help_and_are_a_usage_error(run):
    result = run()
    assert result.code == 2
    assert result.out.startswith("usage: streammerge RECIPE.yaml -o OUT.safetensors [options]")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_a_help(run, command):
    result = run(*([command] if command else []), "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: streammerge {command}".rstrip())


def test_the_version(run):
    assert run("--version").out.startswith(f"streammerge {__version__}, loops: ")


def test_the_home_folder_is_meant_wherever_a_path_is_typed(folder, run, monkeypatch):
    """`--output=~/out` reaches us as it is typed: no shell expands it there."""
    home = folder / "home"
    home.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    shutil.copy("a.safetensors", home)
    words = ("~/a.safetensors", "b.safetensors", "--output=~/out.safetensors", "--report=~/told.json", "-q")
    assert run(*words).code == 0
    assert {path.name for path in home.iterdir()} == {"a.safetensors", "out.safetensors", "told.json"}
    assert not Path("~").exists()
    assert run("verify", "~/out.safetensors", "b=b.safetensors", "--all").code == 0
    assert run("inspect", "~/out.safetensors").code == 0
    (home / "recipe.yaml").write_text("{merge_method: passthrough, models: [~/out.safetensors]}")
    report = streammerge.merge("~/recipe.yaml", output="~/again")
    assert report.output == [str(home / "again" / "model.safetensors")]
