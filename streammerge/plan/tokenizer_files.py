"""A merged tokenizer's files beside the weights, and the numbers of tokens that configs name."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.formats.companions import Companion
from streammerge.models.configs import Adapted, config_in
from streammerge.models.folders import ModelFolder, read_folder
from streammerge.models.layers import sections
from streammerge.models.tokenizers import Tokenizer, is_of_tokenizer, tokens_of
from streammerge.models.tokens import Tokens

GENERATION: Final = "generation_config.json"

Left = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class TokenizerFiles:
    """What becomes of a folder's companions where a tokenizer comes out that is not its own."""

    found: ModelFolder
    tokenizer: Tokenizer

    def placed(self, kept: Sequence[Companion], left: Left) -> tuple[list[Companion], list[tuple[str, str]]]:
        """The companions with the tokenizer's files in the place of the folder's own, and what is not copied."""
        folder = self.tokenizer.folder
        theirs = kept if folder == self.found.path else read_folder(folder).companions
        made, gone = self.tokenizer.companions(theirs)
        rest = [self._renumbered(each) for each in kept if not is_of_tokenizer(each.name)]
        return [*rest, *made], [*left, *gone]

    def adapted(self, adapted: Adapted) -> Adapted:
        """The config with the tokens' new numbers."""
        values = copy.deepcopy(dict(adapted.values))
        changed, notes = self._change(values)
        return replace(adapted, values=values, changed=(*adapted.changed, *changed), notes=(*adapted.notes, *notes))

    def _renumbered(self, companion: Companion) -> Companion:
        if companion.name != GENERATION:
            return companion
        values = copy.deepcopy(dict(config_in(self.found.path, GENERATION) or {}))
        changed, _ = self._change(values)
        if not changed:
            return companion
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        return Companion(GENERATION, text.encode("utf-8", "surrogatepass"), ", ".join(changed))

    def _change(self, values: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Give tokens that a config names by their numbers the new ones; what was changed, and what couldn't be."""
        if self.tokenizer.folder == self.found.path and not self.tokenizer.change.gone:
            return [], []  # the folder's own tokens keep their numbers
        old, new = self._tokens()
        names = {number: token for token, number in old.ids.items()}
        changed, notes = list[str](), list[str]()
        for section, key, value in _numbers(values):
            listed = value if isinstance(value, list) else [value]
            found = [new.ids.get(names.get(number, "")) for number in listed]
            lost = [number for number, made in zip(listed, found, strict=True) if made is None]
            if lost:
                notes.append(f"{key}: {', '.join(map(str, lost))} is no token of the output's, and stays")
            elif found != listed:
                section[key] = found if isinstance(value, list) else found[0]
                changed.append(f"{key}: {value} → {section[key]}")
        return changed, notes

    def _tokens(self) -> tuple[Tokens, Tokens]:
        """The tokens of the folder's config, and those that come out."""
        try:
            old = tokens_of(self.found.path)
        except CheckpointError:
            old = Tokens({}, {})
        return old, self.tokenizer.tokens()


def _numbers(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where a config names tokens by their numbers: the section, the key, the number or the list of some."""
    for _, section in sections(values):
        if not isinstance(section, dict):
            continue
        for key, value in section.items():
            listed = value if isinstance(value, list) else [value]
            if key.endswith(("_token_id", "_token_ids")) and listed and all(type(each) is int for each in listed):
                yield section, key, value
