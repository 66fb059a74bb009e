"""What tensors mean beyond their names: denoisers of one kind alone are mixed, and what belongs to one follows it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeGuard

from streammerge.compute.expressions import Node, gives
from streammerge.errors import PlanError, count, plural
from streammerge.formats.pipelines import NO_SCHEDULER
from streammerge.models.architecture import component_of, family_of, purpose_of, takes_channels
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.decisions import Decisions
from streammerge.models.folders import root_of
from streammerge.models.merged import Merged
from streammerge.models.prediction import EPSILON, Prediction, Sampling, stated_sampling
from streammerge.models.views import beneath
from streammerge.recipe.policies import PredictionPolicy
from streammerge.tensors import Model

DENOISER: Final = frozenset({"UNet", "DiT", "diffusion model"})
"""The components that predict."""


APART: Final = ("Stable Diffusion 1", "Stable Diffusion 2", "SDXL", "SDXL refiner")
"""Architectures that share names, and some shapes, of tensors that were never trained one from the other."""


EMA: Final = "model_ema."


STARTS: Final = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
"""How the names of a denoiser begin that is not alone in its file."""


@dataclass
class Meaning:
    """Which models give the output's denoiser: noted while a merge's tensors are decided on, and judged afterwards.

    `inputs` are the models that are merged. `architectures` are those of models that don't mix with others, `said` is
    what models say of how they are sampled. If the layout is a pipeline the output `follows` those that give its
    denoiser: the layout's scheduler is made to say what they do. `purposes` say what denoisers take more channels for,
    `first` is the layer that is merged and takes them. `involved` are the models that are merged to any of the
    denoiser, each with such a tensor, and `givers` those that give something of it: not what is multiplied by 0.
    """

    layout: str
    inputs: Sequence[str]
    policy: PredictionPolicy
    architectures: Mapping[str, str]
    said: Mapping[str, Sampling]
    has_ema: bool
    follows: bool
    purposes: Mapping[str, str] = field(default_factory=dict)
    first: str = ""
    involved: dict[str, str] = field(default_factory=dict)
    givers: dict[str, str] = field(default_factory=dict)
    is_merged: bool = False

    @classmethod
    def of(
        cls, models: Mapping[str, Model], layout: str, inputs: Sequence[str], policy: PredictionPolicy = "error"
    ) -> Meaning:
        """Look at the models of a merge."""
        return cls(
            layout,
            inputs,
            policy,
            {name: architecture_of(model) for name, model in models.items()},
            {name: sampling_of(model) for name, model in models.items()},
            any(name.startswith(EMA) for name in models[layout].tensors),
            is_pipeline(root_of(models[layout])),
            {name: purpose for name in (layout, *inputs) if (purpose := purpose_of(models[name].tensors))},
        )

    def note_merged(self, name: str, made: Node, inputs: Mapping[str, Node]) -> None:
        """The tensor is merged of all inputs, of which these are the expressions."""
        if self._take_different_things and takes_channels(name) and component_of(name) in DENOISER:
            self.first = name
        new = {model: node for model, node in inputs.items() if model not in self.givers}
        if self._is_watched and (new or not self.is_merged) and component_of(name) in DENOISER:
            self.is_merged = True
            self.involved.update(dict.fromkeys(self.inputs, name))
            self.givers.update((model, name) for model, node in new.items() if gives(node, made))

    def note_copied(self, name: str, model: str) -> None:
        """The tensor is a copy of this model's."""
        if model not in self.givers and self._is_watched and component_of(name) in DENOISER:
            self.givers[model] = self.involved[model] = name

    @functools.cached_property
    def _is_watched(self) -> bool:
        return self.has_ema or any(self.architectures.values()) or any(said.is_anything for said in self.said.values())

    @property
    def _take_different_things(self) -> bool:
        return len(set(self.purposes.values())) > 1

    @property
    def sampling(self) -> Sampling | None:
        """What the output of a pipeline as the layout has to say; None of what says the same as the layout's files."""
        if not self.follows:
            return None
        own = self.said[self.layout]
        if self._mixed_predictions:
            return own
        said = [self.said[name] for name in self._concerned]
        predictions, zeros = [one.prediction for one in said if one.prediction], self._stated_zeros
        return Sampling(
            predictions[0] if predictions else own.prediction, zeros.pop() if len(zeros) == 1 else own.zero_snr
        )

    @property
    def _stated_zeros(self) -> set[bool]:
        stated = (self.said[name].zero_snr for name in self._concerned)
        return {each for each in stated if each is not None}

    def tells(self, mark: str) -> bool:
        """Whether the output says without a tensor what one of this name says in a model."""
        return self.sampling is not None and self.sampling.says(mark)

    def check(self) -> None:
        """PlanError if the denoiser would be mixed of models that share no more than names, or that say that they
        predict different things, which somebody may want all the same."""
        self._check_architectures()
        self._check_purposes()
        found = self._mixed_predictions
        if found and self.policy == "error":
            raise PlanError(
                f"{' and '.join(found)} say that they predict different things, and what is mixed of both predicts "
                "neither",
                found=[f"{name}   {said}" for name, said in found.items()],
                advice=f"Merge models of one kind, {self._apart}, or use --on-prediction-mismatch merge: then what the "
                f"output says of it is what {self.layout} says.",
            )

    def _check_architectures(self) -> None:
        if found := self._mixed_architectures:
            raise PlanError(
                f"{' and '.join(found)} are of different architectures, and what is mixed of both is neither",
                found=[f"{name}   {architecture}" for name, architecture in found.items()],
                advice=f"Merge models of one architecture, or {self._apart}.",
            )

    def _check_purposes(self) -> None:
        """PlanError for channels of one layer that mean one thing in one model, and another in another."""
        if self.first:
            raise PlanError(
                f"{' and '.join(self.purposes)} take different things beside the latent image, and what is mixed of "
                "the channels for these takes neither",
                found=[f"{name}   {purpose}" for name, purpose in self.purposes.items()],
                advice=f"Keep {self.layout}'s first layer: --keep '{self.first}'.",
            )

    @property
    def _apart(self) -> str:
        """How all but the denoiser is merged."""
        name = next(iter(self.involved.values()))
        start = next((start for start in STARTS if name.startswith(start)), "")
        glob = f"--keep '{start}*'" if start else "--keep GLOB"
        return f"only what else they share, with {self.layout}'s denoiser ({glob})"

    @property
    def _mixed_predictions(self) -> dict[str, Prediction]:
        """The models of which the output's denoiser is, and the layout, if they say different things."""
        stated = {name: said for name in self._concerned if (said := self.said[name].prediction)}
        return stated if len({said.kind for said in stated.values()}) > 1 else {}

    @property
    def _concerned(self) -> list[str]:
        """The layout says what the output is, so it counts even where it gives nothing: unless it follows the others,
        of which those count that give something."""
        if self.follows and self.policy == "error":
            return list(self.givers)
        return list(dict.fromkeys([self.layout, *self.involved])) if self.involved else []

    @property
    def _mixed_architectures(self) -> dict[str, str]:
        found = {name: self.architectures[name] for name in self.involved if self.architectures[name]}
        return found if len(set(found.values())) > 1 else {}

    def remarks(self, decisions: Decisions) -> Iterator[str]:
        """What the user should know, though it is no error."""
        if found := self._mixed_predictions:
            told = ", ".join(f"{name} {said.kind}" for name, said in found.items())
            yield f"models predict different things ({told}); the output says of it what {self.layout} says"
        else:
            yield from self._unsaid()
        if self.follows and len(self._stated_zeros) > 1:
            yield f"models differ in whether their noise ends without a signal (zero SNR); {self.layout} decides"
        if self.has_ema and self.is_merged:
            yield from _stale(decisions, self.layout)

    def _unsaid(self) -> Iterator[str]:
        """Who says nothing is usually taken for one that predicts noise, but need not be one."""
        concerned = self._concerned
        if concerned and not any(self.said[name].prediction for name in concerned):
            concerned = list(dict.fromkeys([self.layout, *concerned]))
        stated = {name: self.said[name].prediction for name in concerned}
        said = {name: found for name, found in stated.items() if found and found.kind != EPSILON}
        silent = [name for name, found in stated.items() if found is None]
        if said and silent:
            name, found = next(iter(said.items()))
            yield (
                f"{name} predicts {found}, and {' and '.join(silent)} {plural(silent, 'says', 'say')} nothing of it: "
                f"make sure that {plural(silent, 'it does', 'they do')} too"
            )


