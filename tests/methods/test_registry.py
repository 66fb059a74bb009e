"""The registry: a method says what it does, and each has a reference and a case."""

from __future__ import annotations

import numpy as np
import pytest

import streammerge
from streammerge.errors import RecipeError
from streammerge.methods import METHODS, find_method
from streammerge.methods.registry import LinearMethod, method
from streammerge.methods.results import net
from streammerge.methods.statistics.brackets import Gathering, Sample
from streammerge.methods.statistics.gram import GramPass
from streammerge.methods.statistics.histograms import Equals, LowerBits, UpperBits
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.ranks import Cut, Ranking
from tests.make.models import SHAPES
from tests.references.cases import CASES, ONE_CASE_EACH
from tests.references.linear import REFERENCES


def test_every_method_has_a_reference_and_a_case():
    assert METHODS.keys() == REFERENCES.keys()
    assert METHODS.keys() == {case.method for case in CASES}
    assert [case.method for case in ONE_CASE_EACH] == list(dict.fromkeys(case.method for case in CASES))


def test_an_unknown_method_is_no_attribute():
    with pytest.raises(AttributeError, match="'slurp'"):
        _ = streammerge.slurp
    with pytest.raises(RecipeError, match=r"unknown merge method 'slurp'\n.*Did you mean 'slerp'\?"):
        find_method("slurp")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_does_and_where_it_comes_from(name):
    found = METHODS[name]
    assert found.name == name
    assert found.kind in ("linear", "gram", "block", "whole")
    assert found.formula.startswith("θ = ")
    assert len(found.doc.splitlines()) >= 3
    numbers = [parameter.default for parameter in found.parameters if isinstance(parameter.default, int | float)]
    assert np.isfinite(numbers).all()
    for parameter in found.parameters:
        if parameter.default is not None:
            assert parameter.check(parameter.default, "the default") == parameter.default
    assert streammerge.__getattr__(name).__doc__ == found.doc


def test_a_name_can_be_registered_once():
    def linear(*, weight: float = 1.0) -> list[float]:
        """Another one."""
        return [weight]

    with pytest.raises(ValueError, match="two merge methods are called 'linear'"):
        method(LinearMethod)(linear)
    assert METHODS["linear"].doc.startswith("θ = Σ")


@pytest.mark.parametrize(
    ("contributions", "total"),
    [
        ((1.0, -0.1, -0.2, -0.7), 0.0),
        ((1.0, -1 / 3, -1 / 3, -1 / 3), 0.0),
        ((0.1, 0.2), 0.30000000000000004),
        ((1.0, -1.0 + 1e-12), 1e-12),
        ((1e-300, 1e-300), 2e-300),
        ((), 0.0),
    ],
)
def test_decimal_fractions_that_cancel_are_exactly_nothing(contributions, total):
    assert net(*contributions) == pytest.approx(total, rel=1e-4, abs=0)


def test_passes_are_passes_and_results_are_not():
    ranking = Ranking(2, [[1]])
    ranking.look_for([[1]])
    steps = (GramPass(2), UpperBits(ranking, 1), LowerBits(ranking), Equals(ranking), Sample(ranking))
    assert all(isinstance(step, Pass) for step in (*steps, Gathering(ranking, {})))
    assert not isinstance(GramPass(2).finish(), Pass)
    assert not isinstance((Cut(1),), Pass)


def test_shapes_are_telling():
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    assert {0, 1, 63} < set(sizes)
    assert max(sizes) > 2**18 > sorted(sizes)[-3]
