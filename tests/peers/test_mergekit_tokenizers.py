"""The same tokens and rows as mergekit makes of models whose vocabularies overlap in part."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from tests.make.folders import llama_config
from tests.make.vocabularies import EMBEDDING, HEAD, save_with_tokens, tokenizer_files, written_tokens
from tests.peers.environments import SCRIPTS, interpreter

pytestmark = pytest.mark.peers

pytest.importorskip("tokenizers")

FIRST = ["<unk>", "<s>", "</s>"]
WORDS = [f"w{number}" for number in range(30)]

MODELS: dict[str, tuple[list[str], dict[str, int], int]] = {
    "a": ([*FIRST, *WORDS[:20]], {}, 23),
    "b": ([*FIRST, *WORDS[8:24][::-1]], {"<|im_start|>": 19, "<|im_end|>": 20}, 21),
    "c": ([*FIRST, *WORDS[4:10], *WORDS[22:]], {"<|im_end|>": 17}, 18),
    "d": ([*FIRST, *WORDS[:20]], {"<unused>": 23, "<unused 2>": 24}, 23),
}
"""Tokens, those that are added, and rows: c shares some with either of the others, d has tokens without rows."""


def linear(*names: str, **more: Any) -> dict[str, Any]:
    weights = zip(names, (0.5, 0.3, 0.2), strict=False)
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in weights]
    return {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, **more}


def token(model: str, **meant: Any) -> dict[str, Any]:
    return {"source": {"kind": "model_token", "model": model, **meant}, "force": True}


RECIPES: dict[str, dict[str, Any]] = {
    "base": linear("a", "b", base_model="a", tokenizer_source="base"),
    "base, of two": linear("b", "c", base_model="b", tokenizer_source="base"),
    "union": linear("a", "b", base_model="a", tokenizer_source="union"),
    "union of three": linear("a", "b", "c", base_model="b", tokenizer_source="union"),
    "a model's": linear("a", "b", base_model="a", tokenizer_source="b"),
    "a model's of three": linear("a", "b", "c", base_model="a", tokenizer_source="c"),
    "a mean": linear("a", "b", "c", tokenizer_source="c"),
    "without rows": linear("d", "b", base_model="d", tokenizer_source="union"),
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": ["a", "b"],
        "parameters": {"t": 0.3},
        "tokenizer_source": "union",
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "a",
        "models": ["b", "c"],
        "parameters": {"weight": 0.7, "density": 0.5, "normalize": True},
        "tokenizer_source": "union",
    },
    "task arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "a",
        "models": ["b", "c"],
        "parameters": {"weight": 0.4},
        "tokenizer_source": "base",
    },
    "chosen": linear(
        "a",
        "b",
        base_model="a",
        tokenizer={
            "source": "union",
            "tokens": {
                "w9": {"source": "b", "force": True},
                "w1": {"source": "a", "force": True},
                "w2": token("b", token="w12"),
                "w3": token("b", token_id=20),
                "w4": {"source": {"kind": "zero"}, "force": True},
                "<new>": {"source": {"kind": "model_token", "model": "b", "token_id": 2}},
            },
        },
    ),
    "padded": linear("a", "b", base_model="a", tokenizer={"source": "union", "pad_to_multiple_of": 16}),
}


def as_mergekit(value: Any, folder: Path) -> Any:
    """The recipe with models as paths, in the form that mergekit takes."""
    if isinstance(value, dict):
        return {key: as_mergekit(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [as_mergekit(each if isinstance(each, dict) else {"model": each}, folder) for each in value]
    return str(folder / value) if isinstance(value, str) and value in MODELS else value


@pytest.fixture
def folder(tmp_path):
    for seed, (name, (tokens, added, rows)) in enumerate(MODELS.items()):
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
        files = {**tokenizer_files(tokens, added), "tokenizer_config.json": json.dumps(config)}
        save_with_tokens(tmp_path / name, seed, tokens, added, rows=rows, files=files)
        assert llama_config(vocab=rows)["vocab_size"] == rows
    return tmp_path


def test_mergekit_makes_the_same_of_vocabularies(folder, pytestconfig):
    python = interpreter("mergekit", pytestconfig)
    paths = [folder / f"{number}.yaml" for number in range(len(RECIPES))]
    for path, recipe in zip(paths, RECIPES.values(), strict=True):
        path.write_text(json.dumps({**as_mergekit(recipe, folder), "dtype": "float32"}), encoding="utf-8")
    words = [str(python), str(SCRIPTS / "mergekit_recipes.py"), *map(str, paths)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for path, name in zip(paths, RECIPES, strict=True):
        streammerge.merge(path, output=path.with_suffix(".ours"))
        compare(path.with_suffix(".mergekit"), path.with_suffix(".ours"), name)


def compare(theirs: Path, ours: Path, name: str) -> None:
    """The same tokens, and for each the same row; all else the same, too."""
    tokens, own = written_tokens(theirs), written_tokens(ours)
    assert own.keys() == tokens.keys(), name
    expected, found = (load_file(folder / "model.safetensors") for folder in (theirs, ours))
    assert found.keys() == expected.keys(), name
    order = sorted(tokens)
    for each in expected:
        rows = each in (EMBEDDING, HEAD)
        left = found[each][[own[token] for token in order]] if rows else found[each]
        right = expected[each][[tokens[token] for token in order]] if rows else expected[each]
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=f"{name}: {each}")
        assert found[each].shape == expected[each].shape, name
    if name == "padded":
        torch.testing.assert_close(found[HEAD][len(own) :], expected[HEAD][len(own) :], rtol=1e-4, atol=1e-6)
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (theirs, ours)]
    assert configs[0]["vocab_size"] == configs[1]["vocab_size"] == found[HEAD].shape[0]
