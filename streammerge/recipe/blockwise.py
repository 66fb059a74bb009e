"""A parameter's values by block: a list, a preset, or names with values; and by elements within the blocks.

    {blocks: [0, 1, 0.9, …]}                     one value per block, in the order of the architecture
    {blocks: GRAD_V}                             a preset
    {blocks: {IN00-IN05: 0.3, M00: 1, default: 0.5}}  by name; of entries for the same block the last holds
    {blocks: …, elements: "OUT03 OUT04:attn2:0.5, OUT05:NOT attn:0.2"}

A list or names may also be one piece of text, as on the command line: "0,1,0.9,…", "IN00-IN05=0.3,M00=1". A tensor
whose block has no value, where there is no default either, is as if the parameter were not set here.

Elements are SuperMerger's BLOCKS:ELEMENTS:RATIO, separated by commas or lines. BLOCKS are names and ranges, separated
by spaces, all if there are none; ELEMENTS are parts of tensor names; NOT before either means all others. They hold
where the blocks' values would, and the last that fits a tensor holds. M00 of SDXL is M00 here, not IN09.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from streammerge.errors import RecipeError, suggestion
from streammerge.models.blocks import BASE, Blocks, ListForm, abridged, normal_name
from streammerge.recipe.presets import PRESETS, find_preset, preset_weights
from streammerge.recipe.scalars import Scalar, is_number, scalar, scalar_of_text

DEFAULT: Final = "default"
KEYS: Final = ("blocks", "elements")


@dataclass(frozen=True, slots=True)
class Selection:
    """Words that choose some of several things, or all but these; all if there are no words."""

    words: tuple[str, ...] = ()
    inverted: bool = False

    @classmethod
    def parse(cls, text: str) -> Selection:
        """`IN00 IN01`, or with NOT before them."""
        words = text.split()
        inverted = words[:1] == ["NOT"]
        return cls(tuple(words[inverted:]), inverted)

    def __str__(self) -> str:
        return " ".join(["NOT"] * self.inverted + list(self.words))


@dataclass(frozen=True, slots=True)
class NamedValue:
    """The value for blocks that are named: `IN00`, `IN00-IN05`, `IN00 M00`, or `default`."""

    blocks: str
    value: Scalar

    @property
    def is_default(self) -> bool:
        """Whether it is the value for all blocks that are not named."""
        return self.blocks.lower() == DEFAULT


@dataclass(frozen=True, slots=True)
class Element:
    """The value for the tensors of some blocks whose names have certain parts."""

    blocks: Selection
    parts: Selection
    value: Scalar

    def holds_for(self, name: str) -> bool:
        """Whether the tensor's name has one of the parts, or none of them if the selection is inverted."""
        return not self.parts.words or any(part in name for part in self.parts.words) is not self.parts.inverted

    def __str__(self) -> str:
        return f"{self.blocks}:{self.parts}:{str(self.value).removesuffix('.0')}"


@dataclass(frozen=True, slots=True)
class BlockSetting:
    """A parameter's values by block, as a recipe gives them: one of a list, a preset and names, and elements."""

    values: tuple[Scalar, ...] = ()
    preset: str = ""
    named: tuple[NamedValue, ...] = ()
    elements: tuple[Element, ...] = ()

    def every_value(self) -> Iterator[Scalar]:
        """Every value that a tensor may get."""
        yield from self.values
        if self.preset:
            yield from (value for weights in preset_weights(self.preset) for value in weights)
        yield from (entry.value for entry in self.named)
        yield from (element.value for element in self.elements)

    def describe(self) -> dict[str, Any]:
        """The setting as a recipe writes it."""
        named = {entry.blocks: entry.value for entry in self.named}
        blocks = list(self.values) or self.preset or named
        elements = ", ".join(map(str, self.elements))
        return {key: value for key, value in {"blocks": blocks, "elements": elements}.items() if value}


# Parsing


def is_block_setting(raw: Any) -> bool:  # noqa: ANN401
    """Whether a recipe's value is one by block: a map that says so, or SuperMerger's list as text."""
    if isinstance(raw, dict):
        return not raw.keys().isdisjoint(KEYS)
    return isinstance(raw, str) and "," in raw and all(map(is_number, _entries(raw)))


