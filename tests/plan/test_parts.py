"""Components are put into models and taken out of them, with what training left dropped or used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import streammerge
from streammerge.errors import PlanError
from streammerge.models.dialects import Naming, recognise
from streammerge.models.dialects.translation import Translated
from tests.make.diffusion import diffusion_model, part_of
from tests.make.models import (
    MemoryModel,
    Tensors,
    assert_same_bytes,
    info_of,
    load_model,
    merge_to,
    normal,
    save_model,
    save_models,
)

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
POSITIONS = f"{TEXT}text_model.embeddings.position_ids"
EMBEDDING = "text_model.embeddings.token_embedding.weight"


def named(tensors: Tensors, naming: Naming) -> Tensors:
    found = recognise({name: info_of(tensor) for name, tensor in tensors.items()})
    assert found is not None
    view = Translated(MemoryModel(tensors), found.named(naming))
    return {name: view.read(name, 0, info.elements).reshape(info.shape) for name, info in view.tensors.items()}


def without(tensors: Tensors, *prefixes: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def with_averages(tensors: Tensors) -> Tensors:
    """The model as training leaves it: averages of the UNet in fp32, their state, a loss and an optimizer."""
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    averages = {f"model_ema.{name[6:].replace('.', '')}": tensor.float() + 1 for name, tensor in weights.items()}
    state = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    left = {f"{VAE}loss.logvar": torch.zeros(()), "logvar": torch.zeros(10), "optimizer.state.0": torch.zeros(2)}
    return {**tensors, **averages, **state, **left, "betas": torch.linspace(0, 1, 10)}


def recipe_of(*models: Path, **keys: object) -> dict[str, object]:
    return {"merge_method": "linear", "models": [str(path) for path in models], **keys}


def taking(model: Path | object, component: str, **keys: object) -> dict[str, object]:
    return {"component": component, "take": str(model) if isinstance(model, Path) else model, **keys}


def refusal(recipe: object, **options: object) -> str:
    with pytest.raises(PlanError) as refused:
        streammerge.make_plan(recipe, output="out.safetensors", **options)  # type: ignore[arg-type]
    return str(refused.value)


# ── put in ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["whole", "bare", "diffusers", "ckpt"])
@pytest.mark.parametrize("layout", ["a", "novae"])
def test_a_vae_is_baked_from_any_file_that_has_one(tmp_path, kind, layout):
    a, b = diffusion_model("sd1", 1), diffusion_model("sd1", 2)
    vae = part_of(b, VAE)
    paths = save_models(
        tmp_path, a=a, novae=without(a, VAE), whole=b, bare=vae, diffusers=part_of(named(b, "diffusers"), "vae.")
    )
    paths["ckpt"] = tmp_path / "kl.vae.pt"
    training = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.randn(2, 3, 4, 4)}
    training |= {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    torch.save({"epoch": 1, "state_dict": vae | training}, paths["ckpt"])
    made = merge_to(tmp_path / "out", recipe_of(paths[layout], rules=[taking(paths[kind], "vae")]))
    assert_same_bytes(made, {**a, **below(VAE, vae)})


def test_a_glob_bakes_a_vae_with_what_training_left_in_its_file(tmp_path):
    a, b = diffusion_model("sd1", 1), diffusion_model("sd1", 2)
    paths = save_models(tmp_path, a=a, vae={**part_of(b, VAE), "loss.logvar": torch.zeros(())})
    rules = [{"match": f"{VAE}*", "take": str(paths["vae"])}]
    assert_same_bytes(
        merge_to(tmp_path / "out", recipe_of(paths["a"], rules=rules)), {**a, **below(VAE, part_of(b, VAE))}
    )


def test_a_merge_gets_a_vae_that_is_a_merge(tmp_path):
    models = {name: diffusion_model("sd1", seed) for seed, name in enumerate("abcd")}
    paths = save_models(tmp_path, **{name: without(models[name], VAE) for name in "ab"}, c=models["c"], d=models["d"])
    inner = recipe_of(paths["c"], paths["d"], only="vae")
    made = merge_to(tmp_path / "out", recipe_of(paths["a"], paths["b"], rules=[taking(inner, "vae")]))
    whole = {
        **merge_to(tmp_path / "ab", recipe_of(paths["a"], paths["b"])),
        **merge_to(tmp_path / "cd", inner),
    }
    assert_same_bytes(made, whole)


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_a_unet_alone_is_completed_either_way(tmp_path, naming):
    a, b = diffusion_model("sd1", 1), diffusion_model("sd1", 2)
    unet = part_of(b, UNET)
    bare = unet if naming == "original" else part_of(named(b, "diffusers"), "unet.")
    paths = save_models(tmp_path, a=a, unet=bare)
    complete = {**a, **below(UNET, unet)}
    assert_same_bytes(merge_to(tmp_path / "1", recipe_of(paths["a"], rules=[taking(paths["unet"], "unet")])), complete)
    rules = [taking(paths["a"], "vae"), taking(paths["a"], "text_encoder")]
    made = merge_to(tmp_path / "2", recipe_of(paths["unet"], rules=rules))
    if naming == "diffusers":
        made = named(made, "original")
        complete = without(complete, POSITIONS)
        made = without(made, POSITIONS, "text_model.")
    assert_same_bytes(made, complete)


def test_an_inpainting_unet_is_completed_with_the_parts_of_another(tmp_path):
    a, inpainting = diffusion_model("sd1", 1), part_of(diffusion_model("sd1", 2), UNET)
    inpainting["input_blocks.0.0.weight"] = normal((32, 9, 3, 3), 5, torch.float16)
    paths = save_models(tmp_path, a=a, unet=inpainting)
    rules = [taking(paths["a"], "vae"), taking(paths["a"], "text_encoder")]
    assert_same_bytes(
        merge_to(tmp_path / "out", recipe_of(paths["unet"], rules=rules)), {**a, **below(UNET, inpainting)}
    )


def _t5() -> Tensors:
    shapes = {f"encoder.block.{n}.layer.0.SelfAttention.{part}.weight": (4, 4) for n in range(2) for part in "qkvo"}
    return {name: normal(shape, 7, torch.float16) for name, shape in {**shapes, "shared.weight": (9, 4)}.items()}


def _flux_vae() -> Tensors:
    vae = without(part_of(diffusion_model("sd1", 5), VAE), "quant", "post_quant")
    rows = len(vae["decoder.conv_in.weight"])
    return {**vae, "decoder.conv_in.weight": normal((rows, 16, 3, 3), 8, torch.float16)}


@pytest.mark.parametrize("scaled", [False, True])
def test_flux_is_put_together_in_one_file_and_taken_apart_again(tmp_path, scaled):
    parts = {
        "flux": diffusion_model("flux", 1, torch.bfloat16),
        "clip": part_of(diffusion_model("sd1", 2), TEXT),
        "t5": _t5(),
        "vae": _flux_vae(),
    }
    if scaled:
        codes = parts["flux"]["img_in.weight"].to(torch.float8_e4m3fn)
        parts["flux"] |= {"img_in.weight": codes, "img_in.scale_weight": torch.tensor(0.5)}
        parts["flux"]["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    paths = save_models(tmp_path, **parts)
    rules = [taking(paths["clip"], "text_encoder"), taking(paths["t5"], "t5"), taking(paths["vae"], "vae")]
    rules.append({"match": "*", "keep": True})
    made = merge_to(tmp_path / "all", recipe_of(paths["flux"], rules=rules))
    prefixes = {"flux": UNET, "vae": "vae.", "clip": "text_encoders.clip_l.transformer."}
    prefixes["t5"] = "text_encoders.t5xxl.transformer."
    whole = {prefixes[part] + name: tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    assert_same_bytes(made, whole)
    for word, part in (("transformer", "flux"), ("vae", "vae"), ("clip_l", "clip"), ("text_encoder_2", "t5")):
        kept = recipe_of(
            save_model(tmp_path / "whole.safetensors", made), only=word, rules=[{"match": "*", "keep": True}]
        )
        if scaled and part == "flux":
            assert_same_bytes(merge_to(tmp_path / "part", kept), below(UNET, parts["flux"]))
        else:
            assert_same_bytes(merge_to(tmp_path / "part", kept, names="bare"), parts[part])


# ── taken out ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "word", "prefix"),
    [
        ("sd1", "unet", UNET),
        ("sd1", "vae", VAE),
        ("sd1", "text_encoder", TEXT),
        ("sd2-depth", "text_encoder", "cond_stage_model.model."),
        ("sdxl", "text_encoder", "conditioner.embedders.0.transformer."),
        ("sdxl", "clip_g", "conditioner.embedders.1.model."),
        ("sdxl", "text_encoder_2", "conditioner.embedders.1.model."),
    ],
)
def test_a_component_is_written_alone(tmp_path, model, word, prefix):
    a, b = diffusion_model(model, 1), diffusion_model(model, 2)
    paths = save_models(tmp_path, a=a, b=b)
    part = {name: tensor for name, tensor in a.items() if name.startswith(prefix)}
    assert_same_bytes(merge_to(tmp_path / "own", recipe_of(paths["a"], only=word)), part)
    assert_same_bytes(merge_to(tmp_path / "bare", recipe_of(paths["a"], only=word), names="bare"), part_of(a, prefix))
    both = recipe_of(paths["a"], paths["b"])
    assert_same_bytes(
        merge_to(tmp_path / "merged", {**both, "only": word}),
        {name: tensor for name, tensor in merge_to(tmp_path / "both", both).items() if name.startswith(prefix)},
    )


def test_components_of_models_in_different_names_are_merged_alone(tmp_path):
    a, b = diffusion_model("sd1", 1), diffusion_model("sd1", 2)
    paths = save_models(tmp_path, a=a, b=b, vae=part_of(named(b, "diffusers"), "vae."))
    expected = merge_to(tmp_path / "1", recipe_of(paths["a"], paths["b"], only="vae"))
    assert_same_bytes(merge_to(tmp_path / "2", recipe_of(paths["a"], paths["vae"], only="vae")), expected)


def scaled(tensors: Tensors) -> Tensors:
    """ComfyUI's scaled fp8: a matrix of codes, its scale, and the mark of such a file."""
    name = next(name for name, tensor in tensors.items() if name.startswith(UNET) and tensor.dim() == 2)
    codes = {name: tensors[name].to(torch.float8_e4m3fn), name.replace(".weight", ".scale_weight"): torch.tensor(0.5)}
    return {**tensors, **codes, f"{UNET}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}


def test_scaled_codes_stay_codes_where_only_their_prefix_changes(tmp_path):
    a = scaled(diffusion_model("sd1", 1))
    paths = save_models(tmp_path, a=a)
    keeping = recipe_of(paths["a"], only="unet", rules=[{"match": "*", "keep": True}])
    assert_same_bytes(merge_to(tmp_path / "out", keeping, names="bare"), part_of(a, UNET))
    plan = streammerge.make_plan(keeping, output=tmp_path / "out.safetensors", names="diffusers")
    assert "a: 1 quantised weight is decoded to be named so" in plan.merged.remarks
    merged = merge_to(tmp_path / "whole", recipe_of(paths["a"], prune=True, rules=[{"match": "*", "keep": True}]))
    assert_same_bytes(merged, without(a, POSITIONS))


# ── dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["keep", "fp32"])
def test_a_vae_stays_in_fp32_beside_a_unet_in_fp16(tmp_path, dtype):
    a, b = (diffusion_model("sd1", seed, torch.float32) for seed in (1, 2))
    paths = save_models(tmp_path, a=a, b=b)
    made = merge_to(
        tmp_path / "out",
        recipe_of(paths["a"], paths["b"], dtype="fp16", rules=[{"component": "vae", "dtype": dtype}]),
    )
    for name, tensor in a.items():
        if tensor.is_floating_point():
            wanted = torch.float32 if name.startswith(VAE) else torch.float16
            torch.testing.assert_close(
                made[name], ((tensor.double() + b[name].double()) / 2).to(wanted), rtol=0, atol=0
            )


# ── what training left ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("ema", "prune"), [("drop", False), ("use", False), ("keep", True), ("use", True)])
def test_averages_are_dropped_or_used_and_leftovers_pruned(tmp_path, ema, prune):
    a = diffusion_model("sd1", 1)
    trained = with_averages(a)
    paths = save_models(tmp_path, a=trained)
    expected = without(trained, "model_ema.")
    if prune:
        expected = without(expected, f"{VAE}loss.", "logvar", "optimizer.", POSITIONS)
    if ema == "use":
        expected |= {name: tensor.float() + 1 for name, tensor in a.items() if name.startswith("model.")}
    recipe = recipe_of(paths["a"], ema=ema, prune=prune, rules=[{"match": "*", "keep": True}])
    plan = streammerge.make_plan(recipe, output=tmp_path / "out.safetensors")
    assert plan.count("dropped") == len(trained) - len(expected)
    assert "dropped: averaged weights (EMA)" in plan.summary()
    assert_same_bytes(merge_to(tmp_path / "out", recipe), expected)


def test_a_model_with_averages_merges_with_one_that_has_none(tmp_path):
    a, b = diffusion_model("sd1", 1), diffusion_model("sd1", 2)
    paths = save_models(tmp_path, a=without(with_averages(a), "betas"), b=b, plain=a)
    expected = merge_to(tmp_path / "1", recipe_of(paths["plain"], paths["b"], prune=True))
    assert_same_bytes(merge_to(tmp_path / "2", recipe_of(paths["a"], paths["b"], prune=True)), expected)
    used = merge_to(tmp_path / "3", recipe_of(paths["b"], paths["a"], ema="use", prune=True))
    name = f"{UNET}out.2.weight"
    mean = ((a[name].float() + 1).double() + b[name].double()) / 2
    assert torch.equal(used[name], mean.to(torch.float16))


@pytest.mark.parametrize("names", [None, "diffusers"])
def test_averages_of_what_is_not_wanted_are_not_used(tmp_path, names):
    """The text encoder alone, with what an adapter changes there: its UNet was in the output too."""
    a, b = diffusion_model("sd1", 1), diffusion_model("sd1", 2)
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    up, down = (torch.full(shape, 0.5) for shape in ((24, 2), (2, 24)))
    lora = {"lora_up": up, "lora_down": down}
    adapter = {f"lora_te_{module.replace('.', '_')}.{role}.weight": value for role, value in lora.items()}
    paths = save_models(tmp_path, a=without(with_averages(a), "betas"), b=b, lora=adapter)
    for models in ([paths["a"]], [paths["a"], paths["b"]], [paths["b"], paths["a"]]):
        entries = [{"model": str(path), "adapters": [str(paths["lora"])]} for path in models]
        recipe = {"merge_method": "linear", "models": entries, "ema": "use", "only": "text_encoder"}
        made = merge_to(tmp_path / "out", recipe, force=True, **({"names": names} if names else {}))
        plain = [{"a": a, "b": b}[path.stem] for path in models]
        tail = f"{module}.weight"
        own = [each[f"cond_stage_model.transformer.{tail}"].double() for each in plain]
        wanted = torch.stack(own).mean(0) + 0.5
        (found,) = (tensor for name, tensor in made.items() if name.endswith(tail))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)
        assert len(made) == sum(name.startswith("cond_stage_model.") for name in a)


