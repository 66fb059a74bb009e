"""What a model says of how it is sampled: as tensors in checkpoints, in its scheduler's config in a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.errors import CheckpointError, OutputError, PlanError
from tests.make.models import load_model, save_model
from tests.make.pipelines import as_checkpoint, save_pipeline

V, ZERO = "v_pred", "ztsnr"
SCHEDULER = "scheduler/scheduler_config.json"
KINDS = {V: "v_prediction", "": "epsilon"}


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """Pipelines that predict noise and v; checkpoints with marks, by their names, and one with none."""
    monkeypatch.chdir(tmp_path)
    save_pipeline(Path("eps"), 1)
    save_pipeline(Path("v"), 2, prediction="v_prediction")
    for name, marks in {"plain": (), "v1": (V,), "v2": (V, ZERO), "edm": ("edm_vpred.sigma_max",)}.items():
        save_model(Path(f"{name}.safetensors"), {**as_checkpoint(3), **dict.fromkeys(marks, torch.zeros(0))})


def recipe(*words: str, **keys: Any) -> dict[str, Any]:
    """`eps:0 v2` has no part of the one and all of the other."""
    models = [word.partition(":") for word in words]
    entries = [{"model": name, "parameters": {"weight": float(weight or 1)}} for name, _, weight in models]
    return {"merge_method": "linear", "models": entries, **keys}


def planned(raw: dict[str, Any], output: str = "OUT", **options: Any) -> streammerge.plan.plan.Plan:
    return streammerge.make_plan(raw, output=output, **options)


def stated(raw: dict[str, Any]) -> dict[str, Any]:
    """What the scheduler of a merge says."""
    report = streammerge.merge(raw, output="OUT", sync=False, force=True)
    assert not any({V, ZERO} & load_model(Path(path)).keys() for path in report.output)
    found: dict[str, Any] = json.loads(Path("OUT", SCHEDULER).read_text())
    return found


@pytest.mark.parametrize(
    ("words", "kind", "zero"),
    [
        (("eps:0", "plain.safetensors"), "epsilon", None),
        (("v:0", "plain.safetensors"), "v_prediction", None),
        (("eps:0", "v1.safetensors"), "v_prediction", None),
        (("eps:0", "v2.safetensors"), "v_prediction", True),
        (("eps:0", "v"), "v_prediction", None),
        (("v:0", "eps"), "epsilon", None),
        (("v", "v2.safetensors"), "v_prediction", True),
    ],
)
def test_a_pipeline_says_what_the_models_do_that_it_is_of(words, kind, zero):
    found = stated(recipe(*words))
    assert (found["prediction_type"], found.get("rescale_betas_zero_snr")) == (kind, zero)


def test_so_it_does_of_a_unet_that_is_put_in():
    take = {"component": "unet", "take": "v2.safetensors"}
    found = stated(recipe("eps", rules=[take]))
    assert (found["prediction_type"], found["rescale_betas_zero_snr"]) == ("v_prediction", True)
    take = {"component": "vae", "take": "v2.safetensors"}
    assert stated(recipe("v", rules=[take], layout="v"))["prediction_type"] == "v_prediction"


def test_what_is_stated_by_metadata_counts():
    said = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    save_model(Path("told.safetensors"), as_checkpoint(3), said)
    found = stated(recipe("eps:0", "told.safetensors"))
    assert (found["prediction_type"], found["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_nothing_else_of_the_config_changes_and_it_is_told():
    own = json.loads(Path("eps", SCHEDULER).read_text())
    plan = planned(recipe("eps:0", "v1.safetensors"))
    assert f'{SCHEDULER}: prediction_type: "epsilon" → "v_prediction", as the models say' in plan.notes()
    assert stated(recipe("eps:0", "v1.safetensors")) == {**own, "prediction_type": "v_prediction"}
    streammerge.merge(recipe("v:0", "v1.safetensors"), output="SAME", sync=False)
    assert Path("SAME", SCHEDULER).read_bytes() == Path("v", SCHEDULER).read_bytes()


@pytest.mark.parametrize(("name", "told"), [("PNDMScheduler", True), ("EulerDiscreteScheduler", False)])
def test_a_scheduler_that_does_not_know_of_it_is_told(name, told):
    Path("eps", SCHEDULER).write_text(json.dumps({"_class_name": name, "prediction_type": "epsilon"}))
    notes = planned(recipe("eps:0", "v2.safetensors")).notes()
    assert told == any(f"{name} is none of the schedulers of diffusers that read" in note for note in notes)


def test_predictions_are_mixed_only_if_that_is_wanted():
    with pytest.raises(PlanError, match="predict different things"):
        planned(recipe("eps", "v1.safetensors"))
    with pytest.raises(PlanError, match="predict different things"):
        planned(recipe("eps:0", "v1.safetensors", "eps"))
    mixed = recipe("eps", "v1.safetensors", on_prediction_mismatch="merge", on_missing="keep")
    assert stated(mixed)["prediction_type"] == "epsilon"


def test_models_that_differ_in_their_noise():
    said = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": False}
    Path("v", SCHEDULER).write_text(json.dumps(said))
    with pytest.raises(PlanError, match=r"1 tensor is not in every model\n  ztsnr"):
        planned(recipe("v", "v2.safetensors"))
    kept = recipe("v", "v2.safetensors", on_missing="keep")
    told = "models differ in whether their noise ends without a signal (zero SNR); v decides"
    assert told in planned(kept).notes()
    assert stated(kept) == said


def test_what_no_scheduler_says_is_refused():
    for output in ("OUT", "OUT.safetensors"):
        with pytest.raises(OutputError, match=r"predict v \(EDM\).* has no place for that"):
            planned(recipe("eps:0", "edm.safetensors", on_missing="keep"), output)
    kept = recipe("eps:0", "edm.safetensors", on_missing="keep", on_prediction_mismatch="merge")
    assert stated(kept)["prediction_type"] == "epsilon"


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_config_that_cannot_be_read(text):
    path = Path("eps", SCHEDULER)
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"{SCHEDULER}: can't be read as the scheduler's config"):
        planned(recipe("eps:0", "v1.safetensors"))
    assert planned(recipe("eps:0", "plain.safetensors"))


def test_a_checkpoint_has_marks_for_what_a_scheduler_says():
    Path("v", SCHEDULER).write_text(json.dumps({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    for naming, keys in (("original", {}), ("bare", {"only": "unet"}), (None, {})):
        streammerge.merge(recipe("v", **keys), output=f"{naming}.safetensors", names=naming, sync=False)
        found = load_model(Path(f"{naming}.safetensors"))
        assert found[V].shape == found[ZERO].shape == (0,)
    for raw in (recipe("v", only="vae"), recipe("eps")):
        streammerge.merge(raw, output="none.safetensors", names="original", sync=False, force=True)
        assert not {V, ZERO} & load_model(Path("none.safetensors")).keys()


def test_there_and_back_are_the_same_marks():
    take = {"component": "vae", "take": "v2.safetensors"}
    streammerge.merge(recipe("eps:0", "v2.safetensors"), output="THERE", sync=False)
    streammerge.merge(recipe("THERE", rules=[take]), output="back.safetensors", names="original", sync=False)
    assert {V, ZERO} <= load_model(Path("back.safetensors")).keys()


def test_a_pipeline_has_the_marks_that_its_scheduler_says():
    """Beside a checkpoint that has them as tensors, none is missing."""
    apart = {"match": ["*.output_blocks.*", "*.up_blocks.*"], "drop": True}  # of which there is too little to be told
    plan = planned(recipe("v1.safetensors", "v", rules=[apart]), "OUT.safetensors")
    assert V in plan.merged.tensors
    assert all(V not in names for names in plan.merged.lacking.values())
    plan = planned(recipe("v", "v1.safetensors"))
    assert V not in plan.merged.tensors
    assert not plan.merged.left_out
    with pytest.raises(PlanError, match=r"1 tensor is not in every model\n  ztsnr"):
        planned(recipe("v2.safetensors", "v", rules=[apart]), "OUT.safetensors")
