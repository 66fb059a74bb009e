"""MiDaS dpt_hybrid, the depth estimator that Stable Diffusion 2's depth model carries along."""

from __future__ import annotations

from streammerge.tools.demo.layers import Shapes, conv, linear, nest, norm, weight

STAGES = (3, 4, 9)
"""Residual blocks in each stage of the convolutional backbone."""
LAYERS = 12
PATCHES = 24 * 24
IMAGE = 3


def midas(*, scale: int = 1) -> Shapes:
    """The names and shapes of the estimator's tensors, every width divided by `scale`."""
    stem, width, features = 64 // scale, 768 // scale, 256 // scale
    return nest(
        {
            "pretrained.model": _vision_transformer(stem, width, classes=1000 // scale),
            "pretrained": _reassembly(width),
            "scratch": _fusion([4 * stem, 8 * stem, width, width], features),
        }
    )


def _vision_transformer(stem: int, width: int, classes: int) -> Shapes:
    """A transformer over the patches of what the backbone saw; `head` is left over from its training."""
    layer = nest(
        {
            "norm1": norm(width),
            "attn": nest({"qkv": linear(width, 3 * width), "proj": linear(width, width)}),
            "norm2": norm(width),
            "mlp": nest({"fc1": linear(width, 4 * width), "fc2": linear(4 * width, width)}),
        }
    )
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, PATCHES + 1, width),
        **nest(
            {
                "patch_embed.backbone": _backbone(stem),
                "patch_embed.proj": conv(4 * stem * 2 ** (len(STAGES) - 1), width, kernel=1),
                **{f"blocks.{number}": layer for number in range(LAYERS)},
                "norm": norm(width),
                "head": linear(width, classes),
            }
        ),
    }


def _backbone(stem: int) -> Shapes:
    """A ResNet whose stages double in width, from four times the stem's."""
    parts = {"stem.conv": weight(stem, IMAGE, 7, 7), "stem.norm": norm(stem)}
    inputs = stem
    for stage, blocks in enumerate(STAGES):
        outputs = 4 * stem * 2**stage
        for block in range(blocks):
            parts[f"stages.{stage}.blocks.{block}"] = _bottleneck(inputs, outputs, first=block == 0)
            inputs = outputs
    return nest(parts)


def _bottleneck(inputs: int, outputs: int, *, first: bool) -> Shapes:
    """Down to a quarter of the channels, a convolution there, and up again; the first of a stage changes its input."""
    narrow = outputs // 4
    return nest(
        {
            **({"downsample.conv": weight(outputs, inputs, 1, 1), "downsample.norm": norm(outputs)} if first else {}),
            "conv1": weight(narrow, inputs, 1, 1),
            "norm1": norm(narrow),
            "conv2": weight(narrow, narrow, 3, 3),
            "norm2": norm(narrow),
            "conv3": weight(outputs, narrow, 1, 1),
            "norm3": norm(outputs),
        }
    )


def _reassembly(width: int) -> Shapes:
    """Patches back into images, at two depths of the transformer."""
    project = {"0.project.0": linear(2 * width, width), "3": conv(width, width, kernel=1)}
    return nest({"act_postprocess3": nest(project), "act_postprocess4": nest({**project, "4": conv(width, width)})})


def _fusion(widths: list[int], features: int) -> Shapes:
    """The images of all depths brought to the same width, fused from the coarsest up, and made one depth map."""
    unit = nest({"conv1": conv(features, features), "conv2": conv(features, features)})
    refine = nest({"out_conv": conv(features, features, 1), "resConfUnit1": unit, "resConfUnit2": unit})
    last = max(features // 8, 1)
    return nest(
        {
            **{f"layer{depth}_rn": weight(features, width, 3, 3) for depth, width in enumerate(widths, start=1)},
            **{f"refinenet{depth}": refine for depth, _ in enumerate(widths, start=1)},
            "output_conv.0": conv(features, features // 2),
            "output_conv.2": conv(features // 2, last),
            "output_conv.4": conv(last, 1, kernel=1),
        }
    )
