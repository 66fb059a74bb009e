"""Diffusion models in miniature, under the names of their originals: true lists of names, tiny shapes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch

from streammerge.tools.demo.layouts import LAYOUTS, MINIATURE
from tests.make.models import Shapes, Tensors, make_tensors

CONTEXTS: Final = {"sd1": 768, "sd2-base": 1024, "sd2-depth": 1024, "sd2-inpainting": 1024, "sdxl": 2048}
"""How wide the text is that a UNet sees, by which it is known."""


def diffusion_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensors:
    """A model with normal values, positions that count from 0; its tensors are made once, and not to be written to."""
    return dict(_diffusion_model(name, seed, dtype))


@functools.lru_cache(maxsize=8)
def _diffusion_model(name: str, seed: int, dtype: torch.dtype) -> Tensors:
    shapes = ORIGINALS[name]()
    made = make_tensors(seed, dtype, shapes, scale=0.1)
    return {
        name: torch.arange(tensor.numel()).reshape(tensor.shape) if name.endswith("position_ids") else tensor
        for name, tensor in made.items()
    }


def _whole(layout: str) -> Shapes:
    shapes = LAYOUTS[layout](MINIATURE)
    return {
        name: (shape[0], CONTEXTS[layout]) if re.search(r"attn2\.to_[kv]\.weight$", name) else shape
        for name, shape in shapes.items()
    }


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _attention(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _linear(f"{name}.qkv", 3 * width, width)
    yield from _linear(f"{name}.proj", width, width)


def flux(width: int = 8) -> Shapes:
    """Flux.1 dev with two double blocks and two single ones, as Black Forest Labs name it."""
    return dict(_flux(width))


def _flux(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _linear("img_in", width, 4)
    yield from _linear("txt_in", width, 6)
    for part in ("time_in", "vector_in", "guidance_in"):
        yield from _linear(f"{part}.in_layer", width, 5)
        yield from _linear(f"{part}.out_layer", width, width)
    for n in range(2):
        for stream in ("img", "txt"):
            stem = f"double_blocks.{n}.{stream}"
            yield from _linear(f"{stem}_mod.lin", 6 * width, width)
            yield from _attention(f"{stem}_attn", width)
            yield from ((f"{stem}_attn.norm.{part}_norm.scale", (4,)) for part in ("query", "key"))
            yield from _linear(f"{stem}_mlp.0", 4 * width, width)
            yield from _linear(f"{stem}_mlp.2", width, 4 * width)
        stem = f"single_blocks.{n}"
        yield from _linear(f"{stem}.modulation.lin", 3 * width, width)
        yield from _linear(f"{stem}.linear1", 7 * width, width)
        yield from _linear(f"{stem}.linear2", width, 5 * width)
        yield from ((f"{stem}.norm.{part}_norm.scale", (4,)) for part in ("query", "key"))
    yield from _linear("final_layer.adaLN_modulation.1", 2 * width, width)
    yield from _linear("final_layer.linear", 4, width)


def sd3(width: int = 8) -> Shapes:
    """Stable Diffusion 3.5 medium with three blocks, the first of which looks twice at the image."""
    return dict(_sd3(width))


def _sd3(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "pos_embed", (1, 9, width)
    yield from _linear("x_embedder.proj", width, 4)
    yield from _linear("context_embedder", width, 6)
    for part in ("t_embedder", "y_embedder"):
        yield from _linear(f"{part}.mlp.0", width, 5)
        yield from _linear(f"{part}.mlp.2", width, width)
    for n in range(3):
        for stream in ("x", "context"):
            stem, is_last = f"joint_blocks.{n}.{stream}_block", (n, stream) == (2, "context")
            yield from _linear(f"{stem}.adaLN_modulation.1", (2 if is_last else 6) * width, width)
            for attention in ("attn", "attn2") if (n, stream) == (0, "x") else ("attn",):
                yield from ((f"{stem}.{attention}.ln_{part}.weight", (4,)) for part in "qk")
                yield from _linear(f"{stem}.{attention}.qkv", 3 * width, width)
                yield from () if is_last else _linear(f"{stem}.{attention}.proj", width, width)
            if not is_last:
                yield from _linear(f"{stem}.mlp.fc1", 4 * width, width)
                yield from _linear(f"{stem}.mlp.fc2", width, 4 * width)
    yield from _linear("final_layer.adaLN_modulation.1", 2 * width, width)
    yield from _linear("final_layer.linear", 4, width)


def wan(width: int = 8) -> Shapes:
    """Wan 2.1 for images to video, with two blocks."""
    return dict(_wan(width))


def _wan(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "patch_embedding.weight", (width, 4, 1, 2, 2)
    yield "patch_embedding.bias", (width,)
    for name in ("time_embedding.0", "time_embedding.2", "text_embedding.0", "text_embedding.2", "head.head"):
        yield from _linear(name, width, width)
    yield from _linear("time_projection.1", 6 * width, width)
    for number in (0, 1, 3, 4):
        yield from _linear(f"img_emb.proj.{number}", width, width)
    yield "head.modulation", (1, 2, width)
    for n in range(2):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                yield from _linear(f"blocks.{n}.{attention}.{part}", width, width)
            yield from ((f"blocks.{n}.{attention}.norm_{part}.weight", (width,)) for part in "qk")
        for part in ("k_img", "v_img"):
            yield from _linear(f"blocks.{n}.cross_attn.{part}", width, width)
        yield f"blocks.{n}.cross_attn.norm_k_img.weight", (width,)
        yield f"blocks.{n}.norm3.weight", (width,)
        yield from _linear(f"blocks.{n}.ffn.0", 2 * width, width)
        yield from _linear(f"blocks.{n}.ffn.2", width, 2 * width)
        yield f"blocks.{n}.modulation", (1, 6, width)


def z_image(width: int = 8) -> Shapes:
    """Z-Image with a layer of each kind."""
    return dict(_z_image(width))


def _z_image(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("x_pad_token", (1, width)), ("cap_pad_token", (1, width)), ("cap_embedder.0.weight", (width,)))
    for name in ("x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "final_layer.linear"):
        yield from _linear(name, width, width)
    yield from _linear("final_layer.adaLN_modulation.1", width, width)
    for layer in ("layers.0", "noise_refiner.0", "context_refiner.0"):
        yield f"{layer}.attention.qkv.weight", (3 * width, width)
        yield f"{layer}.attention.out.weight", (width, width)
        yield from ((f"{layer}.{norm}.weight", (width,)) for norm in ("attention.q_norm", "attention.k_norm"))
        yield from ((f"{layer}.{part}_norm{n}.weight", (width,)) for part in ("attention", "ffn") for n in (1, 2))
        yield from ((f"{layer}.feed_forward.w{n}.weight", (width, width)) for n in (1, 2, 3))
        yield from _linear(f"{layer}.adaLN_modulation.0", 4 * width, width)


def wan_22_vae(width: int = 8) -> Shapes:
    """Wan 2.2's VAE with two levels."""
    return dict(_wan_22_vae(width))


