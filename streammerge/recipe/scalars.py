"""A number, a flag or a word, as a recipe's YAML or the command line gives it."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any, Final

from streammerge.errors import RecipeError

Scalar = float | bool | str

_SCIENTIFIC: Final = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_NUMBER: Final = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_AMBIGUOUS: Final = re.compile(r"[-+]?(?:0[0-9]+|0[box].*|.*[_:].*)")
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


def number_of_text(text: str, where: str) -> float | bool:
    """The number that a piece of text is, if it can be read in one way only; else RecipeError, which says where."""
    text = text.strip()
    if is_number(text) and not is_ambiguous(text):
        return number(float(text), where)
    raise RecipeError(f"{where}: expected a decimal number, found {text}", advice="Write it without leading zeros.")


def is_ambiguous(text: str) -> bool:
    """Whether it is what YAML 1.1 doesn't read as people do: 010 is 8 to it, 1:30 is 90, 1_000 is 1000, 0x10 is 16."""
    return _AMBIGUOUS.fullmatch(text) is not None


def scalar_of_text(text: str, where: str) -> Scalar:
    """The number, flag or word that a piece of text is."""
    text = text.strip()
    return scalar(number_of_text(text, where) if is_number(text) else _FLAGS.get(text.lower(), text), where)
