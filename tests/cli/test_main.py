"""The command line: what may be typed, what is printed, and what is left behind when it goes wrong."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge import __version__
from streammerge.cli import screen
from streammerge.cli.main import COMMANDS, main
from streammerge.cli.words import _split_name, _split_weight, add_merge_arguments, options_from, recipe_from
from streammerge.errors import RecipeError
from streammerge.formats.safetensors import build_header
from streammerge.methods import METHODS
from streammerge.recipe.files import packaged_recipes
from streammerge.recipe.options import Options
from streammerge.recipe.parse import Input
from streammerge.tensors import DTYPES
from streammerge.tools.demo.layouts import checkpoint

VALUES = {"a": 1.0, "b": 3.0, "base": 10.0, "depth": 11.0, "waifu": 20.0, "c": 3.5}
UNET = "model.diffusion_model.x"
VAE = "first_stage_model.x"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with models of constant values: UNET and VAE of all, `steps` of all, and `depth`'s own."""
    monkeypatch.chdir(tmp_path)
    for name, value in VALUES.items():
        tensors = {UNET: torch.full((4,), value), VAE: torch.full((2,), value), "steps": torch.tensor(int(value))}
        if name == "depth":
            tensors["depth_model.x"] = torch.full((3,), value)
        save_file(tensors, f"{name}.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run the program in this process: its exit code, stdout and stderr."""

    def run(*words):
        code: object
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


def value(path="out.safetensors", name=UNET) -> float:
    """The value that all elements of a tensor of the output have."""
    found = set(load_file(path)[name].flatten().tolist())
    assert len(found) == 1
    return round(float(found.pop()), 5)


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_merge_arguments(parser)
    return parser.parse_intermixed_args(list(words))


def write_recipe(path: str = "recipe.yaml", **keys) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"merge_method": "linear", "models": ["a.safetensors", "b.safetensors"], **keys}))
    return path


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


@pytest.mark.parametrize(
    ("word", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", None),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:1", "a.safetensors", 1.0),
        ("a.safetensors:-.5", "a.safetensors", -0.5),
        ("a.safetensors:1e-3", "a.safetensors", 0.001),
        ("C:\\models\\a.safetensors", "C:\\models\\a.safetensors", None),
        ("C:\\models\\a.safetensors:0.5", "C:\\models\\a.safetensors", 0.5),
        ("C:/models/a.safetensors:2", "C:/models/a.safetensors", 2.0),
        ("\\\\host\\share\\a.ckpt:1", "\\\\host\\share\\a.ckpt", 1.0),
        ("C:", "C:", None),
        ("a:b:0.5", "a:b", 0.5),
        ("a:0.5:0.25", "a:0.5", 0.25),
        ("a:", "a:", None),
        (":0.5", ":0.5", None),
        ("a:half", "a:half", None),
        ("a:nan", "a:nan", None),
        ("a:1_000", "a:1_000", None),
        ("a:0x1", "a:0x1", None),
    ],
)
def test_a_path_may_have_a_weight(word, path, weight):
    assert _split_weight(word) == (path, weight)


@pytest.mark.parametrize(
    ("word", "name", "path"),
    [
        ("depth=x.ckpt", "depth", "x.ckpt"),
        ("depth=C:\\x.ckpt:0.5", "depth", "C:\\x.ckpt:0.5"),
        ("_a1=b=c", "_a1", "b=c"),
        ("x.ckpt", "", "x.ckpt"),
        ("1=x", "", "1=x"),
        ("a.b=x", "", "a.b=x"),
        ("C:\\a=b", "", "C:\\a=b"),
        ("./a=b.ckpt", "", "./a=b.ckpt"),
        ("=x", "", "=x"),
        ("a=", "", "a="),
    ],
)
def test_a_path_may_have_a_name(word, name, path):
    assert _split_name(word) == (name, path)


