"""Methods on matrices: matrices of every proportion, what they do to vectors and broken numbers, and what they take."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from streammerge.methods import METHODS, Target
from streammerge.methods import matrices as tall
from streammerge.methods.alignment import procrustes, rotation_power
from streammerge.methods.subspaces import tasks_share
from tests.make.models import MemoryModel, normal
from tests.references.closeness import relative_error
from tests.references.linear import REFERENCES
from tests.references.matrix import MATRIX

TASKS = [name for name in MATRIX if name != "rotate"]
PROPORTIONS = [
    (24, 24),
    (40, 9),
    (9, 40),
    (2, 30),
    (30, 2),
    (1, 7),
    (7, 1),
    (1, 1),
    (6, 5, 3, 3),
    (12, 3, 1, 1),
    (4, 3, 5),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "wudi": {"iterations": 5},
    "knots": {"density": 0.5},
    "truncate_rank": {"rank": 3},
}


def models(shape: tuple[int, ...], count: int = 3, scale: float = 1e-2) -> list[torch.Tensor]:
    base = normal(shape, 0)
    return [base, *(base + normal(shape, seed, scale=scale) for seed in range(1, count + 1))]


def made(method: str, tensors: list[torch.Tensor], **parameters: Any) -> torch.Tensor:
    base, *others = [MemoryModel({"w": tensor}) for tensor in tensors]
    given = {"base": base} if METHODS[method].base == "required" else {}
    merged = getattr(streammerge, method)(*others, **given, **parameters)
    values: torch.Tensor = merged.read("w", 0, tensors[0].numel())
    return values.reshape(tensors[0].shape)


def expected(method: str, tensors: list[torch.Tensor], **parameters: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    used = tensors if METHODS[method].base == "required" else tensors[1:]
    values: np.ndarray[Any, np.dtype[np.float64]] = REFERENCES[method](
        [tensor.double().numpy() for tensor in used], **parameters
    )
    return values


@pytest.fixture(params=["in one piece", "in many pieces"])
def sized_pieces(request, monkeypatch):
    if request.param == "in many pieces":
        monkeypatch.setattr(tall, "PIECE", 50)


@pytest.mark.usefixtures("sized_pieces")
@pytest.mark.parametrize("shape", PROPORTIONS, ids=str)
@pytest.mark.parametrize("method", TASKS)
def test_matrices_of_every_proportion(method, shape):
    tensors, parameters = models(shape), SETTINGS.get(method, {})
    found, right = made(method, tensors, **parameters), expected(method, tensors, **parameters)
    delta = found.double() - tensors[0].double()
    # the task vector alone: beside the base, an error of a hundredth of it would hardly show
    assert relative_error(delta, right - tensors[0].double().numpy()) <= 2e-5


@pytest.mark.usefixtures("sized_pieces")
@pytest.mark.parametrize("alignment", [1.0, 0.0, 0.37, -1.0])
@pytest.mark.parametrize("shape", [(24, 24), (40, 9), (9, 12), (9, 40), (2, 30), (6, 5, 3, 3), (12, 3, 1, 1)], ids=str)
def test_rotations_of_every_proportion(shape, alignment):
    tensors = models(shape, 2, 1.0)
    parameters = {"alignment": alignment, "alpha": 0.25}
    assert relative_error(made("rotate", tensors, **parameters), expected("rotate", tensors, **parameters)) <= 2e-6


@pytest.mark.parametrize("method", [*TASKS, "truncate_rank"])
def test_models_that_are_the_base_change_nothing(method):
    base = normal((12, 7), 0)
    count = 1 if method == "truncate_rank" else 3
    assert torch.equal(made(method, [base] * (count + 1), **SETTINGS.get(method, {})), base)


@pytest.mark.parametrize("method", [name for name in TASKS if name != "iso_cts"])  # which cuts through mere noise
def test_tasks_of_low_rank(method):
    base = normal((30, 20), 0)
    tensors = [base, *(base + normal((30, 2), s) @ normal((2, 20), 9 * s) for s in (1, 2, 3))]
    parameters = SETTINGS.get(method, {})
    assert relative_error(made(method, tensors, **parameters), expected(method, tensors, **parameters)) <= 2e-6


@pytest.mark.parametrize("method", [*TASKS, "rotate", "truncate_rank"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_numbers_stay_where_they_are(method, bad):
    tensors = models((8, 6), {"rotate": 2, "truncate_rank": 1}.get(method, 3))
    tensors[1][2, 3] = bad
    finite = made(method, tensors, **SETTINGS.get(method, {})).isfinite()
    assert int((~finite).sum()) == 1
    assert not finite[2, 3]


def test_all_singular_values_become_one():
    tensors = models((20, 30))
    delta = made("iso_c", tensors).double() - tensors[0].double()
    values = torch.linalg.svdvals(delta)
    torch.testing.assert_close(values, torch.full_like(values, float(values.mean())), rtol=1e-4, atol=0)
    summed = sum((tensor.double() - tensors[0].double() for tensor in tensors[1:]), start=torch.zeros(20, 30))
    assert float(values.mean()) == pytest.approx(float(torch.linalg.svdvals(summed).mean()), rel=1e-4)


def test_orthogonal_tasks_do_not_interfere():
    """TSV-M of tasks that share no direction is their sum, and SVC finds nothing to calibrate."""
    base = torch.zeros(8, 8)
    first, second = base.clone(), base.clone()
    first[:4, :4], second[4:, 4:] = normal((4, 4), 1), normal((4, 4), 2)
    for method in ("tsv_m", "svc"):
        parameters = {"alpha": 1.0} if method == "svc" else {}
        found = made(method, [base, first, second], **parameters)
        torch.testing.assert_close(found, first + second, rtol=1e-5, atol=1e-6)


def test_what_tasks_share_is_counted_once():
    base, task = normal((9, 6), 0), normal((9, 6), 1)
    assert relative_error(made("svc", [base, *[base + task] * 3]), (base + task).double().numpy()) <= 1e-6


def test_one_task_is_kept_by_what_only_resolves_interference():
    base, task = normal((9, 6), 0), normal((9, 6), 1)
    for method in ("tsv_m", "svc", "knots", "wudi"):
        assert relative_error(made(method, [base, base + task]), (base + task).double().numpy()) <= 1e-6, method


def test_wudi_lessens_the_interference():
    tensors = models((6, 12), scale=1e-3)
    deltas = [tensor.double() - tensors[0].double() for tensor in tensors[1:]]

    def loss(iterations: int) -> float:
        merged = made("wudi", tensors, iterations=iterations).double() - tensors[0].double()
        return sum(float(((merged - d) @ d.T).square().sum() / d.square().sum()) for d in deltas)

    assert loss(300) < 0.5 * loss(0)


@pytest.mark.parametrize(
    ("rank", "count", "fraction", "own"),
    [(10, 2, 0.8, 1), (3, 2, 0.0, 1), (4, 3, 0.0, 1), (7, 3, 1.0, 0), (1, 2, 0.8, 0)],
)
def test_the_tasks_shares_fit_the_rank(rank, count, fraction, own):
    assert tasks_share(rank, count, fraction) == own


def test_randomised_methods_are_near_the_exact_ones_and_follow_the_seed():
    base = normal((60, 50), 0)
    decay = torch.logspace(0, -3, 50)
    tensors = [base, *(base + (normal((60, 50), s) @ torch.diag(decay)) for s in (1, 2))]
    for method, given in (("truncate_rank", tensors[:2]), ("tsv_m", tensors)):
        exact, drawn = made(method, given), made(method, given, svd="randomized")
        assert 0 < relative_error(drawn, exact.double().numpy()) < 1e-2
        assert torch.equal(drawn, made(method, given, svd="randomized"))
        assert not torch.equal(drawn, made(method, given, svd="randomized", seed=1))


# ── rotations ────────────────────────────────────────────────────────────────────────────────────────────────────────


def some_rotation(size: int) -> torch.Tensor:
    rotation: torch.Tensor = torch.linalg.qr(normal((size, size), 5, torch.float64))[0]
    rotation[:, 0] *= torch.linalg.det(rotation).sign()
    return rotation


def test_what_is_only_rotated_is_turned_back_to():
    a = normal((40, 9), 1)
    b = (a.double() @ some_rotation(9)).float()
    torch.testing.assert_close(made("rotate", [a, a, b]), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_two_halves_of_a_rotation_are_the_rotation(size):
    rotation = some_rotation(size)
    part, rest = rotation_power(rotation, 0.3), rotation_power(rotation, 0.7)
    torch.testing.assert_close(part @ rest, rotation)
    torch.testing.assert_close(part @ part.T, torch.eye(size, dtype=torch.float64))


def test_a_rotation_is_proper_where_it_must_be():
    products = torch.diag(torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64))
    assert float(torch.linalg.det(procrustes(products, proper=False))) == pytest.approx(-1)
    torch.testing.assert_close(procrustes(products, proper=True), torch.eye(3, dtype=torch.float64))


def test_alignment_and_alpha_lead_from_one_model_to_the_other():
    a, b = normal((30, 8), 1), normal((30, 8), 2)
    torch.testing.assert_close(made("rotate", [a, a, b], alignment=0.0), a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made("rotate", [a, a, b], alpha=1.0), b, rtol=1e-5, atol=1e-5)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

MEASURE = """
import json, sys
import torch
from streammerge.compute.machine import peak_resident_bytes, resident_bytes
from streammerge.methods import METHODS, Target
torch.set_num_threads(1)
name, shape, count, parameters, rank = json.loads(sys.argv[1])
base = torch.randn(shape)
changes = [torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) for _ in range(count - 1)]
method, models = METHODS[name], [base, *(base + change for change in changes)]
warm = [torch.randn(40, 40) for _ in range(count)]
method.compute(Target("w", (40, 40), count, step=1600).place(0), warm, parameters)  # what libraries take once
before, elements = resident_bytes(), models[0].numel()
made = method.compute(Target("w", tuple(shape), count, step=elements).place(0), models, parameters)
assert made.shape == models[0].shape
print(peak_resident_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(600, 600), (3000, 300), (300, 3000)], ids=str)
@pytest.mark.parametrize("rank", [5, 300])  # which are decomposed in different ways
@pytest.mark.parametrize("name", [*MATRIX, "truncate_rank"])
def test_what_a_method_takes_is_what_the_plan_counts(name, rank, shape):
    method: Any = METHODS[name]
    count = {"rotate": 2, "truncate_rank": 2}.get(name, 4)
    models = count - (method.base == "required")
    given = {"alignment": 0.5, "alpha": 0.5, "density": (0.3,) * models, "iterations": 2}
    parameters = {
        p.name: given.get(p.name, (p.default,) * models if p.per_model else p.default) for p in method.parameters
    }
    words = [sys.executable, "-c", MEASURE, json.dumps([name, shape, count, parameters, rank])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    target = Target("w", shape, count)
    counted = 4 * target.elements * (1 + method.temporaries) + method.held(target, parameters)
    assert int(done.stdout) <= counted
    assert counted <= 4 * int(done.stdout) + (64 << 20)  # and not out of proportion


def knots_of(base: torch.Tensor, *models: torch.Tensor) -> torch.Tensor:
    first, *others = (MemoryModel({"w": tensor}) for tensor in (base, *models))
    made: torch.Tensor = streammerge.knots(*others, base=first).read("w", 0, base.numel())
    return made.reshape(base.shape)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8), (40, 5)])
def test_votes_that_cancel_elect_nobody(shape):
    delta, third = normal(shape, 2), normal(shape, 3, scale=1e-3)
    base = torch.zeros(shape)
    assert float(knots_of(base, delta, -delta).norm()) <= 1e-6 * float(delta.norm())
    turned = knots_of(base, delta, -delta, third)
    assert float((turned + knots_of(base, -delta, delta, -third)).norm()) <= 1e-6 * float(turned.norm())


def test_knots_of_vectors_is_ties_however_small_an_element_is():
    one, other = torch.tensor([1.0, 1e-9, -1e-12, 0.5]), torch.tensor([1.0, 3e-9, 1e-12, -0.5])
    models = [MemoryModel({"w": tensor}) for tensor in (one, other)]
    ties = streammerge.ties(*models, base=MemoryModel({"w": torch.zeros(4)}))
    assert torch.equal(knots_of(torch.zeros(4), one, other), ties.read("w", 0, 4))
