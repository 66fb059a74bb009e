"""What `streammerge compare A B` tells: how alike two models are, tensor by tensor and as a whole."""

from __future__ import annotations

import bisect
import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from streammerge.errors import SHOWN, one_line
from streammerge.storage.side_files import written_whole
from streammerge.tools.inspection import aligned, count_text

FINEST_STEP: Final = 1e-9
"""The narrowest bin of a histogram: below it, cosines are noise of the last digits."""

TAIL: Final = 0.02
"""The share of the tensors that a histogram may leave below its range: the least similar, where they lie far off."""

FAR_OFF: Final = 3
"""Below the range they are left if the range would be so many times as long with them: the rest would look flat."""

BLOCKS: Final = " ▏▎▍▌▋▊▉"
"""What a bar ends with, by eighths of a character."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """How alike a tensor is in models A and B: by direction (cosine), length (norms) and distance (norm of B − A).

    The cosine is None where it means nothing: for an empty tensor, and where either norm is 0 or not finite. Identical
    are tensors that have the same value, or NaN, everywhere.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    cosine: float | None
    norm_a: float
    norm_b: float
    norm_difference: float
    identical: bool

    @property
    def relative_difference(self) -> float | None:
        """‖B − A‖ / ‖A‖, None where that is no number."""
        return _ratio(self.norm_difference, self.norm_a)


@dataclass(frozen=True, slots=True)
class ShapeMismatch:
    """A tensor that both models have, in different shapes."""

    name: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many cosines lie between one edge and the next; the last bin holds its upper edge, too.

    `below` counts the cosines under the first edge. What has no place on the axis is counted apart: the tensors that
    are identical in both models, and those without a cosine. Without any cosine there are no edges.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    identical: int
    without_cosine: int

    @property
    def decimals(self) -> int:
        """How many decimals it takes to tell the edges apart."""
        return max(0, -math.floor(math.log10(self.step) + 1e-6))

    @property
    def step(self) -> float:
        """The width of a bin."""
        return self.edges[1] - self.edges[0]


@dataclass(frozen=True)
class Comparison:
    """What comparing models A and B has found, tensor by tensor.

    `not_compared` names what both have in the same shape, but for which a cosine means nothing, such as integers.
    `adapter_a` and `adapter_b` tell the kind of an adapter where that is what is compared: factor by factor, which is
    not how alike its changes are. `remarks` tell how names were read.
    """

    path_a: str
    path_b: str
    similarities: tuple[Similarity, ...]
    shape_mismatches: tuple[ShapeMismatch, ...] = ()
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()
    adapter_a: str = ""
    adapter_b: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """The number of elements compared."""
        return sum(similarity.elements for similarity in self.similarities)

    @property
    def identical(self) -> int:
        """How many of the compared tensors are identical in both models."""
        return sum(similarity.identical for similarity in self.similarities)

    @property
    def without_cosine(self) -> tuple[Similarity, ...]:
        """The tensors that differ, but have no cosine."""
        return tuple(one for one in self.similarities if not one.identical and _cosine(one) is None)

    @cached_property
    def differing(self) -> tuple[tuple[float, Similarity], ...]:
        """The tensors that differ, each after its cosine, least similar first."""
        cosines = ((_cosine(one), one) for one in self.similarities if not one.identical)
        found = [(cosine, one) for cosine, one in cosines if cosine is not None]
        return tuple(sorted(found, key=lambda pair: (pair[0], pair[1].name)))

    @property
    def norm_a(self) -> float:
        """The norm of all that was compared of A, as one long vector."""
        return math.hypot(*(one.norm_a for one in self.similarities))

    @property
    def norm_b(self) -> float:
        """The norm of all that was compared of B, as one long vector."""
        return math.hypot(*(one.norm_b for one in self.similarities))

    @property
    def overall_cosine(self) -> float | None:
        """The cosine of all that was compared as two long vectors; None where a norm is 0 or not finite."""
        norm_a, norm_b = self.norm_a, self.norm_b
        if not (0 < norm_a < math.inf and 0 < norm_b < math.inf):
            return None
        parts = ((_cosine(one) or 0.0) * (one.norm_a / norm_a) * (one.norm_b / norm_b) for one in self.similarities)
        return max(-1.0, min(1.0, math.fsum(parts)))

    @property
    def overall_relative_difference(self) -> float | None:
        """‖B − A‖ / ‖A‖ of all that was compared as two long vectors; None where that is no number."""
        norm_difference = math.hypot(*(one.norm_difference for one in self.similarities))
        return _ratio(norm_difference, self.norm_a)

    def quantile(self, share: float) -> float | None:
        """The cosine that so large a share of the differing tensors stay below; 0 is the least, 0.5 the median."""
        cosines = [cosine for cosine, _ in self.differing]
        if not cosines:
            return None
        position = share * (len(cosines) - 1)
        lower = min(int(position), len(cosines) - 1)
        upper = min(lower + 1, len(cosines) - 1)
        return cosines[lower] + (position - lower) * (cosines[upper] - cosines[lower])

    def least_similar(self, count: int) -> tuple[Similarity, ...]:
        """The differing tensors of the least cosines, least first."""
        return tuple(one for _, one in self.differing[:count])

    def histogram(self, bins: int = 12) -> Histogram:
        """The cosines of the differing tensors in at most so many bins, over the range in which nearly all of them lie.

        The edges are round numbers. Cosines of fine-tunes crowd just below 1, so the range comes from the data.
        """
        cosines = [cosine for cosine, _ in self.differing]
        apart = {"identical": self.identical, "without_cosine": len(self.without_cosine)}
        if not cosines:
            return Histogram(edges=(), counts=(), below=0, **apart)
        edges = _round_edges(self._low_end(), cosines[-1], max(2, bins))
        starts = [bisect.bisect_left(cosines, edge) for edge in edges[:-1]]
        return Histogram(
            edges=edges,
            counts=tuple(stop - start for start, stop in zip(starts, [*starts[1:], len(cosines)], strict=True)),
            below=starts[0],
            **apart,
        )

    def _low_end(self) -> float:
        cosines = [cosine for cosine, _ in self.differing]
        least, tail, most = cosines[0], cosines[int(TAIL * len(cosines))], cosines[-1]
        return tail if most - least > FAR_OFF * (most - tail) else least


