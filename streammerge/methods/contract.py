"""What a method's parameters may be, read from its function's signature.

    weight: PerModel = (1.0,)                                  a number per model
    density: Sequence[Annotated[float, Between(0, 1)]] = (1.0,)  the same, in a range
    lambda_: float = 1.0                                       a number; it has to be given where there is no default
    normalize: bool = True                                     a flag
    iterations: Annotated[int, Between(1)] = 10                a whole number, 1 or more
    rescale: Literal["none", "l1", "density"] = "l1"           one of some words

A trailing underscore is dropped from the name, so that `lambda_` can be `lambda`.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

from streammerge.errors import RecipeError

PerModel = Sequence[float]
"""One value per model, in the recipe's order, the base left out."""

ParameterValue = float | bool | str | tuple[Any, ...]

Parameters = Mapping[str, ParameterValue]
"""A method's parameters by their names."""

GIVEN: Final = ("place", "statistics")
"""Keywords that a function is given beside its parameters."""


@dataclass(frozen=True, slots=True)
class Between:
    """The range of a number; a bound that is exclusive is not in it."""

    least: float = -math.inf
    most: float = math.inf
    exclusive: bool = False

    def __contains__(self, value: float) -> bool:
        return self.least < value < self.most if self.exclusive else self.least <= value <= self.most

    def __str__(self) -> str:
        if math.isinf(self.most):
            return f"{'above' if self.exclusive else 'at least'} {self.least:g}"
        if math.isinf(self.least):
            return f"{'below' if self.exclusive else 'at most'} {self.most:g}"
        return f"{'strictly ' * self.exclusive}between {self.least:g} and {self.most:g}"


Share = Annotated[float, Between(0, 1)]
"""A number from 0 to 1, such as a density."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A method's parameter: what kind of value it takes, one for the merge or one per model, and its default."""

    name: str
    type: Literal["number", "whole number", "flag", "choice"] = "number"
    per_model: bool = False
    default: float | bool | str | None = None
    range: Between | None = None
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether the recipe must set it."""
        return self.default is None

    @property
    def takes(self) -> str:
        """What may be given, as people say it: `a number between 0 and 1`, `one of sum, count`."""
        match self.type:
            case "flag":
                return "true or false"
            case "choice":
                return f"one of {', '.join(self.choices)}"
            case _:
                return f"a {self.type}{f' {self.range}' if self.range else ''}"

    def check(self, value: Any, where: str) -> float | bool | str:  # noqa: ANN401
        """The value in the parameter's own type; RecipeError, which says where, if it can't be one."""
        match self.type:
            case "flag":
                fits = isinstance(value, int | float) and value in (0, 1)
            case "choice":
                fits = isinstance(value, str) and value in self.choices
            case _:
                fits = self._is_number(value, where)
        if not fits:
            raise RecipeError(f"{where}: expected {self.takes}, found {value!r}")
        match self.type:
            case "flag":
                return bool(value)
            case "whole number":
                return int(value)
            case _:
                return value if isinstance(value, str) else float(value)

    def _is_number(self, value: Any, where: str) -> bool:  # noqa: ANN401
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RecipeError(f"{where}: expected a finite number, found {value!r}")
        if self.type == "whole number" and value != int(value):
            return False
        return self.range is None or value in self.range


def parameters_of(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The parameters that a method's function takes: its keyword-only ones. TypeError for one of no known type."""
    options = [
        option
        for option in inspect.signature(function).parameters.values()
        if option.kind is option.KEYWORD_ONLY and option.name not in GIVEN
    ]
    # evaluated one by one, because tensors are annotated with types that are imported for type checkers alone
    annotations = types.SimpleNamespace(__annotations__={option.name: option.annotation for option in options})
    hints = get_type_hints(annotations, function.__globals__, include_extras=True)
    return tuple(_parameter(option, hints[option.name], function.__name__) for option in options)


def _parameter(option: inspect.Parameter, hint: Any, method: str) -> Parameter:  # noqa: ANN401
    per_model = get_origin(hint) is Sequence
    if per_model:
        (hint,) = get_args(hint)
    bounds = None
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        bounds = next((extra for extra in extras if isinstance(extra, Between)), None)
    kinds: dict[Any, Literal["number", "whole number", "flag"]] = {float: "number", int: "whole number", bool: "flag"}
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if not choices and hint not in kinds:
        raise TypeError(
            f"merge method {method!r}: the parameter {option.name!r} is annotated with {option.annotation!r}, which "
            "is none of float, int, bool, Literal of words, a Sequence of one of them, or Annotated with Between"
        )
    default = None if option.default is option.empty else option.default
    return Parameter(
        name=option.name.rstrip("_"),
        type="choice" if choices else kinds[hint],
        per_model=per_model,
        default=default[0] if isinstance(default, tuple) else default,
        range=bounds,
        choices=choices,
    )