def test_averages_become_the_unet_in_another_naming(tmp_path):
    a = diffusion_model("sd1", 1)
    paths = save_models(tmp_path, a=without(with_averages(a), "betas"))
    recipe = recipe_of(paths["a"], ema="use", only="unet")
    expected = {name: tensor.float() + 1 for name, tensor in a.items() if name.startswith(UNET)}
    assert_same_bytes(merge_to(tmp_path / "out", recipe, names="diffusers"), named(expected, "diffusers"))


def test_averages_that_are_not_all_there_are_refused(tmp_path):
    trained = with_averages(diffusion_model("sd1", 1))
    half = dict(trained)
    del half["model_ema.diffusion_modelout2weight"]
    strange = {**trained, "model_ema.diffusion_modelnobody": torch.zeros(3)}
    other = {**trained, "model_ema.diffusion_modelout2bias": torch.zeros(9)}
    for name, model in {"half": half, "strange": strange, "other": other}.items():
        said = refusal(recipe_of(save_model(tmp_path / f"{name}.safetensors", model), ema="use"))
        assert "of 1 tensor it can't be told of which weight it is the average" in said


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("layout", "rule", "said"),
    [
        ("sd1", ("fluxvae", "vae"), "latents of 16 channels, and they have 4 there"),
        ("flux", ("sd1", "vae"), "latents of 4 channels, and they have 16 there"),
        ("sd1", ("sd2", "text_encoder"), "is [32], and [24] there"),
        ("sdxl", ("sd1", "unet"), "another architecture: Stable Diffusion 1, not SDXL"),
        ("sd1", ("text", "vae"), "text: it has no vae, which is to be taken from it"),
        ("sd1", ("sd1", "text_encoder_2"), "Stable Diffusion 1 has no text_encoder_2"),
        ("vae", ("sd1", "unet"), "where its UNet would be isn't known"),
        ("flux", ("wide", "text_encoder"), "it is 1280 wide"),
        ("novae", ("half", "vae"), "its VAE is not whole: it has no encoder.conv_in"),
        ("language", ("sd1", "vae"), "its components can't be told"),
        ("sd1", ("language", "vae"), "None of its names"),
    ],
)
def test_a_component_that_does_not_fit_is_refused(tmp_path, layout, rule, said):
    a = diffusion_model("sd1", 1)
    text = part_of(a, TEXT)
    paths = save_models(
        tmp_path,
        sd1=a,
        sd2=diffusion_model("sd2-base", 1),
        sdxl=diffusion_model("sdxl", 1),
        flux=diffusion_model("flux", 1),
        fluxvae=_flux_vae(),
        vae=part_of(a, VAE),
        novae=without(a, VAE),
        half=without(part_of(a, VAE), "encoder."),
        text=text,
        wide={**text, EMBEDDING: torch.zeros(9, 1280)},
        language={"model.layers.0.mlp.gate_proj.weight": torch.zeros(3, 3)},
    )
    model, word = rule
    assert said in refusal(recipe_of(paths[layout], rules=[taking(paths[model], word)]))


