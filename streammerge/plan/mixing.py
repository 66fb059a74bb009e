"""A mixture of experts built of dense models: whose tensors its tensors are, and what its config says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from streammerge.compute.application import apply_method
from streammerge.compute.combining import combine
from streammerge.compute.expressions import Node, Term
from streammerge.errors import PlanError, count, listed, plural
from streammerge.methods import find_method
from streammerge.models.buffers import is_computed
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.configs import DTYPE_KEYS, config_in, embedding_and_head, main_dtype
from streammerge.models.decisions import Decision, Decisions
from streammerge.models.dtypes import Scaled, parse_dtype, stored_as
from streammerge.models.folders import root_of
from streammerge.models.merged import Merged
from streammerge.models.mixtures.architectures import ARCHITECTURES, PARTS, Architecture, filled, fitting
from streammerge.models.mixtures.gates import EmbeddedGates, RandomGates, check_tokens, prompted
from streammerge.models.tokenizers import Tokenizer
from streammerge.models.views import Decoded
from streammerge.plan.vocabularies import home_of
from streammerge.recipe.experts import Expert, Mixture
from streammerge.recipe.recipe import Recipe
from streammerge.tensors import DTYPES, DType, Model, TensorInfo, described

_DENSE: Final = re.compile(rf"(?P<layer>(?:.*\.)?layers\.\d+\.)mlp\.(?P<part>{'|'.join(PARTS)})\.weight")
_BIAS: Final = re.compile(r".*\.self_attn\.(?P<of>[qkvo]_proj)\.bias")

Role = Literal["base", "expert", "gate", "shared gate", "zeros", "left"]


class _Place(NamedTuple):
    """What a tensor of the mixture is: of which model, and what that calls it."""

    role: Role
    source: str
    info: TensorInfo
    expert: Expert | None = None


def mixture_of(recipe: Recipe, mixture: Mixture, models: Mapping[str, Model], naming: str | None = None) -> Merged:
    """The mixture as a merge, its base being the layout; PlanError if the models don't make one."""
    assert recipe.base is not None
    if naming is not None:
        raise PlanError("a mixture has its architecture's names, and no others", advice="Leave --names out.")
    called = dict.fromkeys([recipe.base.name, *(each.name for each in (*mixture.experts, *mixture.shared))])
    configs = {name: _config(models[name], name) for name in called}
    architecture = _architecture(mixture, configs)
    _check_activations(configs)
    values = {name: Decoded(models[name]) for name in called}
    config = configs[recipe.base.name]
    dtype = _dtype(recipe, config, values[recipe.base.name])
    builder = _Builder(recipe, mixture, architecture, values, recipe.base.name, config)
    places = builder.places()
    gates = _Gates(recipe, mixture, models[recipe.base.name], values[recipe.base.name])

    def decide(name: str) -> Decision:
        return _decision(name, places[name], values, recipe, gates, dtype)

    made = architecture.config(config, len(mixture.experts), len(mixture.shared), mixture.experts_per_token)
    home = home_of(models[recipe.base.name])
    return Merged(
        Decisions(places, decide),
        remarks=tuple(_remarks(architecture, mixture, config)),
        layout=models[recipe.base.name],
        config=made,
        tokenizer=home if isinstance(home, Tokenizer) else None,
    )


def _config(model: Model, name: str) -> Mapping[str, Any]:
    """What a model's config says."""
    root = root_of(model)
    folder = root.folder if isinstance(root, Checkpoint) else None
    config = config_in(folder) if folder is not None else None
    if config is None:
        raise PlanError(
            f"{name}: there is no config.json, which says of what kind the model is",
            advice="Name the folders of the models of which a mixture is to be built.",
        )
    return config


