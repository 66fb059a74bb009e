"""The parts that a merge has: components alone, ones that are put in, averaged weights, and what training left.

models ─► cut (ema, prune, only) ─► the layout's naming ─► components that it lacks put in ─► the others in its names
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from streammerge.errors import PlanError, count, plural
from streammerge.models.codes import find_quantised
from streammerge.models.dialects import Component, Naming, Recognised, Role, Source, recognise
from streammerge.models.dialects.encoders import CLIP
from streammerge.models.dialects.parts import home, incomplete, misfit, other_shapes, part_of, role_of
from streammerge.models.dialects.recognition import moved
from streammerge.models.dialects.translation import Translated
from streammerge.models.prediction import is_of_denoiser
from streammerge.models.views import Assembled, Decoded, Selected
from streammerge.plan.naming import Named, in_naming, in_one_naming
from streammerge.recipe.recipe import Recipe, Rule
from streammerge.tensors import Model, TensorInfo

EMA: Final = "model_ema."
"""How the names start of the averages that training keeps beside the weights; the rest has no dots."""

EMA_ITSELF: Final = (f"{EMA}decay", f"{EMA}num_updates")
"""What an average has of its own."""

LEFTOVERS: Final = re.compile(
    r"(?:first_stage_model\.|vae\.)?loss\.|logvar$|optimizers?(?:_states?)?\.|lr_schedulers?\."
)
"""How names start that training leaves: losses with their own networks, and the optimizer's state.

A schedule (`betas`, `alphas_cumprod`, …) is none: programs read in it how the model is to be sampled.
"""

AVERAGES: Final = "averaged weights (EMA)"
REPLACED: Final = "the averaged weights are used"
TRAINING: Final = "of use for training alone"
COUNTING: Final = "it counts from 0, which programs know"

DENOISERS: Final = ("unet", "transformer")
"""The words for the component that predicts."""

ONLY: Final = "only wanted: "

Dropped = Mapping[str, tuple[TensorInfo, str]]
"""Tensors of the layout that the merge never sees, and why."""


@dataclass(frozen=True)
class Prepared:
    """What is merged of the models: the recipe with the globs of its components, and the models in one naming."""

    recipe: Recipe
    named: Named
    dropped: Dropped = field(default_factory=dict)


def prepared(recipe: Recipe, models: Mapping[str, Model], naming: Naming | None = None) -> Prepared:
    """The parts of the models that the recipe asks for, in the names of its layout's or those that are asked for.

    PlanError where a part isn't there, doesn't fit, or can't be told.
    """
    layout = recipe.layout_name
    cut = _Cutting(recipe, models)
    seen, remarks = cut.models(), list(cut.remarks)
    if naming is not None:
        architecture = recognised.architecture if (recognised := cut.only_of(layout)) else ""
        named = in_naming(seen[layout], layout, naming, architecture)
        seen, remarks = {**seen, **named.models}, [*remarks, *named.remarks]
    if naming == "diffusers" and recipe.only in DENOISERS:
        recipe = _without_marks(recipe, seen, remarks)
    if any(rule.component for rule in recipe.rules):
        seen = {**seen, layout: _assembled(recipe, seen, remarks)}
        recipe = _resolved(recipe, seen[layout])
    others = in_one_naming(seen, layout)
    return Prepared(recipe, Named(others.models, (*remarks, *others.remarks)), cut.dropped)


# ── what is left out ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Cutting:
    """The models of a recipe without what it wants nothing of; itself what is left out of the layout."""

    def __init__(self, recipe: Recipe, models: Mapping[str, Model]) -> None:
        self.recipe, self.whole = recipe, models
        self.merged = {entry.name for entry in (*recipe.inputs, *([recipe.base] if recipe.base else []))}
        self.merged.add(recipe.layout_name)
        self.dropped: dict[str, tuple[TensorInfo, str]] = {}
        self.remarks: list[str] = []

    def models(self) -> dict[str, Model]:
        """Every model, cut; itself where nothing is."""
        if self.recipe.ema == "use" and not any(map(has_averages, self.whole.values())):
            raise PlanError(
                f"--ema use: no model has averaged weights ({EMA}…)", advice="Leave it out: their weights are all."
            )
        return {name: self._cut(name, model) for name, model in self.whole.items()}

    def only_of(self, name: str) -> Recognised | None:
        """The whole model, if a component of it is all that is wanted."""
        return recognise(Decoded(self.whole[name]).tensors) if self.recipe.only else None

    def _cut(self, name: str, model: Model) -> Model:
        names = {own: own for own in model.tensors}
        why = dict(self._dropped(name, model))
        if self.recipe.ema == "use":
            averages = averaged(name, model)
            used = {weight: average for weight, average in averages.items() if weight not in why}
            why.update(dict.fromkeys(used, REPLACED))
            names.update(used)
            if not averages and name in self.merged:
                self.remarks.append(f"{name}: it has no averaged weights; those that it has are used")
        if not why:
            return model
        if name == self.recipe.layout_name:
            self.dropped = {own: (model.tensors[own], reason) for own, reason in why.items() if reason != REPLACED}
        self._tell(name, why)
        return Selected(model, {new: old for new, old in names.items() if why.get(new, REPLACED) == REPLACED})

    def _tell(self, name: str, why: Mapping[str, str]) -> None:
        """Note what is left out of a model, by why."""
        for reason, number in Counter(why.values()).items():
            told = f"{name}: {count(range(number), 'tensor')}"
            if reason == REPLACED:
                self.remarks.append(f"{told} {plural(range(number), 'is its', 'are its')} averaged weights (EMA)")
            elif name != self.recipe.layout_name and not reason.startswith(ONLY):
                self.remarks.append(f"{told} left out: {reason}")

    def _dropped(self, name: str, model: Model) -> Iterator[tuple[str, str]]:
        """Which of a model's tensors are left out, and why."""
        recipe, is_part = self.recipe, name not in self.merged
        found = recognise(Decoded(model).tensors) if recipe.prune or (is_part and has_leftovers(model)) else None
        if recipe.prune and found is None and not is_part:
            raise PlanError(
                f"{name}: its names are none of a diffusion model that streammerge knows",
                advice="What training left can't be told: use --drop GLOB instead of --prune.",
            )
        is_alone = is_part and found is not None and len(found.components) == 1
        if recipe.ema != "keep" or recipe.prune or is_alone:
            yield from ((own, AVERAGES) for own in model.tensors if own.startswith(EMA))
        if recipe.prune or is_alone:
            yield from ((own, TRAINING) for own in model.tensors if LEFTOVERS.match(own))
        if recipe.prune and found is not None:
            yield from ((own, COUNTING) for own in _positions(found))
        if recipe.only and not is_part:
            own = _component(name, model, recipe.only)
            yield from ((other, f"{ONLY}{recipe.only}") for other in model.tensors if not own(other))


