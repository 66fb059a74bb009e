"""What `streammerge inspect` tells of one model: what it is, what it is made of, and what its makers wrote into it."""

from __future__ import annotations

import fnmatch
import heapq
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from streammerge.errors import one_line
from streammerge.formats.pipelines import NO_SCHEDULER, Scheduler
from streammerge.formats.torchzip.state_dicts import NONE_LEFT, LeftTensors
from streammerge.models.adapters.profile import profile_of
from streammerge.models.adapters.recognition import Adapter, find_adapter
from streammerge.models.architecture import Component, components, count_dtypes, guess_architecture
from streammerge.models.blocks import Blocks, abridged
from streammerge.models.codes import find_quantised
from streammerge.models.prediction import Prediction, few_steps, stated_prediction
from streammerge.report import short_hashes
from streammerge.tensors import TensorInfo

LARGEST: Final = 5
"""How many of the largest tensors are shown."""

KEY_WIDTH: Final = 32
"""How many characters of a metadata key are shown, at most."""

ENTRY_WIDTH: Final = 24
"""How many characters of a text inside a JSON value are shown, at most: a digest has 64."""

KINDS: Final = 3
"""How many kinds of quantisation are shown, the most frequent."""

LONGEST_JSON: Final = 1_000_000
"""Metadata values of more characters are not parsed, only cut."""


@dataclass(frozen=True)
class Inspection:
    """Everything that a model's header tells.

    `container` is the kind of file, such as "safetensors" or "sharded safetensors (3 files)"; `nbytes` the size on
    disk; `dtypes` the element types with the number of tensors of each, most frequent first; `left` what a torch file
    holds beside the model; `broken` what is wrong with text encoders' positions, by tensor; `hashes` those of its
    files and of their tensors alone, if they were asked for; `scheduler` what a pipeline's says of it.
    """

    path: Path
    container: str
    nbytes: int
    architecture: str
    components: tuple[Component, ...]
    dtypes: tuple[tuple[str, int], ...]
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    left: LeftTensors = NONE_LEFT
    broken: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    scheduler: Scheduler = NO_SCHEDULER

    @property
    def prediction(self) -> Prediction | None:
        """What a diffusion model says that it predicts."""
        return stated_prediction(self.tensors, self.metadata, self.scheduler)

    @property
    def steps(self) -> str:
        """By what a model's metadata say that it was distilled to be sampled in few steps; nothing if they don't."""
        return few_steps(self.metadata)

    @property
    def elements(self) -> int:
        """The number of elements of all tensors together."""
        return sum(info.elements for info in self.tensors.values())

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks by which parameters may be given; none where blocks have no names."""
        return Blocks.of(self.tensors).names

    @property
    def adapter(self) -> Adapter | None:
        """What the model has of an adapter, or what it is of one."""
        return find_adapter(self.tensors)

    @property
    def quantised(self) -> Mapping[tuple[str, bool], int]:
        """How many weights are stored as codes, by their kind and whether they can be decoded, most frequent first."""
        weights = {weight.codes: (weight.kind, weight.is_readable) for weight in find_quantised(self.tensors).values()}
        return dict(Counter(weights.values()).most_common())

    def largest(self, count: int = LARGEST) -> Mapping[str, TensorInfo]:
        """The tensors that take the most bytes, largest first."""
        return dict(heapq.nlargest(count, self.tensors.items(), key=lambda item: item[1].nbytes))

    def matching(self, pattern: str) -> Mapping[str, TensorInfo]:
        """The tensors whose names fit the glob, in the model's order."""
        fits = re.compile(fnmatch.translate(pattern)).match
        return {name: info for name, info in self.tensors.items() if fits(name)}

    def to_json(self, *, tensors: bool = False, match: str | None = None) -> dict[str, Any]:
        """The same in plain values; the tensors one by one only if asked for, all or those that fit a glob."""
        plain: dict[str, Any] = {
            "path": str(self.path),
            "container": self.container,
            "bytes": self.nbytes,
            "architecture": self.architecture,
            "tensor_count": len(self.tensors),
            "elements": self.elements,
            "dtypes": dict(self.dtypes),
            "adapter": _plain_adapter(self),
            "quantised": [
                {"kind": kind, "weights": weights, "decoded": is_readable}
                for (kind, is_readable), weights in self.quantised.items()
            ],
            "prediction": self.prediction and {"kind": self.prediction.kind, "said_by": self.prediction.said_by},
            "few_steps": self.steps,
            "broken_positions": dict(self.broken),
            "blocks": list(self.blocks),
            "components": [_plain_component(part) for part in self.components],
            "largest": _plain_tensors(self.largest()),
            "hashes": {path: dict(found) for path, found in self.hashes.items()},
            "beside_model": self.left.to_json(),
            "metadata": dict(self.metadata),
        }
        if tensors or match is not None:
            plain["tensors"] = _plain_tensors(self.tensors if match is None else self.matching(match))
        return plain