def _stale(decisions: Decisions, layout: str) -> Iterator[str]:
    """EMA weights that stay what they were beside weights that are merged."""
    kept = [name for name, fate in decisions.told() if fate.action == "copied" and name.startswith(EMA)]
    if kept:
        yield (
            f"{count(kept, 'EMA tensor')} {plural(kept, 'stays', 'stay')} {layout}'s beside a merged UNet, of which "
            f"{plural(kept, 'it is', 'they are')} no average: --drop '{EMA}*' leaves {plural(kept, 'it', 'them')} out"
        )


def architecture_of(model: Model) -> str:
    """The model's architecture, if it is one of those that don't mix; else nothing."""
    found = family_of(model.tensors)
    return found if found in APART else ""


def sampling_of(model: Model) -> Sampling:
    """What a model says; a merge says what it was found to, or its tensors and, beside them, its layout's files."""
    inner, root = beneath(model), root_of(model)
    if isinstance(inner, Merged) and inner.sampling is not None:
        return inner.sampling
    return stated_sampling(model.tensors, metadata_of(model), getattr(root, "scheduler", NO_SCHEDULER))


def is_pipeline(root: Model | None) -> TypeGuard[Checkpoint]:
    """Whether a model, beneath all views and merges of it, is the folder of a pipeline."""
    return isinstance(root, Checkpoint) and root.is_pipeline


def metadata_of(model: Model) -> Mapping[str, str]:
    """The metadata of the model's file, of a merge those of its layout's; none of what has no file."""
    found = getattr(root_of(model), "metadata", None)
    return found if isinstance(found, Mapping) else {}