def has_averages(model: Model) -> bool:
    """Whether training has left averages of the weights in it."""
    return any(name.startswith(EMA) for name in model.tensors)


def has_leftovers(model: Model) -> bool:
    """Whether training has left anything in it."""
    return any(name.startswith(EMA) or LEFTOVERS.match(name) for name in model.tensors)


def averaged(name: str, model: Model) -> dict[str, str]:
    """The weights of which a model has averages, and what it calls these; nothing if it has none.

    PlanError where averages are of no weight, or of several, for names without dots don't tell more.
    """
    averages = [own for own in model.tensors if own.startswith(EMA) and own not in EMA_ITSELF]
    called: dict[str, list[str]] = {}
    for own in model.tensors:
        if not own.startswith(EMA):
            called.setdefault(EMA + own.removeprefix("model.").replace(".", ""), []).append(own)
    strange = [own for own in averages if len(called.get(own, ())) != 1]
    found = {called[own][0]: own for own in averages if own not in strange}
    strange += [own for weight, own in found.items() if model.tensors[weight].shape != model.tensors[own].shape]
    part = next((weight.partition(".")[0] + "." for weight in found), EMA)
    strange += [weight for weight in model.tensors if found and weight.startswith(part) and weight not in found]
    if strange:
        raise PlanError(
            f"{name}: of {count(strange, 'tensor')} it can't be told of which weight it is the average (EMA), or which "
            "average it has",
            found=strange,
            advice="Half of an average is none: use --ema drop.",
        )
    if found and find_quantised(model.tensors):
        raise PlanError(f"{name}: its weights are quantised, and their averages are not", advice="Use --ema drop.")
    return found


def _positions(found: Recognised) -> Iterator[str]:
    """Where CLIP keeps which number each place in the text has."""
    for component in found.components:
        if component.kind is CLIP:
            names = (name for name in component.tensors if name.endswith("embeddings.position_ids"))
            yield from map(component.place.own, names)


@dataclass(frozen=True)
class _Belonging:
    """Tells whether a tensor of a file belongs to a component: what its codes are decoded with does, too."""

    prefix: str
    others: frozenset[str]
    has_marks: bool

    def __call__(self, name: str) -> bool:
        return (self.has_marks and is_of_denoiser(name)) or (name.startswith(self.prefix) and name not in self.others)


def _component(name: str, model: Model, word: str) -> _Belonging:
    """What belongs to a model's component of this name; PlanError if it has none."""
    found = recognise(Decoded(model).tensors)
    role = role_of(word, found) if found else None
    component = part_of(role, found) if found and role else None
    if found is None or component is None:
        raise PlanError(f"{name}: it has no {word}", found=_told(found), advice=_advice(found))
    others = (
        own for other in found.components if other is not component for own in map(other.place.own, other.tensors)
    )
    besides = found.others if len(found.components) > 1 else ()
    return _Belonging(component.place.prefix, frozenset((*others, *besides)), role == "denoiser")


def _told(found: Recognised | None) -> list[str]:
    return [f"{part.title}   {part.place.prefix}…" for part in found.components] if found else []


def _advice(found: Recognised | None) -> str:
    return "Its parts are these." if found else "None of its names are those of a part that streammerge knows."


