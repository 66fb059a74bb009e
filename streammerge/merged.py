"""A merge of models as a model: what becomes of every tensor, decided from the recipe and the headers alone."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from streammerge.asked import Recipe, Rule
from streammerge.errors import MethodError, PlanError
from streammerge.extent import Extent
from streammerge.globs import RuleIndex
from streammerge.layers import Layers, layers_of
from streammerge.methods import find_method
from streammerge.methods.contract import ParameterValue
from streammerge.methods.place import Within
from streammerge.methods.registry import BlockMethod, GramMethod, LinearMethod, Method, WholeMethod
from streammerge.mismatches import Problems
from streammerge.nodes import ByBlock, ByGram, ByWhole, External, Node, Term, Together, Viewed, combine, walk
from streammerge.quantisation import DECODED, CodedModels, Quantised, decoded
from streammerge.tensors import DType, Model, TensorInfo, contiguous_strides
from streammerge.tuning import Tuning

if TYPE_CHECKING:
    import torch

Action = Literal["merged", "copied", "dropped"]


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What becomes of one tensor of the layout, and why. A dropped one has no node.

    `parameters` are the method's, for a merged one, and `block` is where it is, if any of them are given by block.
    """

    name: str
    action: Action
    why: str
    info: TensorInfo
    node: Node | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    block: str = ""

    @property
    def detail(self) -> str:
        """`BASE (VAE): weight 0.5/0.25, normalize true`: its block, if it matters, and the parameters' values."""
        values = ", ".join(f"{key} {_shown(value)}" for key, value in self.parameters.items())
        return f"{self.block}: {values}" if self.block else values


