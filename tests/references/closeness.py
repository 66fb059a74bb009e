"""How far a result is from its reference."""

from __future__ import annotations

import numpy as np
import torch

from tests.references.linear import Array


def relative_error(actual: torch.Tensor, expected: Array) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; where nothing is expected, ‖actual‖."""
    difference = float(np.linalg.norm((actual.double().numpy() - expected).reshape(-1)))
    length = float(np.linalg.norm(expected.reshape(-1)))
    return difference / length if length else difference


def ulps_apart(actual: torch.Tensor, expected: Array) -> torch.Tensor:
    """How many representable numbers each element is away from the expected value rounded to its dtype."""
    rounded = torch.from_numpy(np.ascontiguousarray(expected)).reshape(actual.shape).to(actual.dtype)
    return (places(actual) - places(rounded)).abs()


def places(values: torch.Tensor) -> torch.Tensor:
    """Each number's place among all of its dtype, by which neighbours differ by 1 and both zeros are 0."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.contiguous().view(whole).long()
    least = -(2 ** (8 * values.element_size() - 1))
    return torch.where(bits < 0, least - bits, bits)
