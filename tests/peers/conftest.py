"""What every comparison shares: it runs when it is asked for, and has miniature models."""

from __future__ import annotations

import pytest
import torch

from tests.make.models import near, normal


def pytest_collection_modifyitems(config, items):
    """Leave the comparisons out unless `-m` asks for them: they install other tools."""
    if "peers" in (config.option.markexpr or ""):
        return
    here = [item for item in items if item.get_closest_marker("peers")]
    if here:
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]


@pytest.fixture(scope="session")
def tensors():
    """A base, three fine-tunes of it, and three models that have nothing to do with it."""
    shapes = {"bias": (40,), "matrix": (24, 32), "conv": (8, 6, 3, 3)}
    base = {name: normal(shape, place) for place, (name, shape) in enumerate(shapes.items())}
    far = [{name: normal(shape, 10 * seed + len(name)) for name, shape in shapes.items()} for seed in (1, 2, 3)]
    assert all(values.dtype == torch.float32 for values in base.values())
    return {"near": [base, *(near(base, seed, 0.05) for seed in (1, 2, 3))], "far": [base, *far]}