def _architecture(mixture: Mixture, configs: Mapping[str, Mapping[str, Any]]) -> Architecture:
    """What comes out, by the models' types and by what is asked for."""
    types = [str(config.get("model_type")) for config in configs.values()]
    asked = mixture.architecture.lower()
    known = [each for each in ARCHITECTURES if each.name.lower().startswith(asked)]
    if not known:
        raise PlanError(
            f"there is no architecture {mixture.architecture!r} to build",
            advice=f"Known: {', '.join(each.name for each in ARCHITECTURES)}.",
        )
    prompts = any(each.positive or each.negative for each in mixture.shared)
    found = fitting(types, len(mixture.shared), prompts, is_random=mixture.gate_mode != "cheap_embed")
    for each in known:
        if each in found:
            return each
    takes = [f"{each.name}   of {' or '.join(each.sources)}, {_shares(each)}" for each in known]
    raise PlanError(
        f"no mixture is built of {listed(sorted(set(types)))} with {len(mixture.shared)} shared experts"
        f"{' that have prompts' if prompts else ''}",
        found=takes,
        advice="All models must be of one type, and the shared expert as one of these wants it.",
    )


def _shares(each: Architecture) -> str:
    """`with one shared expert, which has prompts`"""
    if each.gated:
        return "with one shared expert, which has prompts unless gates are random"
    return "without a shared expert" if each.shares == (0,) else "without a shared expert or with one, without prompts"


