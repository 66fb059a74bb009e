"""What a merge method is, and the one table of all of them.

A method is a function whose signature is its contract: keyword-only parameters, `PerModel` for one value per model.
Its name is the function's (a trailing underscore is dropped, so that `lambda_` can be `lambda`), its docstring's first
line the formula. The decorator says how it streams:

    linear   parameters -> one coefficient per input                     one pass
    gram     inner products, parameters -> one coefficient per input     a pass for the products, then one
    block    a block of each input, parameters, statistics -> block      passes for the statistics, then one
    whole    whole tensors in their shape, parameters -> tensor          one pass, and memory for whole tensors

Inputs are the base, if the method has one, and then the models in the recipe's order.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

from streammerge.errors import MethodError, RecipeError, suggestion
from streammerge.methods.contract import GIVEN, Parameter, Parameters, ParameterValue, parameters_of
from streammerge.methods.results import checked_coefficients, checked_tensor
from streammerge.methods.tracing import TracedPlace, traced

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place, Target
    from streammerge.methods.statistics.gram import Gram
    from streammerge.methods.statistics.slices import Slices
    from streammerge.methods.steps import Kernel, Step


BaseUse = Literal["required", "optional", "first", "none"]
"""Whether a method has a base beside its models; `first`: a base may be given, and is the first of the models."""


MERGEKIT_METHODS: Final = frozenset(
    {
        *("linear", "passthrough", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap"),
        *("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"),
        *("della", "della_linear", "sce", "ram", "ramplus_tl", "arcee_fusion"),
    }
)
"""The methods that mergekit has, by the same names."""


MERGEKIT_PARAMETERS: Final = frozenset(
    {"weight", "density", "gamma", "epsilon", "normalize", "rescale", "lambda", "int8_mask", "embed_slerp"}
)
"""Parameters that public recipes give to methods that don't have them: mergekit takes no notice of what is unknown."""


