"""Adapters of the families of today, under the names that their trainers write, baked: every tensor is W + s·B·A.

Which tensor a module is, and which rows of it, stands here, for each name; nothing of it is asked of the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streammerge.errors import MergeError
from streammerge.models.adapters.matching import matched
from streammerge.models.adapters.parts import sorted_parts
from streammerge.models.adapters.targets import Targets
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import Tensors, load_model, merge_to, save_model
from tests.models.adapters.baking import bake, numbers, peft_folder
from tests.models.adapters.test_layouts import CLIP_DOTS, LLAMA, QWEN, T5, flat, spelled

ROWS, COLUMNS, RANK, ALPHA = 6, 4, 2, 3.0

LTX2 = "transformer_blocks.{0|1}.{attn1|attn2|audio_attn1|audio_to_video_attn}.{to_q|to_k|to_v|to_out.0}"
HIDREAM = "{double|single}_stream_blocks.{0|1}.block.{attn1.to_q|attn1.to_out|ff_i.experts.3.w1|ff_i.shared_experts.w2}"
LUMINA = "{layers|noise_refiner|context_refiner}.0.{attention.qkv|attention.out|feed_forward.w1|feed_forward.w3}"
ANIMA = "blocks.{0|1}.{self_attn.q_proj|cross_attn.output_proj|mlp.layer1|adaln_modulation_mlp.2}"
PIXART = "transformer_blocks.{0|1}.{attn1.to_q|attn2.to_out.0|ff.net.0.proj|ff.net.2}"
AURA = "double_layers.{0|1}.{attn.w1q|attn.w2o|mlpC.c_fc1|mlpX.c_proj|modC.1}"
KREA = "blocks.{0|1}.{attn.wq|attn.wo|attn.gate|mlp.gate|mlp.up|mlp.down}"
KANDINSKY = "visual_transformer_blocks.{0|1}.{self|cross}_attention.{to_query|to_key|to_value|out_layer}"
ACE = "transformer_blocks.{0|1}.{attn|cross_attn}.{to_q|to_k|to_v|to_out.0|add_q_proj}"
SANA = "transformer_blocks.{0|1}.{attn1|attn2}.{to_q|to_k|to_v|to_out.0}"
COG = "transformer_blocks.{0|1}.{attn1.to_q|attn1.to_out.0|ff.net.0.proj|norm1.linear}"
MOCHI = "blocks.{0|1}.{attn.qkv_x|attn.proj_y|mod_x|mlp_x.w1}"
HUNYUAN_15 = "double_blocks.{0|1}.{img|txt}_{attn_q|attn_k|attn_v|attn_proj|mlp.fc1|mod.linear}"
COMFYS_HUNYUAN = "double_blocks.{0|1}.{img|txt}_{mlp.0|mlp.2|mod.lin|attn.proj}"
TENCENTS_HUNYUAN = "double_blocks.{0|1}.{img|txt}_{mlp.fc1|mlp.fc2|mod.linear|attn_proj}"
OF_COMFYS = "txt_in.individual_token_refiner.blocks.0.{self_attn.qkv|self_attn.proj|mlp.0|mlp.2}"
WAN = "{self_attn.q|self_attn.o|cross_attn.k_img|cross_attn.v_img|ffn.0|ffn.2}"
FLUX_2 = "double_blocks.{0|1}.{img|txt}_{attn.qkv|attn.proj|mlp.0|mlp.2}"
IDEOGRAM = "layers.{0|1}.{attention.qkv|attention.o|feed_forward.w1|adaln_modulation}"
CASCADE = "down_blocks.0.1.attention.attn.{to_q|to_k|to_v|out_proj}"
CLIP = "text_model.encoder.layers.{0|1}." + CLIP_DOTS
VISION = "model.visual.blocks.{0|1}.attn.{qkv|proj}"

FAMILIES: dict[str, list[tuple[str, str]]] = {
    "LTX-2, ComfyUI": [
        (f"diffusion_model.{LTX2}", f"model.diffusion_model.{LTX2}"),
        (
            "diffusion_model.{patchify_proj|adaln_single.linear}",
            "model.diffusion_model.{patchify_proj|adaln_single.linear}",
        ),
    ],
    "HiDream, ai-toolkit": [(f"diffusion_model.{HIDREAM}", HIDREAM)],
    "HiDream, SimpleTuner": [(f"transformer.{HIDREAM}", f"model.diffusion_model.{HIDREAM}")],
    "HiDream, SimpleTuner's LyCORIS": [(f"lycoris_{flat(HIDREAM)}", f"model.diffusion_model.{HIDREAM}")],
    "Lumina 2, kohya, with Gemma": [
        (f"lora_unet_{flat(LUMINA)}", f"model.diffusion_model.{LUMINA}"),
        (f"lora_te_layers_{{0|1}}_{flat(LLAMA)}", f"text_encoders.gemma2_2b.transformer.model.layers.{{0|1}}.{LLAMA}"),
    ],
    "Lumina 2, ComfyUI": [(f"diffusion_model.{LUMINA}", LUMINA)],
    "Gemma alone, kohya": [(f"lora_te_layers_{{0|1}}_{flat(LLAMA)}", f"model.layers.{{0|1}}.{LLAMA}")],
    "Anima, kohya": [
        (f"lora_unet_{flat(ANIMA)}", f"net.{ANIMA}"),
        (
            "lora_unet_llm_adapter_blocks_0_{self_attn_q_proj|mlp_0}",
            "net.llm_adapter.blocks.0.{self_attn.q_proj|mlp.0}",
        ),
    ],
    "Anima, ComfyUI": [(f"diffusion_model.{ANIMA}", f"model.diffusion_model.{ANIMA}")],
    "Qwen 3 alone, ComfyUI": [
        (f"text_encoders.qwen3_06b.transformer.model.layers.{{0|1}}.{LLAMA}", f"model.layers.{{0|1}}.{LLAMA}")
    ],
    "PixArt, SimpleTuner": [(f"transformer.{PIXART}", PIXART)],
    "PixArt, PEFT": [(f"base_model.model.{PIXART}", PIXART)],
    "PixArt, OneTrainer": [(f"lora_transformer_{flat(PIXART)}", PIXART)],
    "AuraFlow, ComfyUI": [(f"diffusion_model.{AURA}", AURA)],
    "Krea 2, ComfyUI": [
        (f"diffusion_model.{KREA}", KREA),
        ("diffusion_model.{first|last.linear|tmlp.0|tproj.1}", "{first|last.linear|tmlp.0|tproj.1}"),
    ],
    "Krea 2, musubi": [(f"lora_unet_{flat(KREA)}", f"model.diffusion_model.{KREA}")],
    "Krea 2, ai-toolkit": [(f"base_model.model.{KREA}", KREA)],
    "Kandinsky 5, musubi": [(f"lora_unet_{flat(KANDINSKY)}", KANDINSKY)],
    "ACE-Step, as published": [(ACE, f"model.diffusion_model.{ACE}")],
    "Sana, diffusers": [(f"transformer.{SANA}", SANA)],
    "Sana, OneTrainer": [(f"lora_transformer_{flat(SANA)}", SANA)],
    "CogVideoX, diffusers": [(f"transformer.{COG}", COG)],
    "Mochi, as published": [(MOCHI, f"model.diffusion_model.{MOCHI}")],
    "HunyuanVideo 1.5, musubi": [(f"lora_unet_{flat(HUNYUAN_15)}", HUNYUAN_15)],
    "HunyuanVideo in ComfyUI's file, diffusion-pipe": [
        (f"transformer.{TENCENTS_HUNYUAN}", f"model.diffusion_model.{COMFYS_HUNYUAN}"),
        (f"diffusion_model.{OF_COMFYS}", f"model.diffusion_model.{OF_COMFYS}"),
    ],
    "HunyuanVideo in ComfyUI's file, musubi": [
        (f"lora_unet_{flat(TENCENTS_HUNYUAN)}", f"model.diffusion_model.{COMFYS_HUNYUAN}"),
        (f"diffusion_model.{OF_COMFYS}", f"model.diffusion_model.{OF_COMFYS}"),
    ],
    "Qwen-Image, LyCORIS": [
        (f"lycoris_transformer_blocks_{{0|1}}_{flat(QWEN)}", f"model.diffusion_model.transformer_blocks.{{0|1}}.{QWEN}")
    ],
    "Qwen-Image, as published": [
        (f"transformer_blocks.{{0|1}}.{QWEN}", f"model.diffusion_model.transformer_blocks.{{0|1}}.{QWEN}")
    ],
    "Qwen-Image with its text encoder": [
        (f"transformer.transformer_blocks.{{0|1}}.{QWEN}", f"model.diffusion_model.transformer_blocks.{{0|1}}.{QWEN}"),
        (
            f"text_encoder.model.layers.{{0|1}}.{LLAMA}",
            f"text_encoders.qwen25_7b.transformer.model.layers.{{0|1}}.{LLAMA}",
        ),
    ],
    "Flux 2, ai-toolkit": [(f"diffusion_model.{FLUX_2}", f"model.diffusion_model.{FLUX_2}")],
    "Flux 2, musubi": [(f"lora_unet_{flat(FLUX_2)}", FLUX_2)],
    "Flux 2, fal": [(f"base_model.model.{FLUX_2}", FLUX_2)],
    "Wan VACE, ComfyUI": [
        (f"diffusion_model.blocks.{{0|1}}.{WAN}", f"blocks.{{0|1}}.{WAN}"),
        (
            "diffusion_model.vace_blocks.{0|1}.{self_attn.q|before_proj|after_proj}",
            "vace_blocks.{0|1}.{self_attn.q|before_proj|after_proj}",
        ),
    ],
    "Wan, DiffSynth": [(f"blocks.{{0|1}}.{WAN}", f"model.diffusion_model.blocks.{{0|1}}.{WAN}")],
    "Ideogram 4, ai-toolkit": [(f"diffusion_model.{IDEOGRAM}", IDEOGRAM)],
    "Stable Cascade, kohya": [(f"lora_prior_unet_{flat(CASCADE)}", f"model.diffusion_model.{CASCADE}")],
    "Stable Diffusion, old scripts of PEFT": [
        (f"text_encoder.base_model.model.{CLIP}", f"text_encoder.{CLIP}"),
        (
            "unet.base_model.model.mid_block.attentions.0.{proj_in|proj_out}",
            "unet.mid_block.attentions.0.{proj_in|proj_out}",
        ),
    ],
    "CLIP alone, kohya": [(f"lora_te1_{flat(CLIP)}", CLIP)],
    "T5 alone, kohya": [(f"lora_te3_{flat(T5)}", T5)],
    "HiDream's text encoders, OneTrainer": [
        (f"lora_te3_{flat(T5)}", f"text_encoders.t5xxl.transformer.{T5}"),
        (f"lora_te4_layers_{{0|1}}_{flat(LLAMA)}", f"text_encoders.llama.transformer.model.layers.{{0|1}}.{LLAMA}"),
    ],
    "Qwen 2.5 VL, LLaMA-Factory": [
        (f"base_model.model.model.layers.{{0|1}}.{LLAMA}", f"model.language_model.layers.{{0|1}}.{LLAMA}"),
        ("base_model.model.visual.blocks.{0|1}.attn.{qkv|proj}", VISION),
    ],
    "Qwen 2.5 VL, Unsloth": [
        (
            f"base_model.model.model.language_model.layers.{{0|1}}.{LLAMA}",
            f"model.language_model.layers.{{0|1}}.{LLAMA}",
        ),
        (f"base_model.model.{VISION}", VISION),
    ],
    "Llama, compiled and sharded": [
        (
            f"_orig_mod.base_model.model.model.layers.{{0|1}}._checkpoint_wrapped_module.{LLAMA}",
            f"model.layers.{{0|1}}.{LLAMA}",
        )
    ],
}


def pairs(family: str) -> Iterator[tuple[str, str]]:
    """Each module, and the tensor that it is."""
    for modules, names in FAMILIES[family]:
        yield from zip(spelled(modules), (f"{name}.weight" for name in spelled(names)), strict=True)


def lora(module: str, seed: int, rows: int = ROWS) -> tuple[Tensors, torch.Tensor]:
    """A LoRA as a module with such a name has it, and its difference."""
    up, down = numbers(rows, RANK, seed=seed), numbers(RANK, COLUMNS, seed=seed + 500)
    is_flat = module.startswith(("lora_", "lycoris_"))
    names = ("lora_up", "lora_down") if is_flat else ("lora_B", "lora_A")
    tensors = {f"{module}.{names[0]}.weight": up, f"{module}.{names[1]}.weight": down}
    alpha = {} if module.startswith("base_model.") else {f"{module}.alpha": torch.tensor(ALPHA)}
    return tensors | alpha, ALPHA / RANK * up.double() @ down.double()


def saved(folder: Path, adapter: Tensors) -> Path | Tensors:
    """As PEFT saves it, where the names are its."""
    if any(name.startswith("base_model.") for name in adapter):
        return peft_folder(folder / "adapter", adapter, r=RANK, lora_alpha=ALPHA)
    return adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_changes_its_tensor_and_no_other(tmp_path, family):
    model: Tensors = {"untouched.weight": numbers(ROWS, COLUMNS)}
    adapter: Tensors = {}
    expected: dict[str, torch.Tensor] = {}
    for number, (module, name) in enumerate(pairs(family)):
        model[name] = numbers(ROWS, COLUMNS, seed=number + 1000)
        tensors, difference = lora(module, number + 1)
        adapter |= tensors
        expected[name] = model[name].double() + 0.7 * difference
    assert len(expected) == len(list(pairs(family))) > 3
    made = bake(tmp_path, model, saved(tmp_path, adapter), weights=0.7)
    assert torch.equal(made["untouched.weight"], model["untouched.weight"])
    for name, tensor in expected.items():
        assert torch.allclose(made[name].double(), tensor, atol=1e-6), name


@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_model_of_something_else_nothing_is_found(family):
    shapes = {"net.a.b.weight": (ROWS, COLUMNS), "text_encoders.x.transformer.layers.9.k.weight": (ROWS, COLUMNS)}
    targets = Targets({name: TensorInfo(DTYPES["F16"], shape) for name, shape in shapes.items()})
    assert not any(targets.find(module, "weight") for module, _ in pairs(family))


@pytest.mark.parametrize("form", ["lora_unet_double_blocks_0_{}_attn_{}", "diffusion_model.double_blocks.0.{}_attn_{}"])
def test_hunyuan_video_15s_queries_are_rows_of_comfyuis_tensor(tmp_path, form):
    model = {
        f"model.diffusion_model.double_blocks.0.{s}_attn.qkv.weight": numbers(12, 4, seed=7) for s in ("img", "txt")
    }
    model |= {f"model.diffusion_model.{name}.weight": numbers(12, 4) for name in spelled(OF_COMFYS)}
    expected = {name: tensor.double().clone() for name, tensor in model.items()}
    adapter: Tensors = {}
    for number, (stream, part) in enumerate((s, p) for s in ("img", "txt") for p in "qkv"):
        tensors, difference = lora(form.format(stream, part), number + 1, rows=4)
        adapter |= tensors
        start = "qkv".index(part) * 4
        expected[f"model.diffusion_model.double_blocks.0.{stream}_attn.qkv.weight"][start : start + 4] += difference
    made = bake(tmp_path, model, adapter)
    assert all(torch.allclose(made[name].double(), tensor, atol=1e-6) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["diffusion_model.{}.diff_m", "diffusion_model.{}.modulation.diff"])
@pytest.mark.parametrize("own", ["{}.modulation", "model.diffusion_model.{}.modulation"])
def test_differences_of_wans_modulations(tmp_path, name, own):
    """lightx2v's, and ComfyUI's: of a tensor that is no module's weight."""
    model = {own.format(where): numbers(1, 6, 8, seed=n) for n, where in enumerate(("blocks.0", "blocks.1", "head"))}
    model[own.format("blocks.0.ffn.0").replace("modulation", "weight")] = numbers(6, 4)
    given = {where: numbers(1, 6, 8, seed=n + 9) for n, where in enumerate(("blocks.0", "blocks.1", "head"))}
    adapter = {name.format(where): tensor for where, tensor in given.items()}
    adapter |= lora("diffusion_model.blocks.0.ffn.0", 3)[0]
    made = bake(tmp_path, model, adapter, weights=0.5)
    for where, tensor in given.items():
        expected = model[own.format(where)].double() + 0.5 * tensor.double()
        assert torch.allclose(made[own.format(where)].double(), expected, atol=1e-6)


