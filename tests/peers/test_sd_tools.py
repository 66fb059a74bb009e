"""The same numbers as sd-mecha and sd-meh, for the methods without chance that they have too."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.make.models import MemoryModel
from tests.peers.environments import interpreter, run_peer
from tests.references.closeness import relative_error
from tests.references.linear import Case

pytestmark = pytest.mark.peers

MECHA = [
    Case("weighted_sum", 2, parameters={"alpha": 0.3}),
    Case("n_average", 3),
    Case("slerp", 2, parameters={"t": 0.3, "lerp_norm": True}),
    Case("perpendicular_component", 2),
    Case("add_perpendicular", 2, base=True, parameters={"alpha": 0.6}),
    Case("train_difference", 2, base=True, parameters={"alpha": 0.7}),
    Case("add_opposite", 2, base=True, parameters={"alpha": 0.7}),
    Case("add_strict_opposite", 2, base=True, parameters={"alpha": 0.7}),
    Case("geometric_sum", 2, parameters={"alpha": 0.3}),
    Case("multiply_quotient", 2, base=True, parameters={"alpha": 0.6}),
    Case("add_cosine_a", 2, parameters={"alpha": 0.1}),
    Case("add_cosine_b", 2, parameters={"alpha": 0.2}),
    Case("clamp", 3, parameters={"stiffness": 0.5}),
    Case("tensor_sum", 2, parameters={"width": 0.4, "offset": 0.3}),
    Case("tensor_sum", 2, parameters={"width": 0.5, "offset": 0.75}),
    Case("geometric_median", 3),
    Case("crossover", 2, parameters={"alpha": 0.3}),
    Case("crossover", 2, parameters={"alpha": 0.3, "tilt": 0.5}),
    Case("crossover", 2, parameters={"alpha": 0.4, "tilt": 1.3}),
    Case("crossover", 2, parameters={"alpha": 0.7, "tilt": 2.6}),
    Case("crossover", 2, parameters={"alpha": 0.7, "tilt": 3.7}),
    Case("top_k_tensor_sum", 2, parameters={"width": 0.4}),
    Case("top_k_tensor_sum", 2, parameters={"width": 1.0}),
    Case("truncate_rank", 1, base=True, parameters={"rank": 3}),
]

MECHA_MATRICES = [Case("model_stock", 3, base=True, parameters={"filter_wise": True, "pairs": "consecutive"})]
"""Whose rows are those of the kernels for convolutions."""

MECHA_TALL = [
    Case("rotate", 2),
    Case("rotate", 2, parameters={"alpha": 0.3, "centralization": 0.5}),
    Case("rotate", 2, parameters={"alignment": -1.0, "alpha": 0.3}),
]
"""Whose matrices have more rows than columns: of others sd-mecha's map is not orthogonal."""

MECHA_FRACTIONS = [Case("rotate", 2, parameters={"alignment": 0.4, "alpha": 0.3})]
"""Which sd-mecha makes from eigenvalues in float32, to 1e-4 where many lie near to 1."""

MEH = [
    Case("weighted_sum", 2, parameters={"alpha": 0.3}),
    Case("weighted_subtraction", 2, parameters={"alpha": 0.4, "beta": 0.5}),
    Case("add_difference", 2, base=True, parameters={"alpha": 0.6}),
    Case("sum_twice", 3, parameters={"alpha": 0.3, "beta": 0.6}),
    Case("triple_sum", 3, parameters={"alpha": 0.3, "beta": 0.6}),
    Case("euclidean_add_difference", 2, base=True, parameters={"alpha": 0.3}),
    Case("multiply_difference", 2, base=True, parameters={"alpha": 0.3, "beta": 0.25}),
    Case("similarity_add_difference", 2, base=True, parameters={"alpha": 0.7, "beta": 0.4}),
    Case("distribution_crossover", 2, base=True, parameters={"alpha": 0.3, "beta": 0.0}),
    Case("distribution_crossover", 2, base=True, parameters={"alpha": 0.3, "beta": 0.4}),
    Case("top_k_tensor_sum", 2, parameters={"width": 0.4, "offset": 0.3}),
    Case("top_k_tensor_sum", 2, parameters={"width": 0.6, "offset": 0.7}),
]


LOOSER = {"geometric_median": 1e-3, "truncate_rank": 1e-5}
"""How far a peer may be off: sd-mecha's median stops when its float32 distances no longer change, and it decomposes in
float32 what is decomposed in float64 here."""


def assert_same(cases, peers, tensors, tolerance=2e-6):
    """Every case's tensors, within the peer's float32 arithmetic."""
    models = [MemoryModel(model) for model in tensors]
    for case, made in zip(cases, peers, strict=True):
        merged = case.merge(models)
        for name, values in made.items():
            own = merged.read(name, 0, values.numel()).reshape(values.shape)
            assert relative_error(own, values.double().numpy()) <= LOOSER.get(case.method, tolerance), (str(case), name)


def as_jobs(cases):
    return [
        {"method": case.method, "models": case.models, "base": case.base, "parameters": dict(case.parameters)}
        for case in cases
    ]


@pytest.mark.parametrize("distance", ["near", "far"])
def test_sd_mecha_makes_the_same(tensors, tmp_path, pytestconfig, distance):
    python = interpreter("sd-mecha", pytestconfig)
    models = tensors[distance]
    assert_same(MECHA, run_peer(python, "sd_mecha_merges.py", tmp_path, as_jobs(MECHA), models), models)
    models = [{"matrix": model["matrix"]} for model in models]
    made = run_peer(python, "sd_mecha_merges.py", tmp_path, as_jobs(MECHA_MATRICES), models)
    assert_same(MECHA_MATRICES, made, models)
    models = [{"conv": model["conv"], "turned": model["matrix"].T.contiguous()} for model in tensors[distance]]
    for cases, within in ((MECHA_TALL, 2e-6), (MECHA_FRACTIONS, 5e-4)):
        made = run_peer(python, "sd_mecha_merges.py", tmp_path, as_jobs(cases), models)
        assert_same(cases, made, models, within)


@pytest.mark.parametrize("distance", ["near", "far"])
def test_sd_meh_makes_the_same(tensors, tmp_path, pytestconfig, distance):
    python = interpreter("sd-meh", pytestconfig)
    models = tensors[distance]
    assert_same(MEH, run_peer(python, "sd_meh_merges.py", tmp_path, as_jobs(MEH), models), models)


def test_the_comparison_can_fail(tensors):
    case = Case("weighted_sum", 2, parameters={"alpha": 0.3})
    other = replace(case, parameters={"alpha": 0.301})
    made = {"bias": other.merge([MemoryModel(model) for model in tensors["far"]]).read("bias", 0, 40)}
    with pytest.raises(AssertionError, match="weighted_sum"):
        assert_same([case], [made], tensors["far"])
