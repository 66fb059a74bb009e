"""Files of several recipes, as mergekit-multi has them: each document a merge, by whose name others take its result.

The document that no other takes is the output's; the others become recipes within it, in the place of their names. So
nothing is written in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from streammerge.errors import RecipeError, listed
from streammerge.recipe.adapters import path_of
from streammerge.recipe.vocabulary import SOURCE, SOURCES

MAX_DOCUMENTS: Final = 100
"""The most recipes of a file."""

_OF_A_MODEL: Final = ("model", "base_model", "source_model", "layout", "take")
"""The keys whose value is a model."""

_NOT_MODELS: Final = ("parameters", "inputs", "chat_template", "const_tag")
"""The keys under which there are none."""


class Document(dict[str, Any]):
    """A recipe's values, in place of the `name` by which it was meant."""

    name: str = ""


def as_one_recipe(documents: Sequence[Any], where: str) -> Any:  # noqa: ANN401
    """The values of the recipe that no other takes, with the others within it; RecipeError if that is not just one."""
    filled = [each for each in documents if each is not None] or documents[:1]
    if len(filled) < 2:
        return filled[0] if filled else None
    return _Joiner(filled, where).joined()


class _Joiner:
    """Documents of one file, put into each other."""

    def __init__(self, documents: Sequence[Any], where: str) -> None:
        self.where = where
        self.named: dict[str, Mapping[str, Any]] = {}
        self.unnamed: list[Mapping[str, Any]] = []
        for number, each in enumerate(documents, 1):
            self._add(each, f"{where}: document {number}")
        self.made: dict[str, Document] = {}
        self.used: set[str] = set()
        self.under_way: list[str] = []

    def _add(self, raw: Any, called: str) -> None:  # noqa: ANN401
        if not isinstance(raw, dict):
            raise RecipeError(f"{called}: expected a recipe, found {type(raw).__name__}")
        name = raw.get("name")
        if name is None:
            self.unnamed.append(raw)
            return
        if not isinstance(name, str) or not name:
            raise RecipeError(f"{called}: name must be text, found {name!r}")
        if name in self.named:
            raise RecipeError(f"{called}: another is named {name!r}, too", advice="Give each a name of its own.")
        self.named[name] = raw

    def joined(self) -> Any:  # noqa: ANN401
        """The document that is the output's."""
        if len(self.unnamed) > 1:
            raise RecipeError(
                f"{self.where}: {len(self.unnamed)} documents have no name, and one output is written",
                advice="Name all but the last merge, as in name: first.",
            )
        for name in self.named:
            self._document(name)
        final = self.unnamed[0] if self.unnamed else None
        result = None if final is None else self._placed(final)
        ends = [name for name in self.named if name not in self.used]
        if len(ends) + len(self.unnamed) != 1:
            which = [*ends, *(["the one without a name"] if self.unnamed else [])]
            raise RecipeError(
                f"{self.where}: one output is written, and {len(which)} of these merges are used by no other: "
                f"{listed(which)}",
                advice="Take the others out, into files of their own.",
            )
        return self.made[ends[0]] if ends else result

    def _document(self, name: str) -> Document:
        """The named document, with those that it takes within it."""
        if name in self.under_way:
            way = [*self.under_way[self.under_way.index(name) :], name]
            raise RecipeError(
                f"{self.where}: these merges are made of each other: {' of '.join(way)}",
                advice="Take one of them out of the circle.",
            )
        if name not in self.made:
            self.under_way.append(name)
            self.made[name] = made = Document(self._placed(self.named[name]))
            made.name = name
            self.under_way.pop()
        return self.made[name]

    def _placed(self, raw: Any, key: str = "") -> Any:  # noqa: ANN401
        """The values, with documents where their names stand for models."""
        if isinstance(raw, dict):
            return dict(self._entries(raw))
        if isinstance(raw, list):
            return [self._placed(each, key) for each in raw]
        return raw

    def _entries(self, raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, value in raw.items():
            if key in _NOT_MODELS:
                yield key, value
            elif key == SOURCE:
                yield key, self._source(value)
            elif key == "tokenizer":
                yield key, self._tokenizer(value)
            elif key in _OF_A_MODEL:
                yield key, self._model(value)
            elif key == "models" and isinstance(value, list):
                yield key, [self._model(each) if isinstance(each, str) else self._placed(each) for each in value]
            else:
                yield key, self._placed(value)

    def _tokenizer(self, raw: Any) -> Any:  # noqa: ANN401
        """What is said of tokens, with the merges that they come from in place of their names."""
        if not isinstance(raw, dict):
            return raw
        made, tokens = self._with_source(raw), raw.get("tokens")
        if not isinstance(tokens, dict):
            return made
        return {**made, "tokens": {token: self._with_source(own) for token, own in tokens.items()}}

    def _with_source(self, raw: Any) -> Any:  # noqa: ANN401
        if not isinstance(raw, dict) or "source" not in raw:
            return raw
        source = raw["source"]
        is_row = isinstance(source, dict) and "kind" in source and "model" in source
        return {**raw, "source": {**source, "model": self._source(source["model"])} if is_row else self._source(source)}

    def _source(self, raw: Any) -> Any:  # noqa: ANN401
        """A model that tokens come from, which has to be among a merge's models, and is not made one by that."""
        name = path_of(raw)
        is_merge = isinstance(name, str) and name in self.named and name not in SOURCES
        return self._document(name) if is_merge else raw

    def _model(self, raw: Any) -> Any:  # noqa: ANN401
        """A model, in any of the ways that it may be told: `NAME`, `NAME+LORA`, `{model: {path: NAME}, lora: …}`."""
        if isinstance(raw, str):
            name, plus, lora = raw.partition("+")
            if name not in self.named or (plus and not lora):
                return raw
            self.used.add(name)
            found = self._document(name)
            return {"model": found, "lora": lora} if plus else found
        if isinstance(raw, dict) and raw.keys() <= {"path", "revision"} and raw.get("path") in self.named:
            if raw.get("revision") is not None:
                raise RecipeError(f"{self.where}: {raw['path']!r} is a merge of this file, and has no revisions")
            return self._model(raw["path"])
        return self._placed(raw)