@dataclass(frozen=True)
class Method:
    """A merge method: its name, its parameters, how many inputs it takes, and the function that makes the output.

    `check(parameters, inputs)` raises a MethodError for parameters that don't go together, or not with so many inputs.
    """

    name: str
    parameters: tuple[Parameter, ...]
    base: BaseUse
    models: tuple[int, int | None]
    doc: str
    check: Callable[[Parameters, int], None] | None = None
    function: Callable[..., Any] = lambda: None

    @property
    def kind(self) -> str:
        """How the method streams: linear, gram, block or whole."""
        raise NotImplementedError

    @property
    def is_own(self) -> bool:
        """Whether it is a user's own method, not one that comes with the program."""
        return not str(self.function.__module__).startswith("streammerge.")

    @functools.cached_property
    def wanted(self) -> frozenset[str]:
        """Which of `place` and `statistics` the function asks for beside its parameters."""
        return frozenset(inspect.signature(self.function).parameters) & frozenset(GIVEN)

    @property
    def formula(self) -> str:
        """The docstring's first line."""
        return self.doc.partition("\n")[0]

    @property
    def parameter_names(self) -> frozenset[str]:
        """The names of its parameters."""
        return frozenset(parameter.name for parameter in self.parameters)

    @property
    def is_mergekits(self) -> bool:
        """Whether mergekit has the method under this name, so that recipes for it are about."""
        return self.name in MERGEKIT_METHODS

    def ignores(self, name: str) -> bool:
        """Whether the method has no such parameter, and mergekit takes it all the same, without effect."""
        return self.is_mergekits and name in MERGEKIT_PARAMETERS and name not in self.parameter_names

    def parameter(self, name: str) -> Parameter:
        """The parameter of this name; RecipeError if there is none."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = [parameter.name for parameter in self.parameters]
        raise RecipeError(
            f"method {self.name!r} has no parameter {name!r}",
            advice=f"{suggestion(name, known)}Its parameters: {', '.join(known) or 'none'}.",
        )

    def may_take(self, models: int) -> bool:
        """Whether the method can take so many models."""
        least, most = self.models
        return models >= least and (most is None or models <= most)

    def check_count(self, models: int, *, has_base: bool, is_listed: bool = False) -> None:
        """RecipeError unless the method can take this many models; the base counts where it is the first of them.

        `is_listed` says that the base stands among the models, of which it is none.
        """
        count = models + (has_base and self.base == "first")
        least, most = self.models
        if not self.may_take(count):
            wanted = str(least) if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            noun = "model" if (most or least) == 1 else "models"
            beside = " beside the base" if self.base == "required" else ""
            raise RecipeError(
                f"method {self.name!r} takes {wanted} {noun}{beside}, found {count}",
                advice="One of the models is the same as the base, and so does not count."
                if is_listed and self.base != "none"
                else "",
            )


@dataclass(frozen=True, slots=True)
class Quotient:
    """Σᵢ cᵢ θᵢ / divisor: a mean is its sum divided once, more exactly than with every weight divided beforehand."""

    coefficients: Sequence[float]
    divisor: float = 1.0


@dataclass(frozen=True)
class LinearMethod(Method):
    """The output is a linear combination with coefficients that the parameters alone decide.

    The function returns them, one per input, or a Quotient of them.
    """

    @property
    def kind(self) -> str:
        """Streams in one pass."""
        return "linear"

    def quotient(self, parameters: Parameters) -> Quotient:
        """One finite coefficient per input, and what their sum is divided by; MethodError where there is none."""
        made = self.function(**keywords(parameters))
        found = made if isinstance(made, Quotient) else Quotient(made)
        coefficients = checked_coefficients(self.name, found.coefficients)
        (divisor,) = checked_coefficients(self.name, (found.divisor,))
        if not divisor:
            raise MethodError(
                f"method {self.name!r} divides by zero",
                advice="Look at its parameters: a sum of weights that is zero can't be normalised.",
            )
        return Quotient(coefficients, divisor)


@dataclass(frozen=True)
class GramMethod(Method):
    """The output is a linear combination with coefficients that follow from the inputs' inner products.

    The function takes these as a Gram and returns one coefficient per input. `slices(parameters)` says whether they are
    those of the whole tensor (None), or those of each row, filter or column: then every slice of the output is a
    combination of its own. With `of_tasks` the function asks for products of task vectors alone: of what inputs differ
    by from the first. Those of the inputs are not measured then, unless they are of slices.
    """

    slices: Callable[[Parameters], Slices | None] | None = None
    of_tasks: bool = False

    @property
    def kind(self) -> str:
        """Streams in two passes."""
        return "gram"

    def coefficients(self, gram: Gram, parameters: Parameters) -> Sequence[float]:
        """One finite coefficient per input.

        Inputs with infinite values or NaNs count as tensors without direction: methods combine such linearly, with no
        coefficient 0 that would hide them.
        """
        return checked_coefficients(self.name, self.function(gram.defined(), **keywords(parameters)))


@dataclass(frozen=True)
class Statistics:
    """What a block method wants to know of whole tensors before it can make a block.

    `begin(target, parameters)` is the first pass over a tensor, or at once the result where the parameters need no
    pass. `passes` is how many there are as a rule (a search that has to begin again makes more), and
    `held(target, parameters)` what they hold in bytes, where that depends on the tensor's size. `scope` is "model"
    where they are taken of the whole model: of all its tensors for which the parameters named in `of` are the same, as
    if they were one; or it names a parameter that is "model" or "tensor".
    """

    begin: Callable[[Target, Parameters], Any]
    passes: int = 0
    held: Callable[[Target, Parameters], int] | None = None
    scope: str = "tensor"
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needs:
    """What a block method is given, and what it takes to make a block of that.

    With `rows` the blocks are whole rows: matrices of as many rows of each input as make a block, or one longer row.
    With a `halo` the function (not the statistics) is also given so many of the rows before and after, as far as there
    are any, and what it makes of these is left out: what lies further away than that has no influence on a row.
    `temporaries` is how many blocks the function and the passes hold at once beside the inputs, `temporaries_each` how
    many more for every input: the plan counts them. `float64` says that the function, or every pass, computes in
    float64, which some devices lack; `blind` that its output is of statistics alone, whatever its inputs' blocks hold.
    """

    rows: Slices | None = None
    halo: int = 0
    temporaries: int = 14
    temporaries_each: int = 1
    float64: bool = False
    blind: bool = False


@dataclass(frozen=True)
class BlockMethod(Method):
    """The output's block is a function of the inputs' blocks, and of statistics if the method wants them.

    The function may ask for the keywords `place`, where the block lies, and `statistics`. With a `kernel` compiled
    loops do its work and its passes'; one that is `elementwise` is told by having it compute with what `traced` gives.
    """

    statistics: Statistics | None = None
    needs: Needs = Needs()
    kernel: Kernel | None = None
    elementwise: bool = False

    @property
    def kind(self) -> str:
        """Streams in one pass, and those of its statistics."""
        return "block"

    def is_of_model(self, parameters: Parameters) -> bool:
        """Whether there are statistics, and they are taken of the whole model."""
        if self.statistics is None:
            return False
        return parameters.get(self.statistics.scope, self.statistics.scope) == "model"

    @property
    def passes(self) -> int:
        """How many passes its statistics take as a rule."""
        return self.statistics.passes if self.statistics else 0

    def held(self, target: Target, parameters: Parameters) -> int:
        """What its statistics hold of a tensor, in bytes."""
        return self.statistics.held(target, parameters) if self.statistics and self.statistics.held else 0

    @property
    def has_kernel(self) -> bool:
        """Whether compiled loops can do its work."""
        return self.elementwise or self.kernel is not None

    @property
    def spans_blocks(self) -> bool:
        """Whether it may be given several blocks at once, those left out of which a cut has its quota.

        What is given blocks as they come goes element by element; of a user's own function that is not taken for
        granted.
        """
        return self.needs.rows is None and not self.is_own

    def steps(self, target: Target, parameters: Parameters, statistics: Any) -> Sequence[Step]:  # noqa: ANN401
        """How compiled loops do its work."""
        if self.kernel:
            defaults: dict[str, Any] = {parameter.name: parameter.default for parameter in self.parameters}
            return self.kernel(target, {**defaults, **parameters}, statistics)
        return traced(lambda inputs: self.made(TracedPlace(target), inputs, parameters, statistics), target.inputs)

    def compute(self, place: Place, inputs: Sequence[Tensor], parameters: Parameters, statistics: Any) -> Tensor:  # noqa: ANN401
        """The output's block at this place; statistics are whatever the method's last pass gave."""
        return checked_tensor(self.name, self.made(place, inputs, parameters, statistics), inputs[0])

    def made(
        self,
        place: Place | TracedPlace,
        inputs: Sequence[Tensor],
        parameters: Parameters,
        statistics: Any,  # noqa: ANN401
    ) -> Tensor:
        """What the function makes."""
        given = {"place": place, "statistics": statistics}
        made: Tensor = self.function(*inputs, **keywords(parameters), **{name: given[name] for name in self.wanted})
        return made


@dataclass(frozen=True)
class WholeMethod(Method):
    """The output is a function of the whole inputs in their shape, in float32 or better: on the CPU, unless it is one
    `anywhere`, whose function computes where its inputs are, in float64 too.

    `temporaries` is how many tensors of the output's size the function holds at once beside its inputs and what it
    returns; `held(target, parameters)` what it takes in bytes beside these, where that is no multiple of the size.
    With `readings(parameters)` the function is given `Tall` matrices instead, whose rows are made when it asks for
    them, and over which it goes so often; what it returns need not have their shape.
    """

    temporaries: int = 6
    held: Callable[[Target, Parameters], int] | None = None
    anywhere: bool = False
    readings: Callable[[Parameters], int] | None = None

    @property
    def kind(self) -> str:
        """Holds whole tensors."""
        return "whole"

    def compute(self, place: Place, inputs: Sequence[Any], parameters: Parameters) -> Tensor:
        """The output."""
        given = {"place": place} if "place" in self.wanted else {}
        made: Tensor = self.function(*inputs, **keywords(parameters), **given)
        return made if self.readings else checked_tensor(self.name, made, inputs[0])


METHODS: Final[dict[str, Method]] = {}
"""Every method by name."""


M = TypeVar("M", bound=Method)


class method(Generic[M]):  # noqa: N801  (it is used as a decorator)
    """Register a function as a merge method: `@method(LinearMethod, base="required")`.

    `models` is the least and greatest number of models (None: any), the base not counted.
    """

    def __init__(
        self,
        kind: type[M],
        *,
        base: BaseUse = "none",
        models: tuple[int, int | None] = (1, None),
        **details: Any,  # noqa: ANN401  (fields of the kind)
    ) -> None:
        self.kind = kind
        self.fields = {"base": base, "models": models, **details}

    def __call__(self, function: Callable[..., Any]) -> M:
        """Register the function and return the method made of it."""
        name = function.__name__.rstrip("_")
        if name in METHODS:
            raise ValueError(f"two merge methods are called {name!r}")
        fields = {
            "parameters": parameters_of(function),
            "doc": inspect.cleandoc(function.__doc__ or ""),
            **self.fields,
        }
        made = METHODS[name] = self.kind(name=name, function=function, **fields)
        return made


def keywords(parameters: Parameters) -> dict[str, ParameterValue]:
    """The parameters as a function takes them: names that Python reserves get their underscore back."""
    return {f"{name}_" if name in ("lambda",) else name: value for name, value in parameters.items()}


def find_method(name: str) -> Method:
    """The method of this name; RecipeError with the nearest names if there is none."""
    try:
        return METHODS[name]
    except KeyError:
        raise RecipeError(
            f"unknown merge method {name!r}",
            advice=f"{suggestion(name, METHODS)}Known methods: {', '.join(sorted(METHODS))}.",
        ) from None
