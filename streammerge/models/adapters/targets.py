"""What an adapter's modules are in a model: its tensors, whole or some of their rows, whatever either calls them.

    lora_unet_down_blocks_0_attentions_0_proj_in  ─►  model.diffusion_model.input_blocks.1.1.proj_in.weight

Nothing is looked up in tables of modules. What stands before a module's name says which component of the model it is
meant for; the rest is compared with the component's own names, in the naming of its file and in the other one if there
is another, with dots and underscores counting the same: so a new architecture needs nothing here.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.models.adapters.dialects import ANY, PEFT, PREFIXES, underscored, unparalleled
from streammerge.models.adapters.experts import sources_of
from streammerge.models.adapters.synonyms import language_paths, paths_apart, with_text_model, xlabs_paths
from streammerge.models.dialects import Source, recognise
from streammerge.models.dialects.pieces import rows, whole
from streammerge.models.dialects.places import ROLES, Role
from streammerge.models.dialects.recognition import moved
from streammerge.models.dialects.rules import accented
from streammerge.models.mixtures.layouts import Block, blocks_of
from streammerge.models.wrappers import bare_names, bare_tensors
from streammerge.tensors import TensorInfo, described


@dataclass(frozen=True)
class Targets:
    """A model's tensors, as adapters may mean them."""

    tensors: Mapping[str, TensorInfo]

    def find(self, module: str, part: str) -> Source | None:
        """The tensor that a module's `weight`, or its `bias`, is; None if there is none, or several might be meant.

        A tensor may stand for itself, where it is no module's weight: `blocks.0.modulation`.
        """
        return self._seen_through(module, lambda targets, name: targets._tensor(name, part))

    def experts(self, module: str, parameter: str) -> Source | None:
        """The tensor, or the tensors one below the other, that a parameter of a layer's experts is."""
        return self._seen_through(module, lambda targets, name: targets._experts(name, parameter))

    def _seen_through(self, module: str, find: Callable[[Targets, str], Source | None]) -> Source | None:
        """What is found of a module under its name, or else without what wrappers put into it, or into the model's."""
        for name in dict.fromkeys((module, unparalleled(module))):
            if found := find(self, name):
                return found
            if self._bare_names and (found := find(self._unwrapped, name)):
                return moved(found, self._bare_names.__getitem__)
        return None

    @functools.cached_property
    def _bare_names(self) -> Mapping[str, str]:
        return bare_names(self.tensors)

    @functools.cached_property
    def _unwrapped(self) -> Targets:
        """The same tensors without what wrappers put into their names."""
        return Targets(bare_tensors(self.tensors))

    def _tensor(self, module: str, part: str) -> Source | None:
        tails = (f".{part}", "") if part == "weight" else (f".{part}",)
        return next(filter(None, (self._found(module, tail) for tail in tails)), None)

    def _found(self, module: str, tail: str) -> Source | None:
        for prefix in ANY:
            name = module.removeprefix(prefix) + tail
            if module.startswith(prefix) and name in self.tensors:
                return whole(name, self.tensors[name])
        meant = self._meant(module, tail)
        return meant[0] if len(meant) == 1 else None

    def _experts(self, module: str, parameter: str) -> Source | None:
        found = self._tensor(module, parameter)
        return found or sources_of(module.removeprefix(PEFT), parameter, self._blocks, self.tensors)

    @functools.cached_property
    def _blocks(self) -> Mapping[str, Block]:
        """The experts of every layer."""
        return blocks_of(self.tensors)

    def _meant(self, module: str, tail: str) -> list[Source]:
        """The tensors that a name may mean, in all components that it may be of: each once."""
        found: dict[object, Source] = {}
        for index, rest in self._indexes(module):
            sources = (_joined([index.get(underscored(path + tail)) for path in paths]) for paths in _ways(rest))
            if source := next(filter(None, sources), None):
                found.setdefault(source.pieces, source)
        return list(found.values())

    def near(self, module: str, part: str) -> str:
        """The model's own name that comes nearest, in words, or those that may be meant; nothing where none does."""
        if meant := self._meant(module, f".{part}"):
            return " and ".join(source.tensors[0] for source in meant) + ", of which either may be meant"
        for index, rest in self._indexes(module):
            for key in difflib.get_close_matches(underscored(f"{rest}_{part}"), list(index)[:NEAR], n=1):
                if source := index[key]:
                    return source.tensors[0]
        return ""

    def _indexes(self, module: str) -> Iterator[tuple[Mapping[str, Source | None], str]]:
        """Where to look a module up, and as what."""
        inner = module.removeprefix(PEFT)
        for prefix, roles in PREFIXES.items():
            if inner.startswith(prefix):
                found = [self._by_role[role] for role in roles if role in self._by_role] or [self._bare]
                yield from ((index, inner.removeprefix(prefix).removeprefix(PEFT)) for index in found)
        if encoder := _ENCODER.match(inner):
            yield from ((index, inner[encoder.end() :]) for index in self._languages(encoder.group()))
        if not inner.startswith(tuple(PREFIXES)):
            rest = next(inner.removeprefix(prefix) for prefix in ANY if inner.startswith(prefix))
            yield self._bare, rest
            yield from ((index, rest) for index in self._by_role.values())

    def _languages(self, prefix: str) -> Iterator[Mapping[str, Source | None]]:
        """Where to look a text encoder's modules up that is a language model: in a checkpoint, or if it is all."""
        if not prefix.startswith("text_encoders."):
            yield self._language
        if "denoiser" not in self._by_role:
            yield self._bare

    @functools.cached_property
    def _language(self) -> Mapping[str, Source | None]:
        """The tensors of text encoders that have no role of their own, by what they are called in them."""
        found: dict[str, Source | None] = {}
        for name, info in self.tensors.items():
            if (encoder := _ENCODER.match(name)) and encoder.group() not in ROLES:
                _note(found, name[encoder.end() :], whole(name, info))
        return found

    @functools.cached_property
    def _bare(self) -> Mapping[str, Source | None]:
        """All tensors by their own names."""
        found: dict[str, Source | None] = {}
        for name, info in self.tensors.items():
            _note(found, name, whole(name, info))
        return found

    @functools.cached_property
    def _by_role(self) -> Mapping[Role, Mapping[str, Source | None]]:
        """The tensors of each component by what they are called in it, in either naming."""
        found: dict[Role, dict[str, Source | None]] = {}
        known = recognise(self.tensors)
        for component in known.components if known else ():
            index = found.setdefault(component.role, {})
            for side in sorted(("ours", "theirs"), key=lambda side: side != component.side):
                for name, source in component.seen(side).items():  # type: ignore[arg-type]
                    _note(index, name, moved(source, component.place.own))
            for name, source in component.seen("ours").items() if component.kind.accent else ():
                _note(index, accented(name, component.kind.accent), moved(source, component.place.own))
        for name, info in self.tensors.items():
            prefix = next((each for each in _ROOTS if name.startswith(each)), "")
            role = ROLES[prefix]
            if role is not None and not (known and known.component(role)):
                _note(found.setdefault(role, {}), name.removeprefix(prefix), whole(name, info))
        return found