def parse_block_setting(raw: Any, where: str) -> BlockSetting:  # noqa: ANN401
    """Check what `is_block_setting` found, as far as no model is needed; RecipeError says where."""
    if not isinstance(raw, dict):
        raw = {"blocks": raw}
    unknown = [str(key) for key in raw if key not in KEYS]
    if unknown:
        raise RecipeError(
            f"{where}: unknown key {unknown[0]!r} beside blocks or elements",
            advice=f"{suggestion(unknown[0], KEYS)}Known: {', '.join(KEYS)}; values for blocks stand under blocks.",
        )
    elements = raw.get("elements")
    if isinstance(elements, list):
        elements = ", ".join(map(str, elements))
    if not isinstance(elements, str | None):
        raise RecipeError(f"{where}: elements must be text like 'OUT03 OUT04:attn2:0.5', found {elements!r}")
    parsed = tuple(_parse_element(entry, where) for entry in _entries(elements or ""))
    match raw.get("blocks"):
        case None if parsed:
            return BlockSetting(elements=parsed)
        case [_, *_] as values:
            return BlockSetting(values=tuple(scalar(value, where) for value in values), elements=parsed)
        case dict() as named if named:
            return BlockSetting(named=_parse_named(named, where), elements=parsed)
        case str() as text if text.strip():
            return _parse_text(text, parsed, where)
        case other:
            raise RecipeError(
                f"{where}: blocks must be a list of values, a preset's name, or a map from block to value, "
                f"found {other!r}",
                advice="See: streammerge methods --presets.",
            )


def _parse_named(named: Mapping[Any, Any], where: str) -> tuple[NamedValue, ...]:
    return tuple(NamedValue(str(name).strip(), scalar(value, f"{where}: {name}")) for name, value in named.items())


def _parse_text(text: str, elements: tuple[Element, ...], where: str) -> BlockSetting:
    entries = _entries(text)
    if all(map(is_number, entries)):
        return BlockSetting(values=tuple(scalar_of_text(entry, where) for entry in entries), elements=elements)
    if "=" not in text:
        return BlockSetting(preset=find_preset(text, where), elements=elements)
    named = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise RecipeError(f"{where}: expected BLOCK=VALUE, found {entry!r}", advice="As in IN00-IN05=0.3,M00=1.")
        named[name.strip()] = scalar_of_text(value, where)
    return BlockSetting(named=_parse_named(named, where), elements=elements)


def _parse_element(entry: str, where: str) -> Element:
    fields = entry.split(":")
    if len(fields) != 3:
        raise RecipeError(
            f"{where}: elements: expected BLOCKS:ELEMENTS:RATIO, found {entry!r}",
            advice="As in OUT03 OUT04:attn2 attn1.to_out:0.5; blocks or elements that are left empty mean all.",
        )
    blocks, parts = Selection.parse(fields[0]), Selection.parse(fields[1])
    for selection, what in ((blocks, "blocks"), (parts, "elements")):
        if selection.inverted and not selection.words:
            raise RecipeError(f"{where}: elements: {entry!r}: NOT stands before no {what}")
    if not is_number(fields[2]):
        raise RecipeError(
            f"{where}: elements: {entry!r}: expected a number as the ratio, found {fields[2].strip()!r}",
            advice="Random ratios (R, U, X) are not drawn here: write the number that was." * _is_random(fields[2]),
        )
    return Element(blocks, parts, scalar_of_text(fields[2], where))


def _is_random(text: str) -> bool:
    return text.strip().upper() in ("R", "U", "X", "ER", "EU", "EX")


def _entries(text: str) -> list[str]:
    """What stands between commas and line ends."""
    return [entry.strip() for entry in re.split(r"[,\n]", text) if entry.strip()]


# What a setting comes to for a model's blocks


@dataclass(frozen=True, slots=True, eq=False)
class BoundElement:
    """An element with the blocks that it holds for."""

    element: Element
    blocks: frozenset[str]

    def holds_for(self, name: str, places: Sequence[str]) -> bool:
        """Whether it holds for the tensor of this name, in these blocks."""
        return self.element.holds_for(name) and self.blocks.isdisjoint(places) is self.element.blocks.inverted


@dataclass(frozen=True, slots=True, eq=False)
class BoundSetting:
    """The values by the names of a model's own blocks."""

    values: Mapping[str, Scalar]
    default: Scalar | None
    elements: tuple[BoundElement, ...]

    def value(self, name: str, places: Sequence[str]) -> Scalar | None:
        """The value for a tensor in these blocks, the narrowest first; None where there is none."""
        for bound in reversed(self.elements):
            if bound.holds_for(name, places):
                return bound.element.value
        return next((self.values[place] for place in places if place in self.values), self.default)


