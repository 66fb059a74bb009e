"""A merge method of one's own, as a program:

    python examples/own_method.py BASE A B OUT.safetensors

or as a file of methods for the command line:

    streammerge A B --base BASE -m capped --methods examples/own_method.py -p limit=0.01 -o OUT.safetensors
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import streammerge
from streammerge.methods import Between, BlockMethod, PerModel, method

if TYPE_CHECKING:
    from torch import Tensor


@method(BlockMethod, base="required")
def capped(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    limit: Annotated[float, Between(0)] = 0.01,
) -> Tensor:
    """θ = θ₀ + clamp(Σᵢ wᵢ (θᵢ − θ₀), −limit, limit)

    Task arithmetic that moves no element further than `limit`.
    """
    change = base.new_zeros(base.shape)
    for share, model in zip(weight, models, strict=True):
        change += share * (model - base)
    return base + change.clamp(-limit, limit)


def main(base: str, first: str, second: str, output: str) -> None:
    """Merge with it; it is a function of the package like all others."""
    merged = streammerge.capped(first, second, base=base, weight=[0.7, 0.3], limit=0.02)
    print(f"{streammerge.merge(merged, output=output).merged} tensors merged")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(str(__doc__))
    try:
        main(*sys.argv[1:])
    except streammerge.MergeError as error:
        sys.exit(f"error: {error}")
