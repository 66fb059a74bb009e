"""What the architectures are built of: layers as the names and shapes of their tensors, and how layers nest."""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def nest(children: Mapping[str, Shapes]) -> Shapes:
    """A module made of named modules: each child's tensors are called `child.tensor`."""
    return {f"{child}.{name}": shape for child, shapes in children.items() for name, shape in shapes.items()}


def linear(inputs: int, outputs: int) -> Shapes:
    """A matrix and its bias."""
    return {"weight": (outputs, inputs), "bias": (outputs,)}


def conv(inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    """A square convolution and its bias."""
    return {"weight": (outputs, inputs, kernel, kernel), "bias": (outputs,)}


def norm(channels: int) -> Shapes:
    """The gain and the bias of a layer, group or batch norm."""
    return {"weight": (channels,), "bias": (channels,)}


def weight(*shape: int) -> Shapes:
    """A weight without a bias: an embedding, a gain, a bare matrix or convolution."""
    return {"weight": shape}