@pytest.mark.parametrize("word", ["a.ckpt:0.5", "x=a.ckpt"])
def test_a_file_that_is_called_so_is_that_file(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    Path(word).touch()
    assert _split_name(word) == ("", word)
    assert _split_weight(word) == (word, None)


@pytest.mark.parametrize("word", ["x" * 5000 + ":0.5", "x=" + "y" * 5000])
def test_words_that_no_file_can_be_called_are_taken_apart_all_the_same(word):
    recipe_from(parsed(word, "b"))
    recipe_from(parsed("a", "b", "--layout", word))


def test_models_on_the_command_line_become_a_recipe(folder):
    recipe = recipe_from(
        parsed(
            *("x=a.safetensors:0.25", "b.safetensors", "-p", "weight=2", "-p", "normalize=no", "--dtype", "bf16"),
            *("--layout", "b.safetensors", "--on-missing", "keep", "--on-shape-mismatch", "pad"),
            *("--drop", "d.*", "--keep", "k.*", "--take", "t.*=base.safetensors", "--take", "u=x"),
        )
    )
    assert recipe.inputs == (
        Input("x", Path("a.safetensors"), {"weight": 0.25}),
        Input("b", Path("b.safetensors")),
    )
    assert recipe.parameters == {"weight": 2, "normalize": False}
    assert recipe.dtype == DTYPES["BF16"]
    assert (recipe.layout, recipe.on_missing, recipe.on_shape_mismatch) == ("b", "keep", "pad")
    assert [(rule.match, rule.action, rule.model) for rule in recipe.rules] == [
        (("t.*",), "take", "base"),
        (("u",), "take", "x"),
        (("k.*",), "keep", ""),
        (("d.*",), "drop", ""),
    ]


def test_options_become_options():
    arguments = parsed(
        *("a", "--device", "cuda:1", "--compute-dtype", "fp64", "--max-ram", "512MB", "--max-vram", "2GiB"),
        *("--threads", "3", "--io", "pread", "--shard-size", "1.5G", "--force", "--no-sync"),
        *("--no-metadata", "--verify"),
    )
    assert options_from(arguments) == Options(
        device="cuda:1",
        compute_dtype=DTYPES["F64"],
        max_ram=512_000_000,
        max_vram=2 * 1024**3,
        threads=3,
        io="pread",
        shard_size=1_500_000_000,
        force=True,
        sync=False,
        metadata=False,
        verify=True,
    )
    assert options_from(parsed("a")) == Options()


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
    (["slices.yaml"], "error: slices.yaml: 'slices' asks for layers of several models stacked into one"),
    ([], "error: there is nothing to merge"),
    (["a.safetensors", "-p", "weight"], "error: -p weight: expected KEY=VALUE"),
    (["a.safetensors", "-p", "weight=[1"], "error: -p weight=[1: is not valid YAML"),
    (["a.safetensors", "-p", "weight=x"], "error: recipe: parameter 'weight': expected a finite number, found 'x'"),
    (["a.safetensors", "--take", "x"], "error: --take x: expected GLOB=MODEL"),
    (["a.safetensors", "--take", "=a.safetensors"], "error: --take =a.safetensors: expected GLOB=MODEL"),
    (["a.safetensors", "--dtype", "fp17"], "error: recipe: unknown dtype 'fp17'\n  Did you mean 'fp16'?"),
    (["a.safetensors", "-m", "slerp", "-p", "t=0.5"], "error: method 'slerp' takes 2 models, found 1"),
    (["a.safetensors", "b.safetensors", "-m", "slerp"], "error: method 'slerp' needs the parameter 't'"),
    (["a.safetensors", "b.safetensors", "-m", "ties"], "error: method 'ties' needs a base model"),
    (["a.safetensors:1", "b.safetensors:-1"], "error: the weights [1.0, -1.0] sum to zero and can't be normalised"),
    (["a.safetensors", "--drop", "nothing.*"], "error: 1 rule matches no tensor of a that"),
    (["a.safetensors", "missing.safetensors"], "error: missing.safetensors: can't be read: No such file"),
    (
        ["depth.safetensors", "a.safetensors"],
        "error: 1 tensor is not in every model\n  depth_model.x   in depth, not in a\n",
    ),
]
REFUSED_BY_A_MERGE = [
    (["a.safetensors", "--device", "cuda:7"], "error: no device 'cuda:7' on this machine\n  there is: cpu"),
    (["a.safetensors", "--device", "tpu"], "error: no device 'tpu' on this machine\n  there is: cpu"),
    (["a.safetensors:0.5", "b.safetensors", "--max-ram", "100MB"], "error: --max-ram 100 MB is too small: Python"),
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
    assert run("--version").out == f"streammerge {__version__}\n"


# ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────────────

REPORT_KEYS = [
    *("output", "method", "tensors", "left_out", "nonfinite", "nonfinite_tensors", "findings"),
    *("bytes_read", "bytes_written", "resumed_bytes", "seconds"),
    *("peak_rss_bytes", "baseline_rss_bytes", "peak_vram_bytes", "device", "dtype", "threads", "io"),
    *("inputs", "hashes", "version"),
]


def test_the_report(folder, run):
    words = ("a.safetensors", "depth.safetensors", "-o", "out.safetensors", "--drop", "steps", "-q")
    assert run(*words, "--on-missing", "keep", "--report", "report.json", "--threads", "1", "--io", "pread").code == 0
    report = json.loads(Path("report.json").read_text())
    assert list(report) == REPORT_KEYS
    assert report["output"] == "out.safetensors"
    assert report["method"] == "linear"
    assert report["tensors"] == {"merged": 2, "copied": 0, "dropped": 1, "total": 2}
    assert report["left_out"] == {"depth": 1}
    assert report["bytes_read"] == 2 * (16 + 8)
    assert report["bytes_written"] == Path("out.safetensors").stat().st_size
    assert list(report["seconds"]) == ["plan", "merge", "sync", "ahead", "total"]
    assert report["seconds"]["total"] == pytest.approx(sum(list(report["seconds"].values())[:3]), abs=1e-4)
    assert report["peak_rss_bytes"] >= report["baseline_rss_bytes"] > 10**7
    assert (report["nonfinite"], report["nonfinite_tensors"], report["peak_vram_bytes"]) == (0, {}, 0)
    assert (report["device"], report["dtype"], report["threads"], report["io"]) == ("cpu", "F32", 1, "pread")
    assert report["inputs"] == [
        {"path": f"{name}.safetensors", "bytes": Path(f"{name}.safetensors").stat().st_size} for name in ("a", "depth")
    ]
    assert report["version"] == __version__


def test_the_report_of_shards_lists_all_files(folder, run):
    words = ("a.safetensors", "b.safetensors", "-o", "out", "--shard-size", "16")
    result = run(*words, "--report", "report.json")
    report = json.loads(Path("report.json").read_text())
    assert [Path(path).name for path in report["output"]] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert "(3 files)" in result.out


def test_values_that_are_no_numbers_are_told(folder, run):
    for name, values in (("a", [1.0, 1e38, 1.0]), ("b", [1.0, 3e38, float("nan")])):
        save_file({"x": torch.tensor(values), "y\x1b[31m\n": torch.tensor([float("inf")])}, f"{name}.safetensors")
    words = ("a.safetensors", "b.safetensors", "-p", "normalize=false", "-o", "out.safetensors")
    result = run(*words, "--report", "r.json")
    assert result.code == 0
    name, reason = "y\\x1b[31m\\n", "it holds 3.40282e+38 at the most, the largest value is 4e+38"
    assert result.err.splitlines() == [
        f"warning: 3 values are infinite or not numbers: x (2), {name} (1)",
        f"warning: a.safetensors holds 1 value that is infinite or not numbers: {name} (1)",
        f"warning: b.safetensors holds 2 values that are infinite or not numbers: x (1), {name} (1)",
        f"warning: 1 value is overflow of float32 ({reason}); store them as a wider dtype: x (1)",
    ]
    report = json.loads(Path("r.json").read_text())
    assert report["nonfinite"] == 3
    assert report["findings"]["x"] == {
        "nonfinite": 2,
        "overflowed": 1,
        "saturated": 0,
        "vanished": 0,
        "elements": 0,
        "largest": pytest.approx(4e38),
        "dtype": "float32",
        "limit": pytest.approx(3.4028235e38),
        "inputs": {"b.safetensors": 1},
    }


def test_what_is_left_out_is_told_even_if_quiet(folder, run):
    result = run("a.safetensors", "depth.safetensors", "-o", "out.safetensors", "--on-missing", "keep", "-q")
    assert result.out == ""
    assert result.err == "warning: depth: 1 tensor that the layout does not have was left out: depth_model.x\n"


def test_quiet_is_silent(folder, run):
    result = run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_verbose_shows_every_tensor_first(folder, run):
    result = run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "-v")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    merged = f"merged F32 [4] {UNET} linear weight 1/1, normalize true"
    assert merged in lines
    assert "copied I64 [] steps from a: I64 is never averaged" in lines
    assert lines.index(merged) < next(n for n, line in enumerate(lines) if "merging" in line)


