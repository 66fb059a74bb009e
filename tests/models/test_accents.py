"""HunyuanVideo as ComfyUI names it, which is Tencent's naming but for parts of names."""

from __future__ import annotations

import pytest
import torch

from streammerge.models.dialects import recognise
from tests.make.diffusion import diffusion_model
from tests.make.models import Tensors, assert_same_bytes, info_of, merge_to, near, save_models
from tests.models.test_dialects import known, named

COMFYUIS = {
    "txt_in.t_embedder.mlp.0.weight": "txt_in.t_embedder.in_layer.weight",
    "txt_in.t_embedder.mlp.2.bias": "txt_in.t_embedder.out_layer.bias",
    "txt_in.c_embedder.linear_1.weight": "txt_in.c_embedder.in_layer.weight",
    "txt_in.c_embedder.linear_2.weight": "txt_in.c_embedder.out_layer.weight",
    "txt_in.input_embedder.weight": "txt_in.input_embedder.weight",
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight": (
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight"
    ),
    "txt_in.individual_token_refiner.blocks.0.self_attn_proj.bias": (
        "txt_in.individual_token_refiner.blocks.0.self_attn.proj.bias"
    ),
    "txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight": "txt_in.individual_token_refiner.blocks.0.mlp.0.weight",
    "time_in.mlp.0.weight": "time_in.in_layer.weight",
    "guidance_in.mlp.2.weight": "guidance_in.out_layer.weight",
    "vector_in.in_layer.weight": "vector_in.in_layer.weight",
    "double_blocks.0.img_mod.linear.weight": "double_blocks.0.img_mod.lin.weight",
    "double_blocks.0.txt_attn_qkv.weight": "double_blocks.0.txt_attn.qkv.weight",
    "double_blocks.0.img_attn_q_norm.weight": "double_blocks.0.img_attn.norm.query_norm.scale",
    "double_blocks.0.img_attn_k_norm.weight": "double_blocks.0.img_attn.norm.key_norm.scale",
    "double_blocks.0.img_attn_proj.bias": "double_blocks.0.img_attn.proj.bias",
    "double_blocks.0.txt_mlp.fc2.weight": "double_blocks.0.txt_mlp.2.weight",
    "single_blocks.0.q_norm.weight": "single_blocks.0.norm.query_norm.scale",
    "single_blocks.0.modulation.linear.weight": "single_blocks.0.modulation.lin.weight",
    "single_blocks.0.linear1.weight": "single_blocks.0.linear1.weight",
}


def as_comfyui_reads(name: str) -> str:
    """The replacements of ComfyUI's `HunyuanVideo.process_unet_state_dict`, in its order."""
    for old, new in (
        *(("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),),
        *(("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),),
        *(("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),),
        *(("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),),
        *(("_mod.linear.", "_mod.lin."), ("_attn_qkv.", "_attn.qkv.")),
        *(("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.2.")),
        ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
        ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
        *((".q_norm.weight", ".norm.query_norm.scale"), (".k_norm.weight", ".norm.key_norm.scale")),
        *(("_attn_proj.", "_attn.proj."), (".modulation.linear.", ".modulation.lin.")),
        *(("_in.mlp.2.", "_in.out_layer."), ("_in.mlp.0.", "_in.in_layer.")),
    ):
        name = name.replace(old, new)
    return name


def in_comfyuis(tensors: Tensors, prefix: str = "") -> Tensors:
    return {prefix + as_comfyui_reads(name): tensor for name, tensor in tensors.items()}


def test_what_comfyui_makes_of_names():
    assert {name: as_comfyui_reads(name) for name in COMFYUIS} == COMFYUIS


@pytest.mark.parametrize("prefix", ["", "model.model.", "model.diffusion_model.", "diffusion_model."])
def test_both_are_one_model(prefix):
    original = diffusion_model("hunyuan", 1)
    other = in_comfyuis(original, prefix)
    found = known(other)
    assert found.architecture == "HunyuanVideo"
    assert found.components[0].place.naming == "ComfyUI's"
    assert not found.components[0].linking.unknown
    assert_same_bytes(named(other, "diffusers"), named(original, "diffusers"))
    assert_same_bytes(named(other, "original"), original)


def test_they_merge_in_the_layouts_names(tmp_path):
    a, b = diffusion_model("hunyuan", 1), near(diffusion_model("hunyuan", 1), 2, 0.1)
    paths = save_models(tmp_path, a=a, b=b, other=in_comfyuis(b), own=in_comfyuis(a), theirs=named(b, "diffusers"))
    wanted = merge_to(tmp_path / "1.safetensors", recipe_of(paths, "a", "b"))
    assert_same_bytes(merge_to(tmp_path / "2.safetensors", recipe_of(paths, "a", "other")), wanted)
    assert_same_bytes(merge_to(tmp_path / "3.safetensors", recipe_of(paths, "own", "b")), in_comfyuis(wanted))
    assert_same_bytes(merge_to(tmp_path / "4.safetensors", recipe_of(paths, "own", "theirs")), in_comfyuis(wanted))


def test_weights_with_scales_keep_their_names(tmp_path):
    paths = save_models(tmp_path, own=in_comfyuis(diffusion_model("hunyuan", 1, torch.bfloat16)))
    found = merge_to(tmp_path / "1.safetensors", {**recipe_of(paths, "own"), "dtype": "fp8_scaled"})
    assert found["double_blocks.0.img_attn.qkv.weight_scale"].shape == ()
    assert "txt_in.input_embedder.weight_scale" not in found
    scaled = [name for name in found if name.startswith("txt_in") and name.endswith("_scale")]
    assert not scaled, "what is around the blocks has none"


def recipe_of(paths, *names: str) -> dict[str, object]:
    return {"merge_method": "linear", "models": [str(paths[name]) for name in names]}


def test_flux_is_no_hunyuan_video():
    flux = diffusion_model("flux")
    found = recognise({name: info_of(tensor) for name, tensor in flux.items()})
    assert found is not None
    assert found.components[0].place.accent == ()
