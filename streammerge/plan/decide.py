"""What becomes of every tensor: merged, copied or dropped, and why; decided from headers alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from streammerge.compute.application import apply_method
from streammerge.compute.expressions import Node
from streammerge.methods import find_method
from streammerge.methods.place import Within
from streammerge.methods.registry import Method
from streammerge.models.adapters.accounts import UNCHANGED
from streammerge.models.adapters.adapted import adapted_in, adapters_of
from streammerge.models.adapters.recognition import refuse_adapters
from streammerge.models.averaged import never_averaged
from streammerge.models.buffers import is_computed
from streammerge.models.decisions import Decision, Decisions
from streammerge.models.dialects import Naming
from streammerge.models.dtypes import Scaled, Storage, stored_as
from streammerge.models.extent import Extent
from streammerge.models.merged import Merged
from streammerge.models.prediction import is_mark
from streammerge.models.presence import with_inner
from streammerge.models.quantised import DECODED, CodedModels, kept_bytes
from streammerge.models.shapes import Fitting, fit, placed
from streammerge.models.views import Decoded, beneath
from streammerge.plan.baking import is_unchanged, told_adapters
from streammerge.plan.copies import Copies
from streammerge.plan.ensemble import Ensemble
from streammerge.plan.globs import RuleIndex
from streammerge.plan.meaning import Meaning
from streammerge.plan.naming import Named
from streammerge.plan.outside import Comparison
from streammerge.plan.parts import Dropped, prepared
from streammerge.plan.problems import Misshapen, Problems
from streammerge.plan.quantisation import stated_layers
from streammerge.plan.scaling import Scaling, with_scales
from streammerge.plan.tuning import Tuning
from streammerge.recipe.recipe import Recipe, Rule
from streammerge.tensors import DType, Model, TensorInfo


def merge_models(
    recipe: Recipe, models: Mapping[str, Model], within: Within = (), naming: Naming | None = None
) -> Merged:
    """Decide what becomes of every tensor of the layout; `models` are the recipe's inputs by name.

    `within` is where the recipe stands in the one that it is part of: what is random differs from place to place. The
    output has the layout's names, unless a `naming` is asked for.
    Raises PlanError with every mismatch of a kind at once, and what settles it.
    """
    ready = prepared(recipe, models, naming)
    return _Resolution(ready.recipe, ready.named, within, ready.dropped).resolve()


@dataclass
class _Resolution:
    """The work of `merge_models`: goes through the layout once and collects what doesn't fit."""

    recipe: Recipe
    named: Named
    within: Within = ()
    dropped: Dropped = field(default_factory=dict)
    problems: Problems = field(default_factory=Problems)
    ensemble: Ensemble = field(default_factory=Ensemble)
    is_reported: bool = False

    def __post_init__(self) -> None:
        recipe, self.models = self.recipe, self.named.models
        self.method: Method = find_method(recipe.method)
        self.layout_name = recipe.layout_name
        self.layout = self.models[self.layout_name]
        adapters = refuse_adapters({name: model.tensors for name, model in self.models.items()})
        self.factors = frozenset(adapters[self.layout_name].tensors if self.layout_name in adapters else ())
        has_base = recipe.base is not None and self.method.base != "none"
        self.base_name = recipe.base.name if recipe.base and has_base else ""
        self.model_names = [entry.name for entry in recipe.models]
        self.input_names = [*([self.base_name] if self.base_name else []), *self.model_names]
        inputs = [self.models[name] for name in self.input_names]
        self.extent = Extent.of_merge(self.method, len(self.layout.tensors), inputs)
        self.coded = CodedModels.of(self.models, self.layout_name)
        self.is_coded = any(self.coded.weights.values())
        self.values = {name: Decoded(model, self.coded.weights[name]) for name, model in self.models.items()}
        self.rules, self.tuning = RuleIndex(recipe.rules), Tuning(recipe, self.layout)
        self.meaning = Meaning.of(self.models, self.layout_name, self.input_names, recipe.on_prediction_mismatch)
        self.scaling = Scaling.of(recipe, self.layout)
        self.copies = Copies(self.models, self.layout_name, self.values, self.coded, self.meaning, self.problems)
        self.comparison = Comparison(recipe, self.models, self.input_names, self.coded, self.rules, self.meaning)

    def resolve(self) -> Merged:
        layout, coded = self.layout.tensors, self.coded
        names = [*layout, *(name for name in self.dropped if name not in layout)] if self.dropped else layout
        decisions = Decisions(names, self._decision, (name for name in layout if coded.is_beside(name)))
        left_out = self.comparison.left_out(self.problems)
        merged = sum(fate.tensors for fate in decisions.fates if fate.action == "merged")
        self.meaning.check()
        self.problems.report(self.recipe, self.comparison.compared, self.rules.unused, merged=merged)
        self.scaling.check()
        cut = [*self.problems.cut()] if self.recipe.on_shape_mismatch == "overlap" else []
        self.is_reported = True
        inner = sum(model.kept_bytes for model in self._nested.values())
        made = Merged(
            decisions,
            with_inner(left_out, self.models, "left_out"),
            with_inner(self.comparison.lacking(), self.models, "lacking"),
            inner + kept_bytes(coded.weights) + self.named.kept_bytes,
            tuple(dict.fromkeys([*self._remarks(decisions), *cut])),
            self.layout,
            self.extent,
            stated=stated_layers(self.copies.codes_of, self.models),
            sampling=self.meaning.sampling,
        )
        return with_scales(made)

    def _remarks(self, decisions: Decisions) -> Iterator[str]:
        yield from self.named.remarks
        yield from self.tuning.remarks()
        yield from self.meaning.remarks(decisions)
        yield from self.copies.remarks()
        for name, model in self._nested.items():
            yield from (f"{name}: {remark}" for remark in model.remarks)

    @functools.cached_property
    def _nested(self) -> dict[str, Merged]:
        """The inputs that are merges themselves, seen otherwise or not."""
        found = {name: beneath(model) for name, model in self.models.items()}
        return {name: model for name, model in found.items() if isinstance(model, Merged)}

    def _decision(self, name: str) -> Decision:
        """What becomes of a tensor. It is the same when this is asked again, when problems are no news any more."""
        if self.is_reported:
            self.problems.forget()
            self.rules.tried = self.tuning.gone_through = 0
        if name in self.dropped and name not in self.layout.tensors:
            info, why = self.dropped[name]
            return Decision(name, "dropped", why, info)
        info = self.layout.tensors[name]
        if self.coded.is_beside(name):
            self.rules.find(name)
            return self.copies.beside(name, info)
        return self._decide(name, info)

    def _decide(self, name: str, info: TensorInfo) -> Decision:
        rule = self.rules.find(name)
        dtype, codes = self.scaling.storage(name, rule, self.recipe)
        if (is_mark(name) or is_computed(name, info)) and not (rule and rule.dtype):
            dtype, codes = None, None
        made = self._fate(name, info, rule, dtype)
        return made if dtype is None else replace(made, rounds=not isinstance(dtype, Scaled), codes=codes)

    def _fate(self, name: str, info: TensorInfo, rule: Rule | None, dtype: Storage | None) -> Decision:
        if rule and rule.action == "drop":
            return Decision(name, "dropped", f"rule {rule}", info)
        if rule and rule.action == "keep":
            if self.is_baking and (changing := adapters_of(self.models[self.input_names[0]], name)):
                self.problems.changed.append(f"{name}   rule {rule}, and {' and '.join(changing)}")
            return self._keep(name, f"kept by rule {rule}", dtype)
        if rule and rule.action == "take":
            return self._take(name, rule, dtype)
        if self.is_coded and (unreadable := self.coded.unreadable([*self.input_names, self.layout_name], name)):
            return self.copies.refuse(name, unreadable, self.problems.unreadable)
        if name in self.factors:
            self.problems.factors.append(name)
            return Decision(name, "dropped", "factors are never averaged", info)
        if why := never_averaged(name, info):
            return self._keep(name, why, dtype)
        return self._merge(name, info, rule, dtype)

    def _keep(self, name: str, why: str, dtype: Storage | None) -> Decision:
        """The layout's tensor, copied."""
        return self.copies.copy(name, self.layout_name, why, dtype)

    def _take(self, name: str, rule: Rule, dtype: Storage | None) -> Decision:
        if name not in self.models[rule.model].tensors:
            return self._without(name, [rule.model], dtype, taken=True)
        self.meaning.note_copied(name, rule.model)
        if self.models[rule.model].tensors[name].shape == self.layout.tensors[name].shape:
            return self.copies.copy(name, rule.model, f"taken by rule {rule}", dtype)
        if unreadable := self.coded.unreadable([rule.model, self.layout_name], name):
            return self.copies.refuse(name, unreadable, self.problems.uncopied)
        taken = self.values[rule.model].node(name)
        fitting = self._fit(name, {rule.model: taken}, taken=True)
        if fitting is None:
            return self._keep_shape(name, dtype)
        node = self._placed(name, fitting.nodes[rule.model], taken.info.dtype)
        return Decision(
            name, "copied", f"from {rule.model}: taken by rule {rule}{fitting.why}", stored_as(node.info, dtype), node
        )

    def _without(self, name: str, lacking: list[str], dtype: Storage | None, *, taken: bool = False) -> Decision:
        """What becomes of a tensor that some of the models lack."""
        why = f"{' and '.join(lacking)} {'lack' if len(lacking) > 1 else 'lacks'} it"
        if not taken:
            self.problems.alone.append(name)
        if self.recipe.on_missing == "drop":
            return Decision(name, "dropped", why, self.layout.tensors[name])
        if self.recipe.on_missing == "error":
            self.problems.missing.append(self.comparison.unshared(name, taken=taken))
        return self._keep(name, why, dtype)

    def _merge(self, name: str, info: TensorInfo, rule: Rule | None, dtype: Storage | None) -> Decision:
        said = self.meaning.said
        lacking = [
            model for model in self.input_names if name not in self.models[model].tensors and not said[model].says(name)
        ]
        if lacking:
            return self._without(name, lacking, dtype)
        if is_mark(name):
            return self._keep(name, "it says how to sample, and is never averaged", dtype)
        inputs = {model: self.values[model].node(name) for model in self.input_names}
        if not all(node.info.dtype.mergeable for node in inputs.values()):
            kinds = ", ".join(f"{model} {node.info.dtype}" for model, node in inputs.items())
            self.problems.unmergeable.append(f"{name}   {kinds}")
            return self._keep(name, "its dtypes can't be averaged", dtype)
        fitting = self._fit(name, inputs)
        if fitting is None:
            return self._keep_shape(name, dtype)
        own = DECODED if self.coded.find(self.layout_name, name) else info.dtype
        output = stored_as(TensorInfo(own, fitting.shape), dtype)
        parameters, seed = self.tuning.values(name, rule), self.recipe.seed or 0
        nodes = [fitting.nodes[model] for model in self.input_names]  # one may be given twice: as the base, too
        node = apply_method(self.method, output, parameters, nodes, name, seed, self.within)
        self.meaning.note_merged(name, node, inputs)
        if self.is_baking and is_unchanged(self.models[self.input_names[0]], name, node, nodes[0]):
            return self._keep(name, UNCHANGED, dtype)
        node, why = self._placed(name, self.ensemble.joined(node), output.dtype), f"{self.method.name}{fitting.why}"
        why += told_adapters(self.models, name, inputs, node)
        return Decision(name, "merged", why, node.info, node, parameters, self.tuning.block(name, rule))

    @functools.cached_property
    def is_baking(self) -> bool:
        """Whether one model is made, of itself and of adapters."""
        return len(self.input_names) == 1 and adapted_in(self.models[self.input_names[0]]) is not None

    def _placed(self, name: str, node: Node, dtype: DType) -> Node:
        """The tensor in the layout's shape: what it doesn't reach is the layout's."""
        if node.info.shape == self.layout.tensors[name].shape:
            return node
        return placed(node, self.values[self.layout_name].node(name), dtype)

    def _keep_shape(self, name: str, dtype: Storage | None) -> Decision:
        return self._keep(name, f"kept for its shape {list(self.layout.tensors[name].shape)}", dtype)

    def _fit(self, name: str, nodes: Mapping[str, Node], *, taken: bool = False) -> Fitting | None:
        """The models' tensors in one shape, as the recipe allows; None, and the problem noted, where not."""
        layout, policy = self.layout.tensors[name], self.recipe.on_shape_mismatch
        fitting = fit(nodes, layout, policy)
        if fitting is None or fitting.why:
            self.problems.note_shape(Misshapen.of(name, self.layout_name, layout, nodes, taken=taken), policy)
        return fitting