def test_progress_is_printed_now_and_then_where_there_is_no_terminal(folder, run, monkeypatch):
    from streammerge.storage.writer import OutputWriter

    whole = OutputWriter.write

    def slow(writer, job, position, data):
        time.sleep(0.2)
        whole(writer, job, position, data)

    monkeypatch.setattr(OutputWriter, "write", slow)
    monkeypatch.setattr(screen, "PLAIN_INTERVAL", 0.0)
    result = run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "--threads", "1")
    assert "merge: " in result.err
    assert all(word in result.err for word in ("%", "/s", "s left", "RAM"))
    assert run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "--force", "-q").err == ""


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("words", [["plan"], ["--dry-run"]])
def test_a_plan_writes_nothing(folder, run, words):
    result = run(*words, "depth.safetensors", "a.safetensors", "--on-missing", "keep", "-o", "new/out.safetensors")
    assert result.code == 0
    lines = result.out.splitlines()
    assert sorted(lines[:3]) == [
        "     1  copied: from depth: I64 is never averaged",
        "     1  copied: from depth: a lacks it",
        "     2  merged: linear",
    ]
    assert lines[3].startswith("note: a lacks 1 tensor (1 depth model) of the layout's")
    assert "output     new/out.safetensors: 4 tensors" in result.out
    assert not Path("new").exists()


