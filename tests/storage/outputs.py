"""Outputs of merges of two models, and what is in their folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import streammerge


def recipe_of(paths, **keys):
    return {"merge_method": "linear", "models": [str(paths["a"]), str(paths["b"])], **keys}


def merge(paths, output, *, keys=None, **options):
    return streammerge.merge(recipe_of(paths, **(keys or {})), output=output, sync=False, **options)


def digests(folder: Path) -> dict[str, str]:
    """Everything in a folder, hidden files too, with what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
