"""What models mean: predictions and architectures that are not mixed, marks that are copied, EMA that is stale."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.errors import PlanError, RecipeError
from streammerge.recipe.description import describe
from streammerge.recipe.parse import parse_recipe
from tests.make.headers import Header, header, merged
from tests.plan.fates import fates

UNET = "model.diffusion_model.out.2.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
CONTEXT = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"


def model(metadata: Any = None, **marks: Any) -> Header:
    """A UNet's and a VAE's tensor, and marks with `__` for dots, in a file with these metadata."""
    tensors: dict[str, Any] = {UNET: (4, 4), VAE: (4, 4), **marks}
    made = header(**tensors)
    made.metadata = dict(metadata or {})  # type: ignore[attr-defined]  # as a checkpoint has them
    return made


EPSILON = {"modelspec.prediction_type": "epsilon"}
V = {"modelspec.prediction_type": "v"}


@pytest.mark.parametrize(
    "other",
    [
        model(V),
        model({"modelspec.predict_key": "v"}),
        model({"modelspec.prediction_type": "V-Prediction"}),
        model({"ss_v_parameterization": "True"}),
        model({"prediction_type": " v_prediction "}),
        model(EPSILON, v_pred="F32 0"),  # samplers go by the tensor
        model(edm_vpred__sigma_max="F32", edm_vpred__sigma_min="F32"),
        model(edm_mean="F32 1 4 1 1", edm_std="F32 1 4 1 1"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_predictions_are_not_mixed(other, swapped):
    models = {"a": model(EPSILON), "b": other}
    models = dict(reversed(models.items())) if swapped else models
    with pytest.raises(PlanError, match="predict different things") as error:
        merged(models, on_missing="keep")
    assert "--on-prediction-mismatch merge" in error.value.advice
    made = merged(models, on_missing="keep", on_prediction_mismatch="merge")
    assert fates(made)[UNET] == "merged: linear"
    assert any("predict different things" in remark for remark in made.remarks)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (model(EPSILON), model({"ss_v_parameterization": "False"})),
        (model(V), model(V, v_pred="F32 0")),
        (model(EPSILON), model()),
        (model(), model()),
        (model(EPSILON), model({"modelspec.prediction_type": "something new"})),
        (model({"ss_v_parameterization": ""}), model(V)),
        (model(EPSILON), model({"modelspec.prediction_type": ""})),
    ],
)
def test_what_is_not_known_to_differ_is_merged(one, other):
    assert fates(merged({"a": one, "b": other}, on_missing="keep"))[UNET] == "merged: linear"


def test_who_says_nothing_beside_v_is_told():
    made = merged({"a": model(), "b": model(v_pred="F32 0")}, on_missing="keep")
    assert any("b predicts v" in remark and "a says nothing" in remark for remark in made.remarks)
    assert not merged({"a": model(), "b": model(EPSILON)}).remarks


def test_only_what_predicts_counts():
    models = {"a": model(EPSILON), "b": model(V)}
    rules = [{"match": "model.diffusion_model.*", "keep": True}]
    assert fates(merged(models, rules=rules))[VAE] == "merged: linear"
    taken = [{"match": "first_stage_model.*", "take": "c"}]
    assert merged({"a": model(EPSILON), "b": model(EPSILON), "c": model(V)}, beside="c", rules=taken)
    taken = [{"match": "model.diffusion_model.*", "take": "c"}]
    with pytest.raises(PlanError, match="predict different things"):
        merged({"a": model(EPSILON), "b": model(EPSILON), "c": model(V)}, beside="c", rules=taken)


def test_the_base_and_nested_merges_count():
    with pytest.raises(PlanError, match="predict different things"):
        merged({"a": model(V), "base": model(EPSILON)}, "task_arithmetic", base="base")
    inner = merged({"a": model(V), "b": model(V)})
    with pytest.raises(PlanError, match="predict different things"):
        merged({"x": inner, "y": model(EPSILON)})


def test_marks_are_copied_in_the_layouts_dtype():
    marks = {"v_pred": "F32 0", "ztsnr": "F32 0", "edm_vpred__sigma_max": "F32", "edm_vpred__sigma_min": "F32"}
    made = merged({"a": model(**marks), "b": model(**marks)}, dtype="float16")
    for mark in marks:
        name = mark.replace("__", ".")
        assert fates(made)[name] == "copied: from a: it says how to sample, and is never averaged"
        assert made.tensors[name].dtype.name == "F32"


def test_schedules_are_neither_averaged_nor_cast():
    schedule = {"betas": "F32 1000", "alphas_cumprod": "F32 1000"}
    made = merged({"a": model(**schedule), "b": model(**schedule)}, dtype="float16")
    assert fates(made)["betas"] == "copied: from a: it says how to sample, and is never averaged"
    kept = merged({"a": model(**schedule)}, dtype="float16", rules=[{"match": "*", "keep": True}])
    asked = merged({"a": model(**schedule)}, rules=[{"match": "betas", "keep": True, "dtype": "float16"}])
    assert [each.tensors["betas"].dtype.name for each in (made, kept, asked)] == ["F32", "F32", "F16"]


def test_marks_that_some_lack_are_still_an_error():
    with pytest.raises(PlanError, match="not in every model"):
        merged({"a": model(v_pred="F32 0"), "b": model()})


def test_a_policy_that_there_is_not():
    with pytest.raises(RecipeError, match="on_prediction_mismatch must be one of error, merge"):
        merged({"a": model(), "b": model()}, on_prediction_mismatch="keep")


def test_the_policy_is_part_of_the_recipe(tmp_path):
    recipe = {"merge_method": "linear", "models": ["a", "b"], "on_prediction_mismatch": "merge"}
    described = describe(parse_recipe(recipe, tmp_path))
    assert described["on_prediction_mismatch"] == "merge"


def with_context(columns: int, **more: Any) -> Header:
    """A UNet for text of so many columns, beside what all architectures share."""
    tensors: dict[str, Any] = {CONTEXT: (4, columns), UNET: (4, 4), VAE: (4, 4), **more}
    return header(**tensors)


@pytest.mark.parametrize(("one", "other"), [(768, 2048), (768, 1024), (1024, 2048), (2048, 1280)])
def test_architectures_are_not_mixed_whatever_policies_say(one, other):
    models = {"a": with_context(one), "b": with_context(other)}
    for policy in ("error", "keep", "overlap"):
        with pytest.raises(PlanError, match="a and b are of different architectures"):
            merged(models, on_missing="keep", on_shape_mismatch=policy)
    rules = [{"match": "model.diffusion_model.*", "keep": True}]
    assert fates(merged(models, rules=rules))[VAE] == "merged: linear"


def test_variants_are_one_architecture():
    first = "model__diffusion_model__input_blocks__0__0__weight"
    models = {"a": with_context(768, **{first: (8, 9, 3, 3)}), "b": with_context(768, **{first: (8, 4, 3, 3)})}
    assert fates(merged(models, on_shape_mismatch="overlap"))[UNET] == "merged: linear"


EMA: dict[str, Any] = {
    "model_ema.diffusion_modelout2weight": (4, 4),
    "model_ema.decay": "F32",
    "model_ema.num_updates": "I32",
}


def test_stale_ema_is_told():
    models = {"a": model(**EMA), "b": model()}
    (remark,) = merged(models, on_missing="keep").remarks
    assert remark.startswith("3 EMA tensors stay a's")
    assert "--drop 'model_ema.*'" in remark
    assert not merged(models, on_missing="drop", rules=[{"match": "model_ema.*", "drop": True}]).remarks
    assert not merged(models, on_missing="keep", rules=[{"match": "model.*", "keep": True}]).remarks
    (remark,) = merged({"a": model(**EMA), "b": model(**EMA)}).remarks  # its counters are integers
    assert remark.startswith("1 EMA tensor stays a's")


@pytest.mark.parametrize("policy", ["overlap", "pad"])
def test_channels_for_different_things_are_not_mixed(policy):
    first = "model.diffusion_model.input_blocks.0.0.weight"
    shapes = {"plain": 4, "depth": 5, "pix2pix": 8, "inpainting": 9}
    models = {name: with_context(768, **{first: (4, size, 3, 3)}) for name, size in shapes.items()}
    two = {name: models[name] for name in ("inpainting", "pix2pix")}
    with pytest.raises(PlanError, match=rf"(.|\n)*instruct-pix2pix(.|\n)*--keep '{first}'"):
        merged(two, on_shape_mismatch=policy)
    kept = merged(two, on_shape_mismatch=policy, rules=[{"match": first, "keep": True}])
    assert fates(kept)[UNET] == "merged: linear"
    assert merged({name: models[name] for name in ("inpainting", "plain")}, on_shape_mismatch=policy)


def test_flux_for_filling_is_not_mixed_with_flux_for_control():
    wide = {name: (8, size) for name, size in {"dev": 64, "control": 128, "fill": 384}.items()}
    models = {
        name: header(img_in__weight=shape, double_blocks__0__img_attn__proj__weight=(8, 8))
        for name, shape in wide.items()
    }
    with pytest.raises(PlanError, match=r"fill   Fill(.|\n)*--keep 'img_in.weight'"):
        merged({name: models[name] for name in ("control", "fill")}, on_shape_mismatch="overlap")
    assert merged({name: models[name] for name in ("fill", "dev")}, on_shape_mismatch="overlap")