def test_differences_of_modulations_add_up(tmp_path):
    one, two = (
        {"diffusion_model.head.diff_m": numbers(1, 2, 8, seed=n)} | lora("diffusion_model.a", n)[0] for n in (1, 2)
    )
    models = [
        {"model": str(save_model(tmp_path / f"{n}.safetensors", each)), "parameters": {"weight": weight}}
        for n, (each, weight) in enumerate(((one, 0.5), (two, -2.0)))
    ]
    merge_to(tmp_path / "out.safetensors", {"merge_method": "linear", "models": models})
    made = load_model(tmp_path / "out.safetensors")["diffusion_model.head.diff_m"]
    expected = 0.5 * one["diffusion_model.head.diff_m"].double() - 2 * two["diffusion_model.head.diff_m"].double()
    assert torch.allclose(made.double(), expected, atol=1e-6)


@pytest.mark.parametrize("tail", ["diff_m", "modulation.diff"])
@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_modulations_have_names_in_comfyuis_files_alone(tmp_path, tail, names):
    """ComfyUI finds what is no module's weight by its own name, and never by kohya's."""
    path = save_model(tmp_path / "a.safetensors", {f"diffusion_model.head.{tail}": numbers(1, 2, 8)})
    recipe = {"merge_method": "linear", "models": [{"model": str(path)}]}
    with pytest.raises(MergeError, match=f"for which {names} has no name"):
        merge_to(tmp_path / "out.safetensors", recipe, names=names)
    merge_to(tmp_path / "out.safetensors", recipe, names="comfy")
    assert list(load_model(tmp_path / "out.safetensors")) == [f"diffusion_model.head.{tail}"]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_rows_whose_order_nothing_tells_are_not_changed(tmp_path, prefix):
    """MiniMax-H3's own files have queries, keys and values head by head, and those of programs not."""
    names = ["audio_patch_proj", "token_refiner.blocks.0.attn.qkv_proj", "blocks.0.attn.qkv_proj", "blocks.0.mlp.fc1"]
    model = {f"{prefix}{name}.weight": numbers(ROWS, COLUMNS, seed=n) for n, name in enumerate(names)}
    with pytest.raises(MergeError, match="head by head in some files and one after the other in others"):
        bake(tmp_path, model, lora("diffusion_model.blocks.0.attn.qkv_proj", 1)[0])
    made = bake(tmp_path, model, lora("diffusion_model.blocks.0.mlp.fc1", 1)[0])
    assert not torch.equal(made[f"{prefix}blocks.0.mlp.fc1.weight"], model[f"{prefix}blocks.0.mlp.fc1.weight"])
    del model[f"{prefix}audio_patch_proj.weight"]
    assert bake(tmp_path, model, lora("diffusion_model.blocks.0.attn.qkv_proj", 1)[0])


