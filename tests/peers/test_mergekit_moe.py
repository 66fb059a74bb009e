"""The same mixtures as mergekit-moe builds of the same recipes, with gates of prompts' embeddings."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import streammerge
from streammerge.models.mixtures.layouts import experts_as
from tests.make.folders import llama_config, llama_tensors, save_folder
from tests.peers.environments import SCRIPTS, interpreter

pytest.importorskip("tokenizers")

pytestmark = pytest.mark.peers

EXPERTS = [
    {"source_model": "b", "positive_prompts": ["one two two", "three"], "negative_prompts": ["four"]},
    {"source_model": "c", "positive_prompts": ["four five", "one"], "residual_scale": 0.5},
    {"source_model": "a", "positive_prompts": ["five"]},
]
SHARED = {"source_model": "b", "residual_scale": 0.25}


def recipes() -> dict[str, dict[str, Any]]:
    base = {"base_model": "a", "gate_mode": "cheap_embed", "dtype": "float32", "experts": EXPERTS}
    return {
        "mixtral": base,
        "mixtral-bf16": {**base, "dtype": "bfloat16", "experts_per_token": 1},
        "deepseek": {**base, "shared_experts": [SHARED]},
        "qwen": {**base, "shared_experts": [{**SHARED, "positive_prompts": ["two"]}]},
    }


def tokenizer() -> str:
    words = ["<unk>", "<s>", "</s>", "one", "two", "three", "four", "five"]
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(words[:3])
    return str(made.to_str())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request) -> Path:
    """Models, and what mergekit makes of every recipe."""
    python = interpreter("mergekit", request.config)
    place = Path(tmp_path_factory.mktemp("moe"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files = {"tokenizer.json": tokenizer(), "tokenizer_config.json": json.dumps(said)}
    for seed, name in enumerate("abc"):
        save_folder(place / name, llama_tensors(seed), llama_config(), files)
    paths = []
    for name, recipe in recipes().items():
        paths.append(place / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [str(python), str(SCRIPTS / "mergekit_moe.py"), *(path.name for path in paths)],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.parametrize("name", recipes())
def test_mixtures_are_those_of_mergekit(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    streammerge.merge(f"{name}.yaml", output=f"{name}.ours")
    with streammerge.open_model(f"{name}.ours") as ours, streammerge.open_model(f"{name}.mergekit") as theirs:
        seen = experts_as(theirs, ours.tensors, "theirs") or theirs
        assert set(seen.tensors) == set(ours.tensors)
        for called, info in ours.tensors.items():
            assert seen.tensors[called] == info
            mine, its = (model.read(called, 0, info.elements).float() for model in (ours, seen))
            torch.testing.assert_close(mine, its, rtol=2e-6 if name != "mixtral-bf16" else 2**-7, atol=1e-6)
    own, other = (json.loads((folder / f"{name}.{who}" / "config.json").read_text()) for who in ("ours", "mergekit"))
    for key in ("architectures", "model_type", "num_experts_per_tok", "rms_norm_eps", "max_position_embeddings"):
        assert own[key] == other[key], key
