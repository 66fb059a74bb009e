"""Merge methods from a user's own file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import streammerge
from streammerge.cli.main import main
from streammerge.compute import costs
from streammerge.errors import MethodError
from streammerge.methods import METHODS
from streammerge.methods.loading import load_methods
from tests.make.models import assert_same_bytes, load_model, make_tensors, merge_to, near, save_models
from tests.promises.pages import PAGES, blocks

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
    monkeypatch.setattr(costs, "WINDOW", 1)
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


UNFIT = '''
import sys
import torch
from streammerge.methods import BlockMethod, Needs, Statistics, WholeMethod, method
def interrupt():
    raise KeyboardInterrupt
def inner(base, model):
    return {inner}
def first(target, parameters):
    return {first}
@method({kind}, base="required", models=(1, 1))
def unfit(base, model):
    """θ"""
    return {then}
'''

GIVEN = {
    "nothing": ("None", "gave nothing (None) instead of a tensor"),
    "a list": ("[base, model]", "gave a list instead of a tensor"),
    "a number": ("1.0", "gave a float instead of a tensor"),
    "another shape": ("base.new_zeros(3)", "made a block of shape [3] of blocks of"),
    "no dimension": ("base.sum()", "made a block of shape [] of blocks of"),
    "integers": ("base.int()", "gave a tensor of torch.int32 instead of torch.float32"),
    "truths": ("base > 0", "gave a tensor of torch.bool instead of torch.float32"),
    "complex numbers": ("base + 0j", "gave a tensor of torch.complex64 instead of torch.float32"),
    "no device": ("base.to('meta')", "gave a tensor on meta instead of cpu"),
    "a sparse tensor": ("base.to_sparse()", "gave a sparse tensor instead of a plain one"),
    "an array": ("base.numpy()", "gave a ndarray instead of a tensor"),
}
RAISED = {
    "a way out": ("sys.exit(0)", "line 8, in inner: SystemExit: 0"),
    "a bug": ("1 / 0", "line 8, in inner: ZeroDivisionError: division by zero"),
    "a bug of torch": ("torch.ones(2) @ torch.ones(3)", "line 8, in inner: RuntimeError: "),
    "an interrupt": ("interrupt()", "line 6, in interrupt: KeyboardInterrupt"),
    "an end": ("next(iter(()))", "line 8, in inner: StopIteration"),
}
MOST_KINDS = ("BlockMethod", "BlockMethod, needs=Needs(rows='rows')", "WholeMethod")
STATISTICS = "BlockMethod, statistics=Statistics(first)"


def unfit(own, models, tmp_path, kind: str, body: str) -> list[str]:
    """The words of a merge by a method that does this when it is called, or when its statistics are taken."""
    first, then = ("inner(None, None)", "base") if kind == STATISTICS else ("None", "inner(base, model)")
    path = own(UNFIT.format(kind=kind, inner=body, first=first, then=then))
    words = [str(models["a"]), "--base", str(models["base"]), "-m", "unfit", "--methods", str(path), "-q"]
    return [*words, "-o", str(tmp_path / "out.safetensors")]


@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize(("body", "problem"), GIVEN.values(), ids=GIVEN)
def test_what_is_no_tensor_as_its_inputs_are_is_told(own, models, tmp_path, capsys, kind, body, problem):
    assert main(unfit(own, models, tmp_path, kind, body)) == 1
    assert f"method 'unfit' {problem}" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", [*MOST_KINDS, STATISTICS])
@pytest.mark.parametrize(("body", "problem"), RAISED.values(), ids=RAISED)
def test_whatever_a_method_raises_is_told_with_its_line(own, models, tmp_path, capsys, kind, body, problem):
    assert main(unfit(own, models, tmp_path, kind, body)) == 1
    assert f"own.py, {problem}" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("body", ["base.double()", "base.half().float()", "base.clone().requires_grad_()", "base * 1"])
@pytest.mark.parametrize("kind", MOST_KINDS)
def test_any_floating_point_tensor_will_do(own, models, tmp_path, kind, body):
    assert main(unfit(own, models, tmp_path, kind, body)) == 0
    base = load_model(models["base"])
    expected = {name: tensor.half().float() for name, tensor in base.items()} if "half" in body else base
    assert_same_bytes(load_model(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("kind", MOST_KINDS)
def test_a_method_may_write_to_what_it_is_given(own, models, tmp_path, kind, io):
    """Inputs that are mapped can't be written to: the process would be killed."""
    words = unfit(own, models, tmp_path, kind, "base.add_(model)")
    before = models["base"].read_bytes()
    assert main([*words, "--io", io, "--verify"]) == 0
    assert models["base"].read_bytes() == before
    base, a = load_model(models["base"]), load_model(models["a"])
    assert_same_bytes(load_model(tmp_path / "out.safetensors"), {name: base[name] + a[name] for name in base})