def test_pefts_names_within_a_component_have_no_scale_of_their_own(tmp_path):
    tensors = {name: tensor for name, tensor in lora("unet.base_model.model.a", 1)[0].items() if "alpha" not in name}
    with pytest.raises(MergeError, match=r"has no alpha, and adapter_config\.json"):
        bake(tmp_path, {"unet.a.weight": numbers(ROWS, COLUMNS)}, tensors)


@pytest.mark.parametrize("start", ["_orig_mod.base_model.model.", "base_model.model._orig_mod.", "base_model.model."])
def test_patterns_of_configs_are_of_names_without_wrappers(tmp_path, start):
    up, down = numbers(ROWS, RANK, seed=1), numbers(RANK, COLUMNS, seed=2)
    module = f"{start}layers.0._checkpoint_wrapped_module.q"
    folder = peft_folder(
        tmp_path / "a", {}, r=8, lora_alpha=8, rank_pattern={"^layers.0.q": 2}, alpha_pattern={"^layers.0.q": 6}
    )
    save_model(folder / "adapter_model.safetensors", {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down})
    model = {"layers.0.q.weight": numbers(ROWS, COLUMNS)}
    made = bake(tmp_path, model, folder)
    expected = model["layers.0.q.weight"].double() + 3 * up.double() @ down.double()
    assert torch.allclose(made["layers.0.q.weight"].double(), expected, atol=1e-6)


