"""What a diffusion model says it predicts: the noise (epsilon), or the velocity v, which merges must not mix.

Samplers know it by tensors that hold nothing or a number beside the weights, or by a configuration; tools write it into
metadata. A model that says nothing may be either: Stable Diffusion 2's two kinds have the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Final

from streammerge.formats.pipelines import NO_SCHEDULER, PREDICTION_TYPE, Scheduler

EPSILON: Final = "epsilon"
V: Final = "v"
EDM: Final = "EDM"
SAMPLE: Final = "the image itself"

V_MARK: Final = "v_pred"
ZERO_MARK: Final = "ztsnr"
"""The tensor that says how noise is added: until nothing of the image is left (zero terminal SNR)."""

MARKS: Final[Mapping[str, str]] = {
    "edm_mean": EDM,
    "edm_std": EDM,
    "edm_vpred.sigma_max": "v (EDM)",
    "edm_vpred.sigma_min": "v (EDM)",
    V_MARK: V,
}
"""The tensors by which ComfyUI and others know what a model predicts, those first that decide where there are more."""

SCHEDULE: Final = re.compile(
    r"ztsnr|(?:noise_augmentor\.|low_scale_model\.)?(?:betas|lvlb_weights"
    r"|(?:(?:log|sqrt)_)?(?:recip_|recipm1_|one_minus_)?alphas_cumprod(?:_prev)?"
    r"|posterior_(?:variance|log_variance_clipped|mean_coef[12]))|denoiser\.(?:log_)?sigmas"
)
"""Tensors that say how noise is added: that none is left at the last step, or how much at each (CompVis' `ddpm.py`).

In 16 bits the first of `alphas_cumprod`, 0.99915, is a third off in what it lacks of 1, which is what samplers ask.
"""

STATED_AS: Final[Mapping[str, str]] = {EPSILON: "epsilon", V: "v_prediction", SAMPLE: "sample"}
"""What a pipeline's scheduler calls what models predict, as far as it can say it."""

_WORDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("epsilon", "eps"), EPSILON),
    **dict.fromkeys(("v", "v_prediction", "v_pred", "vpred", "velocity"), V),
    "sample": SAMPLE,
}
_FLAGS: Final[Mapping[str, str]] = {"true": V, "1": V, "false": EPSILON, "0": EPSILON}

_KEYS: Final = (
    *(("modelspec.prediction_type", _WORDS), ("modelspec.predict_key", _WORDS), ("prediction_type", _WORDS)),
    ("ss_v_parameterization", _FLAGS),
)
"""The keys of metadata that say it, each with what its values mean; any other value says nothing."""


LONGEST: Final = 1000
"""So many characters of a description are looked at."""


_ZERO_KEY: Final = "ss_zero_terminal_snr"
"""The key of metadata by which kohya's trainer says whether the signal in the noise ended at zero."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says that it predicts, and by what it says so."""

    kind: str
    said_by: str

    def __str__(self) -> str:
        return f"{self.kind} (it has {self.said_by})"


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a model says of how it is to be sampled: what it predicts, and whether the signal in the noise that it was
    trained with ends at zero; None for what it doesn't say."""

    prediction: Prediction | None = None
    zero_snr: bool | None = None

    @property
    def is_anything(self) -> bool:
        """Whether it says anything."""
        return self != Sampling()

    def says(self, mark: str) -> bool:
        """Whether it says what a tensor of this name would."""
        is_v = self.prediction is not None and self.prediction.kind == V
        return (mark == V_MARK and is_v) or (mark == ZERO_MARK and self.zero_snr is True)


_FEW_STEPS: Final = re.compile(r"(?<![a-z])(lcm|turbo|lightning|hyper-?sd|dmd2?|schnell)(?![a-z])", re.IGNORECASE)
_DESCRIBED: Final = ("modelspec.architecture", "modelspec.title", "modelspec.usage_hint", "ss_base_model_version")


def few_steps(metadata: Mapping[str, str]) -> str:
    """Where metadata name a distillation for few steps (LCM, Turbo, Lightning …): `Turbo in its modelspec.title`.

    A name is what somebody wrote, so it is told and nothing depends on it.
    """
    named = ((key, _FEW_STEPS.search(metadata.get(key, "")[:LONGEST])) for key in _DESCRIBED)
    return next((f"{found[0]} in its {key}" for key, found in named if found), "")


def is_mark(name: str) -> bool:
    """Whether a tensor of this name says how the model is to be sampled: it is copied, never averaged."""
    return name in MARKS or SCHEDULE.fullmatch(name) is not None


def is_of_denoiser(name: str) -> bool:
    """Whether a tensor of this name belongs to a UNet or transformer wherever it goes: it says what that predicts."""
    return name in MARKS or name == ZERO_MARK


def stated_sampling(
    names: Container[str], metadata: Mapping[str, str], scheduler: Scheduler = NO_SCHEDULER
) -> Sampling:
    """What tensors of these names, a pipeline's scheduler and these metadata say, in this order."""
    prediction, zero = stated_prediction(names, metadata, scheduler), _stated_zero(names, metadata, scheduler)
    if zero is None and prediction is not None and prediction.kind == EPSILON:
        zero = False  # there is no noise to predict in noise alone
    return Sampling(prediction, zero)


def _stated_zero(names: Container[str], metadata: Mapping[str, str], scheduler: Scheduler) -> bool | None:
    """Programs that read marks take a model with the one and without the other for one that has no zero in it."""
    if ZERO_MARK in names or V_MARK in names:
        return ZERO_MARK in names
    if scheduler.zero_snr is not None:
        return scheduler.zero_snr
    return {"true": True, "1": True, "false": False, "0": False}.get(_word(metadata.get(_ZERO_KEY, "")))


def stated_prediction(
    names: Container[str], metadata: Mapping[str, str], scheduler: Scheduler = NO_SCHEDULER
) -> Prediction | None:
    """What tensors of these names or, where none says it, a pipeline's scheduler or these metadata say.

    None if they say nothing.
    """
    for name, kind in MARKS.items():
        if name in names:
            return Prediction(kind, f"a tensor {name}")
    if (word := _word(scheduler.prediction_type)) in _WORDS:
        return Prediction(_WORDS[word], f"{PREDICTION_TYPE}: {word} in its scheduler_config.json")
    for key, words in _KEYS:
        word = _word(metadata.get(key, ""))
        if word in words:
            return Prediction(words[word], f"{key}: {word} in its metadata")
    return None


def _word(text: str) -> str:
    return text[:LONGEST].strip().lower().replace("-", "_")