def test_a_plan_as_json(folder, run):
    result = run("plan", "a.safetensors", "b.safetensors", "--json", "-o", "out.safetensors")
    plan = json.loads(result.out)
    assert plan["output"] == ["out.safetensors"]
    assert {tensor["name"]: tensor["action"] for tensor in plan["tensors"]} == {
        UNET: "merged",
        VAE: "merged",
        "steps": "copied",
    }
    assert result.err == ""


def test_a_plan_needs_no_output_and_minds_the_one_it_is_given(folder, run):
    assert run("plan", "a.safetensors", "b.safetensors").code == 0
    result = run("plan", "a.safetensors", "b.safetensors", "-o", "b.safetensors")
    assert result.code == 1
    assert "the output is the same file as the input b.safetensors" in result.err
    assert run("plan", "a.safetensors", "b.safetensors", "-q").out == ""


# ── bad inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────


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
    assert "differ in shape between the models" in result.err
    assert "Stable Diffusion 1" in result.err
    assert "Stable Diffusion 2" in result.err
    assert "\n  … and " in result.err
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


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_verify_checks_the_format_and_with_the_recipe_every_byte(folder, run):
    merge = ("a.safetensors:0.3", "b.safetensors:0.7")
    assert run(*merge, "-o", "out.safetensors", "-q").code == 0
    result = run("verify", "out.safetensors")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "out.safetensors: a valid model, safetensors, 3 tensors",
        "hashes: not checked: there is no out.safetensors.sha256",
        "inputs: not checked: their hashes were not recorded (--hash-inputs)",
        "values: 3 windows of 3 of 3 tensors are what the recipe gives (--all computes every byte)",
    ]
    assert run("verify", "out.safetensors", "--all").out.endswith("Every byte is what the recipe gives.\n")
    assert "recipe in its metadata" in run("verify", "a.safetensors").out
    result = run("verify", "out.safetensors", *merge)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("Every byte is what the recipe gives.\n")
    recipe = write_recipe(parameters={"weight": [0.3]})
    assert run("verify", "out.safetensors", recipe).code == 1


def test_verify_finds_a_byte_that_is_wrong(folder, run):
    merge = ("a.safetensors", "b.safetensors")
    assert run(*merge, "-o", "out.safetensors", "-q").code == 0
    content = bytearray(Path("out.safetensors").read_bytes())
    content[-1] ^= 1
    Path("out.safetensors").write_bytes(content)
    for words in ((), ("--all",), merge):
        result = run("verify", "out.safetensors", *words)
        assert result.code == 1
        assert result.err.startswith(f"error: out.safetensors: 1 tensor is not what the recipe gives\n  {UNET}\n")
        assert "Every byte" not in result.out
    Path("a.safetensors").unlink()
    result = run("verify", "out.safetensors")
    assert result.code == 0  # its format is all right, and it says what was not checked
    assert "values: not checked: out.safetensors: the recipe in its metadata needs models that are not" in result.out
    assert run("verify", "out.safetensors", "--all").code == 1