def test_names_that_wrappers_gave_are_written_without_them():
    wrapped = "_orig_mod.base_model.model.model.layers.0._checkpoint_wrapped_module.mlp.up_proj"
    modules = sorted_parts([f"{wrapped}.lora_A.weight"]).modules
    assert list(matched({"a": list(modules)}, "peft").modules) == ["base_model.model.model.layers.0.mlp.up_proj"]
    inner = "unet.base_model.model.down_blocks.0.attentions.0.proj_in"
    assert list(matched({"a": [inner]}, "diffusers").modules) == ["unet.down_blocks.0.attentions.0.proj_in"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blk.0.attn_q.weight.lora_a", "llama.cpp's LoRA"),
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune's LoRA"),
        ("model.decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "a LoRA of NeMo or Megatron"),
        ("lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight", "a ControlNet-LLLite"),
        ("transformer_blocks.0.qkv_proj.lora_down", "Nunchaku's LoRA"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "Black Forest Labs' control LoRA"),
    ],
)
def test_what_is_known_and_not_read_is_called_by_its_name(tmp_path, name, kind):
    with pytest.raises(MergeError, match=kind):
        bake(tmp_path, {"a.weight": numbers(ROWS, COLUMNS)}, {name: numbers(RANK), **lora("diffusion_model.a", 1)[0]})
