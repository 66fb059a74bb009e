"""What doesn't fit in a merge: collected while its tensors are gone through, and reported all of a kind at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field

from streammerge.architecture import architecture_mismatch
from streammerge.errors import SHOWN, PlanError, count, plural
from streammerge.tensors import TensorInfo

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Problems:
    """Tensors that can't be merged as asked, one line each, by what is wrong with them."""

    unreadable: list[str] = field(default_factory=list)
    stranded: list[str] = field(default_factory=list)
    factors: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unmergeable: list[str] = field(default_factory=list)

    def report(self, layout: str, unused_rules: Sequence[str], models: Mapping[str, Tensors]) -> None:
        """PlanError with every problem of the first kind that there is, and what settles it.

        `layout` is the layout model's name; `models` are the tensors of the models that were compared.
        """
        keep = f"keep (copy {layout}'s)"
        if self.unreadable:
            raise PlanError(
                f"{count(self.unreadable, 'tensor')} {plural(self.unreadable, 'is', 'are')} quantised in a way that "
                "streammerge can't decode, and averaging codes gives nonsense",
                found=self.unreadable,
                advice="Merge the models before they are quantised, or copy such tensors with --keep.",
            )
        if self.stranded:
            raise PlanError(
                f"{count(self.stranded, 'tensor')} {plural(self.stranded, 'is', 'are')} quantised in a way that "
                f"streammerge can't decode, and {layout}, the layout, has no room for what belongs to such codes",
                found=self.stranded,
                advice="Make the quantised model the --layout, or take such tensors from a model that isn't quantised.",
            )
        if self.factors:
            raise PlanError(
                f"{count(self.factors, 'tensor')} of {layout} {plural(self.factors, 'belongs', 'belong')} to an "
                "adapter beside its weights, and averaging an adapter's factors gives nonsense",
                found=self.factors,
                advice="Put the adapter into its weights first (in PEFT: merge_and_unload), or copy such tensors with "
                "--keep.",
            )
        if self.misshapen:
            raise PlanError(
                f"{count(self.misshapen, 'tensor')} {plural(self.misshapen, 'differs', 'differ')} in shape between "
                "the models",
                found=self.misshapen,
                advice=f"{hint(self.misshapen, models)}Use --on-shape-mismatch {keep}, pad (fill smaller ones with "
                "zeros), slice (cut larger ones), or a rule.",
            )
        if self.missing:
            raise PlanError(
                f"{count(self.missing, 'tensor')} of {layout} {plural(self.missing, 'is', 'are')} missing "
                "from other models",
                found=self.missing,
                advice=f"{hint(self.missing, models)}Use --on-missing {keep} or drop, --take 'GLOB=MODEL', or a rule.",
            )
        if self.unmergeable:
            raise PlanError(
                f"{count(self.unmergeable, 'tensor')} can't be averaged: not all are floating point",
                found=self.unmergeable,
                advice="Copy such tensors with --keep or a rule.",
            )
        if unused_rules:
            raise PlanError(
                f"{count(unused_rules, 'rule')} {plural(unused_rules, 'matches', 'match')} no tensor of {layout} that "
                "an earlier rule left",
                found=unused_rules,
                advice="Correct the globs (`streammerge inspect` lists names), or choose another --layout.",
            )


def hint(problems: Sized, models: Mapping[str, Tensors]) -> str:
    """What the models look like, where so much differs that they may be of different architectures."""
    if len(problems) <= SHOWN:
        return ""
    found = architecture_mismatch(models)
    return f"{found}. " if found else ""