def _wan_22_vae(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.weight", (width, width, 1, 1, 1)) for name in ("conv1", "conv2"))
    for part, way, resnets in (("encoder", "down", 2), ("decoder", "up", 3)):
        yield f"{part}.conv1.weight", (width, width, 3, 3, 3)
        yield f"{part}.head.0.gamma", (width, 1, 1, 1)
        yield f"{part}.head.2.weight", (width, width, 3, 3, 3)
        stems = [f"{part}.{way}samples.{level}.{way}samples.{n}" for level in range(2) for n in range(resnets)]
        for stem in (*stems, f"{part}.middle.0", f"{part}.middle.2"):
            yield from ((f"{stem}.residual.{n}.gamma", (width, 1, 1, 1)) for n in (0, 3))
            yield from ((f"{stem}.residual.{n}.weight", (width, width, 3, 3, 3)) for n in (2, 6))
        yield f"{part}.{way}samples.1.{way}samples.0.shortcut.weight", (width, width, 1, 1, 1)
        yield f"{part}.middle.1.norm.gamma", (width, 1, 1)
        yield f"{part}.middle.1.to_qkv.weight", (3 * width, width, 1, 1)
        yield f"{part}.middle.1.proj.weight", (width, width, 1, 1)
        yield f"{part}.{way}samples.0.{way}samples.{resnets}.resample.1.weight", (width, width, 3, 3)
        yield f"{part}.{way}samples.0.{way}samples.{resnets}.time_conv.weight", (width, width, 3, 1, 1)


def hunyuan(width: int = 8) -> Shapes:
    """HunyuanVideo with a block of each kind, as Tencent names it."""
    return dict(_hunyuan(width))


def _hunyuan(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "img_in.proj.weight", (width, 4, 1, 2, 2)
    yield "img_in.proj.bias", (width,)
    refiner = "txt_in.individual_token_refiner.blocks.0"
    for name in ("txt_in.input_embedder", "txt_in.t_embedder.mlp.0", "txt_in.t_embedder.mlp.2"):
        yield from _linear(name, width, width)
    for name in ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2", f"{refiner}.self_attn_proj"):
        yield from _linear(name, width, width)
    yield from _linear(f"{refiner}.self_attn_qkv", 3 * width, width)
    for name in (f"{refiner}.mlp.fc1", f"{refiner}.mlp.fc2", f"{refiner}.adaLN_modulation.1"):
        yield from _linear(name, width, width)
    yield from ((f"{refiner}.norm{n}.{part}", (width,)) for n in (1, 2) for part in ("weight", "bias"))
    for part in ("time_in.mlp.0", "time_in.mlp.2", "guidance_in.mlp.0", "guidance_in.mlp.2"):
        yield from _linear(part, width, width)
    for part in ("vector_in.in_layer", "vector_in.out_layer", "final_layer.linear"):
        yield from _linear(part, width, width)
    yield from _linear("final_layer.adaLN_modulation.1", 2 * width, width)
    for stream in ("img", "txt"):
        stem = f"double_blocks.0.{stream}"
        yield from _linear(f"{stem}_mod.linear", 6 * width, width)
        yield from _linear(f"{stem}_attn_qkv", 3 * width, width)
        yield from ((f"{stem}_attn_{part}_norm.weight", (4,)) for part in "qk")
        for part in ("attn_proj", "mlp.fc1", "mlp.fc2"):
            yield from _linear(f"{stem}_{part}", width, width)
    yield from _linear("single_blocks.0.linear1", 7 * width, width)
    yield from _linear("single_blocks.0.linear2", width, 5 * width)
    yield from _linear("single_blocks.0.modulation.linear", 3 * width, width)
    yield from ((f"single_blocks.0.{part}_norm.weight", (4,)) for part in "qk")


def hunyuan_dit(width: int = 8) -> Shapes:
    """HunyuanDiT 1.2 with two blocks, the second of which looks at the first again."""
    return dict(_hunyuan_dit(width))


def _hunyuan_dit(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("x_embedder.proj.weight", (width, 4, 2, 2)), ("x_embedder.proj.bias", (width,)))
    yield from (("text_embedding_padding", (9, width)), ("pooler.positional_embedding", (5, width)))
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "mlp_t5.0", "mlp_t5.2", "extra_embedder.0"):
        yield from _linear(name, width, width)
    for name in ("extra_embedder.2", *(f"pooler.{part}_proj" for part in "qkvc"), "final_layer.linear"):
        yield from _linear(name, width, width)
    yield from _linear("final_layer.adaLN_modulation.1", 2 * width, width)
    for n in range(2):
        stem = f"blocks.{n}"
        yield from _linear(f"{stem}.attn1.Wqkv", 3 * width, width)
        yield from _linear(f"{stem}.attn2.kv_proj", 2 * width, width)
        for name in ("attn1.out_proj", "attn2.q_proj", "attn2.out_proj", "default_modulation.1", "mlp.fc1", "mlp.fc2"):
            yield from _linear(f"{stem}.{name}", width, width)
        norms = ("norm1", "norm2", "norm3", *(f"attn{number}.{part}_norm" for number in (1, 2) for part in "qk"))
        yield from ((f"{stem}.{norm}.{part}", (width,)) for norm in norms for part in ("weight", "bias"))
    yield from _linear("blocks.1.skip_linear", width, 2 * width)
    yield from (("blocks.1.skip_norm.weight", (2 * width,)), ("blocks.1.skip_norm.bias", (2 * width,)))


ORIGINALS: Final[Mapping[str, Callable[[], Shapes]]] = {
    **{layout: lambda layout=layout: _whole(layout) for layout in CONTEXTS},  # type: ignore[misc]
    "flux": flux,
    "sd3": sd3,
    "wan": wan,
    "z-image": z_image,
    "wan-2.2-vae": wan_22_vae,
    "hunyuan": hunyuan,
    "hunyuan-dit": hunyuan_dit,
}
"""The names and shapes of each."""


def part_of(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """A component alone, its names without what the model puts before them."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
