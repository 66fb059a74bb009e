"""What doesn't fit in a merge: collected while its tensors are gone through, and reported all of a kind at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from typing import Final

from streammerge.compute.expressions import Node
from streammerge.errors import SHOWN, PlanError, count, counted, listed, plural
from streammerge.models.architecture import architecture_mismatch
from streammerge.models.shapes import Shape, are_mixed, common_shape
from streammerge.recipe.recipe import Recipe
from streammerge.tensors import TensorInfo

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Misshapen:
    """A tensor whose shapes the policy doesn't make one, by model.

    `taken` if a rule takes it from one of these, `mixed` if it then would be of two kinds of elements.
    """

    name: str
    layout: str
    shapes: Mapping[str, Shape]
    taken: bool = False
    mixed: bool = False

    @classmethod
    def of(cls, name: str, layout: str, info: TensorInfo, nodes: Mapping[str, Node], *, taken: bool) -> Misshapen:
        """The tensor as these models have it, and the layout."""
        shapes = {layout: info.shape, **{model: node.info.shape for model, node in nodes.items()}}
        return cls(name, layout, shapes, taken, are_mixed(nodes, info))

    def allows(self, policy: str) -> bool:
        """Whether the policy would."""
        if self.mixed and policy == "overlap":
            return False
        others = [shape for model, shape in self.shapes.items() if model != self.layout]
        return policy == "keep" or common_shape(others, self.shapes[self.layout], policy) is not None

    def is_largest(self, model: str) -> bool:
        """Whether the model's is larger than the layout's, and nowhere smaller."""
        own, layout = self.shapes.get(model, ()), self.shapes[self.layout]
        return own != layout and len(own) == len(layout) and all(a >= b for a, b in zip(own, layout, strict=True))

    def __str__(self) -> str:
        """`x   depth [320, 5, 3, 3]   base, waifu [320, 4, 3, 3]`: the models by their shape, the layout's first."""
        by_shape: dict[Shape, list[str]] = {self.shapes[self.layout]: [self.layout]}
        for model, shape in self.shapes.items():
            names = by_shape.setdefault(shape, [])
            if model not in names:
                names.append(model)
        return f"{self.name}   " + "   ".join(f"{', '.join(names)} {list(shape)}" for shape, names in by_shape.items())


@dataclass(frozen=True, slots=True)
class Unshared:
    """A tensor that some models have and others lack; `taken` if a rule takes it from one that lacks it, or has it
    where the layout does not."""

    name: str
    having: Sequence[str]
    lacking: Sequence[str]
    taken: bool = False

    def __str__(self) -> str:
        return f"{self.name}   in {', '.join(self.having)}, not in {', '.join(self.lacking)}"


