"""What models say of how they are to be sampled, by their tensors and in their metadata."""

from __future__ import annotations

import pytest

from streammerge.models.prediction import LONGEST, few_steps, is_mark, stated_prediction
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.inspection import inspect_model, render


@pytest.mark.parametrize(
    ("names", "metadata", "kind"),
    [
        ((), {}, None),
        (("v_pred",), {}, "v"),
        (("ztsnr",), {}, None),
        (("v_pred", "ztsnr"), {"modelspec.prediction_type": "epsilon"}, "v"),
        (("edm_vpred.sigma_max", "v_pred"), {}, "v (EDM)"),
        (("edm_mean",), {}, "EDM"),
        (("model.v_pred",), {}, None),
        ((), {"modelspec.prediction_type": "Epsilon"}, "epsilon"),
        ((), {"modelspec.prediction_type": "v-prediction"}, "v"),
        ((), {"modelspec.prediction_type": "flow", "prediction_type": "v_prediction"}, "v"),
        ((), {"modelspec.predict_key": "v"}, "v"),
        ((), {"ss_v_parameterization": "true"}, "v"),
        ((), {"ss_v_parameterization": "False"}, "epsilon"),
        ((), {"ss_v_parameterization": "None"}, None),
        ((), {"ss_v2": "True"}, None),
    ],
)
def test_what_is_stated(names, metadata, kind):
    found = stated_prediction(names, metadata)
    assert (found and found.kind) == kind


def test_marks():
    marks = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
    assert all(map(is_mark, marks))
    assert not any(map(is_mark, ("x", "model.v_pred", "logvar", "sigma_max", "")))


def test_schedules_are_marks():
    ours = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef2")
    assert all(map(is_mark, (*ours, "log_one_minus_alphas_cumprod", "noise_augmentor.betas", "denoiser.sigmas")))
    assert not any(map(is_mark, ("model.betas", "betas.weight", "my_alphas_cumprod", "noise_augmentor.data_mean")))


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"modelspec.title": "SDXL Turbo"}, "Turbo in its modelspec.title"),
        ({"modelspec.title": "My_lightning_4step"}, "lightning in its modelspec.title"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lcm"}, "lcm in its modelspec.architecture"),
        ({"modelspec.usage_hint": "Hyper-SD, 8 steps"}, "Hyper-SD in its modelspec.usage_hint"),
        ({"modelspec.architecture": "flux-1-schnell"}, "schnell in its modelspec.architecture"),
        ({"modelspec.title": "TurboMix"}, ""),
        ({"modelspec.title": "enlightning"}, ""),
        ({"modelspec.tags": "lightning, storm"}, ""),
        ({"modelspec.title": "x" * LONGEST + " turbo"}, ""),
        ({}, ""),
    ],
)
def test_few_steps_are_told_where_metadata_name_them(metadata, told):
    assert few_steps(metadata) == told


def test_inspect_tells_them():
    tensors = {"v_pred": TensorInfo(DTYPES["F32"], (0,))}
    hashes = {"a.safetensors": {"sha256": "1" * 64, "tensors": "2" * 64}}
    found = inspect_model(
        tensors,
        path="a.safetensors",
        nbytes=1,
        container="safetensors",
        metadata={"modelspec.title": "XL Turbo"},
        broken={"x\n": "stored as F16"},
        hashes=hashes,
    )
    text = render(found)
    assert "\npredicts v (it has a tensor v_pred)\nfor few steps: Turbo in its modelspec.title\n" in text
    assert "\nbroken: x\\n (stored as F16); a merge mends it\n" in text
    assert f"sha256 {'1' * 64}   AutoV2 {'1' * 10}, AutoV3 {'2' * 12}" in text
    plain = found.to_json()
    assert plain["prediction"] == {"kind": "v", "said_by": "a tensor v_pred"}
    assert plain["few_steps"] == "Turbo in its modelspec.title"
    assert plain["broken_positions"] == {"x\n": "stored as F16"}
    assert plain["hashes"] == hashes
