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

from streammerge.compute.machine import MIB
from streammerge.errors import OutputError
from streammerge.formats.safetensors import build_header
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.folders import llama_config
from tests.make.vocabularies import save_with_tokens, tokenizer_files, tokenizer_values
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