def test_a_component_that_lacks_tensors_is_refused(tmp_path):
    a = diffusion_model("sd1", 1)
    paths = save_models(tmp_path, a=a, vae=without(part_of(a, VAE), "decoder.norm_out"))
    rules = [taking(paths["vae"], "vae")]
    assert "2 tensors are not in every model" in refusal(recipe_of(paths["a"], rules=rules))
    made = merge_to(tmp_path / "out", recipe_of(paths["a"], rules=rules, on_missing="keep"))
    assert_same_bytes(made, a)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"only": "unet", "rules": [taking(Path("b.safetensors"), "vae")]}, "only the unet is to be written"),
        ({"only": "text_encoder_2"}, "a: it has no text_encoder_2"),
        ({"only": "controlnet"}, "a: it has no controlnet"),
        ({"ema": "use"}, "no model has averaged weights"),
        ({"rules": [{"component": "controlnet", "drop": True}]}, "a: it has no controlnet"),
        (
            {"rules": [{"component": "vae", "keep": True}, {"component": "vae", "drop": True}]},
            "1 rule matches no tensor",
        ),
    ],
)
def test_what_is_not_there_is_refused(tmp_path, monkeypatch, keys, said):
    monkeypatch.chdir(tmp_path)
    a = diffusion_model("sd1", 1)
    paths = save_models(tmp_path, a=a, b=a)
    assert said in refusal(recipe_of(paths["a"], **keys))


