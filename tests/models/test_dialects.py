"""One model under many names: what its tensors are called elsewhere, and what of them is where."""

from __future__ import annotations

import json

import pytest
import torch

from streammerge.models.blocks import Blocks
from streammerge.models.dialects import Naming, Recognised, recognise
from streammerge.models.dialects.translation import Translated
from streammerge.tensors import DTYPES, Model, TensorInfo
from tests.make.diffusion import ORIGINALS, diffusion_model, part_of
from tests.make.models import (
    MemoryModel,
    Tensors,
    assert_same_bytes,
    info_of,
    merge_to,
    normal,
    save_model,
    save_models,
)
from tests.models.telling_headers import llama

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


def known(tensors: Tensors) -> Recognised:
    found = recognise({name: info_of(tensor) for name, tensor in tensors.items()})
    assert found is not None
    return found


def named(tensors: Tensors, naming: Naming) -> Tensors:
    """The model in a naming, read through the view."""
    model = MemoryModel(tensors)
    view: Model = Translated(model, known(tensors).named(naming))
    return {name: view.read(name, 0, info.elements).reshape(info.shape) for name, info in view.tensors.items()}


# ── both ways ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ORIGINALS)
def test_there_and_back_are_the_same_bytes(name):
    original = diffusion_model(name)
    there = named(original, "diffusers")
    assert original.keys() != there.keys()
    assert sum(tensor.nbytes for tensor in there.values()) == sum(tensor.nbytes for tensor in original.values())
    unnamed = known(original).unnamed("diffusers")
    assert all(own.startswith("depth_model.model.pretrained.model.head.") for own in unnamed), unnamed
    assert_same_bytes(named(there, "original"), original)


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_model_in_its_own_naming_is_itself(name):
    original = diffusion_model(name)
    sources = known(original).named("original")
    tensors = {key: info_of(tensor) for key, tensor in original.items()}
    assert sources.keys() == original.keys()
    assert all(source.is_whole(key, tensors) for key, source in sources.items())


def test_the_architecture_is_told_in_both_namings():
    for name in ("sd1", "sd2-depth", "sdxl", "flux", "wan", "z-image", "hunyuan", "hunyuan-dit"):
        original = diffusion_model(name)
        assert known(original).architecture == known(named(original, "diffusers")).architecture != "unknown"


# ── what is where ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "diffusers", "original"),
    [
        ("sd1", "unet.conv_in.weight", UNET + "input_blocks.0.0.weight"),
        ("sd1", "unet.time_embedding.linear_2.bias", UNET + "time_embed.2.bias"),
        ("sd1", "unet.down_blocks.0.resnets.1.conv1.weight", UNET + "input_blocks.2.0.in_layers.2.weight"),
        ("sd1", "unet.down_blocks.0.downsamplers.0.conv.bias", UNET + "input_blocks.3.0.op.bias"),
        ("sd1", "unet.down_blocks.3.resnets.0.norm2.weight", UNET + "input_blocks.10.0.out_layers.0.weight"),
        ("sd1", "unet.mid_block.resnets.1.time_emb_proj.bias", UNET + "middle_block.2.emb_layers.1.bias"),
        ("sd1", "unet.up_blocks.0.upsamplers.0.conv.weight", UNET + "output_blocks.2.1.conv.weight"),
        ("sd1", "unet.up_blocks.1.upsamplers.0.conv.weight", UNET + "output_blocks.5.2.conv.weight"),
        ("sd1", "unet.up_blocks.3.resnets.2.conv_shortcut.weight", UNET + "output_blocks.11.0.skip_connection.weight"),
        ("sdxl", "unet.add_embedding.linear_1.weight", UNET + "label_emb.0.0.weight"),
        ("sdxl", "unet.up_blocks.0.upsamplers.0.conv.weight", UNET + "output_blocks.2.2.conv.weight"),
        ("sd1", "vae.decoder.up_blocks.0.resnets.2.conv2.bias", VAE + "decoder.up.3.block.2.conv2.bias"),
        ("sd1", "vae.encoder.conv_norm_out.weight", VAE + "encoder.norm_out.weight"),
        ("sdxl", "text_encoder_2.logit_scale", "conditioner.embedders.1.model.logit_scale"),
        (
            "sd2-base",
            "text_encoder.text_model.embeddings.position_embedding.weight",
            "cond_stage_model.model.positional_embedding",
        ),
        ("flux", "transformer_blocks.1.attn.norm_added_k.weight", "double_blocks.1.txt_attn.norm.key_norm.scale"),
        ("sd3", "pos_embed.pos_embed", "pos_embed"),
        ("wan", "blocks.1.norm2.weight", "blocks.1.norm3.weight"),
        ("wan", "scale_shift_table", "head.modulation"),
    ],
)
def test_names(model, diffusers, original):
    tensors = diffusion_model(model)
    assert torch.equal(named(tensors, "diffusers")[diffusers], tensors[original])


