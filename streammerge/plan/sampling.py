"""How the output of a pipeline says how it is to be sampled: a folder by its scheduler's config, a file by tensors.

Checkpoints say by tensors of names such as `v_pred`, which ComfyUI and others look for, what pipelines say in
`scheduler/scheduler_config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from streammerge.compute.expressions import Stored
from streammerge.errors import OutputError
from streammerge.formats.files import ByteFile
from streammerge.formats.pipelines import PREDICTION_TYPE, SCHEDULER, ZERO_SNR, scheduler_config, scheduler_of
from streammerge.models.architecture import component_of
from streammerge.models.configs import Adapted
from streammerge.models.decisions import Decision, Decisions
from streammerge.models.folders import root_of
from streammerge.models.merged import Merged
from streammerge.models.prediction import EPSILON, STATED_AS, V_MARK, ZERO_MARK, Sampling, stated_sampling
from streammerge.plan.meaning import DENOISER, is_pipeline, sampling_of
from streammerge.tensors import DTYPES, described

NOTHING: Final = described(DTYPES["F32"], (0,))
"""A mark holds nothing: that it is there says all."""


KNOWN_TO: Final = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DPMSolverMultistep", "EulerDiscrete"),
        *("EulerAncestralDiscrete", "LCM", "TCD", "UniPCMultistep", "CogVideoXDDIM", "CogVideoXDPM"),
    )
)
"""The schedulers of diffusers that read `rescale_betas_zero_snr`."""


def with_marks(merged: Merged, output: Path) -> Merged:
    """The merge with tensors that say what its layout's scheduler does, which isn't written; itself if it says nothing.

    `v_pred` if the model predicts v, and `ztsnr` if nothing of the image is left in the noise that it begins with.
    OutputError if these can't say it.
    """
    root = root_of(merged)
    if not is_pipeline(root) or not any(component_of(name) in DENOISER for name in merged.tensors):
        return merged
    sampling = sampling_of(merged)
    _check(sampling, output)
    said = [mark for mark in (V_MARK, ZERO_MARK) if sampling.says(mark) and mark not in merged.tensors]
    marks = {mark: _made(mark, root.files[0]) for mark in said}
    if not marks:
        return merged
    own = merged.decisions

    def decide(name: str) -> Decision:
        return marks[name] if name in marks else own.of(name)

    return replace(merged, decisions=Decisions([*own.names.order, *marks], decide))


def _made(mark: str, file: ByteFile) -> Decision:
    """A mark: no bytes of any file."""
    return Decision(
        mark, "copied", f"it says what {SCHEDULER.name} does in a pipeline", NOTHING, Stored(NOTHING, file, 0)
    )


def scheduler_saying(sampling: Sampling, folder: Path, output: Path) -> Adapted | None:
    """The config of a pipeline's scheduler as it says what a model does; None if it says so already.

    CheckpointError if there is none that can be read, OutputError if it can't say it.
    """
    changes = dict(_changes(sampling, folder))
    if not changes:
        return None
    _check(sampling, output)
    config = scheduler_config(folder)
    told = tuple(f"{key}: {_shown(config.get(key))} → {_shown(value)}" for key, value in changes.items())
    notes = [f"{each}, as the models say" for each in told]
    if changes.get(ZERO_SNR) and config.get("_class_name") not in KNOWN_TO:
        notes.append(f"{config.get('_class_name')} is none of the schedulers of diffusers that read {ZERO_SNR}")
    return Adapted({**config, **changes}, told, tuple(notes))


def _changes(sampling: Sampling, folder: Path) -> Iterator[tuple[str, Any]]:
    """What has to be said otherwise. A scheduler that says nothing takes the model for one that predicts noise."""
    scheduler = scheduler_of(folder)
    stated, said = stated_sampling((), {}, scheduler).prediction, sampling.prediction
    if said is not None and said.kind != (stated.kind if stated else EPSILON):
        yield PREDICTION_TYPE, STATED_AS.get(said.kind)
    if sampling.zero_snr is not None and sampling.zero_snr != (scheduler.zero_snr or False):
        yield ZERO_SNR, sampling.zero_snr


def _check(sampling: Sampling, output: Path) -> None:
    """OutputError for what neither a scheduler's config says, nor tensors that hold nothing."""
    said = sampling.prediction
    if said is not None and said.kind not in STATED_AS:
        raise OutputError(
            f"{output}: its models predict {said}, and what the layout is, a pipeline, has no place for that",
            advice="Have the checkpoint that says it as the layout (--layout NAME -o OUT.safetensors); or, if the "
            f"pipeline's {SCHEDULER.name} is right as it is, use --on-prediction-mismatch merge.",
        )


def _shown(value: object) -> str:
    """As it stands in JSON."""
    return "not stated" if value is None else json.dumps(value)
