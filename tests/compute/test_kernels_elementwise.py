"""Methods that are arithmetic of elements, by compiled loops and by torch: the same bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.compute.expressions import ByBlock
from streammerge.compute.kernels.library import kernels
from streammerge.compute.lanes import torch_dtype
from streammerge.methods import METHODS
from streammerge.methods.registry import BlockMethod
from streammerge.methods.tracing import traced
from streammerge.tensors import DTYPES
from tests.make.programs import NARROW, applied, check, measured, small_pieces, stored, tensors

pytestmark = pytest.mark.skipif(kernels() is None, reason="the library is not built")

ELEMENTWISE = sorted(name for name, method in METHODS.items() if isinstance(method, BlockMethod) and method.elementwise)


@pytest.mark.parametrize("name", ELEMENTWISE)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_elementwise_methods(name, data):
    method = METHODS[name]
    least, most = method.models
    models = data.draw(st.integers(least, most or 5))
    wide = data.draw(st.booleans())
    inputs = data.draw(tensors(models + (method.base == "required"), [*NARROW, "F64"] if wide else NARROW))
    numbers = st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.7])
    given = {
        "alpha": data.draw(numbers),
        "beta": data.draw(numbers),
        "lambda": data.draw(st.sampled_from([1.0, -0.3])),
        "epsilon": data.draw(st.sampled_from([1e-5, 0.3])),
        "threshold": data.draw(numbers),
        "k": data.draw(st.integers(0, models)),
        "task": data.draw(st.integers(0 if name == "emr" else 1, models)),
        "r": data.draw(numbers),
        "t": data.draw(numbers),
    }
    with small_pieces():
        node = applied(name, inputs, **given)
        measured(node, torch_dtype(DTYPES["F64" if wide else "F32"]))
        check(node, compute="F64" if wide else "F32")


def test_a_method_within_a_method_has_registers_of_its_own():
    one, two, three, four = (stored(torch.randn(5000), "F16") for _ in range(4))
    inner = applied("ties", [one, applied("add_opposite", [two, three, four], alpha=0.7), two], density=1.0)
    check(applied("magmax", [one, inner, applied("ram", [four, three, two])]), compute="F32")


def test_places_are_used_again():
    steps = traced(lambda inputs: (inputs[0] + inputs[1]) * (inputs[0] + inputs[1] + 1.0) + 2.0, 2)
    assert [step.code for step in steps] == ["PLUS", "PLUS", "FILL", "PLUS", "TIMES", "FILL", "PLUS", "COPY"]
    assert max(step.of for step in steps) <= 5


def test_numbers_may_stand_first():
    def function(inputs):
        made = 1.0 - inputs[0] + 2.0 * inputs[1]
        made -= inputs[0]
        made *= 0.3
        made /= 0.7
        return 1.0 / (0.5 + made) + -made

    method = BlockMethod("own", (), "none", (2, 2), "", function=lambda *inputs: function(inputs), elementwise=True)
    inputs = (stored(torch.randn(3000), "F32"), stored(torch.randn(3000), "BF16"))
    check(ByBlock(inputs[0].info, method, {}, inputs, "a tensor"), compute="F32")


def test_an_input_is_not_written_to():
    with pytest.raises(AssertionError, match="an input is not to be written to"):
        traced(lambda inputs: inputs[0].mul_(2.0), 1)


def test_what_has_no_step_is_named():
    with pytest.raises(AttributeError, match="methods that use 'exp' are not elementwise"):
        traced(lambda inputs: inputs[0].exp(), 1)


def test_negative_zero_is_no_less_than_zero():
    values = stored(torch.tensor([-0.0] * 40), "F32")
    check(applied("nearswap", [values, values], t=0.0), compute="F32")
