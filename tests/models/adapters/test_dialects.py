"""Adapters of several dialects added up, and written in another: baked, the sum gives what they give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.cli.main import main
from streammerge.errors import MergeError
from streammerge.models.adapters.dialects import underscored
from streammerge.models.adapters.matching import matched
from streammerge.models.adapters.meanings import Meaning, Part, dotted, meaning_of, meanings
from streammerge.models.dialects import recognise
from tests.make.diffusion import diffusion_model
from tests.make.models import Tensors, load_model, merge_to, save_model
from tests.models.adapters.baking import bake, numbers, peft_folder
from tests.models.adapters.test_layouts import original

RANK = 2
DIFFUSERS = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SDXL, CLIP_L = "input_blocks.4.1.transformer_blocks.0.attn1.", "text_model.encoder.layers.0.self_attn.q_proj"


def factors(
    module: str, rows: int, columns: int, seed: int, up: str = "lora_up.weight", down: str = "lora_down.weight"
) -> Tensors:
    return {
        f"{module}.{up}": numbers(rows, RANK, seed=seed),
        f"{module}.{down}": numbers(RANK, columns, seed=seed + 40),
    }


def kohya(*modules: str, shapes: Mapping[str, tuple[int, int]], seed: int = 1) -> Tensors:
    """Factors of modules, whose shapes are told by the ends of their names."""
    return made(modules, shapes, seed)


def peft(*modules: str, shapes: Mapping[str, tuple[int, int]], seed: int = 1) -> Tensors:
    return made(modules, shapes, seed, up="lora_B.weight", down="lora_A.weight")


def made(modules: tuple[str, ...], shapes: Mapping[str, tuple[int, int]], seed: int, **names: str) -> Tensors:
    found: Tensors = {}
    for number, module in enumerate(modules):
        rows, columns = next(shape for end, shape in shapes.items() if module.endswith(end))
        found |= factors(module, rows, columns, seed + number, **names)
    return found


def added(
    folder: Path, *adapters: Tensors | Path, weights: tuple[float, ...], output: str = "sum.safetensors", **options: Any
) -> Path:
    models = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(saved(folder, *adapters), weights, strict=True)
    ]
    merge_to(folder / output, {"merge_method": "linear", "models": models}, **options)
    return folder / output


def saved(folder: Path, *adapters: Tensors | Path) -> list[Path]:
    return [
        each if isinstance(each, Path) else save_model(folder / f"adapter{number}.safetensors", each)
        for number, each in enumerate(adapters)
    ]


def assert_the_same(folder: Path, model: Tensors, adapters: tuple[Tensors | Path, ...], **options: Any) -> Tensors:
    """Baking the sum is baking all of them; the sum's tensors."""
    model = {name: tensor.float() for name, tensor in model.items() if tensor.is_floating_point()}
    weights = (0.7, -1.3)[: len(adapters)]
    path = added(folder, *adapters, weights=weights, **options)
    expected = bake(folder / "both", model, *saved(folder, *adapters), weights=list(weights))
    once = bake(folder / "once", model, path)
    assert any(not torch.equal(once[name], model[name]) for name in model)
    for name, tensor in expected.items():
        assert torch.allclose(once[name], tensor, atol=1e-5), name
    return load_model(path if path.is_file() else path / "adapter_model.safetensors")


