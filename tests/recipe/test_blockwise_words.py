"""Parameters by block on the command line, and blocks in what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.cli.words import _parameters
from streammerge.errors import RecipeError
from streammerge.models.blocks import unet_blocks
from streammerge.recipe.presets import PRESETS
from tests.make.models import assert_same_bytes, merge_to, save_models
from tests.models.test_blocks import supermerger
from tests.recipe.block_values import SD1, SMALL, UNET, pair


@pytest.mark.parametrize(
    ("words", "parameters"),
    [
        (["alpha=blocks:GRAD_V"], {"blocks": "GRAD_V"}),
        (["alpha=0,0.5,1"], "0,0.5,1"),
        (["alpha=blocks:0,0.5,1"], {"blocks": "0,0.5,1"}),
        (["alpha=blocks:IN00-IN05=0.3", "alpha=blocks:M00=1"], {"blocks": "IN00-IN05=0.3,M00=1"}),
        (["alpha=0.5", "alpha=elements:M00:attn:1"], {"blocks": "default=0.5", "elements": "M00:attn:1"}),
        (["alpha=0,1", "alpha=elements:M00:attn:1"], {"blocks": "0,1", "elements": "M00:attn:1"}),
        (["alpha=elements:a:b:1", "alpha=elements:c:d:0"], {"elements": "a:b:1,c:d:0"}),
        (["alpha=0.5", "alpha=0.5"], 0.5),
        (["alpha={blocks: GRAD_V}", "alpha=elements:a:b:1"], {"blocks": "GRAD_V", "elements": "a:b:1"}),
    ],
)
def test_words_become_values_by_block(words, parameters):
    assert _parameters(words) == {"alpha": parameters}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("alpha=0.3", "alpha=0.5"),
        ("alpha=blocks:GRAD_V", "alpha=0.5"),
        ("alpha=[0, 1]", "alpha=blocks:GRAD_V"),
        ("alpha={blocks: {M00: 1}}", "alpha=blocks:GRAD_V"),
    ],
)
def test_a_word_that_would_put_another_out_of_effect_is_refused(first, second):
    with pytest.raises(RecipeError, match=r"-p alpha.* is given twice"):
        _parameters([first, second])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = pair()
    save_models(tmp_path, a=a, b=b)
    return tmp_path


WEIGHTED_SUM = ("a.safetensors", "b.safetensors", "-m", "weighted_sum")


def test_a_merge_by_a_preset_on_the_command_line(folder):
    words = ["-p", "alpha=blocks:WRAP16", "-p", "alpha=elements:OUT11:norm:0.5", "-o", "out.safetensors", "-q"]
    assert main([*WEIGHTED_SUM, *words]) == 0
    a, b, out = (load_file(f"{name}.safetensors") for name in ("a", "b", "out"))
    alpha = dict(zip(unet_blocks(12), PRESETS[26]["WRAP16"], strict=True))
    for name, tensor in out.items():
        block = supermerger(name)
        t = 0.5 if block == "OUT11" and "norm" in name else alpha[block]
        torch.testing.assert_close(tensor, (1 - t) * a[name] + t * b[name])
        if t in (0, 1):
            assert torch.equal(tensor, b[name] if t else a[name])


def test_a_verbose_plan_shows_every_tensors_block_and_value(folder, capsys):
    assert main(["plan", *WEIGHTED_SUM, "-p", "alpha=blocks:OUT12_5", "-v"]) == 0
    shown = re.findall(
        r"^merged .* (\S+)   weighted_sum   (\w+)(?: \(\w+\))?: alpha (\S+)$", capsys.readouterr().out, re.M
    )
    alpha = dict(zip(unet_blocks(12), ("0.5" if v == 0.5 else f"{v:.0f}" for v in PRESETS[26]["OUT12_5"]), strict=True))
    assert sorted(shown) == sorted((name, supermerger(name), alpha[supermerger(name)]) for name in SMALL["sd1"])


def test_the_parts_of_a_block_are_shown_with_it(folder, capsys):
    assert main(["plan", *WEIGHTED_SUM, "-p", "alpha=blocks:VAE=1,TIME=0.25,default=0.5", "--json"]) == 0
    tensors = {each["name"]: each for each in json.loads(capsys.readouterr().out)["tensors"]}
    expected = {
        "first_stage_model.decoder.conv_in.weight": ("BASE (VAE)", 1.0),
        UNET + "time_embed.0.weight": ("IN00 (TIME)", 0.25),
        UNET + "out.2.weight": ("OUT11", 0.5),
    }
    for name, (block, alpha) in expected.items():
        assert (tensors[name]["block"], tensors[name]["parameters"]) == (block, {"alpha": alpha})
    assert main(["plan", *WEIGHTED_SUM, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["tensors"]
    assert not any("block" in each for each in plain)
    assert all(each["parameters"] == {"alpha": 0.5} for each in plain)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("blocks:GRAD_W", "there is no preset 'GRAD_W'\n  Did you mean 'GRAD_"),
        ("0,1,2", "3 values by block, and Stable Diffusion 1 has 26 blocks\n  BASE, IN00-IN11, M00, OUT00-OUT11\n"),
        ("blocks:OUT20=1", "Stable Diffusion 1 has no block 'OUT20'"),
        ("elements:OUT03:0.5", "expected BLOCKS:ELEMENTS:RATIO, found 'OUT03:0.5'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_error(folder, capsys, value, problem):
    assert main([*WEIGHTED_SUM, "-p", f"alpha={value}", "-o", "out.safetensors"]) == 1
    error = capsys.readouterr().err
    assert problem in error
    assert "parameter 'alpha'" in error
    assert "Nothing was written." in error
    assert not Path("out.safetensors").exists()


def test_the_recipe_in_the_metadata_gives_the_same_merge(folder):
    words = ["-p", "alpha=blocks:COSINE", "-p", "alpha=elements:M00:attn:1", "-o", "out.safetensors", "-q"]
    assert main([*WEIGHTED_SUM, *words]) == 0
    with streammerge.open_model("out.safetensors") as model:
        recipe = json.loads(model.metadata["streammerge.recipe"])
    assert recipe["parameters"] == {"alpha": {"blocks": "COSINE", "elements": "M00:attn:1"}}
    assert_same_bytes(merge_to(folder / "again.safetensors", recipe), load_file("out.safetensors"))


def test_a_model_is_inspected_with_its_blocks(folder, capsys):
    assert main(["inspect", "a.safetensors"]) == 0
    assert "\nblocks: BASE, IN00-IN11, M00, OUT00-OUT11, CLIP, TIME, VAE\n" in capsys.readouterr().out
    assert main(["inspect", "a.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == list(SD1.names)


def test_presets_are_listed(capsys):
    assert main(["methods", "--presets"]) == 0
    out = capsys.readouterr().out
    assert "26 blocks: BASE, IN00-IN11, M00, OUT00-OUT11" in out
    assert "20 blocks: BASE, IN00-IN08, M00, OUT00-OUT08" in out
    assert all(name in out for table in PRESETS.values() for name in table)
    assert main(["methods", "--presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {int(count): table for count, table in listed.items()} == {
        count: {name: list(row) for name, row in table.items()} for count, table in PRESETS.items()
    }