def test_verify_finds_tensors_that_are_others(folder, run):
    assert run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q").code == 0
    result = run("verify", "out.safetensors", "depth.safetensors", "b.safetensors", "--on-missing", "keep")
    assert result.code == 1
    assert "out.safetensors: 1 tensors are missing, superfluous, or of another dtype or shape" in result.err
    assert "  depth_model.x   planned F32 [3]   found –" in result.err
    result = run("verify", "out.safetensors", "a.safetensors", "b.safetensors", "--dtype", "fp16")
    assert result.code == 1
    assert f"{UNET}   planned F16 [4]   found F32 [4]" in result.err


def test_verify_reads_shards(folder, run):
    merge = ("a.safetensors", "b.safetensors", "--shard-size", "16")
    assert run(*merge, "-o", "out", "-q").code == 0
    result = run("verify", "out", "a.safetensors", "b.safetensors")
    assert result.code == 0
    assert "a valid model, sharded safetensors (2 files), 3 tensors" in result.out


def test_a_merge_may_verify_itself(folder, run):
    assert run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "--verify", "-q").code == 0


# ── the other commands ───────────────────────────────────────────────────────────────────────────────────────────────


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


# ── as a program ─────────────────────────────────────────────────────────────────────────────────────────────────────

SLOW = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from streammerge.storage.writer import OutputWriter
whole = OutputWriter.write
def write(writer, job, position, data):
    pathlib.Path("started").touch()
    time.sleep(0.3)
    whole(writer, job, position, data)
OutputWriter.write = write
from streammerge.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def start_slow(*words: str) -> subprocess.Popen[str]:
    """A merge that takes its time, under way when this returns."""
    command = [sys.executable, "-c", SLOW, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path("started").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    Path("started").unlink(missing_ok=True)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_merge_leaves_nothing(folder, number, code, there):
    large = {f"layer.{n}": torch.ones(100) for n in range(60)}
    save_file(large, "large.safetensors")
    save_file(large, "large2.safetensors")
    if there:
        Path("out.safetensors").write_text("precious")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    process = start_slow("large.safetensors", "large2.safetensors", "-o", "out.safetensors", "--force", "-q")
    assert any(path.name.endswith(".partial") for path in folder.iterdir())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err == "interrupted: the unfinished output was removed\n"
    Path("started").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def program(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streammerge", *words], capture_output=True, text=True, check=False, **options
    )


def test_the_module_is_the_program(folder):
    done = program("a.safetensors", "b.safetensors", "-o", "out.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert value() == 2.0
    assert program("a.safetensors", "missing", "-o", "x").returncode == 1
    assert program("a.safetensors", "--nonsense").returncode == 2


def test_a_bug_keeps_its_traceback(folder):
    code = SLOW.replace("time.sleep(0.3)", "1 / 0")
    words = ("a.safetensors", "b.safetensors", "-o", "out.safetensors")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert {path.name for path in folder.iterdir()} == {*(f"{name}.safetensors" for name in VALUES), "started"}


def test_names_that_the_terminal_has_no_letters_for_do_not_stop_it(folder):
    save_file({"模型": torch.ones(1)}, "x.safetensors")
    done = program("inspect", "x.safetensors", "--tensors", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "??" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pipe that breaks")
def test_a_reader_that_stops_reading_is_no_error(folder):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "streammerge", "recipes"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
def test_a_terminal_gets_a_bar_and_a_table(folder):
    import pty

    ours, theirs = pty.openpty()
    words = ("a.safetensors", "b.safetensors", "-o", "out.safetensors")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", SLOW, *words], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    printed = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        printed += piece
    os.close(ours)
    assert process.wait() == 0
    text = printed.decode()
    assert "\x1b[" in text
    assert "2 merged, 1 copied, 0 dropped" in text
    assert "RAM" in text


def test_errors_are_known_to_the_caller_of_the_functions_too(folder):
    with pytest.raises(RecipeError, match="there is nothing to merge"):
        recipe_from(parsed())