FLUX = {"img_attn_qkv": (24, 8), "img_attn.qkv": (24, 8), "linear1": (56, 8), "linear2": (8, 40), "proj_mlp": (32, 8)}
SMALL = {"proj_out": (8, 40), "_mlp_0": (32, 8), "": (8, 8)}
CASES: dict[str, tuple[str, Tensors, Tensors, str]] = {
    "Flux: one tensor and three": (
        "flux",
        kohya("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_1_img_attn_proj", shapes=FLUX | SMALL),
        peft(
            *(f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"),
            "transformer.transformer_blocks.1.attn.to_out.0",
            shapes=SMALL,
            seed=9,
        ),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
    ),
    "Flux: of unlike heights, apart first": (
        "flux",
        peft(
            *(f"transformer.single_transformer_blocks.0.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v")),
            "transformer.single_transformer_blocks.0.proj_mlp",
            "transformer.single_transformer_blocks.0.proj_out",
            shapes=FLUX | SMALL,
        ),
        kohya("lora_unet_single_blocks_0_linear1", "lora_unet_single_blocks_1_linear2", shapes=FLUX, seed=7),
        "lora_unet_single_blocks_0_linear2.lora_down.weight",
    ),
    "Flux: three that another lacks": (
        "flux",
        kohya("lora_unet_double_blocks_1_img_attn_qkv", shapes=FLUX),
        made(
            tuple(f"lora_transformer_transformer_blocks_{n}_attn_to_{part}" for n in (0, 1) for part in "qkv"), SMALL, 9
        ),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
    ),
    "Flux: XLabs' and kohya's": (
        "flux",
        made(
            (*(f"double_blocks.0.processor.{part}" for part in ("qkv_lora1", "proj_lora2")),),
            {"qkv_lora1": (24, 8)} | SMALL,
            3,
            up="up.weight",
            down="down.weight",
        ),
        kohya("lora_unet_double_blocks_0_img_attn_qkv", shapes=FLUX, seed=9),
        "lora_unet_double_blocks_0_txt_attn_proj.lora_up.weight",
    ),
    "Flux: whose MLPs tell it from Hunyuan Video": (
        "flux",
        kohya("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_mlp_0", shapes=FLUX | SMALL),
        peft(
            *(f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"),
            "transformer.transformer_blocks.0.ff.net.0.proj",
            "transformer.transformer_blocks.1.norm1.linear",
            shapes={"ff.net.0.proj": (32, 8), "norm1.linear": (48, 8)} | SMALL,
            seed=9,
        ),
        "lora_unet_double_blocks_1_img_mod_lin.lora_up.weight",
    ),
    "Flux: ComfyUI's dots": (
        "flux",
        kohya("diffusion_model.double_blocks.0.img_attn.qkv", shapes=FLUX),
        peft(
            "transformer.transformer_blocks.1.attn.to_out.0", "transformer.transformer_blocks.0.attn.to_k", shapes=SMALL
        ),
        "diffusion_model.double_blocks.1.img_attn.proj.lora_up.weight",
    ),
    "Hunyuan Video: whose MLPs tell it from Flux": (
        "hunyuan",
        kohya(
            "lora_unet_double_blocks_0_img_attn_qkv",
            "lora_unet_double_blocks_0_img_mlp_fc1",
            shapes={"fc1": (8, 8)} | FLUX,
        ),
        peft(
            *(f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"),
            "transformer.transformer_blocks.0.norm1.linear",
            shapes={"norm1.linear": (48, 8)} | SMALL,
            seed=9,
        ),
        "lora_unet_double_blocks_0_img_mod_linear.lora_up.weight",
    ),
    "Wan: musubi's and diffusers'": (
        "wan",
        kohya("lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_1_cross_attn_o", shapes=SMALL),
        peft("transformer.blocks.0.attn1.to_q", "transformer.blocks.0.attn2.to_out.0", shapes=SMALL, seed=9),
        "lora_unet_blocks_0_cross_attn_o.lora_up.weight",
    ),
    "Wan: ComfyUI's and musubi's": (
        "wan",
        peft("diffusion_model.blocks.0.self_attn.q", shapes=SMALL),
        kohya("lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_1_cross_attn_o", shapes=SMALL, seed=9),
        "diffusion_model.blocks.1.cross_attn.o.lora_up.weight",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sum_of_two_dialects(tmp_path, case):
    layout, one, two, tensor = CASES[case]
    assert tensor in assert_the_same(tmp_path, diffusion_model(layout), (one, two))


def sdxl(*modules: str, seed: int, **names: str) -> Tensors:
    """Factors that fit SDXL in miniature."""
    shapes = {
        name.removesuffix(".weight"): tuple(t.shape) for name, t in diffusion_model("sdxl").items() if t.ndim == 2
    }
    rows, columns = shapes[f"model.diffusion_model.{SDXL}to_q"]
    te, width = shapes[f"conditioner.embedders.0.transformer.{CLIP_L}"]
    return made(modules, {"to_q": (rows, columns), "q_proj": (te, width)}, seed, **names)


PEFT_NAMES = {"up": "lora_B.weight", "down": "lora_A.weight"}


@pytest.mark.parametrize("module", [f"unet.{DIFFUSERS}", "lora_unet_" + DIFFUSERS.replace(".", "_")])
def test_original_and_diffusers_names_of_sdxl(tmp_path, module):
    one = sdxl("lora_unet_" + SDXL.replace(".", "_") + "to_q", "lora_te1_" + CLIP_L.replace(".", "_"), seed=1)
    two = sdxl(module, "text_encoder." + CLIP_L, seed=5, **PEFT_NAMES)
    found = assert_the_same(tmp_path, diffusion_model("sdxl"), (one, two))
    assert {name.partition(".")[0] for name in found} == {name.partition(".")[0] for name in one}
    assert all(tensor.shape[0] == 2 * RANK for name, tensor in found.items() if "down" in name)


def test_names_of_clip_by_transformers_5(tmp_path):
    """It leaves out `text_model`, which all others write."""
    bare = CLIP_L.removeprefix("text_model.")
    one, two = sdxl("lora_te1_" + CLIP_L.replace(".", "_"), seed=1), sdxl(f"text_encoder.{bare}", seed=5, **PEFT_NAMES)
    found = assert_the_same(tmp_path, diffusion_model("sdxl"), (one, two))
    assert {name.partition(".")[0] for name in found} == {"lora_te1_" + CLIP_L.replace(".", "_")}
    found = assert_the_same(tmp_path, diffusion_model("sdxl"), (two,), names="kohya", output="k.safetensors")
    assert {name.partition(".")[0] for name in found} == {"lora_te_" + CLIP_L.replace(".", "_")}


@pytest.mark.parametrize(
    ("names", "module"),
    [
        ("comfy", "diffusion_model.blocks.0.self_attn.q.lora_up.weight"),
        ("kohya", "lora_unet_blocks_0_self_attn_q.lora_up.weight"),
        ("peft", "base_model.model.blocks.0.self_attn.q.lora_B.weight"),
    ],
)
def test_names_of_another_dialect(tmp_path, names, module):
    one = kohya("lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_1_ffn_0", shapes={"ffn_0": (16, 8)} | SMALL)
    output = "out" if names == "peft" else "out.safetensors"
    assert module in assert_the_same(tmp_path, diffusion_model("wan"), (one,), names=names, output=output)


def test_a_unet_is_no_transformer():
    kohyas = ["lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_conv_in"]
    found = matched({"a": kohyas}, "diffusers").modules
    assert list(found) == ["unet.down_blocks.0.attentions.0.proj_in", "unet.conv_in"]


def test_diffusers_names_become_original_ones(tmp_path):
    one = peft("transformer.blocks.1.attn2.to_k", "transformer.blocks.1.ffn.net.2", shapes={"2": (8, 16)} | SMALL)
    found = assert_the_same(tmp_path, diffusion_model("wan"), (one,), names="comfy")
    assert found.keys() == {
        f"diffusion_model.blocks.1.{name}.lora_{part}.weight"
        for name in ("cross_attn.k", "ffn.2")
        for part in ("up", "down")
    }


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        ("kohya", ["lora_unet_conv_in", "lora_unet_down_blocks_0_attentions_0_proj_in"]),
        ("kohya", ["lora_unet_blocks_0_attn1_Wqkv"]),
        ("comfy", ["diffusion_model.blocks.0.attn1.Wqkv", "diffusion_model.transformer_blocks.0.attn.to_q"]),
    ],
)
def test_names_of_the_same_dialect_stay(names, modules):
    """Whatever they may be in the original."""
    assert list(matched({"a": modules}, names).modules) == modules


def test_kohyas_names_of_stable_diffusion_1_are_those_of_diffusers():
    """Kohya's programs find nothing else; of SDXL they have the original's, in which nothing tells of other blocks."""
    above, module = "unet.up_blocks.3.attentions.0.proj_in", "unet.down_blocks.1.attentions.0.proj_in"
    assert list(matched({"a": [above, module]}, "kohya").modules)[1] == "lora_unet_down_blocks_1_attentions_0_proj_in"
    assert list(matched({"a": [module]}, "kohya").modules) == ["lora_unet_input_blocks_4_1_proj_in"]


@pytest.mark.parametrize("names", ["comfy", None])
def test_blocks_are_counted_as_usual_where_an_adapter_has_few_of_them(names):
    """One block of a level doesn't say that a level has one block."""
    few = [
        "unet.down_blocks.0.resnets.0.conv1",
        "unet.down_blocks.1.attentions.1.proj_in",
        "unet.up_blocks.1.attentions.0.proj_in",
    ]
    other = ["diffusion_model.input_blocks.1.0.in_layers.2"]
    found = matched({"b": other, "a": few}, names).modules
    assert list(found) == [
        *other,
        *(f"diffusion_model.{name}" for name in ("input_blocks.5.1.proj_in", "output_blocks.3.1.proj_in")),
    ]


def test_dots_are_told_where_only_some_of_the_projections_are_changed():
    """Queries and values alone, as many train them: rows of a tensor of OpenCLIP's whose other rows are not there."""
    clip = [f"lora_te_text_model_encoder_layers_{n}_self_attn_{part}_proj" for n in range(2) for part in "qv"]
    assert list(matched({"a": clip}, "diffusers").modules)[1] == (
        "text_encoder.text_model.encoder.layers.0.self_attn.v_proj"
    )
    flux = ["lora_transformer_transformer_blocks_0_attn_to_q"]
    assert list(matched({"a": flux}, "diffusers").modules) == ["transformer.transformer_blocks.0.attn.to_q"]


@pytest.mark.parametrize("layout", ["sd1", "sdxl", "wan", "z-image", "sd3"])
def test_dots_are_told_in_adapters_of_a_whole_model(layout):
    """Norms and what is around the blocks too, as LyCORIS and extractions have them."""
    found = recognise(original(layout)())
    component = next(each for each in found.components if each.role == "denoiser") if found else None
    names = component.seen("ours") if component else ()
    stems = dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith((".weight", ".bias")))
    flat = [f"lora_unet_{underscored(stem)}" for stem in stems]
    assert [*matched({"a": flat}, "comfy").modules] == [f"diffusion_model.{stem}" for stem in stems] != []


def test_xlabs_single_blocks_have_no_name_elsewhere(tmp_path):
    """Their queries, keys and values are some rows of a tensor, of which nothing tells how many it has."""
    names = {"up": "up.weight", "down": "down.weight"}
    one = made(("single_blocks.0.processor.qkv_lora",), {"": (24, 8)}, 1, **names)
    two = kohya("lora_unet_single_blocks_0_linear1", shapes=FLUX)
    with pytest.raises(MergeError, match="has no name as kohya would have it: XLabs has queries"):
        added(tmp_path, one, two, weights=(1.0, 1.0))


FLUX_APART = {"ff.net.0.proj": (32, 8), "proj_mlp": (32, 8), "proj_out": (8, 40), "": (8, 8)}


def flux_in_diffusers(doubles: int = 2, singles: int = 2, mlp: bool = True) -> Tensors:
    """An adapter as diffusers' scripts train them: without `mlp` not what stands beside the values of single blocks."""
    double = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "ff.net.0.proj")
    single = ("attn.to_q", "attn.to_k", "attn.to_v", *(("proj_mlp", "proj_out") if mlp else ()))
    return peft(
        *(f"transformer.transformer_blocks.{n}.{part}" for n in range(doubles) for part in double),
        *(f"transformer.single_transformer_blocks.{n}.{part}" for n in range(singles) for part in single),
        shapes=FLUX_APART,
    )


