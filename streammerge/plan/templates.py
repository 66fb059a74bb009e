"""The chat template that an output gets: a recipe's text, one of those with names, or that of most of the models.

Libraries look for it in a file of its own first; older ones in the tokenizer's config, and processors' in theirs. Where
one of these has a template, it gets the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.formats.companions import Companion
from streammerge.formats.files import read_errors
from streammerge.models.configs import config_in
from streammerge.recipe.templates import AUTO, TEMPLATES

FILE: Final = "chat_template.jinja"
"""Where libraries look for a chat template first."""

KEY: Final = "chat_template"

_ALSO: Final = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""Where else they look."""

MAX_TEXT: Final = 1 << 20
"""The longest template, in bytes, that is read."""


def wanted_template(asked: str, paths: Iterable[Path]) -> tuple[str, str]:
    """The text of the template that is asked for, and why it is this one; "" where most models have none.

    The first of those that equally many models have is the one.
    """
    if asked != AUTO:
        return (TEMPLATES[asked], f"{asked}'s") if asked in TEMPLATES else (asked, "the recipe's")
    found = [text for path in paths if (text := template_of(path))]
    if not found:
        return "", "no model has a chat template"
    text, times = Counter(found).most_common(1)[0]
    return text, f"that of {times} of the models"


def template_of(path: Path) -> str:
    """A model's own chat template, the default one if it has several; "" if there is none."""
    folder = path if path.is_dir() else path.parent
    with read_errors(folder):
        if (folder / FILE).is_file():
            with (folder / FILE).open("rb") as file:
                return file.read(MAX_TEXT).decode("utf-8", "replace").strip()
    return next((text for name in _ALSO if (text := _stated(folder, name))), "")


def _stated(folder: Path, name: str) -> str:
    try:
        stated: Any = (config_in(folder, name) or {}).get(KEY)
    except CheckpointError:
        return ""
    if isinstance(stated, list):  # several, each with its name
        named = {each.get("name"): each.get("template") for each in stated if isinstance(each, dict)}
        stated = named.get("default")
    return stated.strip() if isinstance(stated, str) else ""


def with_template(companions: Sequence[Companion], folder: Path, text: str, why: str) -> Iterator[Companion]:
    """What lies beside the weights, with this template wherever one is looked for."""
    for each in companions:
        values = _values(folder, each.name) if each.name in _ALSO else None
        if values is not None and KEY in values:
            changed = json.dumps({**values, KEY: text}, indent=2, ensure_ascii=False) + "\n"
            yield Companion(each.name, changed.encode("utf-8", "surrogatepass"), f"{KEY}: {why}")
        elif each.name != FILE:
            yield each
    yield Companion(FILE, text.encode("utf-8", "replace"), why)


def _values(folder: Path, name: str) -> Mapping[str, Any] | None:
    """What a file says; CheckpointError if it can't be read, for nobody could tell what it says of templates."""
    return config_in(folder, name)
