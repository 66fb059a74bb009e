"""What is wrong with the numbers of a merge: found tensor by tensor, told in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from streammerge.errors import OutputError

NAMED: Final = 3
"""How many tensors a warning names."""


@dataclass
class Finding:
    """What was found in one tensor of the output.

    `nonfinite` elements are stored as infinite or not a number. `overflowed` ones of them were finite until they were
    rounded to `dtype`, whose greatest value is `limit`; `saturated` ones lay beyond it too, and became it. `largest` is
    the greatest finite magnitude before rounding. `inputs` counts, by file, what was infinite or no number already.
    Of weights that had scales, and are stored without, `vanished` counts what became 0 though it was not; `elements` is
    how many the tensor has.
    """

    nonfinite: int = 0
    overflowed: int = 0
    saturated: int = 0
    vanished: int = 0
    elements: int = 0
    largest: float = 0.0
    dtype: str = ""
    limit: float = 0.0
    inputs: dict[str, int] = field(default_factory=dict)

    def add(self, other: Finding) -> None:
        """Take in what was found in another block of the tensor."""
        self.nonfinite += other.nonfinite
        self.overflowed += other.overflowed
        self.saturated += other.saturated
        self.vanished += other.vanished
        self.elements = max(self.elements, other.elements)
        self.largest = max(self.largest, other.largest)
        self.dtype, self.limit = self.dtype or other.dtype, self.limit or other.limit
        for path, values in other.inputs.items():
            self.inputs[path] = self.inputs.get(path, 0) + values

    @property
    def is_refused(self) -> bool:
        """Whether there are values, in the output or in an input, that are no finite numbers."""
        return bool(self.nonfinite or self.inputs)

    @property
    def is_any(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.nonfinite or self.saturated or self.vanished or self.inputs)

    @property
    def lost(self) -> int:
        """How many values of weights that had scales are none that the dtype has near them."""
        return self.vanished + self.saturated + self.overflowed if self.elements else 0

    @property
    def made(self) -> int:
        """How many non-finite values the arithmetic made of finite inputs."""
        return 0 if self.inputs else self.nonfinite - self.overflowed

    def __str__(self) -> str:
        causes = [f"{values:,} in {path}" for path, values in sorted(self.inputs.items())]
        if self.overflowed:
            causes.append(
                f"{self.overflowed:,} overflowed {self.dtype}: up to {self.largest:.6g}, it holds {self.limit:.6g}"
            )
        if self.made:
            causes.append(f"{self.made:,} made by the merge of finite values")
        return f"{self.nonfinite:,} in the output ({'; '.join(causes)})"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "nonfinite": self.nonfinite,
            "overflowed": self.overflowed,
            "saturated": self.saturated,
            "vanished": self.vanished,
            "elements": self.elements,
            "largest": float(self.largest),
            "dtype": self.dtype,
            "limit": float(self.limit),
            "inputs": dict(sorted(self.inputs.items())),
        }


def refuse_nonfinite(findings: Mapping[str, Finding]) -> None:
    """OutputError that names the tensors with values that are no finite numbers, and says why, if there are any."""
    refused = {name: finding for name, finding in sorted(findings.items()) if finding.is_refused}
    if refused:
        raise OutputError(
            f"{_tensors(refused)} values that are infinite or not numbers",
            found=[f"{name}   {finding}" for name, finding in refused.items()],
            advice=_advice(refused.values()),
        )


def _tensors(refused: Mapping[str, Finding]) -> str:
    return "1 tensor has" if len(refused) == 1 else f"{len(refused):,} tensors have"


def _advice(refused: Iterable[Finding]) -> str:
    ways = ["Use --on-nonfinite warn to write them all the same."]
    if any(finding.overflowed for finding in refused):
        ways.insert(0, "Store what overflowed as bf16 or fp32 (--dtype).")
    return " ".join(ways)


def warnings(findings: Mapping[str, Finding]) -> list[str]:
    """One sentence for each thing that the user should look at, with the tensors' names."""
    found = dict(sorted(findings.items()))
    shown = []
    if bad := _counts(found, "nonfinite"):
        shown.append(f"{_values(bad)} infinite or not numbers: {named(bad)}")
    shown += [f"{path} holds {_plain(bad)} infinite or not numbers: {named(bad)}" for path, bad in _by_input(found)]
    if made := _counts(found, "made"):
        shown.append(f"{_values(made)} made so by the merge itself, of finite ones: {named(made)}")
    for dtype in sorted({finding.dtype for finding in found.values() if finding.dtype}):
        shown += _beyond(dtype, {name: finding for name, finding in found.items() if finding.dtype == dtype})
    return shown


def _beyond(dtype: str, found: Mapping[str, Finding]) -> list[str]:
    """What lay beyond the range of the dtype in which it is stored, or was too small for it."""
    limit, largest = (max(getattr(finding, name) for finding in found.values()) for name in ("limit", "largest"))
    reason = f"it holds {limit:,.6g} at the most, the largest value is {largest:,.6g}"
    shown = []
    if overflowed := _counts(found, "overflowed"):
        ways = "bf16 or fp32" if limit < 1e38 else "a wider dtype"
        shown.append(f"{_values(overflowed)} overflow of {dtype} ({reason}); store them as {ways}: {named(overflowed)}")
    if saturated := _counts(found, "saturated"):
        shown.append(f"{_values(saturated)} cut to the range of {dtype} ({reason}): {named(saturated)}")
    if lost := _counts(found, "lost"):
        elements = sum(found[name].elements for name in lost)
        shown.append(
            f"{sum(lost.values()):,} of {elements:,} values ({sum(lost.values()) / elements:.1%}) of weights that had "
            f"scales became 0 or were cut in {dtype}, which is stored without; store them as bf16: {named(lost)}"
        )
    return shown


def _by_input(found: Mapping[str, Finding]) -> list[tuple[str, dict[str, int]]]:
    """Every input file that had non-finite values, and how many by tensor."""
    paths = sorted({path for finding in found.values() for path in finding.inputs})
    return [
        (path, {name: finding.inputs[path] for name, finding in found.items() if path in finding.inputs})
        for path in paths
    ]


def _counts(found: Mapping[str, Finding], what: str) -> dict[str, int]:
    return {name: number for name, finding in found.items() if (number := getattr(finding, what))}


def _plain(counts: Mapping[str, int]) -> str:
    values = sum(counts.values())
    return f"{values:,} value that is" if values == 1 else f"{values:,} values that are"


def _values(counts: Mapping[str, int]) -> str:
    values = sum(counts.values())
    return f"{values:,} value is" if values == 1 else f"{values:,} values are"


def named(counts: Mapping[str, int]) -> str:
    """`x (2), y (1)`: the first few tensors, with how many values of each."""
    first = ", ".join(f"{name} ({number:,})" for name, number in list(counts.items())[:NAMED])
    return first + (f" and {len(counts) - NAMED:,} more tensors" if len(counts) > NAMED else "")