def inspect_model(
    tensors: Mapping[str, TensorInfo],
    *,
    path: str | Path,
    nbytes: int,
    metadata: Mapping[str, str] | None = None,
    container: str,
    left: LeftTensors = NONE_LEFT,
    broken: Mapping[str, str] | None = None,
    hashes: Mapping[str, Mapping[str, str]] | None = None,
    scheduler: Scheduler = NO_SCHEDULER,
) -> Inspection:
    """Look at a model's header: what it is, and what it is made of."""
    return Inspection(
        path=Path(path),
        container=container,
        nbytes=nbytes,
        architecture=guess_architecture(tensors),
        components=components(tensors),
        dtypes=count_dtypes(tensors),
        metadata=dict(metadata or {}),
        tensors=tensors,
        left=left,
        broken=broken or {},
        hashes=hashes or {},
        scheduler=scheduler,
    )


def render(inspection: Inspection, *, tensors: bool = False, match: str | None = None, width: int = 100) -> str:
    """The inspection as text for a terminal of this width; with the tensors one by one, all or those that fit a glob.

    Names of tensors are never cut. What a stranger wrote is shown without its control characters.
    """
    left = one_line(f"beside the model: {inspection.left}") if inspection.left.count else ""
    sections = [_heading(inspection), _hash_lines(inspection.hashes), left]
    sections += [_component_table(inspection), _largest_table(inspection)]
    if inspection.metadata:
        sections.append(_metadata_table(inspection.metadata, width))
    if tensors or match is not None:
        sections.append(_tensor_table(inspection, match))
    return "\n\n".join(section for section in sections if section)


def _heading(inspection: Inspection) -> str:
    holdings = (
        f"{_counted(len(inspection.tensors), 'tensor')}, {count_text(inspection.elements)} elements, "
        f"{_dtypes_text(inspection.dtypes)}"
    )
    file = f"{one_line(str(inspection.path))}   {inspection.container}, {size_text(inspection.nbytes)}"
    if not inspection.tensors:
        return f"{file}\nno tensors"
    blocks = [f"blocks: {abridged(inspection.blocks)}"] if inspection.blocks else []
    told = [
        *_meaning_lines(inspection),
        *_adapter_lines(inspection),
        *_quantised_lines(inspection.quantised),
    ]
    return "\n".join([file, f"{inspection.architecture}: {holdings}", *blocks, *told])


def _hash_lines(hashes: Mapping[str, Mapping[str, str]]) -> str:
    """A file's hashes in a line, with its name where there are several."""
    lines = []
    for path, found in hashes.items():
        named = f"   {one_line(Path(path).name)}" if len(hashes) > 1 else ""
        lines.append(f"sha256 {found['sha256']}   {short_hashes(found['sha256'], found['tensors'])}{named}")
    return "\n".join(lines)


def _meaning_lines(inspection: Inspection) -> list[str]:
    """How the model is to be sampled, as far as it says so, and what is wrong with its positions."""
    lines = [f"predicts {inspection.prediction}"] if inspection.prediction else []
    lines += [f"for few steps: {inspection.steps}"] if inspection.steps else []
    lines += [f"broken: {one_line(name)} ({found}); a merge mends it" for name, found in inspection.broken.items()]
    return lines


def _adapter_lines(inspection: Inspection) -> list[str]:
    """What merges can do with an adapter, or with a model that has one inside."""
    adapter = inspection.adapter
    if adapter is None:
        return []
    if adapter.is_inside:
        return [f"beside its weights: {adapter}, {_counted(len(adapter.tensors), 'tensor')} (copied, never averaged)"]
    profile = profile_of(inspection.tensors, inspection.metadata, inspection.path)
    use = "factors of changes to a model; put them into their model: streammerge bake"
    return [*([one_line(str(profile))] if profile.modules else []), use]


def _quantised_lines(quantised: Mapping[tuple[str, bool], int]) -> list[str]:
    """The weights that are stored as codes, and what merges can do with them."""
    lines = [
        f"quantised: {_counted(weights, 'weight')}, {one_line(kind)} "
        f"({'decoded while they are read' if is_readable else 'copied, never merged'})"
        for (kind, is_readable), weights in quantised.items()
    ]
    more = f"quantised: {_counted(len(lines) - KINDS, 'other kind')}"
    return lines if len(lines) <= KINDS else [*lines[:KINDS], more]


def _component_table(inspection: Inspection) -> str:
    if not inspection.components:
        return ""
    heading = ("component", "tensors", "elements", "size", "dtypes", "prefix")
    rows = [
        (
            part.name,
            f"{part.tensors:,}",
            count_text(part.elements),
            size_text(part.nbytes),
            _dtypes_text(part.dtypes),
            one_line(part.prefix),
        )
        for part in inspection.components
    ]
    return aligned([heading, *rows], "<>>><<")


