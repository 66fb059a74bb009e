"""Names with what torch's wrappers put into them are read without, where others have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import MergeError
from streammerge.models.wrappers import bare_names
from tests.make.folders import llama_config, llama_tensors, save_folder
from tests.make.headers import header

WRAPPINGS = {
    "plain": lambda name: name,
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "by layer": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
}


def save(name: str, seed: int, wrapping: str, **made: Any) -> dict[str, torch.Tensor]:
    tensors = llama_tensors(seed, **made)
    wrap = WRAPPINGS[wrapping]
    save_folder(Path(name), {wrap(each): value for each, value in tensors.items()}, llama_config(**made))
    return tensors


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [("plain", "compiled"), ("compiled", "plain"), ("parallel", "plain"), ("both", "parallel"), ("plain", "by layer")],
)
def test_a_merge_has_names_without(one, other):
    a, b = save("a", 1, one), save("b", 2, other)
    report = streammerge.merge({"merge_method": "linear", "models": ["a", "b"]}, output="out")
    found = load_file("out/model.safetensors")
    assert found.keys() == a.keys()
    assert json.loads(Path("out/config.json").read_text()) == llama_config()
    for name in a:
        torch.testing.assert_close(found[name].double(), (a[name].double() + b[name].double()) / 2)
    wrapped = [name for name, wrapping in zip("ab", (one, other), strict=True) if wrapping != "plain"]
    assert [note.partition(":")[0] for note in report.notes if "read without" in note] == wrapped
    assert main(["verify", "out", "--all", "-q", "a=a", "b=b"]) == 0


def test_tied_models_get_their_heads():
    save("a", 1, "plain")
    b = save("b", 2, "compiled", tie=True)
    streammerge.merge({"merge_method": "passthrough", "models": ["b"], "layout": "a"}, output="out")
    found = load_file("out/model.safetensors")
    assert torch.equal(found["lm_head.weight"], b["model.embed_tokens.weight"])


def test_models_that_are_wrapped_alike_keep_their_names():
    a, b = save("a", 1, "parallel"), save("b", 2, "parallel")
    streammerge.merge({"merge_method": "linear", "models": ["a", "b"]}, output="out")
    assert load_file("out/model.safetensors").keys() == {f"module.{name}" for name in a.keys() | b.keys()}


def test_what_differs_beyond_wrappers_is_still_refused():
    save("a", 1, "plain")
    save("b", 2, "compiled", layers=3)
    with pytest.raises(MergeError, match=r"model\.layers\.2\.mlp\.down_proj\.weight   in b, not in a"):
        streammerge.merge({"merge_method": "linear", "models": ["a", "b"]}, output="out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("names", "bare"),
    [
        (["module.x", "module.y"], ["x", "y"]),
        (["module.x", "y"], []),
        (["x", "y"], []),
        (["_orig_mod.x", "x"], []),
        (["_orig_mod.module.module.x", "module.module._orig_mod.y"], ["x", "y"]),
        (["module."], []),
        ([], []),
    ],
)
def test_names_without_wrappers(names, bare):
    assert list(bare_names(header(**dict.fromkeys(names, "F16 1")).tensors)) == bare
