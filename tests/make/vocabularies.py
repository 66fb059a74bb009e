"""Models that have vocabularies of their own: a Llama's folder, and a tokenizer.json with just these tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.make.folders import HIDDEN, llama_config, llama_tensors, save_folder


def listed_token(content: str, number: int, **more: Any) -> dict[str, Any]:
    """A token as a tokenizer.json lists it that is added."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": number, "content": content, **flags, **more}


def tokenizer_values(
    tokens: Sequence[str] | Mapping[str, int],
    added: Mapping[str, int] | None = None,
    kind: str = "BPE",
    merges: Iterable[tuple[str, str]] = (),
) -> dict[str, Any]:
    """The values of a tokenizer.json with these tokens, in the order of their numbers."""
    ids = dict(tokens) if isinstance(tokens, Mapping) else {token: number for number, token in enumerate(tokens)}
    model: dict[str, Any] = {"type": kind, "vocab": ids}
    if kind == "BPE":
        model["merges"] = [list(pair) for pair in merges]
    elif kind == "Unigram":
        model |= {"unk_id": 0, "vocab": [[token, -float(number + 1)] for token, number in ids.items()]}
    elif kind == "WordPiece":
        first = next(iter(ids))
        model |= {"unk_token": first, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    entries = [listed_token(token, number) for token, number in (added or {}).items()]
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": entries, "normalizer": None}
    return {**whole, "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}


def tokenizer_files(*args: Any, **more: Any) -> dict[str, str]:
    """The files of a tokenizer with these tokens."""
    values = tokenizer_values(*args, **more)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": json.dumps(values, indent=2), "tokenizer_config.json": json.dumps(config)}


def save_with_tokens(
    path: Path,
    seed: int,
    tokens: Sequence[str] | Mapping[str, int],
    added: Mapping[str, int] | None = None,
    *,
    rows: int | None = None,
    files: Mapping[str, str | bytes] | None = None,
    **made: Any,
) -> dict[str, torch.Tensor]:
    """Save a Llama that has these tokens, and as many rows if not said otherwise; its tensors."""
    most = max([*_ids(tokens).values(), *(added or {}).values()], default=0)
    rows = most + 1 if rows is None else rows
    tensors = llama_tensors(seed, vocab=rows, **made)
    own = tokenizer_files(tokens, added) if files is None else files
    save_folder(path, tensors, llama_config(vocab=rows, **made), own)
    return tensors


def _ids(tokens: Sequence[str] | Mapping[str, int]) -> dict[str, int]:
    return dict(tokens) if isinstance(tokens, Mapping) else {token: number for number, token in enumerate(tokens)}


def written_tokens(folder: Path) -> dict[str, int]:
    """The tokens that a folder's tokenizer.json lists, read without any of ours."""
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    ids = (
        {piece: number for number, (piece, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary
    )
    return {**{entry["content"]: entry["id"] for entry in values["added_tokens"]}, **ids}


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

ROW = HIDDEN
