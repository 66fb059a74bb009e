"""What the tests of lanes share: a family of models, and lanes with and without staging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streammerge.compute.expressions import PIECE
from streammerge.compute.lanes import Lane, StagedLane
from streammerge.formats.readers import PositionalReader
from tests.make.models import DTYPE_NAMES, make_tensors, near, normal, save_model, save_models, with_integers


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A base and three models near to it, in float16 and in float32, as tensors and as files."""
    families = {}
    for dtype in ("F16", "F32"):
        base = with_integers(make_tensors(0, DTYPE_NAMES[dtype]))
        tensors = [base, *(near(base, seed) for seed in (1, 2, 3))]
        folder = tmp_path_factory.mktemp(dtype)
        paths = [save_model(folder / f"{number}.safetensors", model) for number, model in enumerate(tensors)]
        families[dtype] = tensors, paths
    return families


@pytest.fixture(params=[Lane, StagedLane])
def lane(request):
    return request.param(PositionalReader())


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> list[Path]:
    """Models of tensors of several blocks, with many equal values, zeros, and a tensor that all have the same."""
    coarse = (normal((5 * PIECE + 11,), 1) * 8).round() / 8
    base = {
        "coarse": coarse.half(),
        "matrix": normal((520, 1010), 2, torch.float16),
        "filters": normal((130, 100, 5, 5), 3, torch.float16),
    }
    models = {f"m{number}": near(base, number, 0.1) for number in (1, 2, 3)}
    for number, model in enumerate(models.values()):
        model["coarse"] = ((coarse + normal(coarse.shape, 10 + number) * 0.2) * 8).round().div(8).half()
        model["coarse"][: 2 * PIECE : number + 2] = coarse[: 2 * PIECE : number + 2].half()
    same = {"same": normal((3 * PIECE + 5,), 4, torch.float16), "nothing": torch.zeros(2 * PIECE + 3).half()}
    paths = save_models(
        tmp_path_factory.mktemp("large"), **{name: {**made, **same} for name, made in {"base": base, **models}.items()}
    )
    return list(paths.values())