@dataclass(frozen=True, slots=True)
class Problems:
    """Tensors that can't be merged as asked, by what is wrong with them.

    `uncopied` are those that can't be copied either, `changed` those that are to be kept and that an adapter changes.
    The rest are no problem as long as other tensors are merged: what a policy made `fitted`, what it `kept` as it is
    for its shape, and what is `alone` because not every model has it.
    """

    unreadable: list[str] = field(default_factory=list)
    uncopied: list[str] = field(default_factory=list)
    factors: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    misshapen: list[Misshapen] = field(default_factory=list)
    fitted: list[Misshapen] = field(default_factory=list)
    kept: list[Misshapen] = field(default_factory=list)
    missing: list[Unshared] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    unmergeable: list[str] = field(default_factory=list)

    def forget(self) -> None:
        """Forget what was noted, when it has been reported."""
        for kind in fields(self):
            getattr(self, kind.name).clear()

    def note_shape(self, found: Misshapen, policy: str) -> None:
        """Note a tensor whose shapes differ by what the policy does with it."""
        if policy == "keep":
            self.kept.append(found)
        elif found.allows(policy):
            self.fitted.append(found)
        else:
            self.misshapen.append(found)

    def cut(self) -> Iterator[str]:
        """What is told of models that have more than the output has room for, where only what all have is merged."""
        by_model: dict[str, list[Misshapen]] = {}
        for found in self.fitted:
            for model in found.shapes:
                if found.is_largest(model):
                    by_model.setdefault(model, []).append(found)
        for model, larger in by_model.items():
            first = larger[0]
            told = f"{count(larger, 'tensor')} of {model} {plural(larger, 'is', 'are')} larger than {first.layout}'s"
            shapes = f"{first.name} {list(first.shapes[model])}, not {list(first.shapes[first.layout])}"
            yield f"{told} ({shapes}), and what is more is left out: --layout {model} keeps it"

    def report(self, recipe: Recipe, models: Mapping[str, Tensors], unused: Sequence[str], *, merged: int) -> None:
        """PlanError with every problem of the first kind that there is, and what settles it.

        `models` are the tensors of the models that were compared, `unused` the rules that match nothing; `merged` is
        how many tensors are merged.
        """
        layout = recipe.layout_name
        self._report_codes(layout)
        self._report_factors(layout)
        self._report_changed(layout)
        if not merged:
            self._report_nothing(models)
        self._report_shapes(recipe, models, merged)
        self._report_missing(layout, models, merged)
        self._report_unmergeable(layout)
        _report_unused(unused, layout)

    def _report_codes(self, layout: str) -> None:
        """Codes that can't be decoded, which are neither averaged nor, without what belongs to them, copied."""
        unreadable = (
            "averaging codes gives nonsense",
            "Merge the models before they are quantised, or copy such tensors with --keep GLOB.",
        )
        uncopied = (
            f"{layout}, the layout, has no room for what belongs to such codes",
            "Make the quantised model the --layout, or take such tensors from a model that isn't quantised.",
        )
        for found, (why, advice) in ((self.unreadable, unreadable), (self.uncopied, uncopied)):
            if found:
                raise PlanError(
                    f"{counted(found, 'tensor', 'is', 'are')} quantised in a way that streammerge can't "
                    f"decode, and {why}",
                    found=found,
                    advice=advice,
                )

    def _report_factors(self, layout: str) -> None:
        """Factors of an adapter that lie beside the weights."""
        if self.factors:
            raise PlanError(
                f"{count(self.factors, 'tensor')} of {layout} {plural(self.factors, 'belongs', 'belong')} to an "
                "adapter beside its weights, and averaging an adapter's factors gives nonsense",
                found=self.factors,
                advice="Put the adapter into its weights first (in PEFT: merge_and_unload), or copy such tensors with "
                "--keep.",
            )

    def _report_changed(self, layout: str) -> None:
        """What is to be kept and to be changed."""
        if self.changed:
            raise PlanError(
                f"{count(self.changed, 'tensor')} of {layout} {plural(self.changed, 'is', 'are')} to be kept, and "
                f"{plural(self.changed, 'is', 'are')} changed by an adapter",
                found=self.changed,
                advice="Give the adapter no weight there, in a recipe: adapters: [{adapter: PATH, weight: [{filter: "
                "PART OF THE NAME, value: 0}, {value: 1}]}].",
            )

    def _report_nothing(self, models: Mapping[str, Tensors]) -> None:
        """Names that no two models share: where only shapes were in the way, they are what to tell."""
        if self.alone and all(found.taken for found in (*self.misshapen, *self.kept)):
            raise PlanError(
                "nothing is merged: no tensor that could be has the same name in every model",
                found=[f"{model}   {listed(list(tensors))}" for model, tensors in models.items()],
                advice=f"{hint(range(SHOWN + 1), models)}Merge models of one kind, saved by the same tool; "
                "`streammerge inspect --tensors` lists their names.",
            )

    def _report_shapes(self, recipe: Recipe, models: Mapping[str, Tensors], merged: int) -> None:
        """Shapes that the policy does not allow, or that it keeps all of."""
        found = self.misshapen or ([] if merged else [kept for kept in self.kept if not kept.taken])
        if found:
            raise PlanError(
                f"{counted(found, 'tensor', 'differs', 'differ')} in shape between the models",
                found=list(map(str, found)),
                advice=hint(found, models) + self._shape_advice(found, recipe, merged),
            )

    def _report_missing(self, layout: str, models: Mapping[str, Tensors], merged: int) -> None:
        """What some of the models lack."""
        if self.missing:
            raise PlanError(
                f"{counted(self.missing, 'tensor', 'is', 'are')} not in every model",
                found=list(map(str, self.missing)),
                advice=hint(self.missing, models) + missing_advice(self.missing, layout, models if merged else ()),
            )

    def _report_unmergeable(self, layout: str) -> None:
        """Numbers of which there is no average."""
        if self.unmergeable:
            raise PlanError(
                f"{count(self.unmergeable, 'tensor')} can't be averaged: not all are floating point",
                found=self.unmergeable,
                advice=f"Copy such tensors: {layout}'s with --keep GLOB, another model's with --take 'GLOB=MODEL'.",
            )

    def _shape_advice(self, found: Sequence[Misshapen], recipe: Recipe, merged: int) -> str:
        """What settles it and does not spoil what fits."""
        layout, concerned = recipe.layout_name, (*found, *self.fitted, *self.kept)
        keeps = merged > sum(not fitted.taken for fitted in self.fitted)
        policies = [
            policy
            for policy in WORDS
            if policy != recipe.on_shape_mismatch
            and (keeps or policy != "keep")
            and all(each.allows(policy) for each in concerned)
        ]
        takes = any(rule.action == "take" for rule in recipe.rules)
        larger = [model for model in found[0].shapes if all(each.is_largest(model) for each in concerned)]
        rest = f"; --layout {larger[0]} keeps that model's rest" if larger and not takes else f", keep {layout}'s rest"
        ways = [f"{policy} ({WORDS[policy].format(layout=layout, rest=rest)})" for policy in policies]
        advice = f"Use --on-shape-mismatch {', '.join(ways)}" if ways else ""
        if any(each.taken for each in found):
            return f"{advice or 'Correct the rule'}, or take such tensors from another model."
        return f"{advice + ', or' if advice else 'Use'} --keep GLOB, --drop GLOB or a rule for such tensors."


