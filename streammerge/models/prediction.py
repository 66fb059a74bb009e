"""What a diffusion model says it predicts: the noise (epsilon), or the velocity v, which merges must not mix.

Samplers know it by tensors that hold nothing or a number beside the weights, or by a configuration; tools write it into
metadata. A model that says nothing may be either: Stable Diffusion 2's two kinds have the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Final

EPSILON: Final = "epsilon"
V: Final = "v"
EDM: Final = "EDM"

MARKS: Final[Mapping[str, str]] = {
    "edm_mean": EDM,
    "edm_std": EDM,
    "edm_vpred.sigma_max": "v (EDM)",
    "edm_vpred.sigma_min": "v (EDM)",
    "v_pred": V,
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

_WORDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("epsilon", "eps"), EPSILON),
    **dict.fromkeys(("v", "v_prediction", "v_pred", "vpred", "velocity"), V),
    "sample": "the image itself",
}
_FLAGS: Final[Mapping[str, str]] = {"true": V, "1": V, "false": EPSILON, "0": EPSILON}

_KEYS: Final = (
    *(("modelspec.prediction_type", _WORDS), ("modelspec.predict_key", _WORDS), ("prediction_type", _WORDS)),
    ("ss_v_parameterization", _FLAGS),
)
"""The keys of metadata that say it, each with what its values mean; any other value says nothing."""


LONGEST: Final = 1000
"""So many characters of a description are looked at."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says that it predicts, and by what it says so."""

    kind: str
    said_by: str

    def __str__(self) -> str:
        return f"{self.kind} (it has {self.said_by})"


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
    return name in MARKS or name == "ztsnr"


def stated_prediction(names: Container[str], metadata: Mapping[str, str], scheduler: str = "") -> Prediction | None:
    """What tensors of these names or, where none says it, a pipeline's scheduler or these metadata say.

    None if they say nothing.
    """
    for name, kind in MARKS.items():
        if name in names:
            return Prediction(kind, f"a tensor {name}")
    if (word := _word(scheduler)) in _WORDS:
        return Prediction(_WORDS[word], f"prediction_type: {word} in its scheduler_config.json")
    for key, words in _KEYS:
        word = _word(metadata.get(key, ""))
        if word in words:
            return Prediction(words[word], f"{key}: {word} in its metadata")
    return None


def _word(text: str) -> str:
    return text[:LONGEST].strip().lower().replace("-", "_")