@pytest.mark.parametrize("mlp", [True, False])
def test_flux_in_comfyuis_names(tmp_path, mlp):
    """Hunyuan Video's modules have the same names there: so it doesn't matter which of them the adapter is of."""
    found = assert_the_same(tmp_path, diffusion_model("flux"), (flux_in_diffusers(mlp=mlp),), names="comfy")
    assert {name.partition(".lora_")[0] for name in found} >= {
        "diffusion_model.double_blocks.1.img_attn.qkv",
        "diffusion_model.double_blocks.0.txt_attn.qkv",
        "diffusion_model.double_blocks.0.img_mlp.0",
        "diffusion_model.single_blocks.1.linear1",
    }
    assert found["diffusion_model.single_blocks.0.linear1.lora_up.weight"].shape[0] == 56


@pytest.mark.parametrize("names", ["comfy", "kohya"])
def test_the_last_modulation_has_its_halves_the_other_way_round(tmp_path, names):
    """Shift and scale in the original, scale and shift in diffusers."""
    one = flux_in_diffusers() | peft("transformer.norm_out.linear", shapes={"": (16, 8)}, seed=77)
    one |= peft("transformer.x_embedder", shapes={"": (8, 4)}, seed=78)
    other = kohya(
        *("lora_unet_final_layer_adaLN_modulation_1", "lora_unet_double_blocks_0_img_mlp_0"),
        shapes={"modulation_1": (16, 8)} | SMALL,
    )
    adapters = (one, other) if names == "kohya" else (one,)
    found = assert_the_same(tmp_path, diffusion_model("flux"), adapters, names=names)
    assert any("final_layer" in name for name in found)


