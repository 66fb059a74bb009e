"""What a recipe says of the tokens that come out, in mergekit's words: `tokenizer_source`, or `tokenizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from streammerge.errors import RecipeError
from streammerge.recipe.spellings import check_keys

SOURCE: Final = "tokenizer_source"

BASE, UNION, NUMBERS = "base", "union", "numbers"

SOURCES: Final[Mapping[str, str]] = {
    BASE: "the tokens of the base, or else of the first model",
    UNION: "these, and behind them those that any other model has",
    NUMBERS: "nothing is matched: rows are merged by their number, whatever tokens they are of",
}
"""The sources of a vocabulary beside the models, and what comes out."""

KEYS: Final = ("source", "tokens", "pad_to_multiple_of")

MAX_TOKENS: Final = 10_000
"""The most tokens that a recipe says something of."""

MAX_MULTIPLE: Final = 2**20

Named = Callable[[Any, str], str]
"""The name of the input that is meant, by what the recipe calls it and where."""


@dataclass(frozen=True)
class TokenRow:
    """Where a token's row comes from: a model's row of the same token, of another one, or of a number; zeros; or, with
    none of these, wherever it would. With `force` this holds for models that have the token, too."""

    token: str
    kind: Literal["", "model", "zero"] = ""
    model: str = ""
    other: str = ""
    number: int | None = None
    force: bool = False

    def describe(self) -> dict[str, Any]:
        """As it is written in a recipe."""
        source: Any = {"zero": {"kind": "zero"}, "model": self.model, "": None}[self.kind]
        if self.kind == "model" and (self.other or self.number is not None):
            meant = {"token": self.other} if self.number is None else {"token_id": self.number}
            source = {"kind": "model_token", "model": self.model, **meant}
        return {**({} if source is None else {"source": source}), **({"force": True} if self.force else {})}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that come out: those of `source`, one of SOURCES or a model's name, and others, each with its row."""

    source: str
    is_model: bool = False
    tokens: tuple[TokenRow, ...] = ()
    multiple: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether nothing needs to be done where all models have the same tokens."""
        return not self.tokens and self.multiple == 1

    def describe(self) -> dict[str, Any]:
        """As it is written in a recipe."""
        if self.is_plain:
            return {SOURCE: self.source}
        tokens = {row.token: row.describe() for row in self.tokens}
        multiple = {} if self.multiple == 1 else {"pad_to_multiple_of": self.multiple}
        return {"tokenizer": {"source": self.source, **({"tokens": tokens} if tokens else {}), **multiple}}


def parse_vocabulary(raw: Mapping[str, Any], where: str, named: Named) -> Vocabulary | None:
    """What a recipe says of tokens, None if nothing; RecipeError if that is not understood."""
    whole, source = raw.get("tokenizer"), raw.get(SOURCE)
    if whole is None and source is None:
        return None
    if whole is not None and source is not None:
        raise RecipeError(f"{where}: tokenizer and {SOURCE} can't be combined", advice="Remove one of them.")
    if whole is None:
        return _of(source, f"{where}: {SOURCE}", named)
    if not isinstance(whole, dict):
        raise RecipeError(f"{where}: tokenizer must be a map with a source, found {whole!r}")
    where = f"{where}: tokenizer"
    check_keys(whole, KEYS, where)
    made = _of(whole.get("source", UNION), f"{where}: source", named)
    tokens = whole.get("tokens") or {}
    if not isinstance(tokens, dict) or len(tokens) > MAX_TOKENS:
        raise RecipeError(f"{where}: tokens must be a map of at most {MAX_TOKENS:,} tokens, found {str(tokens)[:60]}")
    rows = tuple(_row(token, said, f"{where}: token {str(token)[:60]!r}", named) for token, said in tokens.items())
    multiple = _multiple(whole.get("pad_to_multiple_of"), where)
    if made.source == NUMBERS and not made.is_model and (rows or multiple > 1):
        raise RecipeError(
            f"{where}: source {NUMBERS} matches no tokens, so that nothing can be said of any",
            advice=f"Write source: {BASE} or {UNION}, or remove tokens and pad_to_multiple_of.",
        )
    return Vocabulary(made.source, made.is_model, rows, multiple)


def _of(raw: Any, where: str, named: Named) -> Vocabulary:  # noqa: ANN401
    if isinstance(raw, str) and raw in SOURCES:
        return Vocabulary(raw)
    return Vocabulary(named(raw, where), is_model=True)


def _multiple(raw: Any, where: str) -> int:  # noqa: ANN401
    if raw is None:
        return 1
    if type(raw) is int and 1 <= raw <= MAX_MULTIPLE:
        return raw
    raise RecipeError(f"{where}: pad_to_multiple_of must be a whole number from 1 to {MAX_MULTIPLE:,}, found {raw!r}")


def _row(token: Any, raw: Any, where: str, named: Named) -> TokenRow:  # noqa: ANN401
    """What is said of one token."""
    if not isinstance(token, str) or not token:
        raise RecipeError(f"{where}: a token is text", advice="Put it in quotation marks.")
    if any("\ud800" <= character <= "\udfff" for character in token):
        raise RecipeError(f"{where}: is no text in UTF-8")
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a map with source and force, found {str(raw)[:60]!r}")
    check_keys(raw, ("source", "force"), where)
    force, source = raw.get("force", False), raw.get("source")
    if not isinstance(force, bool):
        raise RecipeError(f"{where}: force must be true or false, found {force!r}")
    if source is None:
        if force:
            raise RecipeError(f"{where}: force without a source: nobody knows with what", advice="Name a source.")
        return TokenRow(token)
    if isinstance(source, dict) and "kind" in source:
        return _of_kind(token, source, f"{where}: source", named, force=force)
    return TokenRow(token, "model", named(source, f"{where}: source"), force=force)


def _of_kind(token: str, raw: Mapping[str, Any], where: str, named: Named, *, force: bool) -> TokenRow:
    """mergekit's kinds of sources."""
    if raw["kind"] == "zero":
        check_keys(raw, ("kind",), where)
        return TokenRow(token, "zero", force=force)
    if raw["kind"] != "model_token":
        raise RecipeError(f"{where}: kind must be zero or model_token, found {raw['kind']!r}")
    check_keys(raw, ("kind", "model", "token", "token_id"), where)
    other, number = raw.get("token"), raw.get("token_id")
    if (other is None) == (number is None) or not isinstance(other, str | None):
        raise RecipeError(f"{where}: expected one of token, a text, and token_id, a number")
    if number is not None and (type(number) is not int or number < 0):
        raise RecipeError(f"{where}: token_id must be a whole number from 0 on, found {number!r}")
    return TokenRow(token, "model", named(raw.get("model"), f"{where}: model"), other or "", number, force=force)
