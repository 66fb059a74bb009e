"""What methods refuse, before anything is read."""

from __future__ import annotations

import pytest

import streammerge
from streammerge.errors import MethodError, RecipeError
from streammerge.methods import METHODS
from tests.make.models import SMALL, MemoryModel, make_tensors, near


@pytest.fixture(scope="module")
def trio():
    tensors = make_tensors(0, shapes=SMALL)
    return [MemoryModel(tensors), MemoryModel(near(tensors, 1)), MemoryModel(near(tensors, 2))]


REFUSED = {
    "zero sum": (lambda x, a, b: streammerge.linear(a, b, weight=[1.0, -1.0]), MethodError, "sum to zero"),
    "decimal zero sum": (
        lambda x, a, b: streammerge.linear(x, a, b, weight=[0.1, 0.2, -0.3]),
        MethodError,
        "sum to zero and can't be normalised",
    ),
    "zero task weights": (
        lambda x, a, b: streammerge.task_arithmetic(a, b, base=x, weight=[1.0, -1.0], normalize=True),
        MethodError,
        "sum to zero",
    ),
    "zero weights to average": (
        lambda x, a, b: streammerge.n_average(a, b, weight=0.0),
        MethodError,
        "sum to zero",
    ),
    "zero weights to extrapolate": (
        lambda x, a, b: streammerge.expo(a, b, base=x, weight=[1.0, -1.0]),
        MethodError,
        "sum to zero",
    ),
    "everything taken out": (
        lambda x, a, b: streammerge.weighted_subtraction(a, b, alpha=0.5, beta=2.0),
        MethodError,
        r"zero for alpha 0\.5 and beta 2",
    ),
    "two for a triple": (lambda x, a, b: streammerge.triple_sum(a, b), RecipeError, "takes 3 models, found 2"),
    "overflowing product": (
        lambda x, a, b: streammerge.task_arithmetic(a, base=x, weight=1e200, **{"lambda": 1e200}),
        MethodError,
        "'task_arithmetic' comes to coefficients that are no finite numbers",
    ),
    "overflowing sum": (
        lambda x, a, b: streammerge.linear(a, b, weight=[1e308, 1.1e308]),
        MethodError,
        "no finite numbers",
    ),
    "no t": (lambda x, a, b: streammerge.slerp(a, b), RecipeError, "'slerp' needs the parameter 't'"),
    "no alpha": (lambda x, a, b: streammerge.scale(a), RecipeError, "'scale' needs the parameter 'alpha'"),
    "unknown parameter": (
        lambda x, a, b: streammerge.linear(a, b, wieght=0.5),
        RecipeError,
        r"no parameter 'wieght'\n.*Did you mean 'weight'\?",
    ),
    "unknown parameter per model": (
        lambda x, a, b: streammerge.linear(a, b, density=[0.5, 0.5]),
        RecipeError,
        "'linear' has no parameter 'density'",
    ),
    "nan": (
        lambda x, a, b: streammerge.slerp(a, b, t=float("nan")),
        RecipeError,
        "expected a finite number, found nan",
    ),
    "infinite": (
        lambda x, a, b: streammerge.linear(a, b, weight=[1.0, float("inf")]),
        RecipeError,
        "expected a finite number, found inf",
    ),
    "text": (lambda x, a, b: streammerge.slerp(a, b, t="half"), RecipeError, "expected a finite number, found 'half'"),
    "too few values": (
        lambda x, a, b: streammerge.linear(x, a, b, weight=[1.0, 2.0]),
        RecipeError,
        "'weight' has 2 values for 3 models",
    ),
    "one model": (lambda x, a, b: streammerge.slerp(a, t=0.5), RecipeError, "'slerp' takes 2 models, found 1"),
    "three models": (lambda x, a, b: streammerge.slerp(x, a, b, t=0.5), RecipeError, "takes 2 models, found 3"),
    "no models": (lambda x, a, b: streammerge.linear(), RecipeError, "takes at least 1 model, found 0"),
    "two to pass through": (lambda x, a, b: streammerge.passthrough(a, b), RecipeError, "takes 1 model, found 2"),
    "models beside the base": (
        lambda x, a, b: streammerge.add_difference(a, base=x),
        RecipeError,
        "takes 2 models beside the base, found 1",
    ),
    "no base": (lambda x, a, b: streammerge.ties(a, b), RecipeError, "'ties' needs a base model"),
    "base too many": (lambda x, a, b: streammerge.linear(a, b, base=x), RecipeError, "'linear' has no base model"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_refused_before_anything_is_read(trio, mistake):
    call, kind, message = REFUSED[mistake]
    with pytest.raises(kind, match=message):
        call(*trio)
    assert not any(model.ranges for model in trio)


WEIGHTED = {
    name: next((flag for flag in ("normalize", "normalize_weights") if flag in found.parameter_names), "")
    for name, found in METHODS.items()
    if "weight" in found.parameter_names
}
NOT_DIVIDED = ("iso_c", "iso_cts", "svc", "tsv_m", "nuslerp")
"""Methods that sum weighted task vectors and divide by nothing, or, as nuslerp does, then take the middle."""


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("weight", [[1.0, -1.0], [0.0, 0.0], [0.3, -0.3]])
def test_weights_that_sum_to_zero_are_refused_by_every_method_that_divides_by_their_sum(trio, name, weight):
    base, a, b = trio
    keywords = {"weight": weight, **({"base": base} if METHODS[name].base == "required" else {})}
    call, flag = getattr(streammerge, name), WEIGHTED[name]
    if name in NOT_DIVIDED:
        assert call(a, b, **keywords).tensors
        return
    with pytest.raises(MethodError, match="sum to zero and can't be normalised") as error:
        call(a, b, **keywords, **({flag: True} if flag else {}))
    assert error.value.advice == "Choose weights whose sum is not zero."
    if flag:
        assert call(a, b, **keywords, **{flag: False}).tensors