@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize(
    ("doubles", "singles", "module"),
    [(19, 38, "lora_unet_double_blocks_0_img_mlp_0"), (20, 40, "lora_unet_double_blocks_0_img_mlp_fc1")],
)
def test_as_many_blocks_as_a_model_has_tell_it(doubles, singles, module, mlp):
    adapter = dict.fromkeys(name.partition(".lora_")[0] for name in flux_in_diffusers(doubles, singles, mlp))
    assert module in matched({"a": adapter}, "kohya").modules


def test_what_may_be_several_original_names_is_refused(tmp_path):
    """Flux, Hunyuan Video and Stable Diffusion 3 have these modules in diffusers, and others in their originals."""
    with pytest.raises(MergeError, match="may be several original names"):
        added(tmp_path, flux_in_diffusers(), weights=(1.0,), names="kohya")
    one = peft(*(f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"), shapes=SMALL)
    with pytest.raises(MergeError, match=r"nobody can tell which(.|\n)*may be several original names"):
        added(tmp_path, one, weights=(1.0,), names="comfy")


@pytest.mark.parametrize(
    ("tensors", "names", "told"),
    [
        (kohya("lora_unet_some_thing_new", shapes=SMALL), "comfy", "which of its underscores are dots"),
        (kohya("lora_unet_blocks_0_self_attn_q", shapes=SMALL), "diffusers", "is an original name"),
        (kohya("lora_unet_blocks_0_self_attn_q", shapes=SMALL), "original", "adapters have no original names"),
        (
            kohya("lora_unet_blocks_0_self_attn_q", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", shapes=SMALL),
            "peft",
            "which of its underscores are dots|of one component",
        ),
        ({"lora_unet_x.diff_b": numbers(4)}, "diffusers", "for which diffusers has no name|underscores"),
        (peft("diffusion_model.x.y", shapes=SMALL), "bare", "adapters have no bare names"),
    ],
)
def test_names_that_can_not_be_had(tmp_path, tensors, names, told):
    with pytest.raises(MergeError, match=told):
        added(tmp_path, tensors, weights=(1.0,), names=names)
    assert not (tmp_path / "sum.safetensors").exists()


def test_models_have_no_adapters_names(tmp_path, capsys):
    path = save_model(tmp_path / "m.safetensors", {"a.weight": numbers(3, 3)})
    assert main([str(path), "-o", str(tmp_path / "out.safetensors"), "--names", "kohya"]) == 1
    assert "kohya names are an adapter's" in capsys.readouterr().err


# ── PEFT ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

LLM = {"model.embed_tokens.weight": (20, 8), "layers.0.q_proj.weight": (12, 8), "layers.0.o_proj.weight": (8, 12)}


def llm() -> Tensors:
    return {name: numbers(*shape, seed=n) for n, (name, shape) in enumerate(LLM.items())}


def test_the_sum_of_pefts_folders_has_a_config(tmp_path):
    words = {"lora_embedding_A": numbers(3, 20, seed=3), "lora_embedding_B": numbers(8, 3, seed=4)}
    one = peft_folder(
        tmp_path / "one",
        {
            **factors("layers.0.q_proj", 12, 8, 1, **PEFT_NAMES),
            **{f"model.embed_tokens.{n}": t for n, t in words.items()},
        },
        r=RANK,
        lora_alpha=6,
        rank_pattern={"embed_tokens": 3},
        base_model_name_or_path="me/llama",
        use_rslora=True,
    )
    two = peft_folder(
        tmp_path / "two",
        {**factors("layers.0.q_proj", 12, 8, 7, **PEFT_NAMES), **factors("layers.0.o_proj", 8, 12, 9, **PEFT_NAMES)},
        r=RANK,
        lora_alpha=1,
        alpha_pattern={"o_proj": 4},
    )
    found = assert_the_same(tmp_path, llm(), (one, two), output="sum")
    assert found["base_model.model.layers.0.q_proj.lora_A.weight"].shape == (2 * RANK, 8)
    assert found["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (3, 20)
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/llama"
    assert config["lora_alpha"] == config["r"]
    assert config["target_modules"] == ["layers.0.o_proj", "layers.0.q_proj", "model.embed_tokens"]
    ranks = {**dict.fromkeys(config["target_modules"], config["r"])}
    ranks |= {name.replace("\\", ""): rank for name, rank in config["rank_pattern"].items()}
    assert ranks == {"layers.0.o_proj": RANK, "layers.0.q_proj": 2 * RANK, "model.embed_tokens": 3}


@pytest.mark.parametrize("names", [None, "diffusers"])
def test_the_scale_that_diffusers_keeps_in_metadata_is_taken_once(tmp_path, names):
    """It is in the sum's factors, and must not be in its metadata too."""
    module = "unet.mid_block.attentions.0.proj_in"
    model = {f"{module.removeprefix('unet.')}.weight": numbers(8, 6, seed=5)}
    said = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": 3 * RANK})}
    one = save_model(tmp_path / "one.safetensors", factors(module, 8, 6, 1, **PEFT_NAMES), said)
    merge_to(tmp_path / "again.safetensors", {"merge_method": "linear", "models": [str(one)]}, names=names)
    expected, found = (
        bake(tmp_path, model, path)[name] for path in (one, tmp_path / "again.safetensors") for name in model
    )
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, next(iter(model.values())), atol=1e-2)


def test_the_config_of_a_module_whose_name_is_the_end_of_others(tmp_path):
    """PEFT takes the first pattern that fits a name's end: longer names have to come before."""
    model = {f"{name}.weight": numbers(8, 6, seed=n) for n, name in enumerate(("out", "b.0.out", "b.1.out", "b.2.q"))}
    narrow = {
        "diffusion_model.out.lora_up.weight": numbers(8, RANK + 1),
        "diffusion_model.out.lora_down.weight": numbers(RANK + 1, 6),
    }
    wide = made(tuple(f"diffusion_model.{name}" for name in ("b.0.out", "b.1.out", "b.2.q")), {"": (8, 6)}, 3)
    assert_the_same(tmp_path, model, (narrow | wide,), names="peft", output="out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert list(config["rank_pattern"].items()) == [(r"b\.0\.out", RANK), (r"b\.1\.out", RANK), ("out", RANK + 1)]


@pytest.mark.parametrize("more", [{}, {"low_rank": {"rank": 2}}])
def test_what_the_configs_agree_on_is_said_of_the_model(tmp_path, more):
    pairs = factors("layers.0.q_proj", 12, 8, 1, **PEFT_NAMES)
    said: list[dict[str, Any]] = [
        {"base_model_name_or_path": "me/llama", "revision": "main", "task_type": "CAUSAL_LM"},
        {"base_model_name_or_path": "me/llama", "revision": "other", "task_type": None},
        {"base_model_name_or_path": "me/llama-2", "revision": "main", "task_type": "CAUSAL_LM"},
    ]
    names = [str(peft_folder(tmp_path / str(n), pairs, r=RANK, lora_alpha=1, **own)) for n, own in enumerate(said)]
    for models, right in (
        (names[:1], ("me/llama", "main", "CAUSAL_LM")),
        (names[:2], ("me/llama", None, "CAUSAL_LM")),
        (names, (None, None, "CAUSAL_LM")),
    ):
        recipe = {"merge_method": "linear", "models": models, **more}
        streammerge.merge(recipe, output=tmp_path / f"out{len(models)}", sync=False)
        config = json.loads((tmp_path / f"out{len(models)}" / "adapter_config.json").read_text())
        assert tuple(config.get(key) for key in ("base_model_name_or_path", "revision", "task_type")) == right


def test_weights_that_lie_transposed(tmp_path):
    config = {"r": RANK, "lora_alpha": 3, "fan_in_fan_out": True}
    one, two = (
        peft_folder(tmp_path / name, factors("h.0.c_attn", 24, 8, seed, **PEFT_NAMES), **config)
        for name, seed in (("one", 1), ("two", 5))
    )
    found = assert_the_same(tmp_path, {"h.0.c_attn.weight": numbers(8, 24)}, (one, two), output="sum")
    assert found["base_model.model.h.0.c_attn.lora_A.weight"].shape == (2 * RANK, 8)
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_pefts_adapter_is_a_folder(tmp_path):
    one = peft_folder(tmp_path / "one", factors("layers.0.q_proj", 12, 8, 1, **PEFT_NAMES), r=RANK, lora_alpha=6)
    with pytest.raises(MergeError, match="PEFT's adapters are folders"):
        added(tmp_path, one, weights=(1.0,))


def test_a_loha_is_a_lora_of_a_larger_rank(tmp_path):
    module = "lora_unet_x"
    hada = {
        f"hada_w{n}_{part}": numbers(*((12, n + 1) if part == "a" else (n + 1, 10)), seed=n)
        for n in (1, 2)
        for part in "ab"
    }
    one = {f"{module}.{name}": tensor for name, tensor in hada.items()} | {f"{module}.alpha": torch.tensor(1.0)}
    found = assert_the_same(tmp_path, {"x.weight": numbers(12, 10, seed=5)}, (one, factors(module, 12, 10, 3)))
    assert found[f"{module}.lora_down.weight"].shape == (2 * 3 + RANK, 10)


# ── what names mean ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("module", "path"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"),
        ("lora_unet_" + DIFFUSERS.replace(".", "_"), DIFFUSERS),
        ("lora_te_text_model_encoder_layers_3_self_attn_q_proj", "text_model.encoder.layers.3.self_attn.q_proj"),
        ("lora_transformer_single_transformer_blocks_3_proj_mlp", "single_transformer_blocks.3.proj_mlp"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "joint_blocks.0.x_block.attn.qkv"),
        ("lora_unet_blocks_0_cross_attn_k_img", "blocks.0.cross_attn.k_img"),
        ("lora_unet_time_embedding_linear_1", "time_embedding.linear_1"),
        ("lora_unet_input_blocks_1_0_in_layers_2", "input_blocks.1.0.in_layers.2"),
    ],
)
def test_where_dots_stand(module, path):
    assert dotted(meaning_of(module)) == path


def test_a_part_of_a_module():
    found = meanings(
        {
            "a": ["lora_unet_double_blocks_0_img_attn_qkv"],
            "b": [f"transformer.transformer_blocks.0.attn.to_{p}" for p in "qkv"],
        }
    )
    assert found["b"]["transformer.transformer_blocks.0.attn.to_k"] == Meaning(
        "denoiser", "double_blocks.0.img_attn.qkv", is_flat=False, part=Part(1, 3, is_wide=False)
    )
