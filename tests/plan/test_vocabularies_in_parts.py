"""Rows by token in a merge that is stopped on the way, and in how little memory vocabularies are matched."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.compute.machine import MIB
from streammerge.errors import OutputError, PlanError
from streammerge.formats.safetensors import build_header
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.folders import llama_config, save_images
from tests.make.vocabularies import save_with_tokens, tokenizer_files, tokenizer_values, written_tokens
from tests.references.vocabularies import rows_by_token
from tests.storage.outputs import digests
from tests.storage.stopped_merges import run, stop

WORDS = [f"w{number}" for number in range(3000)]


def folders(place: Path, seed: int) -> dict[str, Any]:
    """Two models of the same words in other orders, some of each alone; the recipe of their merge."""
    words = list(WORDS[500:])
    random.Random(seed).shuffle(words)
    save_with_tokens(place / "A", 1, WORDS[:2500], layers=8)
    save_with_tokens(place / "B", 2, words, layers=8)
    ties = {"merge_method": "ties", "base_model": str(place / "A"), "models": [str(place / "B")]}
    tokenizer = {"source": str(place / "B"), "pad_to_multiple_of": 64}
    return {**ties, "parameters": {"density": 0.5}, "tokenizer": tokenizer}


def test_a_stopped_one_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    raw = folders(tmp_path / "models", 1)
    run(raw, tmp_path / "right" / "out")
    output = tmp_path / "new" / "out"
    first = stop(monkeypatch, raw, output, after=9)
    assert not (output / "model.safetensors").exists()
    report = run(raw, output, resume=True)
    assert len(first.windows) == 9
    assert report.resumed_bytes > 0
    assert digests(output) == digests(tmp_path / "right" / "out")


def test_other_tokens_are_another_merge(tmp_path, monkeypatch):
    raw = folders(tmp_path / "models", 1)
    output = tmp_path / "new" / "out"
    stop(monkeypatch, raw, output, after=9)
    words = list(WORDS[500:])
    random.Random(2).shuffle(words)
    for name, text in tokenizer_files(words).items():
        (tmp_path / "models" / "B" / name).write_text(text)
    with pytest.raises(OutputError):
        run(raw, output, resume=True)


# ── modules ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def images(place: Path, seed: int, words: list[str]) -> dict[str, torch.Tensor]:
    """Save a model of images and text, of these tokens; its tensors."""
    save_images(place, seed, files=tokenizer_files(words), vocab=len(words))
    return load_file(place / "model.safetensors")


@pytest.mark.parametrize("source", ["base", "B"])
@pytest.mark.parametrize("has_heads_apart", [False, True])
def test_modules_are_merged_by_token(tmp_path, monkeypatch, source, has_heads_apart):
    monkeypatch.chdir(tmp_path)
    words = {"A": WORDS[:20], "B": WORDS[25:4:-1], "C": WORDS[:7]}
    own = {name: images(Path(name), seed, each) for seed, (name, each) in enumerate(words.items())}
    text = {"models": ["A", "B"], "base_model": "A", "parameters": {"weight": 0.25}}
    whole = {"merge_method": "linear", "tokenizer_source": source, "dtype": "float32", "on_missing": "keep"}
    modules = {"vision_tower": {"models": ["C", "A"], "parameters": {"weight": 0.5}}}
    heads = {"models": ["B", "A"], "parameters": {"weight": 0.25}}
    modules |= {"default": text, "lm_head": heads} if has_heads_apart else {"text_decoder": text}
    streammerge.merge({**whole, "modules": modules}, output="OUT")
    found = load_file("OUT/model.safetensors")
    ids = [{word: number for number, word in enumerate(words[name])} for name in "AB"]
    out = ids[source == "B"]
    assert written_tokens(Path("OUT")) == out
    assert json.loads(Path("OUT/config.json").read_text())["text_config"]["vocab_size"] == len(out)
    for name in (name for name in found if "embed_tokens" in name or "lm_head" in name):
        a, b = rows_by_token([own["A"][name], own["B"][name]], ids, out)
        torch.testing.assert_close(found[name].double(), (a.double() + b.double()) / 2, rtol=1e-6, atol=1e-6)
    vision = next(name for name in found if "vision" in name)
    torch.testing.assert_close(found[vision], (own["C"][vision] + own["A"][vision]) / 2)


def test_a_module_without_tokens_needs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images(Path("A"), 1, WORDS[:20])
    images(Path("B"), 2, WORDS[25:4:-1])
    weight = {"parameters": {"weight": 1}}
    modules = {"vision_tower": {"models": ["A", "B"], **weight}, "default": {"models": ["A"], **weight}}
    tokenizer = {"source": "union", "pad_to_multiple_of": 64}
    streammerge.merge({"merge_method": "linear", "modules": modules, "tokenizer": tokenizer}, output="OUT")
    assert load_file("OUT/model.safetensors")["model.language_model.embed_tokens.weight"].shape[0] == 64


def test_the_tokenizer_is_that_of_the_rows_and_not_the_layouts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images(Path("A"), 1, WORDS[:20])
    save_with_tokens(Path("T"), 2, WORDS[25:4:-1])
    text = {"models": [{"model": "T", "prefix": {"model.": "model.language_model."}, "parameters": {"weight": 1}}]}
    modules = {"vision_tower": {"models": ["A"]}, "multi_modal_projector": {"models": ["A"]}, "text_decoder": text}
    weight = {"merge_method": "linear", "parameters": {"weight": 1}}
    streammerge.merge({**weight, "modules": modules}, output="OUT")
    assert written_tokens(Path("OUT")) == written_tokens(Path("T"))
    assert json.loads(Path("OUT/config.json").read_text())["text_config"]["vocab_size"] == 21


def test_modules_whose_numbers_mean_other_tokens_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images(Path("A"), 1, WORDS[:20])
    images(Path("B"), 2, WORDS[19::-1])
    modules = {"lm_head": {"models": ["A"]}, "default": {"models": ["B"]}}
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "modules": modules}
    with pytest.raises(PlanError, match="vocabularies differ"):
        streammerge.merge(recipe, output="OUT")
    streammerge.merge({**recipe, "tokenizer_source": "numbers"}, output="OUT")


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PEAK = """
import resource, sys
unit = 1 if sys.platform == "darwin" else 1024
{body}
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def peak_of(body: str, folder: Path) -> int:
    """The most that a process takes that does this."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(body=body)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


def large_vocabulary(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """As many tokens as the largest models have, and their merges."""
    tokens, merges = {chr(code): None for code in range(33, 127)}, list[tuple[str, str]]()
    short, draw = list(tokens), random.Random(1)
    while len(tokens) < count:
        pair = draw.choice(short), draw.choice(short)
        made = "".join(pair)
        if made not in tokens:
            tokens[made] = None
            merges.append(pair)
            if len(made) < 8:
                short.append(made)
    return list(tokens), merges


def save_large(path: Path, tokens: list[str], merges: list[tuple[str, str]], width: int) -> None:
    """A model of an embedding alone, of zeros that take no room on the disk."""
    path.mkdir()
    known = set(tokens)
    kept = [pair for pair in merges if {*pair, "".join(pair)} <= known]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_values(tokens, merges=kept), indent=2))
    config = {**llama_config(vocab=len(tokens)), "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    infos = {"model.embed_tokens.weight": TensorInfo(DTYPES["BF16"], (len(tokens), width))}
    header = build_header(infos, {"format": "pt"})
    with (path / "model.safetensors").open("wb") as file:
        file.write(header.encoded)
        file.truncate(len(header.encoded) + sum(info.nbytes for info in infos.values()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="it has no resource")
@pytest.mark.parametrize(("source", "width"), [("base", 256), ("union", 256), ("union", 4096)])
def test_the_largest_vocabularies_take_no_more_than_promised(tmp_path, source, width):
    if source == "union" and importlib.util.find_spec("tokenizers") is None:
        pytest.skip("tokenizers is not installed")
    tokens, merges = large_vocabulary(count := 256_000)
    save_large(tmp_path / "A", tokens, merges, width)
    others = [*tokens[94 : count - 1000], *(f"zz{number}" for number in range(1000)), *tokens[:94]]
    random.Random(2).shuffle(others)
    save_large(tmp_path / "B", others, merges, width)
    words = ["A", "B", "--tokenizer-source", source, "-o", "OUT", "-q", "--threads", "2"]
    taken = peak_of(f"from streammerge.cli.main import main; assert main({words!r}) == 0", tmp_path)
    assert taken < peak_of("import torch", tmp_path) + 64 * MIB
