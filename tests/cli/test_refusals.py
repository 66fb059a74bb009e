"""What can't be done is one message and an exit code that says whose mistake it is, and writes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.formats.safetensors import build_header
from streammerge.tools.demo.layouts import checkpoint
from tests.cli.small_models import UNET, VAE, value, write_recipe

REFUSED = [
    (["--recipe", "sd2-depth"], "error: recipe sd2-depth: it needs 3 models\n  depth=PATH   the depth model, such as"),
    (["--recipe", "sd2-dept"], "error: no recipe 'sd2-dept' comes with streammerge\n  Did you mean 'sd2-depth'?"),
    (["--recipe", "weighted-sum", "a.safetensors"], "error: 'a.safetensors': beside a recipe, models are given as"),
    (["--recipe", "weighted-sum", "c=a.safetensors"], "error: recipe weighted-sum: it needs 2 models"),
    (
        ["--recipe", "add-difference", "a=a.safetensors", "b=b.safetensors", "c=base.safetensors:0.5"],
        "error: 'c' is not merged by this recipe, so it has no weight",
    ),
    (
        ["--recipe", "add-difference", "a=a.safetensors:2", "b=b.safetensors", "c=base.safetensors"],
        "error: recipe add-difference: method 'add_difference' has no parameter 'weight'",
    ),
    (["recipe.yaml", "x=a.safetensors"], "error: recipe.yaml: it has no input 'x'"),
    (["missing.yaml"], "error: missing.yaml: can't be read as a recipe: [Errno 2] No such file"),
    (["list.yaml"], "error: list.yaml: expected a map with merge_method and models"),
    (["twice.yaml"], "error: twice.yaml: line 1: the key 'merge_method' stands twice in one map"),
    (["typo.yaml"], "error: typo.yaml: unknown key 'wieghts'"),
    (["method.yaml"], "error: method.yaml: unknown merge method 'task_arithmatic'\n  Did you mean 'task_arithmetic'?"),
    (["slices.yaml"], "error: slices.yaml: slices and models can't be combined"),
    ([], "error: there is nothing to merge"),
    (["a.safetensors", "-p", "weight"], "error: -p weight: expected KEY=VALUE"),
    (["a.safetensors", "-p", "weight=[1"], "error: -p weight=[1: is not valid YAML"),
    (["a.safetensors", "-p", "weight=x"], "error: recipe: parameter 'weight': expected a finite number, found 'x'"),
    (["a.safetensors", "--take", "x"], "error: --take x: expected GLOB=MODEL"),
    (["a.safetensors", "--take", "=a.safetensors"], "error: --take =a.safetensors: expected GLOB=MODEL"),
    (["a.safetensors", "--dtype", "fp17"], "error: recipe: unknown dtype 'fp17'\n  Did you mean 'fp16'?"),
    (["a.safetensors", "--dtype", "fp16", "--dtype", "bf16"], "error: --dtype is given twice, as fp16 and as bf16\n"),
    (["a.safetensors", "--dtype", "vae=fp16", "--dtype", "vae=fp32"], "error: --dtype vae= is given twice, as fp16 an"),
    (
        ["recipe.yaml", "a=a.safetensors", "a=b.safetensors"],
        "error: a= is given twice, as a.safetensors and as b.safet",
    ),
    (["recipe.yaml", "a=a.safetensors:1", "a=a.safetensors:2"], "error: the weight of a is given twice, as 1.0 and as"),
    (["a.safetensors", "-m", "slerp", "-p", "t=0.5"], "error: method 'slerp' takes 2 models, found 1"),
    (["a.safetensors", "b.safetensors", "-m", "slerp"], "error: method 'slerp' needs the parameter 't'"),
    (["a.safetensors", "b.safetensors", "-m", "ties"], "error: method 'ties' needs a base model"),
    (["a.safetensors:1", "b.safetensors:-1"], "error: the weights [1.0, -1.0] sum to zero and can't be normalised"),
    (["a.safetensors", "--drop", "nothing.*"], "error: 1 rule matches no tensor of a that"),
    (["a.safetensors:0.5", "b.safetensors", "--max-ram", "100MB"], "error: --max-ram 100 MB is too small: Python"),
    (["a.safetensors", "missing.safetensors"], "error: missing.safetensors: can't be read: No such file"),
    (
        ["depth.safetensors", "a.safetensors"],
        "error: 1 tensor is not in every model\n  depth_model.x   in depth, not in a\n",
    ),
]
REFUSED_BY_A_MERGE = [
    (["a.safetensors", "--device", "cuda:7"], "error: no device 'cuda:7' on this machine\n  there is: cpu"),
    (["a.safetensors", "--device", "tpu"], "error: no device 'tpu' on this machine\n  there is: cpu"),
    (["a.safetensors", "--report", "no/where.json"], "error: no/where.json: its folder does not exist"),
    (["a.safetensors", "--report", "."], "error: .: is a folder"),
    (["a.safetensors", "--report", "b.safetensors"], "error: b.safetensors: is named like a model or a recipe"),
    (["a.safetensors", "--report", "recipe.yaml"], "error: recipe.yaml: is named like a model or a recipe"),
    # a plan does not get that far
]


@pytest.mark.parametrize(
    ("words", "problem"), [*REFUSED, *REFUSED_BY_A_MERGE, *((["plan", *words], problem) for words, problem in REFUSED)]
)
def test_what_cannot_be_done_is_one_block_on_stderr_and_exit_code_1(folder, run, words, problem):
    write_recipe()
    Path("list.yaml").write_text("- a\n")
    Path("twice.yaml").write_text("merge_method: linear\nmerge_method: linear\n")
    write_recipe("typo.yaml", wieghts=[1])
    write_recipe("method.yaml", merge_method="task_arithmatic")
    write_recipe("slices.yaml", slices=[])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run(*words, "-o", "out.safetensors")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(problem)
    assert result.err.endswith("Nothing was written.\n")
    assert result.err.count("error:") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a.safetensors", "b.safetensors"], "the output is missing: -o OUT.safetensors"),
        (["a.safetensors", "-o"], "argument -o/--output: expected one argument"),
        (["a.safetensors", "-o", "x", "--frce"], "unrecognized arguments: --frce"),
        (["a.safetensors", "-o", "x", "--forc"], "unrecognized arguments: --forc"),  # no abbreviations
        (["a.safetensors", "-o", "x", "--threads", "0"], "expected a whole number of at least 1, found '0'"),
        (["a.safetensors", "-o", "x", "--threads", "two"], "expected a whole number of at least 1, found 'two'"),
        (["a.safetensors", "-o", "x", "--max-ram", "lots"], "'lots' is no size"),
        (["a.safetensors", "-o", "x", "--shard-size", "0"], "'0' is no size"),
        (["a.safetensors", "-o", "x", "--io", "fast"], "invalid choice: 'fast'"),
        (["a.safetensors", "-o", "x", "--compute-dtype", "int8"], "invalid choice: 'int8'"),
        (["a.safetensors", "-o", "x", "--on-missing", "pad"], "invalid choice: 'pad'"),
        (["a.safetensors", "-o", "x", "--seed", "x"], "invalid int value: 'x'"),
        (
            ["a.safetensors", "-o", "x", "b.safetensors", "-o", "y"],
            "argument -o/--output: given twice, as x and as y: gi",
        ),
        (["-m", "ties", "a.safetensors", "-o", "x", "--method", "slerp"], "argument -m/--method: given twice, as ties"),
        (
            ["convert", "a.safetensors", "-o", "x", "--io", "mmap", "--io", "pread"],
            "argument --io: given twice, as mmap",
        ),
        (["inspect"], "the following arguments are required: model"),
        (["compare", "a"], "the following arguments are required: b"),
        (["verify"], "the following arguments are required: OUT"),
        (["methods", "a", "b"], "unrecognized arguments: b"),
        (["demo", "--dtype", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_what_is_no_command_is_a_usage_error(folder, run, words, problem):
    result = run(*words)
    assert result.code == 2
    assert problem in result.err
    assert result.out == ""
    assert not Path("x").exists()


def test_what_is_said_twice_alike_is_said_once(folder, run):
    twice = ("-o", "x", "-m", "linear", "--dtype", "fp16", "--threads", "2", "-p", "normalize=false")
    assert run("a.safetensors", *twice, "b.safetensors", *twice, "-q").code == 0
    assert Path("x").exists()


def test_a_shape_that_differs(folder, run):
    save_file({UNET: torch.ones(2, 5), VAE: torch.ones(2), "steps": torch.tensor(1)}, "wide.safetensors")
    result = run("wide.safetensors", "a.safetensors", "-o", "out.safetensors")
    assert result.code == 1
    assert result.err == (
        "error: 1 tensor differs in shape between the models\n"
        f"  {UNET}   wide [2, 5]   a [4]\n"
        "  Use --on-shape-mismatch keep (copy wide's), or --keep GLOB, --drop GLOB or a rule for such tensors. Nothing "
        "was written.\n"
    )
    words = ("wide.safetensors", "a.safetensors", "-o", "out.safetensors", "-q", "--on-shape-mismatch", "keep")
    assert run(*words).code == 0
    assert load_file("out.safetensors")[UNET].shape == (2, 5)


def test_models_of_different_architectures(folder, run):
    """Headers of full size over sparse files: nothing of them is read."""
    for name in ("sd1", "sd2-base"):
        header = build_header(checkpoint(name), {})
        with Path(f"{name}.safetensors").open("wb") as file:
            file.write(header.encoded)
            file.truncate(header.file_bytes)
    result = run("sd1.safetensors", "sd2-base.safetensors", "-o", "out.safetensors")
    assert result.code == 1
    assert "are of different architectures" in result.err
    assert "Stable Diffusion 1" in result.err
    assert "Stable Diffusion 2" in result.err
    assert len(result.err.splitlines()) < 10
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "bad.safetensors: not a valid safetensors file: its header describes .* bytes are missing"),
        (b"", "bad.safetensors: is neither safetensors nor a torch zip"),
        (b"<html>not found</html>", "bad.safetensors: is a web page and not a model"),
        (b"PK\x03\x04garbage", "bad.safetensors: not a readable torch zip"),
    ],
)
@pytest.mark.parametrize("command", [[], ["plan"], ["inspect"], ["compare"], ["verify"]])
def test_files_that_are_damaged_or_no_models(folder, run, command, content, problem):
    if content is None:
        content = Path("a.safetensors").read_bytes()[:-1]
    Path("bad.safetensors").write_bytes(content)
    words = {"inspect": [], "verify": []}.get("".join(command), ["a.safetensors"])
    result = run(*command, "bad.safetensors", *words, *([] if command else ["-o", "out.safetensors"]))
    assert result.code == 1
    assert re.match(f"error: {problem}", result.err)
    assert "Traceback" not in result.err


def test_too_little_disk(folder, run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    result = run("a.safetensors", "b.safetensors", "-o", "out.safetensors")
    assert result.code == 1
    assert result.err.startswith("error: out.safetensors: not enough disk: the output takes ")
    assert result.err.endswith("or write to another disk. Nothing was written.\n")
    assert run("plan", "a.safetensors", "b.safetensors").code == 1


@pytest.mark.parametrize("output", ["a.safetensors", "./a.safetensors", "link.safetensors"])
def test_an_output_that_is_an_input(folder, run, output):
    Path("link.safetensors").symlink_to("a.safetensors")
    result = run("a.safetensors", "b.safetensors", "-o", output, "--force")
    assert result.code == 1
    assert "the output is the same file as the input a.safetensors" in result.err
    assert value("a.safetensors") == 1.0


def test_an_output_that_is_there(folder, run):
    Path("out.safetensors").write_text("precious")
    result = run("a.safetensors", "b.safetensors", "-o", "out.safetensors")
    assert result.code == 1
    assert result.err == (
        "error: out.safetensors: the output exists\n"
        "  Use --force to replace it, or choose another name. Nothing was written.\n"
    )
    assert Path("out.safetensors").read_text() == "precious"
    assert run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "--force", "-q").code == 0
    assert value() == 2.0


def test_terminal_codes_in_names_are_not_sent_to_the_terminal(folder, run):
    evil = "x\x1b]0;owned\x07\n\x9b31m\u202eerror: all is lost"
    for name, size in (("evil", 3), ("good", 2)):
        save_file({evil: torch.ones(size), "y": torch.ones(1)}, f"{name}.safetensors", {"\x1b[2J": "\x1b[2J"})
    for words in (
        ["evil.safetensors", "good.safetensors", "-o", "out.safetensors"],
        ["plan", "evil.safetensors", "good.safetensors", "--on-shape-mismatch", "keep", "-v"],
        ["evil.safetensors", "good.safetensors", "-v", "--on-shape-mismatch", "keep", "-o", "out.safetensors"],
        ["inspect", "evil.safetensors", "--tensors"],
        ["compare", "evil.safetensors", "good.safetensors", "-q"],
        ["verify", "out.safetensors", "good.safetensors", "evil.safetensors", "--on-shape-mismatch", "keep"],
    ):
        result = run(*words)
        printed = result.out + result.err
        assert "owned" in printed, words
        assert all(character == "\n" or character.isprintable() for character in printed), words
        assert not any(line.startswith("error: all is lost") for line in printed.splitlines())


def test_a_merge_of_which_nothing_is_left_replaces_no_output(folder, run):
    Path("out.safetensors").write_bytes(Path("a.safetensors").read_bytes())
    result = run("a.safetensors", "b.safetensors", "--drop", "*", "-o", "out.safetensors", "--force")
    assert (result.code, result.out) == (1, "")
    assert "nothing is left to be written: all 3 tensors are left out" in result.err
    assert Path("out.safetensors").read_bytes() == Path("a.safetensors").read_bytes()