NEAR: Final = 20_000
"""How many names are compared to find the nearest."""

_ENCODER: Final = re.compile(r"lora_te\d?_|text_encoder(?:_\d)?\.|text_encoders\.\w+\.transformer\.")
"""How names of text encoders' modules begin, and ComfyUI's of their tensors."""

_ROOTS: Final = tuple(sorted(ROLES.keys() - {"", "model."}, key=len, reverse=True))
"""What names of components begin with, in models that aren't known: those of language models begin with `model.`."""


def _note(index: dict[str, Source | None], name: str, source: Source) -> None:
    """Add a tensor under its name; what two of them would be called is no name of either."""
    key = underscored(name)
    known = index.setdefault(key, source)
    if known is not source and (known is None or known.pieces != source.pieces):
        index[key] = None


def _joined(sources: Sequence[Source | None]) -> Source | None:
    """Several tensors as one, one after the other by rows; None if there are none, or one of them isn't there."""
    parts = [source for source in sources if source is not None]
    if not parts or len(parts) < len(sources):
        return None
    if len(parts) == 1:
        return parts[0]
    first = parts[0].info
    if any(part.transposed or part.info.shape[1:] != first.shape[1:] for part in parts):
        return None
    info = described(first.dtype, (sum(map(rows, (part.info for part in parts))), *first.shape[1:]))
    return Source(info, tuple(piece for part in parts for piece in part.pieces))


def _ways(module: str) -> Iterator[tuple[str, ...]]:
    """A module's name, and what other programs call the same: one module of the model, or several of which it is made.

    diffusers called processors so in its older versions, transformers 5 leaves out CLIP's `text_model`, XLabs has its
    own names, and HunyuanVideo 1.5 has three modules where ComfyUI has one.
    """
    yield (module,)
    plain = re.sub(r"([._])processor[._]", r"\1", module)
    if plain != module:
        yield (plain,)
    if plain.endswith("to_out"):
        yield (f"{plain}.0",)
    yield (with_text_model(module),)
    yield xlabs_paths(module)
    yield paths_apart(module)
    yield from ((path,) for path in language_paths(module))
