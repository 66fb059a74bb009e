"""A model's card, the README.md of its folder: what Hugging Face's hub reads at its top, and how the model was made.

Its last line says that we wrote it, with a digest of the rest: so a card that somebody has written on is known, and
stays.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streammerge.errors import RecipeError, output_errors
from streammerge.formats.files import read_errors
from streammerge.recipe.files import parse_yaml
from streammerge.version import __version__

CARD: Final = "README.md"

MAX_CARD: Final = 1 << 20
"""The longest card, in bytes, that is read."""

CARRIED: Final = ("license", "license_name", "license_link", "pipeline_tag", "language")
"""What the output's card says as the models' cards do, where all of them say the same."""

LICENCE: Final = CARRIED[:3]

MAX_VALUE: Final = 200
"""The longest of such values, in characters."""

_HUB: Final = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
"""What a model may be called on the hub."""

_MARK: Final = "<!-- written by streammerge; a card without its changes has the digest {} -->\n"
_MARKED: Final = re.compile(rb"<!-- written by streammerge; [^\n>]* (?P<digest>[0-9a-f]{32}) -->\n\Z")


@dataclass(frozen=True)
class CardModel:
    """A model that is merged: what it is called, and what its own card says of it."""

    name: str
    stated: Mapping[str, Any]


def read_stated(folder: Path) -> Mapping[str, Any]:
    """What the card of a model says at its top; nothing if there is none, or none that we may read or understand."""
    path = folder / CARD
    try:
        with read_errors(path):
            text = _text(path)
        if not text.startswith("---\n") or (end := text.find("\n---", 4)) < 0:
            return {}
        found = parse_yaml(text[4 : end + 1], str(path))
    except (ValueError, RecipeError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    """What stands in a card, with plain line breaks."""
    if not path.is_file() or not os.access(path, os.R_OK):
        return ""
    with path.open("rb") as file:
        return file.read(MAX_CARD).decode("utf-8", "replace").replace("\r\n", "\n")


def model_card(
    recipe: Mapping[str, Any],
    models: Sequence[CardModel],
    library: str | None,
    methods: Iterable[str] = (),
    *,
    adapts: str | None = None,
) -> bytes:
    """The card of a merge. `recipe` are its values as the metadata have them; the same merge has the same card.

    Of an adapter, `adapts` is the model that it is for, "" if nothing tells.
    """
    import yaml

    what, tags = ("mixture", ["moe"]) if "experts" in recipe else ("merge", [])
    what, tags = (what, tags) if adapts is None else ("LoRA", ["lora"])
    bases = [model.name for model in models] if adapts is None else [adapts]
    front = {
        "base_model": [name for name in bases if _HUB.fullmatch(name)],
        "base_model_relation": "merge" if adapts is None else "adapter" if adapts else None,
        "library_name": library,
        "tags": ["merge", "streammerge", *tags],
        **_agreed(models),
    }
    top = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    dumped = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", dumped) or [""]))
    named = [f"`{method}`" for method in sorted(set(methods))]
    made_by = f"streammerge {__version__}{f' with {_and(named)}' if named else ''}"
    told = _and([model.name for model in models[:3]], others=len(models) - 3)
    lines = [
        f"---\n{top}---\n\n# A {what} of {_plain(told)}\n",
        f"Made by {made_by}, of\n",
        *(f"- {_plain(model.name)}{_licence(model)}" for model in models),
        f"\n## The recipe\n\n{fence}yaml\n{dumped}{fence}\n\n## To make it again\n",
        "With the recipe above as recipe.yaml, and the models beside it under the names that it gives them:\n",
        f"{fence}sh\nstreammerge recipe.yaml -o merged\n{fence}\n",
        "The recipe is in the metadata of the weights, too; `streammerge verify` computes them again and compares.\n",
    ]
    return _marked("\n".join(lines) + "\n")


def _marked(text: str) -> bytes:
    encoded = text.encode("utf-8", "replace")
    return encoded + _MARK.format(_digest(encoded)).encode()


def _digest(encoded: bytes) -> str:
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def is_unchanged_card(path: Path) -> bool:
    """Whether this is a card of ours, on which nobody has written since; OutputError if it can't be read."""
    with output_errors(path):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            encoded = file.read(MAX_CARD + 1)
    match = _MARKED.search(encoded)
    return match is not None and match["digest"].decode() == _digest(encoded[: match.start()])


def _agreed(models: Sequence[CardModel]) -> dict[str, Any]:
    """What all models' cards say, and say alike; of the licence all or nothing."""
    said = {key: [model.stated.get(key) for model in models] for key in CARRIED}
    alike = {key: values[0] for key, values in said.items() if values.count(values[0]) == len(values)}
    told = {key: value for key, value in alike.items() if _is_told(value)}
    is_whole = "license" in told and all(key in alike for key in LICENCE)
    return {key: value for key, value in told.items() if key not in LICENCE or is_whole}


def _is_told(value: Any) -> bool:  # noqa: ANN401
    """Whether it is a word, or a list of words, as they are meant to be."""
    values = value if isinstance(value, list) else [value]
    return 0 < len(values) <= 100 and all(isinstance(each, str) and 0 < len(each) <= MAX_VALUE for each in values)


def _licence(model: CardModel) -> str:
    stated = model.stated.get("license")
    return f" (licence: {_plain(str(stated))})" if _is_told(stated) else ""


def _plain(text: str) -> str:
    """A name within a line of Markdown: no line breaks, nothing that Markdown takes for its own."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", shown)


def _and(words: Sequence[str], *, others: int = 0) -> str:
    """`a, b and c`, `a, b, c and 2 others`"""
    *most, last = [*words, *([f"{others} other{'s' * (others > 1)}"] if others > 0 else [])]
    return f"{', '.join(most)} and {last}" if most else last
