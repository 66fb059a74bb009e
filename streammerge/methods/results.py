"""What merge methods give, made sure of: a user's own may give anything; and sums that come to 0 as typed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streammerge.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor


def checked_tensor(name: str, made: Any, like: Tensor) -> Tensor:  # noqa: ANN401
    """What the method of this name made, in the inputs' dtype; MethodError unless it is a tensor as its inputs are.

    Any floating-point dtype is one to compute in.
    """
    import torch

    if not isinstance(made, torch.Tensor):
        raise MethodError(f"method {name!r} gave {_kind(made)} instead of a tensor")
    if made.shape != like.shape:
        raise MethodError(f"method {name!r} made a block of shape {list(made.shape)} of blocks of {list(like.shape)}")
    if not made.is_floating_point():
        raise MethodError(f"method {name!r} gave a tensor of {made.dtype} instead of {like.dtype}")
    if made.device != like.device:
        raise MethodError(f"method {name!r} gave a tensor on {made.device} instead of {like.device}")
    if made.layout != torch.strided:
        raise MethodError(f"method {name!r} gave a sparse tensor instead of a plain one")
    return made.detach().to(like.dtype)


def checked_coefficients(name: str, made: Any) -> Sequence[float]:  # noqa: ANN401
    """What the method of this name came to; MethodError unless it is finite numbers."""
    try:
        values = [float(value) for value in made] if not isinstance(made, str | bytes) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        values = None
    if values is None:
        raise MethodError(f"method {name!r} gave {_kind(made)} instead of one number for each input")
    if not all(math.isfinite(value) for value in values):
        raise MethodError(
            f"method {name!r} comes to coefficients that are no finite numbers: {values}",
            advice="Look at its parameters: a sum of weights that is zero can't be normalised.",
        )
    return values


def _kind(made: Any) -> str:  # noqa: ANN401
    return "nothing (None)" if made is None else f"a {type(made).__name__}"


def net(*contributions: float) -> float:
    """The contributions' sum, exactly 0 where they cancel but for the rounding of decimal fractions.

    1 - 0.1 - 0.2 - 0.7 is 0 to whoever typed it, and a base that is multiplied by 0 need not be read. Contributions
    that are too large to be added come to no number.
    """
    if len(contributions) == 1:
        return contributions[0] if math.isfinite(contributions[0]) else math.nan
    try:
        total, size = math.fsum(contributions), math.fsum(abs(value) for value in contributions)
    except (OverflowError, ValueError):
        return math.nan
    if not math.isfinite(size):
        return math.nan
    return 0.0 if abs(total) <= 4 * 2.0**-53 * size else total
