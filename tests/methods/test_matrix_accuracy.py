"""Methods on matrices against true decompositions in float64, to the last place of what is stored: hard matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pytest
import torch

import streammerge
from streammerge.methods import METHODS, Target, WholeMethod, matrices
from tests.make.models import MemoryModel, normal
from tests.references.closeness import ulps_apart
from tests.references.linear import REFERENCES
from tests.references.matrix import MATRIX

Shape = tuple[int, ...]
F64 = torch.float64


def noise(shape: Shape, seed: int) -> torch.Tensor:
    """Of square matrices the least singular value is a thousandth of the greatest."""
    return normal(shape, seed, F64, scale=1e-2)


def low_rank(shape: Shape, seed: int) -> torch.Tensor:
    """As a LoRA that was merged: all other directions are the stored dtype's rounding."""
    return normal((shape[0], 3), seed, F64) @ normal((3, shape[1]), 7 * seed, F64, scale=1e-2)


def steep(shape: Shape, seed: int) -> torch.Tensor:
    """Rows of sizes from 1 to a ten-thousandth."""
    return torch.logspace(-1, -5, shape[0], dtype=F64)[:, None] * normal(shape, seed, F64)


def alike(shape: Shape, seed: int) -> torch.Tensor:
    """Tasks that are nearly the same, so that what they share is large and how they differ small."""
    return normal(shape, 99, F64, scale=1e-2) + normal(shape, seed, F64, scale=1e-5)


def few_rows(shape: Shape, seed: int) -> torch.Tensor:
    """Most rows as they were."""
    made = noise(shape, seed)
    made[5:] = 0
    return made


CHANGES: Final[Mapping[str, Callable[[Shape, int], torch.Tensor]]] = {
    change.__name__: change for change in (noise, low_rank, steep, alike, few_rows)
}

PARAMETERS: Final[Mapping[str, dict[str, Any]]] = {
    "wudi": {"iterations": 3},
    "knots": {"density": 0.6},
    "truncate_rank": {"rank": 3},
    "rotate": {"alpha": 0.25},
}

UNSTABLE: Final = {
    "iso_cts": {"low_rank", "few_rows", "alike"},  # it cuts among directions of mere rounding
    "truncate_rank": {"alike"},
}
"""Where the result itself hangs on the last bits of the inputs, in float64 too."""


ANYWHERE = [name for name, method in METHODS.items() if isinstance(method, WholeMethod) and method.anywhere]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(matrices, "PIECE", 500)
    monkeypatch.setattr(matrices, "BAND", 16)


def merged(method: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All of the tensor, as it is stored."""
    base, *models = (MemoryModel({"w": tensor}) for tensor in tensors)
    given: dict[str, Any] = {"base": base} if METHODS[method].base == "required" else {}
    made = getattr(streammerge, method)(*models, **given, **PARAMETERS.get(method, {}))
    values: torch.Tensor = made.read("w", 0, tensors[0].numel())
    return values.reshape(tensors[0].shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(40, 40), (24, 90), (90, 24), (1, 30), (1, 1)], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", [*MATRIX, "truncate_rank"])
def test_outputs_are_right_to_the_last_place(method, change, shape, dtype):
    if change in UNSTABLE.get(method, ()) or (method, shape) == ("knots", (1, 30)):
        pytest.skip("it has no single result there")  # of single elements votes cancel, and the reference takes +
    base = normal(shape, 0, F64)
    count = {"rotate": 2, "truncate_rank": 1}.get(method, 3)
    tensors = [base.to(dtype), *((base + CHANGES[change](shape, seed)).to(dtype) for seed in range(1, count + 1))]
    used = tensors if METHODS[method].base == "required" else tensors[1:]
    right = REFERENCES[method]([tensor.double().numpy() for tensor in used], **PARAMETERS.get(method, {}))
    found = merged(method, tensors)
    if dtype != torch.float32:
        assert int(ulps_apart(found, right).max()) <= 1
    # of float32 the task vector's small elements may be further away, but by no more than its large ones are rounded
    off = np.abs(found.double().numpy() - right).max()
    assert off <= torch.finfo(dtype).eps * np.abs(right).max()


def test_all_methods_on_matrices_compute_anywhere():
    assert sorted(ANYWHERE) == sorted([*MATRIX, "truncate_rank"])


@pytest.mark.parametrize("change", ["noise", "few_rows"])
@pytest.mark.parametrize("shape", [(40, 40), (24, 90), (90, 24), (30,)], ids=str)
@pytest.mark.parametrize("method", ANYWHERE)
def test_nothing_is_made_elsewhere_than_where_the_inputs_are(method, shape, change):
    """On any device, of which the one without contents stands for all: to mix it with another is an error."""
    found = METHODS[method]
    assert isinstance(found, WholeMethod)
    count = {"rotate": 2, "truncate_rank": 2}.get(method, 4)
    base = normal(shape, 0)
    changed = CHANGES[change] if len(shape) > 1 else normal
    inputs = [base, *(base + changed(shape, seed) for seed in range(1, count))]
    given = {**PARAMETERS.get(method, {}), "alignment": 0.4, "density": (0.6,) * (count - 1)}
    parameters: dict[str, Any] = {
        p.name: given.get(p.name, (p.default,) * (count - 1) if p.per_model else p.default) for p in found.parameters
    }
    ways = [parameters, {**parameters, "svd": "randomized"}] if "svd" in parameters else [parameters]
    for way in ways:
        place = Target("w", shape, count, step=base.numel()).place(0)
        here = found.compute(place, inputs, way)
        with torch.device("meta"):
            assert torch.equal(found.compute(place, inputs, way), here)