def _without_marks(recipe: Recipe, models: Mapping[str, Model], remarks: list[str]) -> Recipe:
    """The recipe for a denoiser in diffusers' names, whose library knows no marks: it goes by the scheduler."""
    marks = tuple(dict.fromkeys(own for model in models.values() for own in model.tensors if is_of_denoiser(own)))
    if not marks:
        return recipe
    remarks.append(
        f"{recipe.layout_name}: {', '.join(marks)} {plural(marks, 'is', 'are')} left out: what the {recipe.only} "
        "predicts, a pipeline has in scheduler/scheduler_config.json"
    )
    return replace(recipe, rules=(Rule(marks, "drop"), *recipe.rules))


# ── what is put in ───────────────────────────────────────────────────────────────────────────────────────────────────


def _assembled(recipe: Recipe, models: Mapping[str, Model], remarks: list[str]) -> Model:
    """The layout with those components that rules take from others and it doesn't have."""
    name = recipe.layout_name
    layout = models[name]
    found = _recognised(name, layout)
    lacking: dict[Role, tuple[Rule, Component]] = {}
    for rule in recipe.rules:
        if rule.component and rule.action == "take":
            role, part = _taken(rule, found, models, name)
            if found.component(role) is None:
                lacking.setdefault(role, (rule, part))
    if not lacking:
        return layout
    if recipe.only:
        raise PlanError(
            f"only the {recipe.only} is to be written, and rules take other components",
            found=[str(rule) for rule, _ in lacking.values()],
            advice="Leave out the one or the other.",
        )
    parts = [
        Translated(models[rule.model], _at_home(name, found, role, rule.model, part))
        for role, (rule, part) in lacking.items()
    ]
    own = _at_its_place(name, layout, found, remarks)
    remarks += [f"{name}: it has no {rule.component}, and gets {rule.model}'s" for rule, _ in lacking.values()]
    return Assembled(own, tuple(parts))


def _recognised(name: str, layout: Model) -> Recognised:
    found = recognise(Decoded(layout).tensors)
    if found is None:
        raise PlanError(
            f"{name}: its names are none of a diffusion model that streammerge knows, so its components can't be told",
            advice="Write a glob for their tensors instead, such as --take 'first_stage_model.*=MODEL'.",
        )
    return found


def _taken(rule: Rule, layout: Recognised, models: Mapping[str, Model], name: str) -> tuple[Role, Component]:
    """What a component that a rule takes is in the layout, and the component itself; PlanError if it doesn't fit."""
    role = role_of(rule.component, layout)
    if role is None:
        raise PlanError(f"{name}: {layout.architecture} has no {rule.component}", found=_told(layout))
    source = recognise(Decoded(models[rule.model]).tensors)
    part = part_of(role, source) if source else None
    if source is None or part is None:
        raise PlanError(
            f"{rule.model}: it has no {rule.component}, which is to be taken from it",
            found=_told(source),
            advice=_advice(source),
        )
    own = layout.component(role)
    if why := misfit(part, role, source, layout) or (other_shapes(part, own) if own else ""):
        raise PlanError(
            f"{rule.model}: its {part.title} can't be {name}'s: {why}",
            advice="Name a file for this architecture, or make the model with that component the layout.",
        )
    return role, part


def _at_home(name: str, layout: Recognised, role: Role, model: str, part: Component) -> dict[str, Source]:
    """A part of a model under the names that the layout would have for it."""
    place = home(layout, role)
    if place is None:
        raise PlanError(
            f"{name}: where its {part.title} would be isn't known",
            found=_told(layout),
            advice="Make the model with the UNet or the transformer the layout, and take the other parts.",
        )
    if why := incomplete(part):
        raise PlanError(f"{model}: its {part.title} is not whole: {why}", advice="Fetch it again.")
    return {place.own(own): moved(source, part.place.own) for own, source in part.seen(place.side).items()}


def _at_its_place(name: str, layout: Model, found: Recognised, remarks: list[str]) -> Model:
    """The layout; with what whole models have before the names of a denoiser, if it is one that is alone."""
    denoiser = found.component("denoiser")
    place = home(found, "denoiser")
    if denoiser is None or place is None or denoiser.place.prefix:
        return layout
    remarks.append(f"{name}: its names have {place.prefix} before them in a whole model")
    return Selected(layout, {own if is_of_denoiser(own) else place.prefix + own: own for own in layout.tensors})


def _resolved(recipe: Recipe, layout: Model) -> Recipe:
    """The recipe, its rules for components with globs that fit these in the layout."""
    found = _recognised(recipe.layout_name, layout)
    return replace(recipe, rules=tuple(_with_globs(rule, found, recipe.layout_name) for rule in recipe.rules))


def _with_globs(rule: Rule, layout: Recognised, name: str) -> Rule:
    if not rule.component:
        return rule
    role = role_of(rule.component, layout)
    part = layout.component(role) if role else None
    if part is None:
        raise PlanError(f"{name}: it has no {rule.component}", found=_told(layout), advice=_advice(layout))
    globs = (f"{part.place.prefix}*",) if part.place.prefix else tuple(map(part.place.own, part.tensors))
    return replace(rule, match=globs)
