"""What modules of an extracted adapter are called is what baking finds: of every layout, in every dialect."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from streammerge.models.adapters.dialects import DIALECTS, PREFIXES
from streammerge.models.adapters.naming import NOT_FOUND, is_table, modules_of, tensor_names, usual_dialect
from streammerge.models.adapters.targets import Targets
from streammerge.models.dialects.places import ROLES
from streammerge.recipe import options
from streammerge.tensors import TensorInfo
from streammerge.tools.demo.layouts import checkpoint
from tests.models.adapters.test_layouts import LAYOUTS

WHOLE = ("sd1", "sd2-base", "sd2-depth", "sdxl", "llama")


def model(name: str) -> Mapping[str, TensorInfo]:
    return checkpoint(name) if name in WHOLE else LAYOUTS[name].model()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", [*WHOLE, *LAYOUTS])
def test_every_module_is_found_again(name, dialect):
    tensors = model(name)
    targets, seen, written = Targets(tensors), set[str](), set[str]()
    for module in modules_of(tensors, dialect):
        seen.update(module.source.tensors)
        if not module.name:
            assert module.reason
            assert module.reason != NOT_FOUND or (name, dialect != "peft") == ("Falcon, PEFT", True), module.source
            continue
        found = targets.find(module.name, module.part)
        assert found is not None, module.name
        assert found.pieces == module.source.pieces, module.name
        names = tensor_names(module, dialect).values()
        assert written.isdisjoint(names), module.name
        written.update(names)
    assert seen == set(tensors), "every tensor is accounted for"
    assert written or name == "Falcon, PEFT"


@pytest.mark.parametrize(
    ("name", "dialect"), [("sd1", "kohya"), ("sdxl", "kohya"), ("sd2-depth", "kohya"), ("llama", "peft")]
)
def test_the_usual_dialect(name, dialect):
    assert usual_dialect(model(name)) == dialect


@pytest.mark.parametrize(
    ("name", "dialect", "module", "tensor"),
    [
        ("sd1", "kohya", "lora_unet_down_blocks_0_attentions_0_proj_in", "input_blocks.1.1.proj_in.weight"),
        ("sdxl", "kohya", "lora_unet_input_blocks_4_1_proj_in", "input_blocks.4.1.proj_in.weight"),
        ("sdxl", "kohya", "lora_te1_text_model_encoder_layers_0_mlp_fc1", "layers.0.mlp.fc1.weight"),
        ("sdxl", "kohya", "lora_te2_text_model_encoder_layers_31_mlp_fc2", "resblocks.31.mlp.c_proj.weight"),
        ("sd1", "comfy", "diffusion_model.input_blocks.1.1.proj_in", "input_blocks.1.1.proj_in.weight"),
        (
            "sd1",
            "comfy",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
            "encoder.layers.0.mlp.fc1.weight",
        ),
        (
            "sd2-depth",
            "comfy",
            "text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1",
            "resblocks.0.mlp.c_fc.weight",
        ),
        ("sdxl", "diffusers", "unet.down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in.weight"),
        ("sdxl", "diffusers", "unet.time_embedding.linear_1", "time_embed.0.weight"),
        ("sdxl", "diffusers", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "resblocks.0.mlp.c_fc.weight"),
        ("llama", "peft", "base_model.model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_names_as_programs_have_them(name, dialect, module, tensor):
    found = {each.name: each for each in modules_of(model(name), dialect) if each.part == "weight"}
    assert found[module].source.tensors[0].endswith(tensor)


@pytest.mark.parametrize(
    ("module", "is_one"),
    [
        ("model.embed_tokens", True),
        ("emb", True),
        ("wte", True),
        ("bert.embeddings.word_embeddings", True),
        ("gpt_neox.embed_in", True),
        ("gpt_neox.embed_out", False),
        ("x_embedder", False),
        ("time_embedding.linear_1", False),
        ("emb_layers.1", False),
        ("lm_head", False),
    ],
)
def test_what_an_embedding_is(module, is_one):
    assert is_table(f"base_model.model.{module}", (8, 4)) is is_one


def test_a_convolution_of_patches_is_no_embedding():
    assert not is_table("base_model.model.patch_embedding", (8, 4, 1, 2, 2))


def test_what_is_read_and_what_may_be_asked_for_is_of_one_table():
    assert {*options.DIALECTS} == {*DIALECTS}
    assert {each: (role,) for each, role in ROLES.items() if each.startswith("text_encoders.")} == {
        each: roles for each, roles in PREFIXES.items() if each.startswith("text_encoders.")
    }
