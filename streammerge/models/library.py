"""The `tokenizers` library, which reads and writes a tokenizer that was changed, in a process of its own.

It holds a large vocabulary in a quarter of a GB, and nobody knows what it does with values that it has never seen.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Final

from streammerge.errors import PlanError

ADVICE: Final = "Take the vocabulary of one model as it is: tokenizer_source: base, or the model's path."

SECONDS: Final = 600
"""How long it may take."""

_PROGRAM: Final = """
import hashlib, json, sys
import tokenizers
made = tokenizers.Tokenizer.from_buffer(sys.stdin.buffer.read())
found = hashlib.sha256()
for token, number in sorted(made.get_vocab(with_added_tokens=True).items(), key=lambda item: (item[1], item[0])):
    found.update(json.dumps([token, number]).encode())
sys.stdout.buffer.write(found.hexdigest().encode() + made.to_str(pretty=True).encode())
"""


def rewritten(values: bytes, tokens: Mapping[str, int], where: str) -> bytes:
    """A tokenizer.json as the library writes it; PlanError, which says where, if it has other tokens there."""
    if importlib.util.find_spec("tokenizers") is None:
        raise PlanError(
            "the merged tokenizer is made with the tokenizers library, which is not installed",
            advice="pip install 'streammerge[llm]', or pip install tokenizers.",
        )
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], input=values, capture_output=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise PlanError(f"{where}: the tokenizers library can't be asked: {problem}", advice=ADVICE) from problem
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        last = said[-1] if said else f"it ended with {done.returncode}"
        raise PlanError(f"{where}: refused by the tokenizers library: {last}", advice=ADVICE)
    found, text = done.stdout[:64], done.stdout[64:]
    if found != _digest(tokens):
        raise PlanError(f"{where}: the tokenizers library has other tokens there, or other numbers", advice=ADVICE)
    return text


def _digest(tokens: Mapping[str, int]) -> bytes:
    made = hashlib.sha256()
    for token, number in sorted(tokens.items(), key=lambda item: (item[1], item[0])):
        made.update(json.dumps([token, number]).encode())
    return made.hexdigest().encode()
