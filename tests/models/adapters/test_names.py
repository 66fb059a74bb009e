"""What an adapter's modules are in a model, in every dialect of either."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from streammerge.models.adapters.targets import Targets
from streammerge.models.dialects import recognise
from streammerge.models.dialects.translation import Translated
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.demo.layouts import checkpoint
from tests.make.diffusion import ORIGINALS, diffusion_model
from tests.make.models import MemoryModel, Tensors, info_of, normal
from tests.models.adapters.baking import bake, numbers

UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer.text_model.encoder.layers.0."
CLIP_L = "conditioner.embedders.0.transformer.text_model.encoder.layers.0."
CLIP_G = "conditioner.embedders.1.model.transformer.resblocks.31."
FUSED = "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"


def made(*names: str) -> Targets:
    """A model of tensors of these names."""
    return Targets({name: TensorInfo(DTYPES["F16"], (6, 4)) for name in names})


LAYOUTS = {layout: Targets(checkpoint(layout)) for layout in ("sd1", "sd2-depth", "sdxl", "llama")}


@pytest.mark.parametrize(
    ("layout", "module", "tensor"),
    [
        (
            "sd1",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        ),
        ("sd1", "lora_unet_mid_block_attentions_0_proj_in", f"{UNET}middle_block.1.proj_in.weight"),
        ("sd1", "lora_unet_up_blocks_3_resnets_2_conv_shortcut", f"{UNET}output_blocks.11.0.skip_connection.weight"),
        ("sd1", "lora_te_text_model_encoder_layers_0_self_attn_q_proj", f"{CLIP}self_attn.q_proj.weight"),
        (
            "sd1",
            "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out",
            f"{UNET}output_blocks.3.1.transformer_blocks.0.attn1.to_out.0.weight",
        ),
        ("sd1", "text_encoder.text_model.encoder.layers.0.mlp.fc1", f"{CLIP}mlp.fc1.weight"),
        ("sd1", "text_model.encoder.layers.0.mlp.fc1", f"{CLIP}mlp.fc1.weight"),
        ("sd1", "base_model.model.text_model.encoder.layers.0.mlp.fc1", f"{CLIP}mlp.fc1.weight"),
        (
            "sdxl",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
        ),
        (
            "sdxl",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
        ),
        ("sdxl", "lora_unet_down_blocks_0_downsamplers_0_conv", f"{UNET}input_blocks.3.0.op.weight"),
        ("sdxl", "lora_unet_up_blocks_0_upsamplers_0_conv", f"{UNET}output_blocks.2.2.conv.weight"),
        ("sdxl", "diffusion_model.input_blocks.4.1.proj_in", f"{UNET}input_blocks.4.1.proj_in.weight"),
        ("sdxl", "lycoris_input_blocks_4_1_proj_in", f"{UNET}input_blocks.4.1.proj_in.weight"),
        ("sdxl", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", f"{CLIP_L}self_attn.q_proj.weight"),
        ("sdxl", "lora_te2_text_model_encoder_layers_31_mlp_fc2", f"{CLIP_G}mlp.c_proj.weight"),
        ("sdxl", "text_encoder_2.text_model.encoder.layers.31.mlp.fc2", f"{CLIP_G}mlp.c_proj.weight"),
        ("llama", "base_model.model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight"),
        ("llama", "base_model.model.lm_head", "lm_head.weight"),
        ("llama", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_modules_of_real_layouts(layout, module, tensor):
    found = LAYOUTS[layout].find(module, "weight")
    assert found is not None
    assert found.tensors == (tensor,)
    assert found.info.shape[0] == LAYOUTS[layout].tensors[tensor].shape[0]


@pytest.mark.parametrize(("part", "rows"), [("q", (0, 1024)), ("k", (1024, 2048)), ("v", (2048, 3072))])
def test_a_module_may_be_rows_of_a_tensor(part, rows):
    found = LAYOUTS["sd2-depth"].find(f"lora_te_text_model_encoder_layers_3_self_attn_{part}_proj", "weight")
    assert found is not None
    assert [(piece.tensor, piece.start, piece.stop) for piece in found.pieces] == [(FUSED, *rows)]


def kohya(layers: int) -> Iterator[str]:
    """Every module that kohya's trainer makes a LoRA of in the UNet of Stable Diffusion 1."""
    inner = [f"attn{n}_to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    places = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    places += ["mid_block_attentions_0"] + [f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)]
    for place in places:
        yield from (f"lora_unet_{place}_{end}" for end in ("proj_in", "proj_out"))
        yield from (f"lora_unet_{place}_transformer_blocks_0_{end}" for end in inner)
    for n in range(layers):
        ends = [f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
        yield from (f"lora_te_text_model_encoder_layers_{n}_{end}" for end in ends)


@pytest.mark.parametrize(("layout", "layers"), [("sd1", 12), ("sd2-depth", 23)])
def test_every_module_of_a_whole_lora_is_another_part_of_the_model(layout, layers):
    found = [LAYOUTS[layout].find(module, "weight") for module in kohya(layers)]
    assert len(found) == 16 * 12 + 6 * layers
    assert all(found)
    assert len({source.pieces for source in found if source}) == len(found)


@pytest.mark.parametrize(
    ("names", "module", "tensor"),
    [
        # architectures of which nothing is known: their names are all that is needed
        (["double_blocks.0.img_attn.qkv.weight"], "lora_unet_double_blocks_0_img_attn_qkv", 0),
        (["model.diffusion_model.single_blocks.7.linear1.weight"], "lora_unet_single_blocks_7_linear1", 0),
        (["blocks.0.self_attn.q.weight", "head.head.weight"], "lora_unet_blocks_0_self_attn_q", 0),
        (["blocks.0.self_attn.q.weight"], "diffusion_model.blocks.0.self_attn.q", 0),
        (["transformer_blocks.0.attn.to_out.0.weight"], "transformer.transformer_blocks.0.attn.to_out.0", 0),
        (["transformer_blocks.0.attn.to_q.weight"], "lora_transformer_transformer_blocks_0_attn_to_q", 0),
        (["transformer.h.0.attn.c_attn.weight"], "base_model.model.transformer.h.0.attn.c_attn", 0),
        (["h.0.attn.c_attn.weight"], "base_model.model.h.0.attn.c_attn", 0),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "lora_unet_joint_blocks_0_x_block_attn_qkv", 0),
        (
            ["text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"],
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            0,
        ),
        (["a.b_c.weight", "a.b.d.weight"], "lora_unet_a_b_c", 0),
    ],
)
def test_names_alone_tell(names, module, tensor):
    found = made(*names).find(module, "weight")
    assert found is not None
    assert found.tensors == (names[tensor],)


@pytest.mark.parametrize(
    ("names", "module"),
    [
        (["a.b_c.weight", "a.b.c.weight"], "lora_unet_a_b_c"),  # two might be meant
        (["a.b.weight"], "lora_unet_a_c"),
        (["a.b.bias"], "lora_unet_a_b"),
        (["text_encoder.a.weight", "unet.b.weight"], "unet.a"),
    ],
)
def test_what_is_not_there_is_not_found(names, module):
    assert made(*names).find(module, "weight") is None


def test_a_name_of_two_components_is_of_neither():
    """Both text encoders of SDXL have such a module, and nothing says of which it is."""
    module = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    assert LAYOUTS["sdxl"].find(module, "weight") is None
    assert "of which either may be meant" in LAYOUTS["sdxl"].near(module, "weight")
    assert LAYOUTS["sd1"].find(module, "weight") is not None


def test_of_two_that_are_spelled_alike_the_one_that_is_named_is_meant():
    found = made("a.b_c.weight", "a.b.c.weight").find("base_model.model.a.b.c", "weight")
    assert found is not None
    assert found.tensors == ("a.b.c.weight",)


def test_the_nearest_name_is_told():
    assert made("a.attn.to_q.weight", "zzz.weight").near("lora_unet_a_attn_to_qq", "weight") == "a.attn.to_q.weight"
    assert made("a.weight").near("lora_unet_something_else_entirely", "weight") == ""


# ── tensors of several modules, and modules of several tensors ───────────────────────────────────────────────────────

WIDTH, RANK = 8, 2
FUSED_LAYER, LAYER = "cond_stage_model.model.transformer.resblocks.0.", "text_encoder.text_model.encoder.layers.0."


def openclip() -> dict[str, torch.Tensor]:
    shapes = {"attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,), "ln_1.weight": (WIDTH,)}
    tensors = {f"{FUSED_LAYER}{name}": normal(shape, n) for n, (name, shape) in enumerate(shapes.items())}
    return {**tensors, "cond_stage_model.model.ln_final.weight": normal((WIDTH,), 7)}


def test_rows_of_a_fused_tensor_are_changed(tmp_path):
    """Of OpenCLIP's text encoders queries, keys and values are one tensor, and three modules in adapters."""
    model = openclip()
    adapter: dict[str, torch.Tensor] = {}
    expected = model[f"{FUSED_LAYER}attn.in_proj_weight"].double().clone()
    for n, part in enumerate("qv"):
        up, down = numbers(WIDTH, RANK, seed=n), numbers(RANK, WIDTH, seed=n + 5)
        module = f"lora_te_text_model_encoder_layers_0_self_attn_{part}_proj"
        adapter |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
        first = "qkv".index(part) * WIDTH
        expected[first : first + WIDTH] += up.double() @ down.double()
    made = bake(tmp_path, model, adapter)
    assert torch.allclose(made[f"{FUSED_LAYER}attn.in_proj_weight"].double(), expected, atol=1e-6)
    assert torch.equal(made[f"{FUSED_LAYER}attn.in_proj_bias"], model[f"{FUSED_LAYER}attn.in_proj_bias"])


def test_rows_are_changed_by_what_goes_by_the_weights_too(tmp_path):
    model = openclip()
    up, down = numbers(WIDTH, RANK, seed=1), numbers(RANK, WIDTH, seed=2)
    module = "lora_te_text_model_encoder_layers_0_self_attn_k_proj"
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": torch.ones(WIDTH, 1)}
    made = bake(tmp_path, model, {f"{module}.{name}": tensor for name, tensor in tensors.items()})
    expected = model[f"{FUSED_LAYER}attn.in_proj_weight"].double().clone()
    changed = expected[WIDTH : 2 * WIDTH] + up.double() @ down.double()
    expected[WIDTH : 2 * WIDTH] = changed / changed.norm(dim=1, keepdim=True)
    assert torch.allclose(made[f"{FUSED_LAYER}attn.in_proj_weight"].double(), expected, atol=1e-6)


def test_a_module_that_is_several_tensors_changes_rows_of_each(tmp_path):
    model = {
        f"{LAYER}{name}": normal(shape, n)
        for n, (name, shape) in enumerate(
            (f"self_attn.{part}_proj.{end}", shape)
            for part in "qkv"
            for end, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
        )
    }
    up, down = numbers(3 * WIDTH, RANK, seed=1), numbers(RANK, WIDTH, seed=2)
    module = "lora_te_transformer_resblocks_0_attn_in_proj"
    made = bake(tmp_path, model, {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down})
    whole = up.double() @ down.double()
    for n, part in enumerate("qkv"):
        name = f"{LAYER}self_attn.{part}_proj.weight"
        expected = model[name].double() + whole[n * WIDTH : (n + 1) * WIDTH]
        assert torch.allclose(made[name].double(), expected, atol=1e-6)


# ── architectures that are known in two namings ──────────────────────────────────────────────────────────────────────


def in_diffusers(tensors: Tensors) -> Tensors:
    """The model in diffusers' naming."""
    found = recognise({name: info_of(tensor) for name, tensor in tensors.items()})
    assert found is not None
    view = Translated(MemoryModel(tensors), found.named("diffusers"))
    return {name: view.read(name, 0, info.elements).reshape(info.shape) for name, info in view.tensors.items()}


BESIDE = ("vae.", "depth_model.", "depth_estimator.")
"""How names begin, in diffusers, of what adapters are not made for."""


@pytest.mark.parametrize("layout", [layout for layout in ORIGINALS if not layout.endswith("vae")])
def test_an_adapter_changes_the_same_in_a_model_of_either_naming(tmp_path, layout):
    original = diffusion_model(layout)
    diffusers = in_diffusers(original)
    names = [name for name, tensor in diffusers.items() if name.endswith(".weight") and tensor.ndim == 2]
    adapter: Tensors = {}
    for n, name in enumerate(name for name in names if not name.startswith(BESIDE)):
        module = name.removesuffix(".weight")
        module = module if module.startswith(("unet.", "text_encoder")) else f"transformer.{module}"
        rows, columns = diffusers[name].shape
        adapter[f"{module}.lora_B.weight"] = numbers(rows, RANK, seed=n)
        adapter[f"{module}.lora_A.weight"] = numbers(RANK, columns, seed=n + 500)
    ours = in_diffusers(bake(tmp_path, original, adapter))
    theirs = bake(tmp_path, diffusers, adapter)
    assert len(adapter) > 20
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name].float(), tensor.float(), rtol=2e-3, atol=2e-3), name
        assert name.startswith(BESIDE) or name not in names or not torch.equal(tensor, diffusers[name])
