"""Which dicts of torch files are the models, as the command line says it: `--entry KEY`, `--entry NAME=KEY`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from streammerge.errors import RecipeError
from streammerge.models.located import has_entries

_NAMED: Final = re.compile(r"(?P<name>[^=]+)=(?P<key>.+)", re.DOTALL)


@dataclass
class Entries:
    """The entries that were asked for: by the model's name, and for every torch file that has none of its own.

    An entry that chooses nothing is an error, which is what `used` is for.
    """

    named: dict[str, str] = field(default_factory=dict)
    default: str = ""
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, words: Iterable[str]) -> Entries:
        """The entries that these words of the command line ask for; RecipeError if two contradict each other."""
        entries = cls()
        for word in words:
            match = _NAMED.fullmatch(word)
            if match and match["name"] not in entries.named:
                entries.named[match["name"]] = match["key"]
            elif not match and word and not entries.default:
                entries.default = word
            else:
                raise RecipeError(f"--entry {word}: expected KEY once, and NAME=KEY once for a model")
        return entries

    def choose(self, name: str, path: Path | None) -> str:
        """The entry of a model, "" if none is asked for. One of the hub has no path, and gets what its name has."""
        if name in self.named:
            self.used.add(name)
            return self.named[name]
        if self.default and path is not None and has_entries(path):
            self.used.add("")
            return self.default
        return ""

    def check(self, names: Iterable[str]) -> None:
        """RecipeError if an entry has chosen nothing."""
        for name in self.named:
            if name not in self.used:
                raise RecipeError(
                    f"--entry {name}={self.named[name]}: there is no model {name!r} without an entry of its own",
                    advice=f"The models: {', '.join(names)}.",
                )
        if self.default and "" not in self.used:
            raise RecipeError(
                f"--entry {self.default}: none of the models is a torch file of which a dict has to be chosen",
                advice="Leave it out.",
            )


def entries_of(words: Sequence[str], paths: dict[str, str]) -> dict[str, str]:
    """The entries of models that are called and lie like this."""
    entries = Entries.of(words)
    found = {name: entries.choose(name, Path(path)) for name, path in paths.items()}
    entries.check(paths)
    return found