def render(comparison: Comparison, *, width: int = 100, least: int = 10) -> str:
    """The comparison as text for a terminal of this width, with so many of the least similar tensors."""
    sections = (
        _summary(comparison),
        _histogram_text(comparison.histogram(), width),
        _least_similar_text(comparison.least_similar(least)),
        *_findings(comparison),
    )
    return "\n\n".join(section for section in sections if section)


def write_csv(comparison: Comparison, path: str | Path) -> None:
    """Write one row per compared tensor; a cell without a value is empty."""
    columns = ("name", "shape", "elements", "cosine", "relative_difference", "norm_a", "norm_b", "norm_difference")
    with (
        written_whole(Path(path)) as target,
        target.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        rows = csv.writer(file)
        rows.writerow([*columns, "identical"])
        for one in comparison.similarities:
            plain = _plain_similarity(one) | {"shape": "x".join(map(str, one.shape))}
            rows.writerow([*(plain[column] for column in columns), str(one.identical).lower()])


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison in plain values; what is no finite number is None."""
    return {
        "path_a": comparison.path_a,
        "path_b": comparison.path_b,
        "adapter_a": comparison.adapter_a or None,
        "adapter_b": comparison.adapter_b or None,
        "compared": len(comparison.similarities),
        "elements": comparison.elements,
        "identical": comparison.identical,
        "overall_cosine": comparison.overall_cosine,
        "overall_relative_difference": comparison.overall_relative_difference,
        "quantiles": {str(share): comparison.quantile(share) for share in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)},
        "tensors": [_plain_similarity(one) for one in comparison.similarities],
        "shape_mismatches": [
            {"name": one.name, "shape_a": list(one.shape_a), "shape_b": list(one.shape_b)}
            for one in comparison.shape_mismatches
        ],
        "only_in_a": list(comparison.only_in_a),
        "only_in_b": list(comparison.only_in_b),
        "remarks": list(comparison.remarks),
        "not_compared": list(comparison.not_compared),
    }


def _summary(comparison: Comparison) -> str:
    lines = [
        f"A  {one_line(comparison.path_a)}{_adapter_text(comparison.adapter_a)}",
        f"B  {one_line(comparison.path_b)}{_adapter_text(comparison.adapter_b)}",
        *comparison.remarks,
        tally(comparison),
    ]
    if comparison.differing:
        lines[-1] += (
            f", median {_cosine_text(comparison.quantile(0.5))}, least {_cosine_text(comparison.quantile(0.0))}"
        )
    return "\n".join(lines)


def _adapter_text(kind: str) -> str:
    return f"   {kind}: its factors are compared, not the changes that they make" if kind else ""


def tally(comparison: Comparison) -> str:
    """How many tensors differ, and how alike the models are as a whole."""
    if not comparison.similarities:
        return "no tensor to compare"
    compared = f"{_tensors(len(comparison.similarities))} compared ({count_text(comparison.elements)} elements)"
    differing = len(comparison.similarities) - comparison.identical
    if not differing:
        return f"{compared}: all identical"
    overall = _cosine_text(comparison.overall_cosine)
    return f"{compared}: {differing:,} differ, {comparison.identical:,} identical; overall cosine {overall}"


def _histogram_text(histogram: Histogram, width: int) -> str:
    if not histogram.edges:
        return ""
    digits = histogram.decimals
    bins = [f"{low:.{digits}f} to {high:.{digits}f}" for low, high in itertools.pairwise(histogram.edges)]
    labels = [*([f"below {histogram.edges[0]:.{digits}f}"] if histogram.below else []), *bins]
    counts = [*([histogram.below] if histogram.below else []), *histogram.counts]
    apart = (("identical", histogram.identical), ("no cosine", histogram.without_cosine))
    room = max(10, min(60, width - max(map(len, labels)) - len("  tensors  ")))
    rows = [("cosine", "tensors", "")]
    rows += [
        (label, f"{count:,}", _bar(count / max(counts), room)) for label, count in zip(labels, counts, strict=True)
    ]
    rows += [(label, f"{count:,}", "") for label, count in apart if count]
    return aligned(rows, "<><")


def _bar(share: float, width: int) -> str:
    """So large a share of the width in block characters, to an eighth of one; what is not nothing can be seen."""
    whole, eighths = divmod(max(math.ceil(share), round(share * width * len(BLOCKS))), len(BLOCKS))
    return ("█" * whole + BLOCKS[eighths]).rstrip()


def _least_similar_text(least_similar: Sequence[Similarity]) -> str:
    if not least_similar:
        return ""
    rows = [
        (_cosine_text(_cosine(one)), _number_text(one.relative_difference), one_line(one.name), str(list(one.shape)))
        for one in least_similar
    ]
    return f"least similar\n{aligned([('cosine', '‖B−A‖/‖A‖', 'tensor', 'shape'), *rows], '<<<<', indent=2)}"


def _findings(comparison: Comparison) -> Iterator[str]:
    mismatches = [f"{one.name}   A {list(one.shape_a)}   B {list(one.shape_b)}" for one in comparison.shape_mismatches]
    yield _finding("different shapes, not compared", mismatches)
    yield _finding("only in A", comparison.only_in_a)
    yield _finding("only in B", comparison.only_in_b)
    yield _finding("no floating-point numbers, not compared", comparison.not_compared)
    yield _finding("no cosine, zero or not finite in A or B", [one.name for one in comparison.without_cosine])


def _finding(what: str, found: Sequence[str]) -> str:
    if not found:
        return ""
    lines = [f"{what}: {_tensors(len(found))}", *(f"  {one_line(line)}" for line in found[:SHOWN])]
    return "\n".join([*lines, *([f"  … and {len(found) - SHOWN:,} more"] if len(found) > SHOWN else [])])


def _tensors(number: int) -> str:
    return f"{number:,} tensor" if number == 1 else f"{number:,} tensors"


def _cosine_text(cosine: float | None) -> str:
    """The cosine with as many decimals as it takes to tell it from 1, or a dash."""
    if cosine is None:
        return "–"
    return f"{cosine:.6f}" if cosine < 1 - 1e-5 else f"{cosine:.9f}"


def _number_text(number: float | None) -> str:
    return "–" if number is None else f"{number:.3g}"


def _ratio(numerator: float, denominator: float) -> float | None:
    return _finite(numerator / denominator) if denominator else None


def _cosine(similarity: Similarity) -> float | None:
    """The cosine if it is one; rounding may have carried it a little past 1."""
    cosine = similarity.cosine
    return None if cosine is None or not math.isfinite(cosine) else max(-1.0, min(1.0, cosine))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _plain_similarity(similarity: Similarity) -> dict[str, Any]:
    return {
        "name": similarity.name,
        "shape": list(similarity.shape),
        "elements": similarity.elements,
        "cosine": _cosine(similarity),
        "relative_difference": similarity.relative_difference,
        "norm_a": _finite(similarity.norm_a),
        "norm_b": _finite(similarity.norm_b),
        "norm_difference": _finite(similarity.norm_difference),
        "identical": similarity.identical,
    }


def _round_edges(low: float, high: float, bins: int) -> tuple[float, ...]:
    """At most so many bins from `low` to `high`, as narrow as round numbers allow for their edges."""
    start, end = Decimal(repr(low)), Decimal(repr(high))
    steps = _round_numbers(max((high - low) / bins, FINEST_STEP))
    spans = ((step, math.floor(start / step), math.ceil(end / step)) for step in steps)
    step, first, last = next(span for span in spans if span[2] - span[1] <= bins)
    return tuple(float(number * step) for number in range(min(first, last - 1), last + 1))


def _round_numbers(least: float) -> Iterator[Decimal]:
    """The numbers 1, 2 and 5 times a power of ten, ascending, from about `least`."""
    for power in itertools.count(math.floor(math.log10(least))):
        yield from (Decimal(digit).scaleb(power) for digit in (1, 2, 5))