COEFFICIENTS = {
    "nothing": ("None", "gave nothing (None) instead of one number for each input"),
    "a number": ("0.5", "gave a float instead of one number for each input"),
    "a word": ("'12'", "gave a str instead of one number for each input"),
    "words": ("['a', 'b']", "gave a list instead of one number for each input"),
    "tensors": ("[torch.ones(2), 1.0]", "gave a list instead of one number for each input"),
    "too much": ("[10**400, 1]", "gave a list instead of one number for each input"),
    "complex numbers": ("[1j, 1.0]", "gave a list instead of one number for each input"),
    "no number": ("[float('nan'), 1.0]", "comes to coefficients that are no finite numbers: [nan, 1.0]"),
    "too few": ("[1.0]", "gave 1 coefficients for 2 inputs"),
}


@pytest.mark.parametrize("kind", ["LinearMethod", "GramMethod"])
@pytest.mark.parametrize("case", [*COEFFICIENTS, *RAISED])
def test_coefficients_are_numbers_or_it_is_told(own, models, tmp_path, capsys, kind, case):
    body, problem = (COEFFICIENTS | RAISED)[case]
    if (kind, case) == ("LinearMethod", "an interrupt"):
        pytest.skip("in the main thread it may be the user's")
    text = UNFIT.format(kind=kind, inner=body, first="None", then="inner(0, 0)").replace("BlockMethod", "GramMethod")
    text = text.replace("WholeMethod", "LinearMethod").replace(
        "unfit(base, model)", "unfit(gram)" if kind == "GramMethod" else "unfit()"
    )
    words = [str(models["a"]), "--base", str(models["base"]), "-m", "unfit", "--methods", str(own(text)), "-q"]
    assert main([*words, "-o", str(tmp_path / "out.safetensors")]) == 1
    err = capsys.readouterr().err
    assert (f"method 'unfit' {problem}" if case in COEFFICIENTS else f"own.py, {problem}") in err
    assert not (tmp_path / "out.safetensors").exists()


PROBLEMS = {
    "no methods": ("x = 1", "own.py: it registers no merge method\n  Decorate a function"),
    "no text": ("\0", "own.py: source code string cannot contain null bytes"),
    "syntax": ("\n\ndef f(:\n", "own.py, line 3: "),
    "an import": ("import no_such_module", "own.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    "an exception": ("def f():\n    return 1 / 0\n\nf()", "own.py, line 2, in f: ZeroDivisionError: division by zero"),
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


QUOTIENT = LINEAR.replace("import LinearMethod", "import LinearMethod, Quotient")

WRONG = {
    "coefficients": (LINEAR.replace("[1.0 - share, share]", "[share]"), "halfway", "gave 1 coefficients for 2 inputs"),
    **{
        f"quotient {made}": (QUOTIENT.replace("[1.0 - share, share]", f"Quotient({made})"), "halfway", problem)
        for made, problem in (
            ("[1.0, -1.0], 0", "divides by zero"),
            ("[1.0, 1.0], float('nan')", "comes to coefficients that are no finite numbers"),
            ("[1.0, 1.0], None", "gave a tuple instead of one number"),
            ("None", r"gave nothing \(None\) instead of one number"),
            ("[1.0]", "gave 1 coefficients for 2 inputs"),
        )
    },
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
    base = {} if METHODS[name].base == "none" else {"base": models["base"]}
    merge = getattr(streammerge, name)(*given, **base)
    plain = merge_to(tmp_path / "plain.safetensors", merge, threads=1)
    assert_same_bytes(merge_to(tmp_path / "out.safetensors", merge, threads=3), plain)
