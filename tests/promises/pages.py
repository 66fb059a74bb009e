"""The README and the pages of the documentation as tests see them: their headings, their links, their code blocks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from docs import make

PAGES = make.pages()

_MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """A fenced block of code: its language and its text. Its name is that of a file, if its first line says so."""

    language: str
    text: str

    @property
    def name(self) -> str:
        """`recipe.yaml` of a block that begins with `# recipe.yaml`."""
        match = re.match(r"# ([\w-]+\.(?:yaml|py))\n", self.text)
        return match[1] if match else ""


def tokens(page: Path) -> Iterator[Token]:
    """Everything in a page, what stands within lines too."""
    for token in _MARKDOWN.parse(make.read(page)):
        yield token
        yield from token.children or ()


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks."""
    return [Block(token.info, token.content) for token in tokens(page) if token.type == "fence"]


def anchors(page: Path) -> set[str]:
    """What may stand behind `#` in a link to the page: its headings as GitHub spells them there."""
    found = _MARKDOWN.parse(make.read(page))
    headings = [after.content for token, after in itertools.pairwise(found) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Where the page's links and pictures lead."""
    targets = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(page)]
    return [str(target) for target in targets if target]