@dataclass(frozen=True)
class Merged:
    """A merge, computed when it is read.

    Per input, `left_out` are its tensors that the layout doesn't have, `lacking` the layout's that it doesn't have.
    `remarks` are what the user should know of the recipe, `layout` is the model whose tensors the merge has, and
    `extent` how much has been planned for it.
    """

    decisions: tuple[Decision, ...]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lacking: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    layout: Model | None = None
    extent: Extent = field(default_factory=Extent)

    @functools.cached_property
    def layers(self) -> Layers:
        """The layers that a gradient goes over: the layout's."""
        return layers_of(self.layout) if self.layout is not None else Layers.of(self.tensors)

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The output's tensors, in the layout's order."""
        return {decision.name: decision.info for decision in self.decisions if decision.node is not None}

    @functools.cached_property
    def nodes(self) -> Mapping[str, Node]:
        """The output's tensors as expressions."""
        return {decision.name: decision.node for decision in self.decisions if decision.node is not None}

    def node(self, name: str) -> Node:
        """The tensor's expression, not rounded to its stored dtype."""
        return self.nodes[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the merged tensor, in the dtype in which it would be stored."""
        from streammerge.surveys import read_merged

        return read_merged(self.nodes[name], self.tensors[name].dtype, start, stop)


def node_of(model: Model, name: str) -> Node:
    """The expression for a model's tensor; a model that is none of ours can only be asked to read itself."""
    own = getattr(model, "node", None)
    if own is None:
        return External(model.tensors[name], model, name)
    found: Node = own(name)
    return found


def merge_models(recipe: Recipe, models: Mapping[str, Model], within: Within = ()) -> Merged:
    """Decide what becomes of every tensor of the layout; `models` are the recipe's inputs by name.

    `within` is where the recipe stands in the one that it is part of: what is random differs from place to place.
    Raises PlanError with every mismatch of a kind at once, and what settles it.
    """
    return _Resolution(recipe, models, within).resolve()


@dataclass
class _Resolution:
    """The work of `merge_models`: goes through the layout once and collects what doesn't fit."""

    recipe: Recipe
    models: Mapping[str, Model]
    within: Within = ()
    problems: Problems = field(default_factory=Problems)
    codes_of: dict[str, str] = field(default_factory=dict)
    together: dict[tuple[ParameterValue, ...], Together] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.method: Method = find_method(recipe.method)
        self.layout_name = recipe.layout_name
        self.layout = self.models[self.layout_name]
        has_base = recipe.base is not None and self.method.base != "none"
        self.base_name = recipe.base.name if recipe.base and has_base else ""
        self.model_names = [entry.name for entry in recipe.models]
        self.input_names = [*([self.base_name] if self.base_name else []), *self.model_names]
        inputs = [self.models[name] for name in self.input_names]
        self.extent = Extent.of_merge(self.method, len(self.layout.tensors), inputs)
        self.coded = CodedModels.of(self.models, self.layout_name)
        self.rules, self.tuning = RuleIndex(recipe.rules), Tuning(recipe, self.layout)

    def resolve(self) -> Merged:
        layout, coded = self.layout.tensors, self.coded
        weights = {name: self._decide(name, info) for name, info in layout.items() if name not in coded.beside}
        decisions = tuple(weights.get(name) or self._decide_beside(name, info) for name, info in layout.items())
        self._report_problems()
        known = {name: {*layout, *coded.accounted(name)} for name in self.models}
        left_out = {name: names_beside(model.tensors, known[name]) for name, model in self.models.items()}
        held = {name: {*model.tensors, *coded.weights[name]} for name, model in self.models.items()}
        lacking = {name: names_beside(weights, held[name]) for name in self.models}
        return Merged(
            decisions,
            {name: tensors for name, tensors in left_out.items() if tensors},
            {name: tensors for name, tensors in lacking.items() if tensors},
            tuple(dict.fromkeys([*self.tuning.remarks(), *self._nested_remarks()])),
            self.layout,
            self.extent,
        )

    def _nested_remarks(self) -> Iterator[str]:
        for name, model in self.models.items():
            if isinstance(model, Merged):
                yield from (f"{name}: {remark}" for remark in model.remarks)

    def _decide(self, name: str, info: TensorInfo) -> Decision:
        rule = self.rules.find(name)
        dtype = (rule and rule.dtype) or self.recipe.dtype
        if rule and rule.action == "drop":
            return Decision(name, "dropped", f"rule {rule}", info)
        if rule and rule.action == "keep":
            return self._copy(name, self.layout_name, f"kept by rule {rule}", dtype)
        if rule and rule.action == "take":
            return self._take(name, rule, dtype)
        if unreadable := self.coded.unreadable([*self.input_names, self.layout_name], name):
            return self._refuse(name, unreadable)
        if not info.dtype.mergeable and info.dtype.kind != "packed":
            return self._copy(name, self.layout_name, f"{info.dtype} is never averaged", dtype)
        return self._merge(name, info, rule, dtype)

    def _refuse(self, name: str, quantised: Mapping[str, Quantised]) -> Decision:
        kinds = ", ".join(f"{model}: {weight.kind}" for model, weight in quantised.items())
        self.problems.unreadable.append(f"{name}   {kinds}")
        return Decision(name, "dropped", "its codes can't be decoded", self.layout.tensors[name])

    def _decide_beside(self, name: str, info: TensorInfo) -> Decision:
        """What belongs to a weight's codes goes where they go: copied with them, or left out where they are decoded."""
        self.rules.find(name)
        codes = self.coded.beside[name]
        model = self.codes_of.get(codes) if codes else (self.layout_name if self.codes_of else None)
        if model is None:
            return Decision(name, "dropped", "the weights that it belongs to are decoded", info)
        node = node_of(self.models[model], name)
        return Decision(name, "copied", f"from {model}: it belongs to {codes or 'its weights'}", node.info, node)

    def _weight(self, model: str, name: str) -> Node:
        """The model's tensor, decoded if it is stored as codes."""
        weight = self.coded.find(model, name)
        if weight is None:
            return node_of(self.models[model], name)
        return decoded(weight, lambda part: node_of(self.models[model], part))

    def _copy(self, name: str, model: str, why: str, dtype: DType | None) -> Decision:
        node, quantised = node_of(self.models[model], name), self.coded.find(model, name)
        if quantised is not None:
            if self.coded.stay_whole(quantised) and stored_as(node.info, dtype) == node.info:
                self.codes_of[name] = model
            elif not quantised.is_readable:
                return self._refuse(name, {model: quantised})
            else:
                node, why = self._weight(model, name), f"{why}, decoded"
        info = stored_as(node.info, dtype)
        cast = "" if info == node.info else f", stored as {info.dtype}"
        return Decision(name, "copied", f"from {model}: {why}{cast}", info, node)

    def _take(self, name: str, rule: Rule, dtype: DType | None) -> Decision:
        if name not in self.models[rule.model].tensors:
            return self._without(name, [rule.model], dtype)
        shape, weight = self.layout.tensors[name].shape, self.coded.find(rule.model, name)
        if self.models[rule.model].tensors[name].shape == shape:
            return self._copy(name, rule.model, f"taken by rule {rule}", dtype)
        if weight is not None and not weight.is_readable:
            return self._refuse(name, {rule.model: weight})
        node = self._weight(rule.model, name)
        fitted = self._fit(name, [node], [rule.model], shape)
        if fitted is None:
            return self._copy(name, self.layout_name, f"kept for its shape {list(shape)}", dtype)
        info = stored_as(fitted[0].info, dtype)
        why = f"from {rule.model}: taken by rule {rule}, fitted to the shape {list(shape)}"
        return Decision(name, "copied", why, info, fitted[0])

    def _without(self, name: str, lacking: list[str], dtype: DType | None) -> Decision:
        """What becomes of a tensor that some of the models lack."""
        why = f"{' and '.join(lacking)} {'lack' if len(lacking) > 1 else 'lacks'} it"
        if self.recipe.on_missing == "drop":
            return Decision(name, "dropped", why, self.layout.tensors[name])
        if self.recipe.on_missing == "error":
            self.problems.missing.append(f"{name}   not in {', '.join(lacking)}")
        return self._copy(name, self.layout_name, why, dtype)

    def _merge(self, name: str, info: TensorInfo, rule: Rule | None, dtype: DType | None) -> Decision:
        lacking = [model for model in self.input_names if name not in self.models[model].tensors]
        if lacking:
            return self._without(name, lacking, dtype)
        inputs = [self._weight(model, name) for model in self.input_names]
        if not all(node.info.dtype.mergeable for node in inputs):
            kinds = [f"{model} {node.info.dtype}" for model, node in zip(self.input_names, inputs, strict=True)]
            self.problems.unmergeable.append(f"{name}   {', '.join(kinds)}")
            return self._copy(name, self.layout_name, "its dtypes can't be averaged", dtype)
        fitted = self._fit(name, inputs, self.input_names, info.shape)
        if fitted is None:
            return self._copy(name, self.layout_name, f"kept for its shape {list(info.shape)}", dtype)
        if self.coded.find(self.layout_name, name):
            info = TensorInfo(DECODED, info.shape)
        output = stored_as(info, dtype)
        parameters = self.tuning.values(name, rule)
        node = apply_method(self.method, output, parameters, fitted, name, self.recipe.seed or 0, self.within)
        if isinstance(node, ByBlock):
            node = self._with_others(node)
        return Decision(name, "merged", self.method.name, output, node, parameters, self.tuning.block(name, rule))

    def _with_others(self, node: ByBlock) -> ByBlock:
        """The node, among those with which it shares its statistics if the method takes them of the whole model."""
        method = node.method
        if method.statistics is None or not method.is_of_model(node.parameters):
            return node
        if any(needs_statistics(part) for child in node.inputs for part in walk(child)):
            raise PlanError(
                f"method {method.name!r} measures the whole model at once, and one of its inputs is a merge that has "
                "to be measured itself",
                advice="Write that merge to a file first, or measure each tensor alone (scope: tensor).",
            )
        key = tuple(node.parameters[name] for name in method.statistics_of)
        together = self.together.setdefault(key, Together())
        member = replace(node, together=together)
        together.members.append(member)
        return member

    def _fit(self, name: str, nodes: list[Node], models: list[str], shape: tuple[int, ...]) -> list[Node] | None:
        """The models' tensors in the layout's shape, as the recipe allows; None, and the problem noted, where not."""
        policy = self.recipe.on_shape_mismatch
        fitted = [fit(node, shape, policy) for node in nodes]
        possible = [node for node in fitted if node is not None]
        if len(possible) == len(nodes):
            return possible
        if policy != "keep":
            self.problems.misshapen.append(f"{name}   {self._shapes(name, shape, models)}")
        return None

    def _shapes(self, name: str, expected: tuple[int, ...], models: list[str]) -> str:
        """`depth [320, 5, 3, 3]   base, waifu [320, 4, 3, 3]`: the models by their shape, the layout's first."""
        by_shape: dict[tuple[int, ...], list[str]] = {expected: [self.layout_name]}
        for model in models:
            names = by_shape.setdefault(self.models[model].tensors[name].shape, [])
            if model not in names:
                names.append(model)
        return "   ".join(f"{', '.join(models)} {list(shape)}" for shape, models in by_shape.items())

    def _report_problems(self) -> None:
        compared = {name: self.models[name].tensors for name in (*self.input_names, self.layout_name)}
        self.problems.report(self.layout_name, self.rules.unused, compared)


def _shown(value: ParameterValue) -> str:
    """`0.5`, or `0.5/0.25` of several models."""
    values = value if isinstance(value, tuple) else (value,)
    return "/".join(
        f"{each:g}" if isinstance(each, float) else str(each).lower() if isinstance(each, bool) else str(each)
        for each in values
    )


def fit(node: Node, shape: tuple[int, ...], policy: str) -> Node | None:
    """The tensor zero-padded or cut to the shape, as the policy allows; None where it does not."""
    own = node.info.shape
    if own == shape:
        return node
    allowed = {"pad": lambda has, wants: has <= wants, "slice": lambda has, wants: has >= wants}.get(policy)
    if allowed is None or len(own) != len(shape) or not all(map(allowed, own, shape)):
        return None
    inner = tuple(map(min, own, shape))
    return Viewed(TensorInfo(node.info.dtype, shape), node, 0, contiguous_strides(own), inner)


def apply_method(
    method: Method,
    info: TensorInfo,
    parameters: Mapping[str, ParameterValue],
    inputs: Iterable[Node],
    name: str = "",
    seed: int = 0,
    within: Within = (),
) -> Node:
    """The expression of a method over the inputs, the base first if there is one; random numbers follow from the name,
    the seed, and where in a recipe it is."""
    nodes = tuple(inputs)
    if method.check:
        method.check(parameters, len(nodes))
    match method:
        case LinearMethod():
            coefficients = method.coefficients(parameters)
            if len(coefficients) != len(nodes):
                raise MethodError(
                    f"method {method.name!r} gave {len(coefficients)} coefficients for {len(nodes)} inputs"
                )
            return combine(info, tuple(Term(c, node) for c, node in zip(coefficients, nodes, strict=True)))
        case GramMethod():
            return ByGram(info, method, parameters, nodes, name, seed, within)
        case BlockMethod():
            return ByBlock(info, method, parameters, nodes, name, seed, within)
        case WholeMethod():
            return ByWhole(info, method, parameters, nodes, name, seed, within)
    raise TypeError(f"method {method.name!r} is of no known kind")


def needs_statistics(node: Node) -> bool:
    """Whether passes over the inputs are needed before the node can be computed."""
    return isinstance(node, ByGram | ByWhole) or (isinstance(node, ByBlock) and node.method.statistics is not None)


def names_beside(names: Iterable[str], others: Container[str]) -> tuple[str, ...]:
    """The names that are not among the others."""
    return tuple(name for name in names if name not in others)


def stored_as(info: TensorInfo, dtype: DType | None) -> TensorInfo:
    """The description with the asked-for dtype, if it is one and the elements are floating point."""
    return TensorInfo(dtype, info.shape) if dtype and info.dtype.mergeable else info