def test_query_key_and_value_are_thirds_of_the_rows():
    original = diffusion_model("flux")
    found = named(original, "diffusers")
    for last in ("weight", "bias"):
        fused = original[f"double_blocks.1.txt_attn.qkv.{last}"]
        parts = [found[f"transformer_blocks.1.attn.add_{part}_proj.{last}"] for part in "qkv"]
        assert torch.equal(torch.cat(parts), fused)
        assert [len(part) for part in parts] == [8, 8, 8]
        wide = [found[f"single_transformer_blocks.0.{name}.{last}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v")]
        assert torch.equal(torch.cat(wide), original[f"single_blocks.0.linear1.{last}"][:24])
        assert len(found[f"single_transformer_blocks.0.proj_mlp.{last}"]) == 32


def test_shift_and_scale_change_places():
    original = diffusion_model("flux")
    shift, scale = original["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(named(original, "diffusers")["norm_out.linear.weight"], torch.cat([scale, shift]))


def test_only_the_last_block_of_stable_diffusion_3_has_its_context_swapped():
    original = diffusion_model("sd3")
    found = named(original, "diffusers")
    names = [f"joint_blocks.{n}.context_block.adaLN_modulation.1.bias" for n in (1, 2)]
    assert torch.equal(found["transformer_blocks.1.norm1_context.linear.bias"], original[names[0]])
    shift, scale = original[names[1]].chunk(2)
    assert torch.equal(found["transformer_blocks.2.norm1_context.linear.bias"], torch.cat([scale, shift]))


def test_open_clips_projection_is_the_transpose():
    original = diffusion_model("sdxl")
    projection = original["conditioner.embedders.1.model.text_projection"]
    assert torch.equal(named(original, "diffusers")["text_encoder_2.text_projection.weight"], projection.T)


def test_the_attention_of_a_vae_is_of_matrices():
    original = diffusion_model("sd1")
    name = VAE + "encoder.mid.attn_1.q.weight"
    assert original[name].dim() == 4
    found = named(original, "diffusers")["vae.encoder.mid_block.attentions.0.to_q.weight"]
    assert torch.equal(found, original[name][:, :, 0, 0])


def test_old_names_of_a_vae_are_understood():
    vae = named(part_of(diffusion_model("sd1"), VAE), "diffusers")
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in vae.items():
        for new, before in words.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = tensor
    assert old.keys() != vae.keys()
    assert_same_bytes(named(old, "original"), named(vae, "original"))


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prefix", ["net.", "model.", "model.model.", "diffusion_model."])
def test_a_transformer_behind_whatever_trainers_put_before_it(prefix):
    original = diffusion_model("flux")
    prefixed = {prefix + name: tensor for name, tensor in original.items()}
    assert known(prefixed).architecture == "Flux"
    assert_same_bytes(named(prefixed, "original"), original)
    blocks = Blocks.of({name: info_of(tensor) for name, tensor in prefixed.items()})
    assert blocks.places[f"{prefix}single_blocks.1.linear1.weight"] == ("S01",)


def test_a_component_alone_has_no_prefix():
    whole = diffusion_model("sd1")
    unet, vae = part_of(whole, UNET), part_of(whole, VAE)
    for part, first in ((unet, "conv_in.weight"), (vae, "encoder.conv_in.weight")):
        found = known(part)
        assert [component.place.prefix for component in found.components] == [""]
        assert first in found.named("diffusers")
        assert found.named("bare").keys() == part.keys()
    assert known(unet).named("original").keys() == {UNET + name for name in unet}
    assert known(vae).named("original").keys() == vae.keys()


def test_one_components_tensors_are_found_by_their_names():
    found = known(diffusion_model("sd2-base"))
    text = found.component("CLIP")
    assert text is not None
    assert (text.title, text.side, text.place.prefix) == ("text encoder", "ours", "cond_stage_model.model.")
    source = text.seen("theirs")["text_model.encoder.layers.3.self_attn.k_proj.weight"]
    assert source.tensors == ("transformer.resblocks.3.attn.in_proj_weight",)
    assert (source.pieces[0].start, source.pieces[0].stop) == (32, 64)


def test_a_text_encoder_without_text_model_in_its_names_is_understood():
    whole = diffusion_model("sd1")
    nai = {name.replace(TEXT + "text_model.", TEXT): tensor for name, tensor in whole.items()}
    assert nai.keys() != whole.keys()
    assert_same_bytes(named(nai, "original"), whole)


def test_second_names_are_no_second_model():
    whole = diffusion_model("sdxl")
    clip = part_of(whole, "conditioner.embedders.1.model.")
    found = known({**whole, **{f"cond_stage_model.model.{name}": tensor for name, tensor in clip.items()}})
    assert [component.role for component in found.components] == ["denoiser", "VAE", "CLIP", "CLIP 2", "CLIP 2"]
    assert len(found.unnamed("diffusers")) == len(clip)


# ── what isn't understood ────────────────────────────────────────────────────────────────────────────────────────────


def test_other_models_are_not_recognised():
    assert recognise(llama(2)) is None
    assert recognise({}) is None
    lora = {f"unet.conv_in.lora_{part}.weight": TensorInfo(DTYPES["F16"], (4, 4)) for part in "AB"}
    assert recognise(lora) is None


def test_names_that_no_rule_tells_of_keep_their_own():
    odd = {
        **diffusion_model("sd1"),
        UNET + "input_blocks.1.0.new_layer.weight": normal((3,), 1),
        VAE + "temporal.weight": normal((3,), 2),
        "v_pred": torch.zeros(0),
    }
    found = known(odd)
    left = {UNET + "input_blocks.1.0.new_layer.weight", VAE + "temporal.weight", "v_pred"}
    assert set(found.unnamed("diffusers")) == left
    assert left <= found.named("diffusers").keys()
    assert not left & found.named("diffusers").keys() - odd.keys()


@pytest.mark.parametrize("lost", ["attn.to_k.weight", "attn.add_v_proj.bias"])
def test_a_part_of_a_fused_tensor_alone_has_no_name(lost):
    diffusers = named(diffusion_model("flux"), "diffusers")
    del diffusers[f"transformer_blocks.0.{lost}"]
    assert len(known(diffusers).unnamed("original")) == 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("double_blocks.0.img_attn.qkv.weight", (25, 8)),
        ("double_blocks.0.img_attn.qkv.weight", ()),
        ("single_blocks.0.linear1.weight", (24, 8)),
        ("final_layer.adaLN_modulation.1.weight", (15, 8)),
    ],
)
def test_a_tensor_of_another_shape_than_the_rules_expect_has_no_name(name, shape):
    odd = {**diffusion_model("flux"), name: normal(shape, 1)}
    assert set(known(odd).unnamed("diffusers")) == {name}