def _report_unused(unused: Sequence[str], layout: str) -> None:
    if unused:
        raise PlanError(
            f"{counted(unused, 'rule', 'matches', 'match')} no tensor of {layout} that an earlier rule left",
            found=unused,
            advice="Correct the globs (`streammerge inspect` lists names), or choose another --layout.",
        )


WORDS: Final = {
    "overlap": "merge what all have{rest}",
    "keep": "copy {layout}'s",
    "pad": "fill smaller ones with zeros",
    "slice": "cut larger ones",
}
"""What the policies do to tensors of unequal shape, those first that lose the least."""


def missing_advice(found: Sequence[Unshared], layout: str, models: Iterable[str]) -> str:
    """What settles tensors that only some models have; `models` are those that may give the layout instead."""
    inside = [layout in problem.having for problem in found]
    whole = [model for model in models if all(model in problem.having for problem in found)]
    free = not any(problem.taken for problem in found)
    if not any(inside):
        ways = ["--on-missing keep (leave them out)"]
        ways += [f"--layout {model} --on-missing keep (copy {model}'s)" for model in whole[:1]]
    else:
        outside = "" if all(inside) else ", leave out the others"
        ways = [f"--on-missing keep (copy {layout}'s{outside})", "--on-missing drop (leave them out)"]
    if free:
        ways.append("--drop GLOB")
    if free and all(inside):
        ways.append("--take 'GLOB=MODEL'")
    return f"Use {', '.join(ways[:-1])}, or {ways[-1]}." if len(ways) > 1 else f"Use {ways[0]}."


def hint(problems: Sized, models: Mapping[str, Tensors]) -> str:
    """What the models look like, where so much differs that they may be of different architectures."""
    if len(problems) <= SHOWN:
        return ""
    found = architecture_mismatch(models)
    return f"{found}. " if found else ""
