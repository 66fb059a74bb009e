"""`low_rank` of a recipe: that the output is an adapter, and how large its factors are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from streammerge.errors import RecipeError, suggestion
from streammerge.recipe.options import DIALECTS
from streammerge.recipe.scalars import number, number_of_text
from streammerge.recipe.spellings import parse_flag

if TYPE_CHECKING:
    from streammerge.models.adapters.ranks import LowRank

SVDS: Final = ("auto", "exact", "randomized")


@dataclass(frozen=True, slots=True)
class Asked:
    """A key of `low_rank`: what its option is called and says, and its value of what YAML, or a word, gives.

    One `of_models` has no meaning where adapters are merged.
    """

    key: str
    help: str
    value: Callable[[Any, str], Any]
    metavar: str = ""
    choices: tuple[str, ...] = ()
    of_models: bool = False

    @property
    def flag(self) -> str:
        """`--key`"""
        return f"--{self.key.replace('_', '-')}"

    def typed(self, text: str) -> Any:  # noqa: ANN401
        """The value that a word stands for."""
        return self.value(text, self.flag)


def _number(raw: Any, where: str) -> float:  # noqa: ANN401
    """A number, typed or in YAML; a flag is none."""
    found = number_of_text(raw, where) if isinstance(raw, str) else number(raw, where)
    if isinstance(found, bool):
        raise RecipeError(f"{where}: expected a number, found {raw!r}")
    return float(found)


def _whole(least: int) -> Callable[[Any, str], int]:
    """A whole number of at least so much."""

    def parse(raw: Any, where: str) -> int:  # noqa: ANN401
        found = _number(raw, where)
        if found != int(found) or found < least:
            raise RecipeError(f"{where}: expected a whole number of at least {least}, found {raw!r}")
        return int(found)

    return parse


def _share(raw: Any, where: str) -> float:  # noqa: ANN401
    """A number above 0, of 1 at the most."""
    found = _number(raw, where)
    if not 0 < found <= 1:
        raise RecipeError(f"{where}: expected a number above 0 and no greater than 1, found {raw!r}")
    return found


def _from(least: float) -> Callable[[Any, str], float]:
    """A number of at least so much."""

    def parse(raw: Any, where: str) -> float:  # noqa: ANN401
        found = _number(raw, where)
        if found < least:
            raise RecipeError(f"{where}: expected a number of at least {least:g}, found {raw!r}")
        return found

    return parse


def _one_of(words: tuple[str, ...]) -> Callable[[Any, str], str]:
    """One of these words."""

    def parse(raw: Any, where: str) -> str:  # noqa: ANN401
        if not isinstance(raw, str) or raw not in words:
            advice = suggestion(str(raw), list(words))
            raise RecipeError(f"{where}: expected one of {', '.join(words)}, found {raw!r}", advice=advice)
        return raw

    return parse


ASKED: Final = (
    Asked("rank", "the rank of an adapter's factors, or the most of it", _whole(1), "R"),
    Asked("energy", "the least rank that holds this share of the squares of all singular values", _share, "E"),
    Asked("sv_ratio", "as many singular values as are above the greatest by this number", _from(1), "N"),
    Asked("sv_fro", "the least rank that holds this share of the Frobenius norm", _share, "F"),
    Asked("sv_cumulative", "the least rank that holds this share of the sum of singular values", _share, "C"),
    Asked("sv_epsilon", "as many singular values as are greater than this number", _from(0), "T"),
    Asked("conv_rank", "of kernels larger than 1 (default: as of all; 0: leave them out)", _whole(0), "R"),
    Asked(
        "svd",
        "how matrices are decomposed (default: exactly up to 2048 rows or columns)",
        _one_of(SVDS),
        choices=SVDS,
    ),
    Asked("clamp_quantile", "cut the factors' elements at this quantile of them (default: 1)", _share, "Q"),
    Asked("min_diff", "leave out what nowhere differs by more than this (default: 0)", _from(0), "D", of_models=True),
    Asked("biases", "write biases, norms and other vectors too, as whole differences", parse_flag, of_models=True),
    Asked(
        "names",
        "whose names the adapter has (default: kohya for Stable Diffusion, peft for language models, else comfy)",
        _one_of(DIALECTS),
        choices=DIALECTS,
        of_models=True,
    ),
)  # fmt: skip
"""Every key, in the order in which options are told."""


def parse_low_rank(raw: Any, where: str) -> LowRank | None:  # noqa: ANN401
    """What a recipe asks for; None if it has no such key. RecipeError for what isn't understood, or says too little."""
    if raw is None:
        return None
    from streammerge.models.adapters.ranks import CRITERIA, LowRank

    where = f"{where}: low_rank"
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{where}: expected a map such as {{rank: 32}}, found {raw!r}")
    asked = {each.key: each for each in ASKED}
    for key in raw:
        if key not in asked:
            advice = f"{suggestion(str(key), list(asked))}Known: {', '.join(asked)}."
            raise RecipeError(f"{where}: unknown key {key!r}", advice=advice)
    found = {key: asked[key].value(value, f"{where}: {key}") for key, value in raw.items() if value is not None}
    given = [key for key in CRITERIA if key in found]
    if len(given) > 1:
        raise RecipeError(f"{where}: one of {', '.join(CRITERIA)}, found {' and '.join(given)}")
    if not given and "rank" not in found:
        raise RecipeError(
            f"{where}: it says no rank",
            advice="Give a rank (--rank 32), or what it has to hold (--energy, --sv-ratio, --sv-fro, --sv-cumulative, "
            "--sv-epsilon).",
        )
    return LowRank(**found)