def test_pruning_what_nobody_knows_is_refused(tmp_path):
    paths = save_models(tmp_path, a={"loss.weight": torch.zeros(3), "model.x": torch.zeros(3)})
    assert "What training left can't be told" in refusal(recipe_of(paths["a"], prune=True))


@pytest.mark.parametrize(("model", "word"), [("sd1", "text_encoder"), ("sd2-base", "clip_l"), ("sdxl", "clip_g")])
def test_a_text_encoder_of_a_pipeline_has_the_original_names_of_its_architecture(tmp_path, model, word):
    original = diffusion_model(model)
    path = save_model(tmp_path / "theirs.safetensors", named(original, "diffusers"))
    found = merge_to(tmp_path / "out.safetensors", recipe_of(path, only=word), names="original")
    prefix = {"sd1": TEXT, "sd2-base": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}[model]
    assert_same_bytes(found, {name: tensor for name, tensor in original.items() if name.startswith(prefix)})


# ── what a denoiser predicts goes with it ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def predicting(tmp_path) -> dict[str, Path]:
    """A model that predicts v, its UNet alone, and a model that says that it predicts noise."""
    v = diffusion_model("sd1", 1) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    alone = {name.removeprefix(UNET): tensor for name, tensor in without(v, VAE, TEXT).items()}
    epsilon = save_model(
        tmp_path / "e.safetensors", diffusion_model("sd1", 2), {"modelspec.prediction_type": "epsilon"}
    )
    return {**save_models(tmp_path, v=v, alone=alone), "epsilon": epsilon}


