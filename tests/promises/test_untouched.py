"""No method writes to what it is given: blocks may be mapped files, or the buffers of another part of the merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streammerge.methods import METHODS, BlockMethod, Target, WholeMethod
from streammerge.methods.statistics.passes import Pass
from tests.make.models import normal
from tests.references.cases import CASES
from tests.references.linear import Case

CHOSEN = [case for case in CASES if isinstance(METHODS[case.method], BlockMethod | WholeMethod)]


def parameters_of(case: Case) -> dict[str, Any]:
    """Every parameter's value in this case, as a method is given them."""
    values = {}
    for parameter in METHODS[case.method].parameters:
        value = case.parameters.get(parameter.name, parameter.default)
        single = parameter.per_model and not isinstance(value, list)
        values[parameter.name] = (value,) * case.models if single else tuple(value) if parameter.per_model else value
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_inputs_stay_as_they_are(case, dtype):
    method = METHODS[case.method]
    shape = (6, 50) if isinstance(method, WholeMethod) or method.needs.rows else (300,)  # type: ignore[attr-defined]
    base = normal(shape, 0, dtype)
    models = [base + normal(shape, 1 + number, dtype, 1e-2) for number in range(case.models)]
    given = [base, *models] if case.base else models
    copies = [tensor.clone() for tensor in given]
    target, parameters = Target("w", shape, len(given), step=300), parameters_of(case)
    if isinstance(method, WholeMethod):
        made = method.compute(target.place(0), given, parameters)
    else:
        assert isinstance(method, BlockMethod)
        step = method.statistics.begin(target, parameters) if method.statistics else None
        while isinstance(step, Pass):
            step.add(0, step.measure(0, given))
            step = step.finish()
        made = method.compute(target.place(0), given, parameters, step)
    assert made.shape == base.shape
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))
