"""Words: how a path has a weight and a name, and what recipe and options they come to."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from streammerge.cli.arguments import add_merge_arguments
from streammerge.cli.request import read_request
from streammerge.cli.words import _split_name, _split_weight
from streammerge.errors import RecipeError
from streammerge.recipe.options import Options
from streammerge.recipe.recipe import Input
from streammerge.tensors import DTYPES


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_merge_arguments(parser)
    return parser.parse_intermixed_args(list(words))


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
    read_request(parsed(word, "b"))
    read_request(parsed("a", "b", "--layout", word))


def test_models_on_the_command_line_become_a_recipe(folder):
    recipe = read_request(
        parsed(
            *("x=a.safetensors:0.25", "b.safetensors", "-p", "weight=2", "-p", "normalize=no", "--dtype", "bf16"),
            *("--layout", "b.safetensors", "--on-missing", "keep", "--on-shape-mismatch", "pad"),
            *("--drop", "d.*", "--keep", "k.*", "--take", "t.*=base.safetensors", "--take", "u=x"),
        )
    ).recipe
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
    assert read_request(arguments).options == Options(
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
    assert read_request(parsed("a")).options == Options()


def test_errors_are_known_to_the_caller_of_the_functions_too(folder):
    with pytest.raises(RecipeError, match="there is nothing to merge"):
        read_request(parsed())
