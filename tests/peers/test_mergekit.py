"""The same numbers as mergekit, for the methods without chance that it has too."""

from __future__ import annotations

import pytest

from streammerge.methods import METHODS
from tests.peers.environments import interpreter, run_peer
from tests.peers.test_sd_tools import as_jobs, assert_same
from tests.references.linear import Case

pytestmark = pytest.mark.peers

CASES = [
    Case("linear", 3, parameters={"weight": [0.2, 0.3, 0.9]}),
    Case("linear", 2, parameters={"weight": [0.7, -0.4], "normalize": False}),
    Case("passthrough", 1, parameters={"scale": 0.7}),
    Case("slerp", 1, base=True, parameters={"t": 0.3}),
    Case("nuslerp", 2, parameters={"weight": [1.0, 2.0]}),
    Case("nuslerp", 2, base=True, parameters={"weight": [0.6, 0.4]}),
    Case("nuslerp", 2, parameters={"weight": [-0.5, 0.5]}),
    Case("multislerp", 3, parameters={"weight": [1.0, 2.0, 4.0]}),
    Case("multislerp", 2, base=True, parameters={"weight": [0.3, 0.7]}),
    Case("karcher", 3),
    Case("model_stock", 3, base=True),
    Case("task_arithmetic", 2, base=True, parameters={"weight": [0.6, 0.3], "lambda": 1.2}),
    Case("ties", 3, base=True, parameters={"weight": [1.0, 0.5, 0.75], "density": 0.5}),
    Case("breadcrumbs", 2, base=True, parameters={"weight": [1.0, 0.5], "density": 0.6, "gamma": 0.1}),
    Case("sce", 3, base=True, parameters={"select_topk": 1.0}),
    Case("ram", 2, base=True, parameters={"epsilon": 0.02}),
    Case("nearswap", 1, base=True, parameters={"t": 0.01}),
]

MATRICES = [
    Case("nuslerp", 2, base=True, parameters={"weight": [0.6, 0.4], "nuslerp_flatten": False}),
    Case("nuslerp", 2, parameters={"weight": [0.6, 0.4], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    Case("model_stock", 2, base=True, parameters={"filter_wise": True}),
]
"""Whose rows are other ones for convolutions."""


def jobs(cases):
    made = as_jobs(cases)
    for job, case in zip(made, cases, strict=True):
        job["per_model"] = any(parameter.per_model for parameter in METHODS[case.method].parameters)
    return made


@pytest.mark.parametrize("distance", ["near", "far"])
def test_mergekit_makes_the_same(tensors, tmp_path, pytestconfig, distance):
    python = interpreter("mergekit", pytestconfig)
    models = tensors[distance]
    assert_same(CASES, run_peer(python, "mergekit_merges.py", tmp_path, jobs(CASES), models), models, 1e-5)


@pytest.mark.parametrize("distance", ["near", "far"])
def test_mergekit_makes_the_same_of_rows_and_columns(tensors, tmp_path, pytestconfig, distance):
    python = interpreter("mergekit", pytestconfig)
    models = [{"matrix": model["matrix"]} for model in tensors[distance]]
    assert_same(MATRICES, run_peer(python, "mergekit_merges.py", tmp_path, jobs(MATRICES), models), models, 1e-5)
