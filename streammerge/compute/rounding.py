"""Numbers in fewer bits, rounded once.

torch makes float32 of a float64 on the way to 16 or 8 bits, which rounds twice: what comes to lie in the middle between
two numbers is taken for a tie. On the way it is therefore rounded to odd (Boldo, Melquiond 2008): of the two float32
numbers beside an inexact one the odd one is taken, which is no tie in fewer bits and lies on the right side of all.
"""

from __future__ import annotations

from typing import Final

import torch

PIECE: Final = 2**15
"""Elements that are rounded at once, for their several temporaries to be small."""


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values in this dtype."""
    return (
        values.to(dtype)
        if is_exact(values.dtype, dtype)
        else rounded_into(values.new_empty(values.shape, dtype=dtype), values)
    )


def rounded_into(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values in the dtype and memory of `out`."""
    if is_exact(values.dtype, out.dtype):
        return out.copy_(values)
    flat, made = values.reshape(-1), out.view(-1)
    for start in range(0, flat.numel(), PIECE):
        made[start : start + PIECE] = rounded_to_odd(flat[start : start + PIECE])
    return out


def is_exact(source: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether torch rounds once itself."""
    return source != torch.float64 or not dtype.is_floating_point or dtype.itemsize >= 4


def rounded_to_odd(values: torch.Tensor) -> torch.Tensor:
    """float64 as float32: what is inexact becomes the neighbour whose last bit is 1."""
    near = values.float()
    size, kept = values.abs(), near.abs().double()
    bits = near.view(torch.int32)
    towards = (size > kept).int() - (size < kept).int()  # in magnitude; 0 of what is exact, or no number
    return bits.add(towards.mul_(1 - (bits & 1))).view(torch.float32)
