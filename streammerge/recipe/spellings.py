"""What the keys of a recipe take: seeds, flags and names, each in the spellings that are understood."""

from __future__ import annotations

from typing import Any

from streammerge.errors import RecipeError


def parse_seed(raw: Any, where: str) -> int | None:  # noqa: ANN401
    """The seed of what is random, None where it isn't set."""
    if raw is None or (isinstance(raw, int) and not isinstance(raw, bool)):
        return raw
    raise RecipeError(f"{where}: seed must be a whole number, found {raw!r}")


def parse_flag(raw: Any, where: str) -> bool:  # noqa: ANN401
    """true or false; text that only looks like one of them ('false', 'no') is none."""
    if isinstance(raw, bool):
        return raw
    raise RecipeError(
        f"{where} must be true or false, found {raw!r}", advice="Write true or false, without quotation marks."
    )


def parse_key(raw: Any, where: str) -> str:  # noqa: ANN401
    """A name that is not empty, a whole number being one too; "" where there is none."""
    if raw is None or (isinstance(raw, str | int) and not isinstance(raw, bool) and raw != ""):
        return "" if raw is None else str(raw)
    raise RecipeError(f"{where}: expected a name, found {raw!r}")


def parse_name(raw: Any, where: str) -> str:  # noqa: ANN401
    """A piece of text that is not empty; YAML's numbers, flags and dates are none."""
    if isinstance(raw, str) and raw:
        return raw
    raise RecipeError(f"{where} must be text, found {raw!r}", advice="Put it in quotation marks if it is a name.")
