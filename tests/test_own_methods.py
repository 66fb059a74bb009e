"""Merge methods from a user's own file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import streammerge
from streammerge import works
from streammerge.cli import main
from streammerge.errors import MethodError
from streammerge.methods import METHODS
from streammerge.methods.loading import load_methods
from tests.models import assert_same_bytes, load_model, make_tensors, merge_to, near, save_models
from tests.pages import PAGES, blocks

LINEAR = """
from streammerge.methods import LinearMethod, method

@method(LinearMethod, base="required", models=(1, 1))
def halfway(*, share: float = 0.5) -> list[float]:
    \"\"\"θ = (1 − s) θ₀ + s θ₁\"\"\"
    return [1.0 - share, share]
"""

BLOCKS = """
from __future__ import annotations

from torch import Tensor

from streammerge.methods import BlockMethod, Place, Share, method

@method(BlockMethod, base="required", models=(1, 1))
def sprinkle(base: Tensor, model: Tensor, *, density: Share = 0.5, place: Place) -> Tensor:
    \"\"\"θ = θ₁ at random, else θ₀\"\"\"
    return model.where(place.uniform(0, model) < density, base)
"""


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "own.py") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def models(tmp_path):
    base = make_tensors(0)
    return save_models(tmp_path, base=base, a=near(base, 1), b=near(base, 2))


def test_a_file_brings_its_methods(own, models):
    assert load_methods(own(LINEAR)) == ("halfway",)
    assert streammerge.load_methods(own(BLOCKS, "other.py")) == ("sprinkle",)
    merged = streammerge.halfway(models["a"], base=models["base"], share=1.0)
    assert torch.equal(merged.read("layers.0.bias", 0, 63), load_model(models["a"])["layers.0.bias"])
    assert "halfway" in dir(streammerge)


@pytest.mark.parametrize(("text", "name"), [(LINEAR, "halfway"), (BLOCKS, "sprinkle")])
def test_the_bytes_do_not_depend_on_how_it_is_run(own, models, tmp_path, monkeypatch, text, name):
    load_methods(own(text))
    merge = getattr(streammerge, name)(models["a"], base=models["base"])
    plain = merge_to(tmp_path / "plain.safetensors", merge, threads=1, io="pread")
    monkeypatch.setattr(works, "WINDOW", 1)
    assert_same_bytes(merge_to(tmp_path / "out.safetensors", merge, threads=4, io="mmap", verify=True), plain)
    for tensor, values in plain.items():
        assert torch.equal(merge.read(tensor, 0, values.numel()), values.reshape(-1))
    base, a = load_model(models["base"]), load_model(models["a"])
    if name == "sprinkle":
        taken = plain["layers.1.block"] == a["layers.1.block"]
        assert 0.49 < taken.float().mean() < 0.51
        assert torch.equal(plain["layers.1.block"][~taken], base["layers.1.block"][~taken])


def test_the_command_line_takes_files(own, models, tmp_path, capsys):
    words = ["--methods", str(own(LINEAR)), "--methods", str(own(BLOCKS, "other.py"))]
    merge = [str(models["a"]), "--base", str(models["base"]), "-m", "sprinkle", "-p", "density=1", "-q"]
    assert main([*merge, *words, "-o", str(tmp_path / "out.safetensors")]) == 0
    assert_same_bytes(load_model(tmp_path / "out.safetensors"), load_model(models["a"]))
    assert main(["methods", *words, "halfway"]) == 0
    assert "θ = (1 − s) θ₀ + s θ₁" in capsys.readouterr().out
    assert main(["plan", *merge, *words]) == 0
    assert main(["verify", str(tmp_path / "out.safetensors"), *merge, *words]) == 0


def test_without_the_option_there_is_no_such_method(models, tmp_path, capsys):
    assert main([str(models["a"]), "-m", "halfway", "-o", str(tmp_path / "out.safetensors")]) == 1
    assert "unknown merge method 'halfway'" in capsys.readouterr().err


def test_a_recipe_can_not_name_a_file_of_methods(own, models, tmp_path):
    raw = {"merge_method": "halfway", "models": [str(models["a"])], "methods": str(own(LINEAR))}
    with pytest.raises(streammerge.RecipeError, match="unknown key 'methods'"):
        streammerge.merge(raw, output=tmp_path / "out.safetensors")
    assert "halfway" not in METHODS


def test_a_file_that_is_loaded_again_replaces_its_methods(own, models):
    load_methods(own(LINEAR))
    load_methods(own(LINEAR.replace("0.5", "0.25").replace("halfway", "partway")))
    assert "partway" in METHODS
    assert "halfway" not in METHODS
    assert METHODS["partway"].parameters[0].default == 0.25


PROBLEMS = {
    "no methods": ("x = 1", "own.py: it registers no merge method\n  Decorate a function"),
    "syntax": ("\n\ndef f(:\n", "own.py, line 3: "),
    "an import": ("import no_such_module", "own.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    "an exception": ("def f():\n    return 1 / 0\n\nf()", "own.py, line 2: ZeroDivisionError: division by zero"),
    "a parameter": (LINEAR.replace("share: float", "share: dict"), "own.py, line 4: TypeError: merge method 'halfway'"),
    "a name": (
        LINEAR.replace("halfway", "linear"),
        "own.py, line 4: ValueError: two merge methods are called 'linear'",
    ),
}


@pytest.mark.parametrize(("text", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_wrong_with_a_file_is_said_with_its_line(own, text, problem):
    before = dict(METHODS)
    with pytest.raises(MethodError, match=re.escape(problem).replace(r"line\ 4", r"line\ \d")):
        load_methods(own(text))
    assert before == METHODS


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(MethodError, match=r"none\.py: there is no such file of merge methods"):
        load_methods(tmp_path / "none.py")


def test_a_file_that_fails_leaves_what_it_brought_before(own):
    load_methods(own(LINEAR))
    with pytest.raises(MethodError):
        load_methods(own("1 / 0"))
    assert "halfway" in METHODS


WRONG = {
    "coefficients": (LINEAR.replace("[1.0 - share, share]", "[share]"), "halfway", "gave 1 coefficients for 2 inputs"),
    "shape": (
        BLOCKS.replace("return model", "return model.sum() + 0 * model[:1]"),
        "sprinkle",
        "made a block of shape",
    ),
}


@pytest.mark.parametrize(("text", "name", "problem"), WRONG.values(), ids=WRONG)
def test_what_a_method_gives_has_to_fit(own, models, tmp_path, text, name, problem):
    if name == "sprinkle":
        text = text.replace(".where(place.uniform(0, model) < density, base)", "")
    load_methods(own(text))
    with pytest.raises(MethodError, match=f"method '{name}' {problem}"):
        streammerge.merge(
            getattr(streammerge, name)(models["a"], base=models["base"]), output=tmp_path / "out.safetensors"
        )


DOCUMENTED = [block.text for page in PAGES for block in blocks(page) if "@method(" in block.text]


def test_there_are_documented_examples():
    assert len(DOCUMENTED) >= 3


@pytest.mark.parametrize("text", DOCUMENTED)
def test_a_documented_example_runs(own, models, tmp_path, text):
    (name,) = load_methods(own(text))
    given = [models["a"], models["b"]][: METHODS[name].models[1]]
    merge = getattr(streammerge, name)(*given, base=models["base"])
    plain = merge_to(tmp_path / "plain.safetensors", merge, threads=1)
    assert_same_bytes(merge_to(tmp_path / "out.safetensors", merge, threads=3), plain)