def _check_activations(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """PlanError if the models' feed-forward layers compute something else: a mixture has one activation."""
    found = {name: {**filled(config), **config}.get("hidden_act") for name, config in configs.items()}
    if len(set(found.values())) > 1:
        raise PlanError(
            "the models' layers have different activations, and those of a mixture have one",
            found=[f"{name}   {act}" for name, act in found.items()],
        )


def _dtype(recipe: Recipe, config: Mapping[str, Any], values: Decoded) -> DType | None:
    """The dtype that is asked for, or else that of the base model, by its config or by its tensors."""
    if isinstance(recipe.dtype, Scaled):
        raise PlanError("a mixture is stored in one dtype, without scales", advice="Choose another --dtype.")
    if recipe.dtype is not None:
        return recipe.dtype
    said = next((config[key] for key in DTYPE_KEYS if isinstance(config.get(key), str)), main_dtype(values.tensors))
    found = parse_dtype(said, "config.json") if said else None
    return found if isinstance(found, DType) else None


@dataclass(frozen=True)
class _Builder:
    """Says what every tensor of a mixture is."""

    recipe: Recipe
    mixture: Mixture
    architecture: Architecture
    values: Mapping[str, Decoded]
    base: str
    config: Mapping[str, Any]

    def places(self) -> dict[str, _Place]:
        """Every tensor of the mixture, in the base's order; PlanError if something is missing, or doesn't fit."""
        self._check_readable()
        places: dict[str, _Place] = {}
        problems: list[str] = []
        layers: dict[str, set[str]] = {}
        for name, info in self.values[self.base].tensors.items():
            if match := _DENSE.fullmatch(name):
                layer, part = match["layer"], match["part"]
                if layer not in layers:
                    places |= self._gates(layer)
                layers.setdefault(layer, set()).add(part)
                places |= dict(self._experts(name, layer, part, info, problems))
            else:
                role = self._role(name, info)
                if role is None:
                    problems.append(f"{name}   {self.base}: {self.architecture.name} has no such tensor")
                else:
                    places[name] = _Place(role, name, info)
        problems += [f"{layer}mlp   {self.base}: lacks a matrix" for layer, own in layers.items() if len(own) < 3]
        problems += self._beyond_base(layers)
        if not layers:
            problems.append(f"{self.base}: no layer has {', '.join(PARTS)}")
        if problems:
            what = f"{count(problems, 'tensor')} {plural(problems, 'keeps', 'keep')} the models from being a mixture"
            raise PlanError(
                what, found=problems, advice="Models of one shape, and of the type that their config says, are needed."
            )
        return self._with_biases(places, layers)

    def _check_readable(self) -> None:
        for name, values in self.values.items():
            if values.left:
                told = f"{count(values.left, 'tensor')} {plural(values.left, 'is', 'are')} quantised in a way that"
                raise PlanError(
                    f"{name}: {told} streammerge can't decode",
                    found=sorted(values.left),
                    advice="Decode the model, and build the mixture of that.",
                )

    def _role(self, name: str, info: TensorInfo) -> Role | None:
        """What becomes of a tensor of the base outside of feed-forward layers; None if the mixture can't have it."""
        if is_computed(name, info):
            return "left"
        if ".mlp." in name:
            return None
        bias = _BIAS.fullmatch(name)
        if bias is None:
            return "base"
        kept = self.architecture.biases == "kept" or (self.architecture.biases == "wanted" and bias["of"] != "o_proj")
        return "base" if kept else None

    def _gates(self, layer: str) -> dict[str, _Place]:
        """What chooses a layer's experts."""
        width = self._width
        rows = described(DTYPES["F32"], (len(self.mixture.experts), width))
        made = {layer + self.architecture.gate: _Place("gate", "", rows)}
        if self.architecture.gated:
            one = described(rows.dtype, (len(self.mixture.shared), width))
            made[layer + self.architecture.shared_gate] = _Place("shared gate", "", one)
        return made

    @property
    def _width(self) -> int:
        """How many elements a token has within the model."""
        tensors = self.values[self.base].tensors
        embedding, _ = embedding_and_head(tensors)
        if not embedding or len(tensors[embedding].shape) != 2:
            told = f"{self.base}: nobody can tell which tensor is its embedding"
            raise PlanError(told, advice="It must be a model of the type that its config says.")
        return tensors[embedding].shape[1]

    def _experts(
        self, name: str, layer: str, part: str, info: TensorInfo, problems: list[str]
    ) -> Iterator[tuple[str, _Place]]:
        """A matrix of every expert."""
        architecture = self.architecture
        own = [(architecture.expert(n, part), each) for n, each in enumerate(self.mixture.experts)]
        own += [(architecture.shared_expert(part), each) for each in self.mixture.shared]
        for called, expert in own:
            found = self.values[expert.name].tensors.get(name)
            if found is None:
                problems.append(f"{name}   {expert.name}: lacks it")
            elif found.shape != info.shape or not found.dtype.mergeable:
                problems.append(f"{name}   {expert.name}: {found}, {self.base}: {info}")
            else:
                yield layer + called, _Place("expert", name, found, expert)

    def _beyond_base(self, layers: Mapping[str, object]) -> Iterator[str]:
        """The layers that experts have beyond the base's, of which nothing would come into the mixture."""
        for expert in dict.fromkeys(each.name for each in (*self.mixture.experts, *self.mixture.shared)):
            dense = (match["layer"] for name in self.values[expert].tensors if (match := _DENSE.fullmatch(name)))
            beyond = (layer for layer in dict.fromkeys(dense) if layer not in layers)
            yield from (f"{layer}mlp   {self.base}: lacks it, and {expert} has it" for layer in beyond)

    def _with_biases(self, places: dict[str, _Place], layers: Mapping[str, object]) -> dict[str, _Place]:
        """Zeros for the biases that the architecture wants and the base hasn't."""
        if self.architecture.biases != "wanted":
            return places
        for layer in layers:
            for of in ("q_proj", "k_proj", "v_proj"):
                weight = places.get(f"{layer}self_attn.{of}.weight")
                name = f"{layer}self_attn.{of}.bias"
                if weight is not None and name not in places:
                    places[name] = _Place("zeros", "", described(weight.info.dtype, weight.info.shape[:1]))
        return places


class _Gates:
    """The gates of every layer, tokens told and checked once."""

    def __init__(self, recipe: Recipe, mixture: Mixture, base: Model, values: Decoded) -> None:
        self.mixture, self.seed = mixture, recipe.seed or 0
        self.embedded: dict[Role, EmbeddedGates] = {}
        tensors = values.tensors
        embedding, _ = embedding_and_head(tensors)
        self.width = tensors[embedding].shape[1]
        if mixture.gate_mode != "cheap_embed":
            return
        root = root_of(base)
        folder = root.folder if isinstance(root, Checkpoint) else None
        assert folder is not None, "its config was read there"
        if isinstance(home_of(base), Tokenizer):
            raise PlanError(
                "gates are to be made of prompts, and the base is a merge whose tokenizer is yet to be written",
                advice="Merge the base to a folder first, or write gate_mode: random.",
            )
        own: tuple[tuple[Role, Sequence[Expert]], ...] = (("gate", mixture.experts), ("shared gate", mixture.shared))
        for role, experts in own:
            if not any(each.positive for each in experts):
                continue
            tokens = prompted(folder, [each.positive for each in experts], [each.negative for each in experts])
            check_tokens(tokens, [each.name for each in experts], tensors[embedding].shape[0])
            self.embedded[role] = EmbeddedGates(values, embedding, tokens)

    def node(self, name: str, role: Role, info: TensorInfo) -> Node:
        """The gates that are called so."""
        if role in self.embedded:
            return self.embedded[role].node()
        is_uniform = self.mixture.gate_mode == "uniform_random"
        return RandomGates(name, info.shape[0], info.shape[1], self.seed, is_uniform).node()


def _decision(
    name: str, place: _Place, values: Mapping[str, Decoded], recipe: Recipe, gates: _Gates, dtype: DType | None
) -> Decision:
    """What becomes of a tensor of the mixture."""
    assert recipe.base is not None
    info = stored_as(place.info, dtype)
    match place.role:
        case "left":
            return Decision(name, "dropped", "a buffer that libraries compute themselves", place.info)
        case "zeros":
            return Decision(name, "merged", "zeros, which the architecture wants", info, combine(info, ()))
        case "gate" | "shared gate":
            mode = recipe.mixture.gate_mode if recipe.mixture else ""
            return Decision(name, "merged", f"gates: {mode}", info, gates.node(name, place.role, place.info))
        case "expert" if place.expert is not None:
            return _of_expert(name, place, place.expert, values, recipe, info)
        case _:
            base = recipe.base.name
            return Decision(name, "copied", f"from {base}", info, values[base].node(place.source))


def _of_expert(
    name: str, place: _Place, expert: Expert, values: Mapping[str, Decoded], recipe: Recipe, info: TensorInfo
) -> Decision:
    """A matrix of an expert, with noise and scaled as is asked for."""
    node, changes = values[expert.name].node(place.source), []
    if expert.noise:
        noisy = find_method("plus_random")
        node = apply_method(noisy, info, {"alpha": expert.noise}, [node], name, recipe.seed or 0)
        changes.append(f"noise {expert.noise:g}")
    if expert.residual != 1 and place.source.endswith("down_proj.weight"):
        node = combine(info, (Term(expert.residual, node),)) if expert.residual else combine(info, ())
        changes.append(f"times {expert.residual:g}")
    why = f"from {expert.name}{''.join(f', {change}' for change in changes)}"
    return Decision(name, "merged" if changes else "copied", why, info, node)


def _remarks(architecture: Architecture, mixture: Mixture, config: Mapping[str, Any]) -> Iterator[str]:
    """What the user should know of the mixture."""
    each = len(mixture.experts)
    yield f"a mixture: {architecture.name} of {each} experts, {mixture.experts_per_token} of them for each token"
    if config.get("sliding_window") and "sliding_window" in architecture.config(config, 1, 0, 1):
        yield f"the base attends to {config['sliding_window']} tokens at once, and the mixture to all before"
    if each & (each - 1):
        yield f"{each} experts are no power of two, which some programs want (llama.cpp)"
    if mixture.gate_mode != "cheap_embed":
        yield "its gates are random: it has to be trained before it is of use"
