"""Models of one architecture under different names merge, in the layout's names or in those that are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import streammerge
from streammerge.cli.main import main
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
    near,
    normal,
    save_model,
    save_models,
)

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


def named(tensors: Tensors, naming: Naming) -> Tensors:
    found = recognise({name: info_of(tensor) for name, tensor in tensors.items()})
    assert found is not None
    view = Translated(MemoryModel(tensors), found.named(naming))
    return {name: view.read(name, 0, info.elements).reshape(info.shape) for name, info in view.tensors.items()}


def remarks(recipe: object, folder: Path, **options: object) -> tuple[str, ...]:
    return streammerge.make_plan(recipe, output=folder / "out.safetensors", **options).merged.remarks  # type: ignore[arg-type]


# ── one architecture, two namings ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["sd1", "sd2-base", "sdxl", "flux", "sd3", "wan", "z-image", "hunyuan", "hunyuan-dit"])
def test_a_merge_of_two_namings_is_that_in_one(tmp_path, name):
    a = diffusion_model(name, 1, torch.bfloat16)
    b = near(a, 2, 0.05)
    paths = save_models(tmp_path, a=a, b=b, da=named(a, "diffusers"), db=named(b, "diffusers"))
    for first, second, same in (("a", "db", "b"), ("da", "b", "db")):
        mixed = streammerge.linear(paths[first], paths[second], weight=[0.3, 0.7])
        alike = streammerge.linear(paths[first], paths[same], weight=[0.3, 0.7])
        assert_same_bytes(merge_to(tmp_path / "mixed", mixed), merge_to(tmp_path / "alike", alike))


@pytest.mark.parametrize("loops", ["auto", "off"])
def test_methods_that_measure_tensors_do_so_in_the_layouts(tmp_path, loops, monkeypatch):
    monkeypatch.setenv("STREAMMERGE_KERNELS", loops)
    base = diffusion_model("flux", 1, torch.float16)
    a, b = near(base, 2, 0.05), near(base, 3, 0.05)
    paths = save_models(tmp_path, base=base, a=a, b=b, da=named(a, "diffusers"), db=named(b, "diffusers"))
    for mixed, alike in (
        (
            streammerge.slerp(paths["base"], paths["da"], t=0.3),
            streammerge.slerp(paths["base"], paths["a"], t=0.3),
        ),
        (
            streammerge.ties(paths["a"], paths["db"], base=paths["base"], density=0.4),
            streammerge.ties(paths["a"], paths["b"], base=paths["base"], density=0.4),
        ),
    ):
        assert_same_bytes(merge_to(tmp_path / "mixed", mixed), merge_to(tmp_path / "alike", alike))


def test_the_plan_tells_what_was_read_as_what(tmp_path):
    a = diffusion_model("sd1")
    paths = save_models(tmp_path, a=a, b=named(a, "diffusers"), unet=part_of(a, UNET))
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(paths["b"])]}
    assert remarks(recipe, tmp_path) == ("b: UNet, VAE, text encoder in diffusers' names, read as a's",)
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(paths["unet"])], "on_missing": "keep"}
    assert remarks(recipe, tmp_path) == ("unet: UNet in bare names, read as a's",)
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(paths["a"])]}
    assert remarks(recipe, tmp_path) == ()


def test_what_is_only_called_otherwise_is_copied_as_it_lies(tmp_path):
    a = diffusion_model("sd1")
    paths = save_models(tmp_path, a=a, b=named(near(a, 1), "diffusers"))
    recipe = {
        "merge_method": "linear",
        "models": [str(paths["a"])],
        "rules": [{"match": [f"{VAE}*"], "take": str(paths["b"])}],
    }
    plan = streammerge.make_plan(recipe, output=tmp_path / "out.safetensors")
    assert all(kind.compute is None for kind in plan.jobs.kinds)
    made = merge_to(tmp_path / "out.safetensors", recipe)
    assert_same_bytes(part_of(made, VAE), part_of(near(a, 1), VAE))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_what_stands_before_names_is_no_difference(tmp_path, prefix):
    a, b = diffusion_model("flux", 1), diffusion_model("flux", 2)
    paths = save_models(tmp_path, a=a, b=b, c={prefix + name: tensor for name, tensor in b.items()})
    mixed = merge_to(tmp_path / "mixed", streammerge.linear(paths["a"], paths["c"]))
    assert_same_bytes(mixed, merge_to(tmp_path / "alike", streammerge.linear(paths["a"], paths["b"])))


def test_an_attention_of_matrices_is_one_of_convolutions(tmp_path):
    a, b = (part_of(diffusion_model("sd1", seed), VAE) for seed in (1, 2))
    flat = {
        name: tensor[:, :, 0, 0] if "attn_1" in name and tensor.dim() == 4 else tensor for name, tensor in b.items()
    }
    paths = save_models(tmp_path, a=a, b=b, c={name: tensor.contiguous() for name, tensor in flat.items()})
    merged = streammerge.linear(paths["a"], paths["c"])
    assert merged.remarks == ("1: VAE has matrices for 1×1 convolutions or the reverse, read in 0's shapes",)
    mixed = merge_to(tmp_path / "mixed", merged)
    assert_same_bytes(mixed, merge_to(tmp_path / "alike", streammerge.linear(paths["a"], paths["b"])))


def test_a_text_encoder_alone_is_the_one_of_its_width(tmp_path):
    xl = diffusion_model("sdxl", 1)
    for stem, names in (
        ("conditioner.embedders.0.transformer.", "original"),
        ("conditioner.embedders.1.model.", "original"),
        ("conditioner.embedders.1.model.", "diffusers"),
    ):
        own = near(part_of(xl, stem), 3, 0.05)
        alone = named(own, names)  # type: ignore[arg-type]
        paths = save_models(tmp_path, xl=xl, clip=alone)
        rule = {"match": [f"{stem}*"], "take": str(paths["clip"])}
        made = merge_to(tmp_path / "out", {"merge_method": "linear", "models": [str(paths["xl"])], "rules": [rule]})
        assert_same_bytes(part_of(made, stem), own)


def test_second_names_of_the_same_bytes_are_told_and_left_out(tmp_path):
    xl = diffusion_model("sdxl", 1)
    clip = part_of(xl, "conditioner.embedders.1.model.")
    whole = xl | {f"cond_stage_model.model.{name}": xl[f"conditioner.embedders.1.model.{name}"] for name in clip}
    torch.save({"state_dict": whole}, tmp_path / "alias.ckpt")
    a = save_model(tmp_path / "a.safetensors", near(xl, 2, 0.05))
    plain = save_model(tmp_path / "plain.safetensors", xl)
    recipe = {"merge_method": "linear", "models": [str(a), str(tmp_path / "alias.ckpt")]}
    assert remarks(recipe, tmp_path) == (f"alias: {len(clip)} tensors of it have a second name, which is left out",)
    alike = merge_to(tmp_path / "alike", streammerge.linear(a, plain))
    assert_same_bytes(merge_to(tmp_path / "mixed", recipe), alike)
    both = merge_to(tmp_path / "both", streammerge.linear(tmp_path / "alias.ckpt", a))
    name = "token_embedding.weight"
    assert torch.equal(both[f"cond_stage_model.model.{name}"], both[f"conditioner.embedders.1.model.{name}"])


def test_second_names_of_other_bytes_are_no_second_names(tmp_path):
    xl = diffusion_model("sdxl", 1)
    clip = near(part_of(xl, "conditioner.embedders.1.model."), 3, 0.05)
    paths = save_models(
        tmp_path, a=xl, b=xl | {f"cond_stage_model.model.{name}": tensor for name, tensor in clip.items()}
    )
    with pytest.raises(PlanError, match=f"{len(clip)} tensors are not in every model"):
        streammerge.linear(paths["a"], paths["b"])


def test_a_name_that_nobody_knows_is_not_dropped(tmp_path):
    a = diffusion_model("sd1")
    odd = {**named(a, "diffusers"), "unet.down_blocks.0.motion.weight": normal((3,), 1)}
    paths = save_models(tmp_path, a=a, b=odd)
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(paths["b"])]}
    with pytest.raises(PlanError, match=r"1 tensor is not in every model\n  unet\.down_blocks\.0\.motion\.weight"):
        merge_to(tmp_path / "out", recipe)
    told = remarks({**recipe, "on_missing": "keep"}, tmp_path)
    assert told[1] == "b: 1 tensor has no name among a's, and keeps its own: unet.down_blocks.0.motion.weight"


def test_other_architectures_are_not_read_as_one_another(tmp_path):
    one, two = diffusion_model("sd1"), named(diffusion_model("sd2-base"), "diffusers")
    paths = save_models(tmp_path, one=one, two=two)
    with pytest.raises(PlanError, match="0 looks like Stable Diffusion 1; 1 like Stable Diffusion 2"):
        streammerge.linear(paths["one"], paths["two"])


def test_scaled_weights_are_decoded_under_other_names(tmp_path):
    a = diffusion_model("flux", 1, torch.float32)
    codes = {}
    for name, tensor in diffusion_model("flux", 2, torch.float32).items():
        if name.endswith("qkv.weight"):
            codes[name], codes[f"{name.removesuffix('weight')}weight_scale"] = (
                (tensor * 50).to(torch.float8_e4m3fn),
                torch.tensor(0.02),
            )
        else:
            codes[name] = tensor
    paths = save_models(tmp_path, a=a, da=named(a, "diffusers"), c=codes)
    expected = named(merge_to(tmp_path / "alike", streammerge.linear(paths["a"], paths["c"])), "diffusers")
    made = merge_to(tmp_path / "mixed", streammerge.linear(paths["da"], paths["c"]))
    assert_same_bytes(made, expected)


def test_codes_that_cannot_be_read_keep_their_names(tmp_path):
    a = diffusion_model("flux", 1)
    name = "double_blocks.0.img_attn.qkv.weight"
    codes = {name: torch.zeros(96, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(3)}
    paths = save_models(tmp_path, a=named(a, "diffusers"), c={**a, **codes, f"{name}.quant_map": torch.ones(16)})
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(paths["c"])]}
    with pytest.raises(PlanError):
        merge_to(tmp_path / "out", {**recipe, "on_missing": "keep"})
    with pytest.raises(PlanError, match="3 tensors are quantised in a way that streammerge can't decode, nor name"):
        merge_to(
            tmp_path / "out.safetensors", {"merge_method": "linear", "models": [str(paths["c"])]}, names="diffusers"
        )


# ── the output's names ───────────────────────────────────────────────────────────────────────────────────────────────


def test_names_are_chosen_for_the_output(tmp_path):
    a = diffusion_model("sdxl", 1)
    paths = save_models(tmp_path, a=a, d=named(a, "diffusers"))
    for first in ("a", "d"):
        for naming in ("original", "diffusers"):
            made = merge_to(
                tmp_path / "out.safetensors", {"merge_method": "linear", "models": [str(paths[first])]}, names=naming
            )
            assert_same_bytes(made, a if naming == "original" else named(a, "diffusers"))


def test_a_model_that_is_no_recipe_is_renamed_too(tmp_path):
    a, b = diffusion_model("flux", 1), diffusion_model("flux", 2)
    paths = save_models(tmp_path, a=a, b=b)
    merged = streammerge.slerp(paths["a"], paths["b"], t=0.3)
    plain = merge_to(tmp_path / "plain", merged)
    assert_same_bytes(merge_to(tmp_path / "out.safetensors", merged, names="diffusers"), named(plain, "diffusers"))


def test_a_component_gets_bare_names(tmp_path):
    unet = {name: tensor for name, tensor in diffusion_model("sd1").items() if name.startswith(UNET)}
    path = save_model(tmp_path / "unet.safetensors", unet)
    made = merge_to(tmp_path / "out.safetensors", {"merge_method": "linear", "models": [str(path)]}, names="bare")
    assert_same_bytes(made, part_of(unet, UNET))


def test_what_has_no_name_is_told(tmp_path):
    path = save_model(tmp_path / "a.safetensors", {**diffusion_model("sd1"), "v_pred": torch.zeros(0)})
    recipe = {"merge_method": "linear", "models": [str(path)]}
    assert remarks(recipe, tmp_path, names="diffusers") == (
        "a: 1 tensor has no diffusers name, and keeps its own: v_pred",
    )
    assert "v_pred" in merge_to(tmp_path / "out.safetensors", recipe, names="diffusers")


@pytest.mark.parametrize(
    ("naming", "tensors", "message"),
    [
        (
            "bare",
            lambda: diffusion_model("sd1"),
            "a: bare names are those of one component, and it has 3\n  UNet   model",
        ),
        ("diffusers", lambda: {"x": torch.ones(3)}, "a: its names are none that streammerge knows in several namings"),
        (
            "original",
            lambda: {
                "unet.down_blocks.0.resnets.0.norm1.weight": torch.ones(3),
                "text_encoder.text_model.final_layer_norm.weight": torch.ones(3),
            },
            "a: its architecture isn't known, and so not what original names are\n  text encoder   text_encoder",
        ),
    ],
)
def test_a_naming_that_cannot_be_had_is_refused(tmp_path, naming, tensors, message):
    path = save_model(tmp_path / "a.safetensors", tensors())
    with pytest.raises(PlanError, match=message):
        remarks({"merge_method": "linear", "models": [str(path)]}, tmp_path, names=naming)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_command_line_takes_names_and_its_metadata_keep_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = diffusion_model("flux", 1)
    save_models(tmp_path, a=a)
    assert main(["a.safetensors", "--names", "diffusers", "-o", "out.safetensors", "-q"]) == 0
    assert_same_bytes(load_model(tmp_path / "out.safetensors"), named(a, "diffusers"))
    assert main(["out.safetensors", "--recipe-from-metadata", "-o", "again.safetensors", "-q"]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert main(["verify", "out.safetensors"]) == 0


def test_an_output_that_is_joined_is_the_same_by_any_means(tmp_path):
    path = save_model(tmp_path / "d.safetensors", named(diffusion_model("flux", 1), "diffusers"))
    recipe = {"merge_method": "linear", "models": [str(path)]}
    first = merge_to(tmp_path / "one", recipe, names="original")
    for options in ({"threads": 1}, {"io": "mmap"}, {"io": "pread", "threads": 3}, {"verify": True}):
        assert_same_bytes(merge_to(tmp_path / "other", recipe, names="original", **options), first)


def test_a_unet_of_a_width_that_nobody_has_merges_in_other_names_too(tmp_path):
    """As those of the demo: what it is was told of the text encoder in the one naming, and of the VAE in the other."""
    whole = diffusion_model("sd1")
    a = {name: tensor[:, :16].clone() if tensor.shape[1:] == (768,) else tensor for name, tensor in whole.items()}
    paths = save_models(tmp_path, a=a, b=near(a, 2, 0.05))
    recipe = {"merge_method": "linear", "models": [str(path) for path in paths.values()]}
    mixed = merge_to(tmp_path / "mixed.safetensors", recipe, names="diffusers")
    assert_same_bytes(mixed, named(merge_to(tmp_path / "alike.safetensors", recipe), "diffusers"))