@functools.lru_cache(maxsize=256)
def bind(setting: BlockSetting, blocks: Blocks) -> BoundSetting:
    """The setting's values for these blocks; RecipeError if it doesn't fit them."""
    if not blocks.forms:
        raise RecipeError(
            f"values by block need blocks that have names, and the layout model ({blocks.architecture}) has none",
            advice="Use a list of numbers, stretched over the layers; a list of {filter, value}; or rules.",
        )
    default = next((entry.value for entry in setting.named if entry.is_default), None)
    entries = [entry for entry in setting.named if not entry.is_default]
    named = {block: entry.value for entry in entries for block in _chosen(entry.blocks.split(), blocks)}
    elements = tuple(_bound(element, blocks) for element in setting.elements)
    return BoundSetting(named or _listed(setting, blocks), default, elements)


def _listed(setting: BlockSetting, blocks: Blocks) -> Mapping[str, Scalar]:
    if blocks.unsure and (setting.preset or setting.values):
        raise RecipeError(
            f"a list of values by block, or a preset, is of all blocks, and {blocks.unsure}",
            advice="Give them by the blocks' names, as in IN00-IN05=0.3,default=1.",
        )
    values = _preset_of(setting.preset, blocks) if setting.preset else setting.values
    names = _form_of(len(values), blocks).blocks if values else ()
    return dict(zip(names, values, strict=True))


def _preset_of(name: str, blocks: Blocks) -> tuple[float, ...]:
    """The preset's values: its own for so many blocks, or Stable Diffusion's where these are taken too."""
    for form in sorted(blocks.forms, key=lambda form: len(form.blocks) != len(blocks.order)):
        if name in PRESETS.get(len(form.blocks), {}):
            return PRESETS[len(form.blocks)][name]
    fitting = sorted(PRESETS.get(len(blocks.order), {}))
    raise RecipeError(
        f"the preset {name} has no values for the {len(blocks.order)} blocks of {blocks.architecture}",
        found=[abridged(blocks.order)],
        advice=f"Presets for it: {', '.join(fitting)}." if fitting else "Presets are for UNets; give values by block.",
    )


def list_remark(setting: BlockSetting, blocks: Blocks) -> str:
    """What the user should know of a list of so many values; empty if nothing."""
    return _form_of(len(setting.values), blocks).remark if setting.values else ""


def _form_of(count: int, blocks: Blocks) -> ListForm:
    for form in blocks.forms:
        if len(form.blocks) == count:
            return form
    raise RecipeError(
        f"{count} values by block, and {blocks.architecture} has {len(blocks.order)} blocks",
        found=[abridged(blocks.order)],
        advice=f"Give so many values in this order: {', '.join(map(str, blocks.forms))}.",
    )


def _bound(element: Element, blocks: Blocks) -> BoundElement:
    words = element.blocks.words
    bound = BoundElement(element, frozenset(_chosen(words, blocks) if words else blocks.names))
    if not any(bound.holds_for(name, places) for name, places in blocks.places.items()):
        raise RecipeError(
            f"elements: {str(element)!r} fits no tensor",
            advice="Elements are parts of tensor names, which `streammerge inspect --tensors` lists.",
        )
    return bound


def _chosen(words: Iterable[str], blocks: Blocks) -> Iterator[str]:
    """The blocks that names and ranges mean."""
    for word in words:
        first, dash, last = word.partition("-")
        if not dash:
            yield _known(word, blocks, blocks.names)
            continue
        start, stop = (blocks.order.index(_known(end, blocks, blocks.order)) for end in (first, last))
        if stop < start:
            raise RecipeError(f"blocks {word}: {last} comes before {first}", found=[abridged(blocks.order)])
        yield from blocks.order[start : stop + 1]


def _known(word: str, blocks: Blocks, names: Sequence[str]) -> str:
    name = normal_name(word)
    if name not in (*names, BASE):
        raise RecipeError(
            f"{blocks.architecture} has no block {word!r}",
            found=[abridged(names)],
            advice=f"{suggestion(name, names)}These are its blocks.".strip(),
        )
    return name
