"""The weights by which a mixture's layers choose experts: made of prompts' embeddings, or random.

They are made when they are read, as a model of their own; tokens are told before, from the tokenizer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from streammerge.compute.expressions import External, Node
from streammerge.errors import PlanError
from streammerge.formats.files import read_errors
from streammerge.formats.objects import UnreadableError, read_object
from streammerge.methods.random_numbers import Stream
from streammerge.tensors import DTYPES, Model, TensorInfo, described

if TYPE_CHECKING:
    import torch

TOKENIZER: Final = "tokenizer.json"

MAX_TOKENIZER: Final = 64 * 2**20
"""The longest tokenizer, in bytes, that is read."""

MAX_SMALL: Final = 4 * 2**20
"""The longest of the small files beside it."""

LEAST: Final = 1e-8
"""What the length of a vector is taken for, if it is less."""

Counts = Mapping[int, int]
"""How often each token occurs."""


@dataclass(frozen=True)
class Prompted:
    """The tokens of an expert's prompts: those that are its business, and those that are not."""

    positive: Counts
    negative: Counts


def prompted(folder: Path, positive: Sequence[Sequence[str]], negative: Sequence[Sequence[str]]) -> list[Prompted]:
    """The tokens of prompts, by the tokenizer in a folder; PlanError if it has none, or nothing can read it."""
    encode = _Encoder(folder)
    return [Prompted(encode(own), encode(others)) for own, others in zip(positive, negative, strict=True)]


class _Encoder:
    """Counts the tokens of texts, each behind the token with which texts begin, if there is one."""

    def __init__(self, folder: Path) -> None:
        path = folder / TOKENIZER
        if not path.is_file():
            raise PlanError(
                f"{folder}: there is no {TOKENIZER}, by which the experts' prompts become tokens",
                advice="Save the tokenizer there with transformers, or write gate_mode: random.",
            )
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise PlanError(
                "gates are to be made of prompts, which takes Hugging Face's tokenizers, and that isn't installed",
                advice="pip install tokenizers, or write gate_mode: random.",
            ) from None
        with read_errors(path), path.open("rb") as file:
            encoded = file.read(MAX_TOKENIZER + 1)
        if len(encoded) > MAX_TOKENIZER:
            raise PlanError(f"{path}: a tokenizer of more than {MAX_TOKENIZER:,} bytes is not read")
        try:
            self.tokenizer = Tokenizer.from_str(encoded.decode("utf-8"))
        except Exception as error:  # the library raises Exception itself
            raise PlanError(f"{path}: is no tokenizer: {error}", advice="Save it again with transformers.") from error
        self.begin = _begin(folder)

    def __call__(self, texts: Sequence[str]) -> Counts:
        counts: Counter[int] = Counter()
        for text in texts:
            counts.update(self.tokenizer.encode(self.begin + text, add_special_tokens=False).ids)
        return counts


def _begin(folder: Path) -> str:
    """The token with which texts begin, by the tokenizer's config; "" where there is none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        try:
            values = read_object(path, MAX_SMALL) if path.is_file() else {}
        except UnreadableError as error:
            raise PlanError(f"{path}: can't be read: {error}", advice="Save the tokenizer again.") from None
        token = values.get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return ""


@dataclass(frozen=True, eq=False)
class EmbeddedGates:
    """Gates of prompts: of each expert Σ count · embedding, as long as 1, less the same of its negative prompts.

    mergekit's `cheap_embed`: every layer has the same.
    """

    model: Model
    embedding: str
    experts: Sequence[Prompted]

    @property
    def width(self) -> int:
        """How many elements an embedding has."""
        return self.model.tensors[self.embedding].shape[1]

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """One tensor for all layers, called by what it is made of."""
        said = json.dumps([[sorted(each.positive.items()), sorted(each.negative.items())] for each in self.experts])
        digest = hashlib.blake2b(said.encode(), digest_size=12).hexdigest()
        return {f"gates of {self.embedding} {digest}": described(DTYPES["F32"], (len(self.experts), self.width))}

    def node(self) -> Node:
        """The gates of any layer."""
        name, info = next(iter(self.tensors.items()))
        return External(info, self, name, told=name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the gates."""
        return self._gates.flatten()[start:stop].clone()

    @functools.cached_property
    def _gates(self) -> torch.Tensor:
        import torch

        rows = []
        for expert in self.experts:
            vector = _unit(self._sum(expert.positive))
            rows.append(_unit(vector - _unit(self._sum(expert.negative))) if expert.negative else vector)
        gates: torch.Tensor = torch.stack(rows).float()
        return gates

    def _sum(self, counts: Counts) -> torch.Tensor:
        import torch

        total = torch.zeros(self.width, dtype=torch.float64)
        for token, count in sorted(counts.items()):
            row = self.model.read(self.embedding, token * self.width, (token + 1) * self.width)
            total.add_(row.double(), alpha=count)
        return total


def _unit(vector: torch.Tensor) -> torch.Tensor:
    """The vector as long as 1; its squares are added up exactly, so that all machines agree."""
    return vector / max(math.sqrt(math.fsum((vector * vector).tolist())), LEAST)


@dataclass(frozen=True, eq=False)
class RandomGates:
    """Gates to be trained: normally distributed, or even between −1/√width and 1/√width, as layers begin."""

    name: str
    count: int
    width: int
    seed: int
    is_uniform: bool

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The gates of one layer."""
        called = f"{self.name} {self.seed} {'uniform' * self.is_uniform}".rstrip()
        return {called: described(DTYPES["F32"], (self.count, self.width))}

    def node(self) -> Node:
        """The gates of this layer."""
        name, info = next(iter(self.tensors.items()))
        return External(info, self, name, told=name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the gates."""
        import torch

        stream, cpu = Stream.of(repr((self.seed, self.name)).encode()), torch.device("cpu")
        if not self.is_uniform:
            return stream.normal(start, stop - start, cpu, torch.float32)
        return stream.uniform(start, stop - start, cpu).mul_(2).sub_(1).mul_(1 / math.sqrt(self.width))


Gates = EmbeddedGates | RandomGates


def check_tokens(experts: Sequence[Prompted], called: Sequence[str], rows: int) -> None:
    """PlanError if prompts have tokens that the embedding has no row for, or no tokens at all."""
    for expert, name in zip(experts, called, strict=True):
        if not expert.positive:
            raise PlanError(f"{name}: its prompts have no tokens", advice="Write some text.")
        if (most := max([*expert.positive, *expert.negative])) >= rows:
            raise PlanError(
                f"{name}: its prompts have the token {most}, and the base's embedding has {rows:,} rows",
                advice="The base's tokenizer is of another model.",
            )