def _largest_table(inspection: Inspection) -> str:
    largest = inspection.largest()
    return f"largest tensors\n{aligned(_tensor_rows(largest), '>><<<', indent=2)}" if largest else ""


def _metadata_table(metadata: Mapping[str, str], width: int) -> str:
    keys = {key: shortened(key, KEY_WIDTH) for key in metadata}
    room = max(20, width - 4 - max(map(len, keys.values())))
    rows = [(keys[key], metadata_text(value, room)) for key, value in metadata.items()]
    return f"metadata\n{aligned(rows, '<<', indent=2)}"


def _tensor_table(inspection: Inspection, match: str | None) -> str:
    found = inspection.tensors if match is None else inspection.matching(match)
    if match is None:
        title = "tensors"
    elif found:
        title = f"{_counted(len(found), 'tensor')} matching {one_line(match)}"
    else:
        return f"no tensor matches {one_line(match)}"
    return f"{title}\n{aligned(_tensor_rows(found), '>><<<', indent=2)}"


def _tensor_rows(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, ...]]:
    return [
        (count_text(info.elements), size_text(info.nbytes), info.dtype.name, str(list(info.shape)), one_line(name))
        for name, info in tensors.items()
    ]


def _plain_component(component: Component) -> dict[str, Any]:
    return {
        "name": component.name,
        "prefix": component.prefix,
        "tensor_count": component.tensors,
        "elements": component.elements,
        "bytes": component.nbytes,
        "dtypes": dict(component.dtypes),
    }


def _plain_adapter(inspection: Inspection) -> dict[str, Any] | None:
    adapter = inspection.adapter
    if adapter is None:
        return None
    plain = {"kind": adapter.kind, "tensors": len(adapter.tensors), "is_inside": adapter.is_inside}
    profile = None if adapter.is_inside else profile_of(inspection.tensors, inspection.metadata, inspection.path)
    return plain if profile is None else {**plain, **profile.to_json()}


def _plain_tensors(tensors: Mapping[str, TensorInfo]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": info.dtype.name, "shape": list(info.shape)} for name, info in tensors.items()]


def _dtypes_text(dtypes: Sequence[tuple[str, int]]) -> str:
    """The element types, with how many tensors have each where there are several: "F16" or "F16 (196), I64 (1)"."""
    if len(dtypes) == 1:
        return dtypes[0][0]
    return ", ".join(f"{dtype} ({tensors:,})" for dtype, tensors in dtypes)


def metadata_text(value: str, width: int) -> str:
    """A metadata value in one line of at most so many characters; a JSON object as its entries: "type=webui, …"."""
    if value.startswith("{") and len(value) <= LONGEST_JSON:
        try:
            return shortened(_entries_text(json.loads(value)), width)
        except (ValueError, RecursionError):
            pass  # a brace opens it, but JSON it is not
    return shortened(value, width, ending=f"… ({len(value):,} characters)")


def _entries_text(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_entry_text(value)}" for key, value in entries.items() if value is not None) or "{}"


def _entry_text(value: object) -> str:
    match value:
        case dict():
            return f"{{{_counted(len(value), 'entry', 'entries')}}}"
        case list():
            return f"[{_counted(len(value), 'item')}]"
        case str():
            return shortened(value, ENTRY_WIDTH)
        case _:
            return json.dumps(value)


def shortened(text: str, width: int, *, ending: str = "…") -> str:
    """The text in one printable line of at most so many characters, with this ending where it is cut."""
    line = one_line(text[: width + 1])  # no more is looked at than can be shown: values of megabytes exist
    return line if len(line) <= width else line[: max(0, width - len(ending))] + ending[-width:]


def aligned(rows: Sequence[Sequence[str]], alignments: str, *, indent: int = 0) -> str:
    """The rows as lines with their columns aligned, each by its `<` or `>`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, alignments, widths, strict=True))
        for row in rows
    )
    return "\n".join((" " * indent + line).rstrip() for line in lines)


def size_text(nbytes: int) -> str:
    """A size in decimal units with three digits: "2.61 GB", "335 MB", "77 B"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * scale:
            return f"{_three_digits(nbytes / scale)} {unit}"
    return f"{nbytes} B"


def count_text(elements: int) -> str:
    """A number of elements: "77", "32.0 k", "865.9 M", "1.43 G"."""
    for unit, scale, decimals in (("G", 1e9, 2), ("M", 1e6, 1), ("k", 1e3, 1)):
        if elements >= 0.99995 * scale:
            return f"{elements / scale:,.{decimals}f} {unit}"
    return str(elements)


def _three_digits(value: float) -> str:
    for decimals, limit in ((2, 9.995), (1, 99.95)):
        if value < limit:
            return f"{value:.{decimals}f}"
    return f"{value:,.0f}"


def _counted(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
