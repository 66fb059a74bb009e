"""The article's arithmetic in float64, and how far a merge is from it, tensor by tensor and in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from streammerge.errors import MergeError
from streammerge.models.checkpoints import Checkpoint, open_model
from streammerge.tools.demo.files import DemoModels

if TYPE_CHECKING:
    from torch import Tensor

PIECE: Final = 2**20
"""Elements that are checked at once."""

FIRST_CONVOLUTION: Final = "model.diffusion_model.input_blocks.0.0.weight"


def check_article(models: DemoModels, output: Path, weights: tuple[float, float] = (0.5, 0.5)) -> str:
    """What was compared and how far apart it is at the most; MergeError if a copied tensor is not its source's."""
    with (
        open_model(models.base) as base,
        open_model(models.depth) as depth,
        open_model(models.waifu) as waifu,
        open_model(output) as merged,
    ):
        if set(merged.tensors) != set(depth.tensors):
            raise MergeError(f"{output}: it does not hold the depth model's tensors")
        worst, copied = 0, 0
        for name in merged.tensors:
            if name.startswith("model.diffusion_model.") and name != FIRST_CONVOLUTION:
                worst = max(worst, max(distances(name, (base, depth, waifu), merged, weights), default=0))
            else:
                source = waifu if name.startswith("first_stage_model.") else depth
                check_same(name, source, merged)
                copied += 1
    computed = len(depth.tensors) - copied
    return f"{computed:,} tensors merged, at most {worst} units in the last place off; {copied:,} copied byte for byte."


def distances(
    name: str, models: tuple[Checkpoint, Checkpoint, Checkpoint], merged: Checkpoint, weights: tuple[float, float]
) -> Iterator[int]:
    """For each piece of a merged tensor, its greatest distance from the reference, in units in the last place."""
    for start, stop in pieces(merged.tensors[name].elements):
        base, depth, waifu = (model.read(name, start, stop).double() for model in models)
        reference = base + weights[0] * (depth - base) + weights[1] * (waifu - base)
        yield ulps(merged.read(name, start, stop), reference)


def check_same(name: str, source: Checkpoint, merged: Checkpoint) -> None:
    """MergeError unless the tensor's bytes are its source's."""
    import torch

    for start, stop in pieces(merged.tensors[name].elements):
        one, other = (model.read(name, start, stop).view(torch.uint8) for model in (source, merged))
        if not torch.equal(one, other):
            raise MergeError(f"tensor {name}: it is not {source.path.name}'s byte for byte")


def pieces(elements: int) -> Iterator[tuple[int, int]]:
    """Flat ranges that cover so many elements."""
    return ((start, min(start + PIECE, elements)) for start in range(0, elements, PIECE))


def ulps(stored: Tensor, reference: Tensor) -> int:
    """The greatest distance between stored numbers and a float64 reference, in representable numbers of their dtype."""
    import torch

    bits = {2: torch.int16, 4: torch.int32}[stored.dtype.itemsize]
    places = [place(values.view(bits)) for values in (stored, reference.to(stored.dtype))]
    return int((places[0] - places[1]).abs().max()) if stored.numel() else 0


def place(bits: Tensor) -> Tensor:
    """Where numbers with these bit patterns stand among all of their dtype, counted from 0; -0.0 and 0.0 are one."""
    import torch

    magnitude = bits.long() - torch.iinfo(bits.dtype).min
    return bits.long().where(bits >= 0, -magnitude)
