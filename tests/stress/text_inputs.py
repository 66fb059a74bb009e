"""Recipes and indexes of shards made up by chance: valid ones, tricks, and damage in every place."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Final

from tests.stress.header_inputs import BYTES, NAMES, TOKENS

RECIPES: Final = (
    "merge_method: linear\nmodels: [a.ckpt, {model: b.ckpt, parameters: {weight: 0.5}}]\ndtype: float16\n",
    (
        "merge_method: ties\nbase_model: x\nmodels:\n  - model: a\n    parameters:\n      density: [0, 0.5, 1]\n"
        "      weight:\n        - {filter: mlp, value: 1}\n        - value: 0.5\n  - model: {model: {path: b}}\n"
    ),
    (
        "merge_method: slerp\nmodels: [{model: {merge_method: linear, models: [a, b]}, name: n}, c]\nlayout: n\n"
        "parameters: {t: 1e-1}\nrules:\n  - {match: '*.x', take: c}\n  - {match: [a, 'b*'], drop: true}\n"
    ),
    "a: &a {weight: 1}\nmerge_method: linear\nmodels:\n  - {model: x, parameters: *a}\n",
    "merge_method: linear\ninputs: {x: the x}\nmodels: [x]\nseed: 3\non_missing: keep\nout_dtype: bfloat16\n",
)
PIECES: Final = (
    *("- ", ": ", "{", "}", "[", "]", ",", "&a ", "*a", "<<: *a\n", "!!python/object/apply:os.system ['exit 3']\n"),
    *("!!python/name:os.system", "!!binary /w==", "!!set {a}", "!!timestamp x", "!!int ", "!!float ", "!!omap [a: 1]"),
    *("? ", "|\n", ">-\n", "'", '"', "#", "%YAML 1.9\n", "---\n", "...\n", "~", "null", ".nan", ".inf", "-.inf", "yes"),
    *("1e400", "0x" + "f" * 300, "1:" * 300 + "1", "9" * 5000, "0b2", "0o9", "2001-99-99", "2001-01-01T99:99:99Z"),
    *("&x [*x]", "&x {a: *x}", "[" * 600, "{a: " * 600, "- " * 600, "\t", "\r", "\n", "\0", "\x85", "\u2028", "\ufeff"),
    *('"\\ud800"', '"\\0"', '"\\x1b[31m"', "\x1b", "\u202e", "$HOME/x", "${X}", "%X%", "~/x", "~root/x", "../../x"),
    *("C:\\x", "\\\\host\\share\\x", "//host/x", "/etc/passwd", "file:///x", "merge_method", "models", "parameters"),
    "a: &b [x,x,x,x,x,x,x,x,x]\nc: &d [*b,*b,*b,*b,*b,*b,*b,*b]\ne: &f [*d,*d,*d,*d,*d,*d,*d]\ng: [*f,*f,*f,*f]\n",
)
PLAIN: Final = ("a.safetensors", "b.safetensors", "model-00001-of-00002.safetensors", "x.bin", "é.ckpt")
ESCAPES: Final = (
    *("../x", "..", ".", "", "/etc/passwd", "C:\\x", "C:x", "\\\\host\\share\\x", "//host/x", "a\0", "a/b", "a\\b"),
    *("\ud800", "\x1b[31m", "\u202e", "CON", "x" * 5000, "~", "~/x", "$HOME"),
)


def recipes(seed: int) -> Iterator[bytes]:
    """Recipes without end, the same for the same seed."""
    chance = random.Random(seed)
    while True:
        text = chance.choice(RECIPES)
        for _ in range(chance.choice((0, 1, 1, 2, 4))):
            text = _damaged(text, chance)
        yield text.encode("utf-8", "surrogatepass") + (chance.choice(BYTES) if chance.random() < 0.02 else b"")


def _damaged(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    if chance.random() < 0.4:  # where a value begins
        at = chance.choice([place + 1 for place, character in enumerate(text) if character in " [{,"] or [at])
    stop = at + chance.choice((1, 1, 5, 20))
    match chance.randrange(5):
        case 0:
            return text[:at] + text[stop:]
        case 1:
            return text[:at] + text[at:stop] * chance.choice((2, 3, 50)) + text[stop:]
        case 2:
            return text[:at] + chance.choice(NAMES) + text[at:]
        case 3:
            other = chance.choice(RECIPES)
            start = chance.randrange(len(other))
            return text[:at] + other[start : start + 40] + text[at:]
        case _:
            return text[:at] + chance.choice(PIECES) + text[at:]


def indexes(seed: int) -> Iterator[bytes]:
    """Indexes of shards without end, the same for the same seed."""
    chance = random.Random(seed)
    while True:
        names = [chance.choice(NAMES) for _ in range(chance.randrange(5))]
        shards = [chance.choice(ESCAPES if chance.random() < 0.1 else PLAIN) for _ in names]
        index = {
            "metadata": {"total_size": chance.choice((0, 8, 10**30, -1, 1e300))},
            "weight_map": dict(zip(names, shards, strict=True)),
        }
        encoded = bytearray(json.dumps(index, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass"))
        for _ in range(chance.choice((0, 0, 1, 2))):
            at = chance.randrange(len(encoded) + 1)
            if chance.random() < 0.5:
                encoded[at:at] = chance.choice(TOKENS).encode()
            else:
                encoded[at : at + chance.choice((0, 1, 9))] = chance.choice(BYTES) if chance.random() < 0.3 else b""
        yield bytes(encoded)