@pytest.mark.parametrize(("model", "naming"), [("v", None), ("v", "bare"), ("alone", "original"), ("alone", None)])
def test_marks_go_with_the_denoiser_under_their_own_names(tmp_path, predicting, model, naming):
    found = merge_to(tmp_path / "out.safetensors", recipe_of(predicting[model], only="unet"), names=naming)
    assert {"v_pred", "ztsnr"} < found.keys()
    prefix = UNET if (model, naming) in (("v", None), ("alone", "original")) else ""
    assert f"{prefix}input_blocks.0.0.weight" in found
    assert not any("pred" in name for name in found if name != "v_pred")


def test_marks_are_no_part_of_a_vae_and_of_nothing_in_diffusers_names(tmp_path, predicting):
    vae = merge_to(tmp_path / "vae.safetensors", recipe_of(predicting["v"], only="vae"))
    report = streammerge.merge(
        recipe_of(predicting["v"], only="unet"), output=tmp_path / "unet.safetensors", names="diffusers"
    )
    assert not {"v_pred", "ztsnr"} & (vae.keys() | load_model(tmp_path / "unet.safetensors").keys())
    assert any("v_pred, ztsnr are left out" in note and "scheduler_config.json" in note for note in report.notes)


@pytest.mark.parametrize("naming", [None, "diffusers"])
def test_denoisers_alone_that_predict_different_things_are_not_mixed(tmp_path, predicting, naming):
    recipe = recipe_of(predicting["epsilon"], predicting["v"], only="unet")
    with pytest.raises(PlanError, match="predict different things"):
        streammerge.merge(recipe, output=tmp_path / "out.safetensors", names=naming)
