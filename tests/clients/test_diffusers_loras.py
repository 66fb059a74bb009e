"""diffusers' own `load_lora_weights` and `fuse_lora` give what baking gives, dialect by dialect.

They run where diffusers, transformers and peft are installed. The pipelines are small ones with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.clients.miniatures import flux, sd1, sdxl, wan, z_image
from tests.make.models import Tensors, merge_to, normal, save_model

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

RANK, WEIGHT = 2, 0.7


def factors(name: str, module: nn.Module, seed: int, up: str, down: str, alpha: str = "") -> Tensors:
    """A module's factors, and alpha where there is a name for it."""
    assert isinstance(module.weight, torch.Tensor)
    rows, *columns = module.weight.shape
    found = {
        f"{name}.{down}": normal((RANK, *columns), seed, scale=0.2),
        f"{name}.{up}": normal((rows, RANK, *(1 for _ in columns[1:])), seed + 1, scale=0.2),
    }
    return {**found, f"{name}.{alpha}": torch.tensor(1.0)} if alpha else found


def modules_of(pipeline: Any, part: str, ends: Iterable[str]) -> dict[str, nn.Module]:
    """The linear modules and convolutions of a pipeline's part whose names end so."""
    kinds = (nn.Linear, nn.Conv2d)
    named = getattr(pipeline, part).named_modules()
    return {name: each for name, each in named if isinstance(each, kinds) and name.endswith(tuple(ends))}


ATTENTION = ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "proj_in")
CLIP = ("q_proj", "v_proj", "fc1")
MLP = ("fc1", "fc2")
"""What diffusers 0.42 finds again of kohya's text encoders, with transformers 5: it loses their queries and values."""

KOHYA = {"up": "lora_up.weight", "down": "lora_down.weight", "alpha": "alpha"}
PEFT = {"up": "lora_B.weight", "down": "lora_A.weight"}


def in_diffusers(pipeline: Any, parts: Mapping[str, Iterable[str]]) -> Tensors:
    """`unet.….lora_A.weight`"""
    named = [
        (f"{part}.{name}", each)
        for part, ends in parts.items()
        for name, each in modules_of(pipeline, part, ends).items()
    ]
    return {key: t for n, (name, each) in enumerate(named) for key, t in factors(name, each, 10 * n, **PEFT).items()}


def in_kohya(pipeline: Any, prefixes: Mapping[str, tuple[str, Iterable[str]]]) -> Tensors:
    """`lora_unet_….lora_down.weight`, of diffusers' names."""
    named = [
        (prefix + of_kohya(part, name).replace(".", "_"), each)
        for part, (prefix, ends) in prefixes.items()
        for name, each in modules_of(pipeline, part, ends).items()
    ]
    return {key: t for n, (name, each) in enumerate(named) for key, t in factors(name, each, 10 * n, **KOHYA).items()}


def of_kohya(part: str, name: str) -> str:
    """The name of a module of a text encoder as older versions of transformers have it, whose kohya's are."""
    return name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"


def of_shapes(shapes: Mapping[str, tuple[int, ...]], up: str, down: str, alpha: str = "") -> Tensors:
    """Factors of modules of these names and shapes."""
    found: Tensors = {}
    for number, (name, (rows, *columns)) in enumerate(shapes.items()):
        module = nn.Linear(columns[0], rows, bias=False)
        found |= factors(name, module, 10 * number, up, down, alpha)
    return found


def old_processors(pipeline: Any) -> Tensors:
    """`unet.….attn1.processor.to_q_lora.down.weight`"""
    found: Tensors = {}
    for number, (name, each) in enumerate(modules_of(pipeline, "unet", ("attn1.to_q", "attn1.to_out.0")).items()):
        stem, _, last = name.removesuffix(".0").rpartition(".")
        found |= factors(f"unet.{stem}.processor.{last}_lora", each, 10 * number, "up.weight", "down.weight")
    return found


UP, DOWN, MID = "up_blocks.0.attentions.0", "down_blocks.2.attentions.1", "mid_block.attentions.0"
XL = {
    "lora_unet_input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "lora_unet_input_blocks_8_1_transformer_blocks_2_attn2_to_k": f"{DOWN}.transformer_blocks.2.attn2.to_k",
    "lora_unet_middle_block_1_transformer_blocks_0_ff_net_2": f"{MID}.transformer_blocks.0.ff.net.2",
    "lora_unet_output_blocks_0_1_transformer_blocks_1_attn1_to_out_0": f"{UP}.transformer_blocks.1.attn1.to_out.0",
}


def of_sdxl(pipeline: Any) -> Tensors:
    """Kohya's names of SDXL, whose blocks are the original's."""
    found: Tensors = {}
    for number, (name, path) in enumerate(XL.items()):
        found |= factors(name, pipeline.unet.get_submodule(path), 10 * number, **KOHYA)
    for prefix, part in (("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2")):
        found |= in_kohya(pipeline, {part: (prefix, MLP)})
    return found


def of_flux(pipeline: Any, prefix: str, kinds: Mapping[str, tuple[int, int]], names: Mapping[str, str]) -> Tensors:
    """Factors of modules of Flux, whose sizes are multiples of the model's width."""
    width = pipeline.transformer.inner_dim
    return of_shapes(
        {prefix + name: (rows * width, columns * width) for name, (rows, columns) in kinds.items()}, **names
    )


