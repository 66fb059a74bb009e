"""What the tests of methods share: families of models."""

from __future__ import annotations

import pytest

from tests.make.models import DTYPE_NAMES, make_tensors, near, save_model, with_integers
from tests.methods.families import FAMILY_SHAPES, Family


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Models of every dtype, near to each other and far from each other; made when they are first asked for."""
    made: dict[tuple[str, str], Family] = {}

    def family(dtype: str, distance: str) -> Family:
        key = dtype, distance
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{dtype}-{distance}")
            base = with_integers(make_tensors(0, DTYPE_NAMES[dtype], FAMILY_SHAPES))
            relatives = [
                near(base, seed)
                if distance == "near"
                else with_integers(make_tensors(seed, DTYPE_NAMES[dtype], FAMILY_SHAPES), seed)
                for seed in (1, 2, 3)
            ]
            tensors = [base, *relatives]
            paths = [save_model(folder / f"{number}.safetensors", model) for number, model in enumerate(tensors)]
            made[key] = Family(tensors, paths)
        return made[key]

    return family