def test_parts_of_unequal_kinds_are_not_joined():
    diffusers = named(diffusion_model("flux"), "diffusers")
    name = "transformer_blocks.0.attn.to_k.weight"
    for odd in (diffusers[name].float(), diffusers[name][:4]):
        assert name in known({**diffusers, name: odd}).unnamed("original")


def test_what_has_mostly_other_names_is_another_model():
    """PixArt's blocks are called as Stable Diffusion 3's are, and are others."""
    names = ["pos_embed.proj.weight", *(f"transformer_blocks.{n}.attn1.to_q.weight" for n in range(9))]
    assert recognise({name: TensorInfo(DTYPES["F16"], (4, 4)) for name in names}) is None
    odd = {f"input_blocks.{n}.0.{part}.weight": (4,) for n in range(9) for part in ("in_layers.2", "a", "b")}
    assert recognise({name: TensorInfo(DTYPES["F16"], shape) for name, shape in odd.items()}) is None


def test_a_control_net_is_no_denoiser():
    for name in ("flux", "sd1"):
        tensors = named(diffusion_model(name), "diffusers")
        prefix = "unet." if name == "sd1" else ""
        net = {**part_of(tensors, prefix), "controlnet_blocks.0.weight": normal((4, 4), 1)}
        assert [component.role for component in known(net).components] == ["ControlNet"]


