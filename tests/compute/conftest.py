"""What the tests of lanes share: a family of models, and lanes with and without staging."""

from __future__ import annotations

import pytest

from streammerge.compute.lanes import Lane, StagedLane
from streammerge.formats.readers import PositionalReader
from tests.make.models import DTYPE_NAMES, make_tensors, near, save_model, with_integers


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
