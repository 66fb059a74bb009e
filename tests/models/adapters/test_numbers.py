"""Every number of 8 bits is what torch takes it for."""

from __future__ import annotations

import math

import pytest
import torch

from streammerge.models.adapters.numbers import number_of
from streammerge.models.checkpoints import open_model
from tests.make.models import save_model


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits(tmp_path, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    path = save_model(tmp_path / "a.safetensors", {f"{n}": codes[n] for n in range(256)})
    with open_model(path) as checkpoint:
        for n, expected in enumerate(codes.tolist()):
            found = number_of(checkpoint.nodes[f"{n}"])
            assert found == expected or (math.isnan(found) and math.isnan(expected)), n