FLUX_BLOCKS = {
    "double_blocks_0_img_attn_qkv": (3, 1),
    "double_blocks_0_txt_attn_proj": (1, 1),
    "double_blocks_0_img_mlp_0": (4, 1),
    "double_blocks_0_txt_mlp_2": (1, 4),
    "double_blocks_0_img_mod_lin": (6, 1),
    "single_blocks_0_linear2": (1, 5),
    "single_blocks_0_modulation_lin": (3, 1),
}
XLABS = {
    "double_blocks.0.processor.qkv_lora1": (3, 1),
    "double_blocks.0.processor.qkv_lora2": (3, 1),
    "double_blocks.0.processor.proj_lora1": (1, 1),
    "double_blocks.0.processor.proj_lora2": (1, 1),
    "single_blocks.0.processor.qkv_lora": (3, 1),
    "single_blocks.0.processor.proj_lora": (1, 5),
}
FLUX_PARTS = (
    "attn.to_q",
    "attn.add_v_proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "norm1.linear",
    "proj_mlp",
    "proj_out",
)


def of_wan(prefix: str, separator: str, names: Mapping[str, str]) -> Tensors:
    attentions = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"]
    shapes = {**dict.fromkeys(attentions, (24, 24)), "ffn.0": (16, 24), "ffn.2": (24, 16)}
    named = {f"blocks.{n}.{name}": shape for n in (0, 1) for name, shape in shapes.items()}
    return of_shapes({prefix + name.replace(".", separator): shape for name, shape in named.items()}, **names)


@dataclass(frozen=True)
class Case:
    """A pipeline, and an adapter of it."""

    pipeline: Callable[[], Any]
    adapter: Callable[[Any], Tensors]


CASES = {
    "SD 1, kohya": Case(
        sd1, lambda p: in_kohya(p, {"unet": ("lora_unet_", ATTENTION), "text_encoder": ("lora_te_", MLP)})
    ),
    "SD 1, kohya's convolutions": Case(
        sd1, lambda p: in_kohya(p, {"unet": ("lora_unet_", ("conv1", "conv_shortcut", "time_emb_proj"))})
    ),
    "SD 1, diffusers with older names of its text encoder": Case(
        sd1,
        lambda p: {
            name.replace("text_encoder.encoder.", "text_encoder.text_model.encoder."): tensor
            for name, tensor in in_diffusers(p, {"unet": ATTENTION, "text_encoder": CLIP}).items()
        },
    ),
    "SD 1, diffusers": Case(sd1, lambda p: in_diffusers(p, {"unet": ATTENTION, "text_encoder": CLIP})),
    "SD 1, old processors": Case(sd1, old_processors),
    "SDXL, kohya": Case(sdxl, of_sdxl),
    "SDXL, diffusers": Case(
        sdxl, lambda p: in_diffusers(p, {"unet": ATTENTION, "text_encoder": CLIP, "text_encoder_2": CLIP})
    ),
    "Flux, kohya": Case(flux, lambda p: of_flux(p, "lora_unet_", FLUX_BLOCKS, KOHYA)),
    "Flux, XLabs": Case(flux, lambda p: of_flux(p, "", XLABS, {"up": "up.weight", "down": "down.weight"})),
    "Flux, diffusers": Case(flux, lambda p: in_diffusers(p, {"transformer": FLUX_PARTS})),
    "Wan, musubi": Case(wan, lambda _: of_wan("lora_unet_", "_", KOHYA)),
    "Wan, ComfyUI": Case(wan, lambda _: of_wan("diffusion_model.", ".", PEFT)),
    "Z-Image, ai-toolkit": Case(
        z_image,
        lambda p: {
            name.replace("transformer.", "diffusion_model."): tensor
            for name, tensor in in_diffusers(p, {"transformer": ("to_q", "to_out.0", "feed_forward.w2")}).items()
        },
    ),
}
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def weights(pipeline: Any) -> Tensors:
    """What adapters may change of a pipeline, by the names of its folders."""
    parts = {part: model for part in PARTS if isinstance(model := getattr(pipeline, part, None), nn.Module)}
    return {
        f"{part}.{name}": tensor.detach().clone().contiguous()
        for part, model in parts.items()
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("case", CASES)
def test_fuse_lora(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    pipeline = CASES[case].pipeline().to(torch.float32)
    before, adapter = weights(pipeline), CASES[case].adapter(pipeline)
    path = save_model(tmp_path / "lora.safetensors", adapter)
    loadable = [part for part in pipeline._lora_loadable_modules if getattr(pipeline, part, None) is not None]
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    pipeline.fuse_lora(lora_scale=WEIGHT, components=loadable)
    pipeline.unload_lora_weights()
    right = weights(pipeline)
    assert right.keys() == before.keys()
    base = save_model(tmp_path / "base.safetensors", before)
    given = {"model": str(base), "adapters": [{"adapter": str(path), "weight": WEIGHT}]}
    made = merge_to(tmp_path / "out.safetensors", {"merge_method": "linear", "models": [given]})
    changed = {name for name in right if not torch.equal(right[name], before[name])}
    assert len(changed) > 3
    assert changed == {name for name in made if not torch.equal(made[name], before[name])}
    for name, tensor in right.items():
        assert torch.allclose(made[name], tensor, rtol=1e-5, atol=2e-6), name
