"""Parameters as functions declare them, and the values that they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest

from streammerge.errors import RecipeError
from streammerge.methods.contract import Between, Parameter, PerModel, Share, parameters_of


def example(
    base: Unknown,  # type: ignore[name-defined]  # noqa: F821
    *models: Unknown,  # type: ignore[name-defined]  # noqa: F821
    weight: PerModel,
    density: Sequence[Share] = (0.5,),
    lambda_: float = 1.0,
    normalize: bool = True,
    steps: Annotated[int, Between(1)] = 10,
    rescale: Literal["none", "l1"] = "l1",
    votes: Sequence[Literal["sum", "count"]] = ("sum",),
    statistics: Unknown,  # type: ignore[name-defined]  # noqa: F821
) -> None: ...


PARAMETERS = {parameter.name: parameter for parameter in parameters_of(example)}


def test_parameters_are_read_from_the_signature():
    assert list(PARAMETERS.values()) == [
        Parameter("weight", per_model=True),
        Parameter("density", per_model=True, default=0.5, range=Between(0, 1)),
        Parameter("lambda", default=1.0),
        Parameter("normalize", "flag", default=True),
        Parameter("steps", "whole number", default=10, range=Between(1)),
        Parameter("rescale", "choice", default="l1", choices=("none", "l1")),
        Parameter("votes", "choice", per_model=True, default="sum", choices=("sum", "count")),
    ]
    assert [name for name, parameter in PARAMETERS.items() if parameter.required] == ["weight"]


@pytest.mark.parametrize("annotation", [str, dict, "list[float]", "float | None"])
def test_a_parameter_of_another_type_is_refused(annotation):
    def method(*, x: Any) -> None: ...

    method.__annotations__["x"] = annotation
    with pytest.raises(
        TypeError, match=r"merge method 'method': the parameter 'x' is annotated with .*, which is none"
    ):
        parameters_of(method)


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("weight", 1, 1.0),
        ("weight", True, 1.0),
        ("weight", -2.5, -2.5),
        ("density", 0, 0.0),
        ("density", 1, 1.0),
        ("normalize", 0, False),
        ("normalize", 1.0, True),
        ("steps", 3.0, 3),
        ("rescale", "none", "none"),
    ],
)
def test_a_value_comes_in_the_parameters_own_type(name, value, result):
    found = PARAMETERS[name].check(value, "here")
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("weight", "x", "expected a finite number, found 'x'"),
        ("weight", float("inf"), "expected a finite number, found inf"),
        ("weight", None, "expected a finite number, found None"),
        ("density", 1.5, "expected a number between 0 and 1, found 1.5"),
        ("normalize", 2, "expected true or false, found 2"),
        ("normalize", "yes", "expected true or false, found 'yes'"),
        ("steps", 2.5, "expected a whole number at least 1, found 2.5"),
        ("steps", 0, "expected a whole number at least 1, found 0"),
        ("rescale", "l2", "expected one of none, l1, found 'l2'"),
        ("rescale", 1, "expected one of none, l1, found 1"),
    ],
)
def test_another_value_is_an_error_that_says_what_is_expected(name, value, problem):
    with pytest.raises(RecipeError, match=f"^here: {problem}$"):
        PARAMETERS[name].check(value, "here")


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (Between(0, 1), "between 0 and 1", (0, 0.5, 1), (-0.1, 1.1)),
        (Between(0, 1, exclusive=True), "strictly between 0 and 1", (0.5,), (0, 1)),
        (Between(0), "at least 0", (0, 1e30), (-1e-30,)),
        (Between(0, exclusive=True), "above 0", (1e-30,), (0,)),
        (Between(most=2), "at most 2", (-1e30, 2), (2.1,)),
        (Between(most=2, exclusive=True), "below 2", (1.9,), (2,)),
    ],
)
def test_ranges(bounds, text, inside, outside):
    assert str(bounds) == text
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)
