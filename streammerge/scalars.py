"""A number, a flag or a word, as a recipe's YAML or the command line gives it."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any, Final

from streammerge.errors import RecipeError

Scalar = float | bool | str

_SCIENTIFIC: Final = re.compile(r"[-+]?\d+\.?\d*[eE][-+]?\d+")
_NUMBER: Final = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FLAGS: Final = {"true": True, "false": False}


def scalar(raw: Any, where: str) -> Scalar:  # noqa: ANN401
    """A number or a word; whether the method's parameter can take it is for `check_settings` to say."""
    return raw if isinstance(raw, str) and not _SCIENTIFIC.fullmatch(raw) else number(raw, where)


def number(raw: Any, where: str) -> float | bool:  # noqa: ANN401
    """A finite number, or a flag; RecipeError, which says where, for anything else."""
    if isinstance(raw, str) and _SCIENTIFIC.fullmatch(raw):  # YAML takes 1e-3 for text, and 1.0e-3 for a number
        raw = float(raw)
    with contextlib.suppress(OverflowError):  # a whole number that no float can hold
        if isinstance(raw, bool) or (isinstance(raw, int | float) and math.isfinite(raw)):
            return raw
    raise RecipeError(f"{where}: expected a finite number, found {raw!r}")


def is_number(text: str) -> bool:
    """Whether a piece of text is a number."""
    return _NUMBER.fullmatch(text.strip()) is not None


def scalar_of_text(text: str, where: str) -> Scalar:
    """The number, flag or word that a piece of text is."""
    text = text.strip()
    return scalar(float(text) if is_number(text) else _FLAGS.get(text.lower(), text), where)


def parse_seed(raw: Any, where: str) -> int | None:  # noqa: ANN401
    """The seed of what is random, None where it isn't set."""
    if raw is None or (isinstance(raw, int) and not isinstance(raw, bool)):
        return raw
    raise RecipeError(f"{where}: seed must be a whole number, found {raw!r}")


def parse_key(raw: Any, where: str) -> str:  # noqa: ANN401
    """A name that is not empty, a whole number being one too; "" where there is none."""
    if raw is None or (isinstance(raw, str | int) and not isinstance(raw, bool) and raw != ""):
        return "" if raw is None else str(raw)
    raise RecipeError(f"{where}: expected a name, found {raw!r}")
