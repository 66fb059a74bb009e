"""What becomes of every tensor: merged, copied or dropped, and why; decided from headers alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from streammerge.compute.application import apply_method
from streammerge.compute.costs import is_only
from streammerge.compute.expressions import Node, gives, is_stored
from streammerge.errors import count, plural
from streammerge.methods import find_method
from streammerge.methods.place import Within
from streammerge.methods.registry import Method
from streammerge.models.adapters.accounts import UNCHANGED
from streammerge.models.adapters.adapted import adapted_in, adapters_of
from streammerge.models.adapters.recognition import refuse_adapters
from streammerge.models.buffers import is_computed
from streammerge.models.codes import Quantised, may_be_weights
from streammerge.models.decisions import Decision, Decisions
from streammerge.models.dialects import Naming
from streammerge.models.dialects.places import SAFETY_CHECKER
from streammerge.models.dtypes import Scaled, Storage, stored_as
from streammerge.models.extent import Extent
from streammerge.models.merged import Merged
from streammerge.models.positions import are_positions, mended, what_is_broken
from streammerge.models.prediction import is_mark
from streammerge.models.presence import Names, names_beside, names_lacking, names_outside, with_inner
from streammerge.models.quantised import DECODED, CodedModels, kept_bytes
from streammerge.models.shapes import Fitting, fit, placed
from streammerge.models.views import Decoded, beneath, node_of
from streammerge.plan.ensemble import Ensemble
from streammerge.plan.globs import RuleIndex
from streammerge.plan.meaning import Meaning
from streammerge.plan.naming import Named
from streammerge.plan.parts import Dropped, prepared
from streammerge.plan.problems import Misshapen, Problems, Unshared
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
    codes_of: dict[str, str] = field(default_factory=dict)
    ensemble: Ensemble = field(default_factory=Ensemble)
    mended: dict[str, str] = field(default_factory=dict)
    uncast: dict[str, dict[str, None]] = field(default_factory=dict)
    alike: dict[DType, dict[str, None]] = field(default_factory=dict)
    looked_at: dict[tuple[str, str], str] = field(default_factory=dict)
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

    def resolve(self) -> Merged:
        layout, coded = self.layout.tensors, self.coded
        weights = [name for name in layout if not coded.is_beside(name)]
        names = [*layout, *(name for name in self.dropped if name not in layout)] if self.dropped else layout
        decisions = Decisions(names, self._decision, (name for name in layout if coded.is_beside(name)))
        left_out = self._look_outside(names_outside(self.models, layout.keys(), coded))
        merged = sum(fate.tensors for fate in decisions.fates if fate.action == "merged")
        self.meaning.check()
        self.problems.report(self.recipe, self._compared, self.rules.unused, merged=merged)
        self.scaling.check()
        cut = [*self.problems.cut()] if self.recipe.on_shape_mismatch == "overlap" else []
        self.is_reported = True
        whole = {name: model for name, model in self.models.items() if name not in self._parts}
        lacking = {
            name: told
            for name, names in names_lacking(whole, weights, coded).items()
            if (told := tuple(own for own in names if not self.meaning.said[name].says(own)))
        }
        inner = sum(model.kept_bytes for model in self._nested.values())
        made = Merged(
            decisions,
            with_inner(left_out, self.models, "left_out"),
            with_inner(lacking, self.models, "lacking"),
            inner + kept_bytes(coded.weights) + self.named.kept_bytes,
            tuple(dict.fromkeys([*self._remarks(decisions), *cut])),
            self.layout,
            self.extent,
            stated=stated_layers(self.codes_of, self.models),
            sampling=self.meaning.sampling,
        )
        return with_scales(made)

    @functools.cached_property
    def _parts(self) -> frozenset[str]:
        """The models from which only components are taken: nobody expects them to have the rest."""
        taken = {rule.model for rule in self.recipe.rules if rule.component and rule.action == "take"}
        return frozenset(taken - {self.layout_name, *self.input_names})

    def _remarks(self, decisions: Decisions) -> Iterator[str]:
        yield from self.named.remarks
        yield from self.tuning.remarks()
        yield from self.meaning.remarks(decisions)
        yield from self.mended.values()
        for kind, names in self.uncast.items():
            told = f"{count(names, 'quantised weight')} ({kind}) {plural(names, 'stays', 'stay')} as stored"
            yield f"{told}: streammerge can't decode {plural(names, 'it', 'them')}, so no other dtype is given"
        for dtype, alike in self.alike.items():
            told = f"{count(alike, 'weight')} with {plural(alike, 'a scale', 'scales')} {plural(alike, 'is', 'are')}"
            rest = f"all else that this dtype is for is stored as {dtype} without, norms and biases too"
            yield f"{told} {dtype} already, and {plural(alike, 'keeps it', 'keep them')}; {rest}"
        yield from self._nested_remarks()

    def _nested_remarks(self) -> Iterator[str]:
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
            self.problems = Problems()
            self.rules.tried = self.tuning.gone_through = 0
        if name in self.dropped and name not in self.layout.tensors:
            info, why = self.dropped[name]
            return Decision(name, "dropped", why, info)
        info = self.layout.tensors[name]
        return self._decide_beside(name, info) if self.coded.is_beside(name) else self._decide(name, info)

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
            return self._copy(name, self.layout_name, f"kept by rule {rule}", dtype)
        if rule and rule.action == "take":
            return self._take(name, rule, dtype)
        if self.is_coded and (unreadable := self.coded.unreadable([*self.input_names, self.layout_name], name)):
            return self._refuse(name, unreadable, self.problems.unreadable)
        if name in self.factors:
            self.problems.factors.append(name)
            return Decision(name, "dropped", "factors are never averaged", info)
        if are_positions(name, info):
            return self._copy(name, self.layout_name, "positions are never averaged", dtype)
        if is_computed(name, info):
            return self._copy(name, self.layout_name, "a buffer that libraries compute is never averaged", dtype)
        if name.startswith(SAFETY_CHECKER):
            return self._copy(name, self.layout_name, "a safety checker is never averaged", dtype)
        if not info.dtype.mergeable and not may_be_weights(name, info):
            return self._copy(name, self.layout_name, f"{info.dtype} is never averaged", dtype)
        return self._merge(name, info, rule, dtype)

    def _look_outside(self, outside: Names) -> Names:
        """Note what is missing in the layout, as what is missing in other models: which of them it is, is chance.

        Returned are the names without those that rules drop, and what the output says otherwise.
        """
        wanted: dict[str, bool] = {}
        told: set[str] = set()
        for model, names in outside.items():
            for name in names_beside(names, self.coded.weights[self.layout_name]):
                rule = self.rules.peek(name)
                if rule and rule.action == "drop":
                    self.rules.find(name)
                    told.add(name)
                elif rule and rule.action == "take" and rule.model == model:
                    wanted[name] = True
                elif name.startswith(SAFETY_CHECKER):
                    continue
                elif is_mark(name) and self.meaning.tells(name):
                    told.add(name)
                elif model in self.input_names and (rule is None or rule.action == "merge"):
                    info = self.models[model].tensors[name]
                    is_weights = info.dtype.mergeable or may_be_weights(name, info)
                    if is_weights and not are_positions(name, info) and not is_computed(name, info):
                        wanted.setdefault(name, False)
        if not self.recipe.rules:
            self.problems.alone.extend(wanted)
        if self.recipe.on_missing == "error":
            self.problems.missing.extend(self._unshared(name, taken=taken) for name, taken in wanted.items())
        left = {model: self._expected(model, names_beside(names, told)) for model, names in outside.items()}
        return {model: names for model, names in left.items() if names}

    def _expected(self, model: str, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of a model's tensors that somebody may miss: of one that only gives components, theirs."""
        if model not in self._parts:
            return names
        rules = ((name, self.rules.peek(name)) for name in names)
        return tuple(name for name, rule in rules if rule and rule.action == "take" and rule.model == model)

    def _unshared(self, name: str, *, taken: bool) -> Unshared:
        models = list(self._compared)
        having = [model for model in models if name in self.models[model].tensors]
        return Unshared(name, having, [model for model in models if model not in having], taken)

    @functools.cached_property
    def _compared(self) -> dict[str, Mapping[str, TensorInfo]]:
        """The models that the recipe brings together, the layout first."""
        taken = [rule.model for rule in self.recipe.rules if rule.action == "take"]
        return {name: self.models[name].tensors for name in (self.layout_name, *self.input_names, *taken)}

    def _refuse(self, name: str, quantised: Mapping[str, Quantised], problems: list[str]) -> Decision:
        kinds = ", ".join(f"{model}: {weight.kind}" for model, weight in quantised.items())
        problems.append(f"{name}   {kinds}")
        return Decision(name, "dropped", "its codes can't be decoded", self.layout.tensors[name])

    def _decide_beside(self, name: str, info: TensorInfo) -> Decision:
        """What belongs to a weight's codes goes where they go: copied with them, or left out where they are decoded."""
        self.rules.find(name)
        codes = self.coded.beside.get(name)
        model = self.codes_of.get(codes) if codes is not None else self._marking(self.coded.marks[name])
        if model is None:
            gone = "the weights that it belongs to are decoded"
            if codes is None:
                gone = "no weights with scales of its kind are left"
            return Decision(name, "dropped", gone, info)
        node = node_of(self.models[model], name)
        return Decision(name, "copied", f"from {model}: it belongs to quantised weights", node.info, node)

    def _marking(self, prefix: str) -> str | None:
        """The layout, if it has to keep a mark of scaled weights: some whose names start so are copied as codes."""
        return self.layout_name if any(codes.startswith(prefix) for codes in self.codes_of) else None

    def _broken(self, model: str, name: str) -> str:
        """What is wrong with a model's tensor that has to be positions, if it has and anything is; looked at once."""
        if not are_positions(name, self.models[model].tensors[name]):
            return ""
        if (model, name) not in self.looked_at:
            self.looked_at[model, name] = what_is_broken(self.models[model], name)
        return self.looked_at[model, name]

    def _copy(self, name: str, model: str, why: str, dtype: Storage | None) -> Decision:
        self.meaning.note_copied(name, model)
        if broken := self._broken(model, name):
            node = mended(name, self.models[model].tensors[name].shape)
            self.mended[name] = f"{name}: {model}'s are no positions ({broken}), and are written as 0, 1, 2 …"
            return Decision(name, "copied", f"mended: {model}'s are {broken}", node.info, node)
        node, quantised = node_of(self.models[model], name), self.coded.find(model, name)
        if quantised is not None:
            is_kept = not quantised.is_readable or stored_as(node.info, dtype) == node.info
            if is_kept and self.coded.stay_whole(quantised):
                if dtype is not None and not quantised.is_readable:
                    self.uncast.setdefault(quantised.kind, {})[name] = None
                elif dtype is not None:
                    self.alike.setdefault(node.info.dtype, {})[name] = None
                self.codes_of[name], dtype = model, None
            elif not quantised.is_readable:
                return self._refuse(name, {model: quantised}, self.problems.uncopied)
            else:
                node, why = self.values[model].node(name), f"{why}, decoded"
        why += self._with_adapters(name, {model: node}, node)
        info = stored_as(node.info, dtype)
        cast = "" if info == node.info else f", stored as {info.dtype}"
        return Decision(name, "copied", f"from {model}: {why}{cast}", info, node)

    def _take(self, name: str, rule: Rule, dtype: Storage | None) -> Decision:
        if name not in self.models[rule.model].tensors:
            return self._without(name, [rule.model], dtype, taken=True)
        self.meaning.note_copied(name, rule.model)
        if self.models[rule.model].tensors[name].shape == self.layout.tensors[name].shape:
            return self._copy(name, rule.model, f"taken by rule {rule}", dtype)
        if unreadable := self.coded.unreadable([rule.model, self.layout_name], name):
            return self._refuse(name, unreadable, self.problems.uncopied)
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
            self.problems.missing.append(self._unshared(name, taken=taken))
        return self._copy(name, self.layout_name, why, dtype)

    def _merge(self, name: str, info: TensorInfo, rule: Rule | None, dtype: Storage | None) -> Decision:
        said = self.meaning.said
        lacking = [
            model for model in self.input_names if name not in self.models[model].tensors and not said[model].says(name)
        ]
        if lacking:
            return self._without(name, lacking, dtype)
        if is_mark(name):
            return self._copy(name, self.layout_name, "it says how to sample, and is never averaged", dtype)
        inputs = {model: self.values[model].node(name) for model in self.input_names}
        if not all(node.info.dtype.mergeable for node in inputs.values()):
            kinds = ", ".join(f"{model} {node.info.dtype}" for model, node in inputs.items())
            self.problems.unmergeable.append(f"{name}   {kinds}")
            return self._copy(name, self.layout_name, "its dtypes can't be averaged", dtype)
        fitting = self._fit(name, inputs)
        if fitting is None:
            return self._keep_shape(name, dtype)
        own = DECODED if self.coded.find(self.layout_name, name) else info.dtype
        output = stored_as(TensorInfo(own, fitting.shape), dtype)
        parameters, seed = self.tuning.values(name, rule), self.recipe.seed or 0
        nodes = [fitting.nodes[model] for model in self.input_names]  # one may be given twice: as the base, too
        node = apply_method(self.method, output, parameters, nodes, name, seed, self.within)
        self.meaning.note_merged(name, node, inputs)
        if self.is_baking and self._is_unchanged(name, node, nodes[0]):
            return self._copy(name, self.layout_name, UNCHANGED, dtype)
        node, why = self._placed(name, self.ensemble.joined(node), output.dtype), f"{self.method.name}{fitting.why}"
        why += self._with_adapters(name, inputs, node)
        return Decision(name, "merged", why, node.info, node, parameters, self.tuning.block(name, rule))

    @functools.cached_property
    def is_baking(self) -> bool:
        """Whether one model is made, of itself and of adapters."""
        return len(self.input_names) == 1 and adapted_in(self.models[self.input_names[0]]) is not None

    def _is_unchanged(self, name: str, node: Node, own: Node) -> bool:
        """Whether a tensor is the model's, as it was before adapters were put into it."""
        changing = adapters_of(self.models[self.input_names[0]], name)
        return is_only(node, own) and (changing == [] or (changing is None and is_stored(own)))

    def _with_adapters(self, name: str, inputs: Mapping[str, Node], made: Node) -> str:
        """Which adapters of any input change a tensor, in words: of those inputs of which something is in it."""
        found = {model: adapters_of(self.models[model], name) or [] for model in inputs}
        own = (each for model, each in found.items() if each and gives(inputs[model], made))
        changing = dict.fromkeys(adapter for each in own for adapter in each)
        return f", with {' and '.join(changing)}" if changing else ""

    def _placed(self, name: str, node: Node, dtype: DType) -> Node:
        """The tensor in the layout's shape: what it doesn't reach is the layout's."""
        if node.info.shape == self.layout.tensors[name].shape:
            return node
        return placed(node, self.values[self.layout_name].node(name), dtype)

    def _keep_shape(self, name: str, dtype: Storage | None) -> Decision:
        return self._copy(name, self.layout_name, f"kept for its shape {list(self.layout.tensors[name].shape)}", dtype)

    def _fit(self, name: str, nodes: Mapping[str, Node], *, taken: bool = False) -> Fitting | None:
        """The models' tensors in one shape, as the recipe allows; None, and the problem noted, where not."""
        layout, policy = self.layout.tensors[name], self.recipe.on_shape_mismatch
        fitting = fit(nodes, layout, policy)
        if fitting is None or fitting.why:
            self.problems.note_shape(Misshapen.of(name, self.layout_name, layout, nodes, taken=taken), policy)
        return fitting