def test_a_resnet_where_an_attention_is_expected_has_no_name():
    odd = {**diffusion_model("sd1"), UNET + "middle_block.1.in_layers.0.weight": normal((3,), 1)}
    assert known(odd).unnamed("diffusers") == (UNET + "middle_block.1.in_layers.0.weight",)


# ── the depth estimator ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_depth_model_merges_with_its_pipeline(tmp_path):
    a, b = diffusion_model("sd2-depth", 1), diffusion_model("sd2-depth", 2)
    theirs = named(b, "diffusers")
    folders = ("unet", "vae", "text_encoder", "depth_estimator")
    for part in folders:
        save_model(tmp_path / "pipe" / part / "model.safetensors", part_of(theirs, f"{part}."))
    index = {"_class_name": "StableDiffusionDepth2ImgPipeline", **{part: ["x", "Y"] for part in folders}}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    paths = save_models(tmp_path, a=a, b=b)
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(tmp_path / "pipe")], "on_missing": "keep"}
    made = merge_to(tmp_path / "1.safetensors", recipe)
    wanted = merge_to(tmp_path / "2.safetensors", {**recipe, "models": [str(paths["a"]), str(paths["b"])]})
    head = "depth_model.model.pretrained.model.head."
    kept = {name: tensor for name, tensor in a.items() if name.startswith(head)}
    assert_same_bytes(made, wanted | kept)


def test_a_depth_estimator_is_put_in_and_taken_out(tmp_path):
    a, b = diffusion_model("sd2-depth", 1), named(diffusion_model("sd2-depth", 2), "diffusers")
    paths = save_models(tmp_path, a=a, midas=part_of(b, "depth_estimator."))
    taken = {"component": "depth_estimator", "take": str(paths["midas"])}
    keep = {"match": "*", "keep": True}
    recipe = {"merge_method": "linear", "models": [str(paths["a"])], "rules": [taken, keep], "on_missing": "keep"}
    made = merge_to(tmp_path / "1.safetensors", recipe)
    other = diffusion_model("sd2-depth", 2)
    for name, tensor in made.items():
        is_theirs = name.startswith("depth_model.") and ".model.head." not in name
        assert torch.equal(tensor, (other if is_theirs else a)[name]), name
    alone = {"merge_method": "linear", "models": [str(paths["a"])], "only": "depth_estimator"}
    made = merge_to(tmp_path / "2.safetensors", alone, names="diffusers")
    assert {name for name in made if ".model.head." not in name} == set(part_of(b, "depth_estimator."))
