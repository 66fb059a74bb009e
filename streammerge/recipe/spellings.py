"""What the keys of a recipe take: seeds, flags and names, each in the spellings that are understood."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from streammerge.errors import RecipeError, suggestion
from streammerge.recipe.policies import PARTS

_DEFINITIONS: Final = ("models", "slices", "modules")
"""The keys that say what is merged, of which a recipe has one."""


def in_our_words(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values as we write them, of two things that recipes for mergekit say otherwise.

    It writes out keys that have nothing beside the one of `models`, `slices` and `modules` that is meant. Published
    recipes call the seed `random_seed`; a `seed`, which options give too, counts before it.
    """
    is_said = any(raw.get(key) is not None for key in _DEFINITIONS)
    empty = [key for key in _DEFINITIONS if is_said and key in raw and raw[key] is None]
    made = {key: value for key, value in raw.items() if key not in empty}
    if (seed := made.pop("random_seed", None)) is not None:
        made.setdefault("seed", seed)
    return made


def check_keys(raw: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    """RecipeError for the first key that is not known, with the one that is likely to be meant."""
    known = list(known)
    for key in raw:
        if key not in known:
            from streammerge.methods import METHODS  # late: help pages need none of them

            is_parameter = "parameters" in known and any(key in method.parameter_names for method in METHODS.values())
            hint = f"Write it under parameters: {{{key}: …}}. " if is_parameter else suggestion(str(key), known)
            raise RecipeError(f"{where}: unknown key {key!r}", advice=f"{hint}Known: {', '.join(known)}.")


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


def parse_part(raw: Any, where: str) -> str:  # noqa: ANN401
    """The part of a model that is meant, one of PARTS; "" for none."""
    if raw is not None and raw not in PARTS:
        raise RecipeError(
            f"{where}: no part of a model is called {raw!r}",
            advice=f"{suggestion(str(raw), list(PARTS))}Parts: {', '.join(PARTS)}.",
        )
    return raw or ""


def parse_globs(raw: Any, where: str) -> list[str]:  # noqa: ANN401
    """The globs of a rule, which are one or a list."""
    globs = [raw] if isinstance(raw, str) else raw
    if not isinstance(globs, list) or not globs or not all(isinstance(glob, str) for glob in globs):
        raise RecipeError(f"{where}: match must be a glob or a list of globs, found {raw!r}")
    return globs


def parse_prefixes(raw: Any, where: str) -> tuple[tuple[str, str], ...]:  # noqa: ANN401
    """What names begin with and are to begin with: a map, whose texts are empty or end with a dot."""
    if raw is None:
        return ()
    pairs = list(raw.items()) if isinstance(raw, dict) else []
    if not pairs or not all(
        isinstance(text, str) and (not text or text.endswith(".")) for pair in pairs for text in pair
    ):
        raise RecipeError(
            f"{where}: prefix must be a map from prefixes to others, each ending with a dot, found {str(raw)[:60]}",
            advice='Write it like prefix: {"model.language_model.": "model."}, the model\'s own on the left.',
        )
    return tuple(pairs)
