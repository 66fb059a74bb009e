"""The steps of a function that computes with tensors as if they were numbers: told by having it compute with others.

What it is given have a tensor's operators and methods, and write down what is done. A function's arithmetic is so told
once, in its own words, and compiled loops do the same in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.methods.steps import Step

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Target


def traced(function: Callable[[Sequence[Tensor]], Tensor], inputs: int) -> list[Step]:
    """The steps by which the function's result takes the place of its first input."""
    trace = Trace(inputs)
    given: Any = [Elements(trace, place, is_input=True) for place in range(inputs)]
    result: Any = function(given)
    return [*trace.steps, Step("COPY", 0, (result.place,))]


def traced_vectors(function: Callable[[Sequence[Tensor]], Sequence[Tensor]], inputs: int) -> tuple[list[Step], int]:
    """The steps by which the function's results are left in neighbouring places, and the first of these."""
    trace = Trace(inputs)
    given: Any = [Elements(trace, place, is_input=True) for place in range(inputs)]
    results: Any = function(given)
    first = trace.taken
    return [*trace.steps, *(Step("COPY", first + i, (made.place,)) for i, made in enumerate(results))], first


@dataclass(frozen=True, slots=True)
class TracedPlace:
    """A place in a trace: random numbers are made by steps."""

    tensor: Target

    def drawn(self, model: int, like: Elements, share: float) -> Elements:
        """What is 1 with this probability."""
        return like.made_at_random("DRAW", share, *self.tensor.stream(model).numbers)

    def normal(self, model: int, like: Elements) -> Elements:
        """Normally distributed numbers."""
        return like.made_at_random("NORMAL", *self.tensor.stream(model).numbers)


class Trace:
    """What was done so far, and the places that are free."""

    def __init__(self, taken: int) -> None:
        self.steps: list[Step] = []
        self.free: list[int] = []
        self.taken = taken

    def place(self) -> int:
        """One that nothing is in."""
        if self.free:
            return self.free.pop()
        self.taken += 1
        return self.taken - 1


Operand = Any
"""Elements, or a number."""


class Elements:
    """A tensor's part in a trace. What a comparison gives are 1 and 0, as which torch computes with truth values."""

    def __init__(self, trace: Trace, place: int, *, is_input: bool = False) -> None:
        self.trace = trace
        self.place = place
        self.is_input = is_input
        self.shape = self.dtype = None

    def __del__(self) -> None:
        if not self.is_input:
            self.trace.free.append(self.place)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        raise AttributeError(f"methods that use {name!r} are not elementwise")

    def made_at_random(self, code: str, *numbers: float) -> Elements:
        """What a step makes of random numbers."""
        return self._made(code, *numbers)

    def _made(self, code: str, *numbers: float) -> Elements:
        made = Elements(self.trace, self.trace.place())
        self.trace.steps.append(Step(code, made.place, numbers))
        return made

    def _set(self, code: str, *numbers: float) -> Elements:
        assert not self.is_input, "an input is not to be written to"
        self.trace.steps.append(Step(code, self.place, numbers))
        return self

    def _elements(self, operand: Operand) -> Elements:
        return operand if isinstance(operand, Elements) else self._made("FILL", float(operand))

    def _of(self, code: str, other: Operand) -> Elements:
        other = self._elements(other)
        return self._made(code, self.place, other.place)

    def _with(self, code: str, other: Operand) -> Elements:
        other = self._elements(other)
        return self._set(code, self.place, other.place)

    def __add__(self, other: Operand) -> Elements:
        return self._of("PLUS", other)

    def __sub__(self, other: Operand) -> Elements:
        return self._of("MINUS", other)

    def __mul__(self, other: Operand) -> Elements:
        return self._of("TIMES", other)

    def __truediv__(self, other: Operand) -> Elements:
        return self._of("OVER", other)

    def __radd__(self, other: float) -> Elements:
        return self._elements(other) + self

    def __rsub__(self, other: float) -> Elements:
        return self._elements(other) - self

    def __rmul__(self, other: float) -> Elements:
        return self._elements(other) * self

    def __rtruediv__(self, other: float) -> Elements:
        return self._elements(other) / self

    def __isub__(self, other: Operand) -> Elements:
        return self._with("MINUS", other)

    def __imul__(self, other: Operand) -> Elements:
        return self._with("TIMES", other)

    def __itruediv__(self, other: Operand) -> Elements:
        return self._with("OVER", other)

    def __iadd__(self, other: Operand) -> Elements:
        return self._with("PLUS", other)

    def __gt__(self, other: Operand) -> Elements:
        return self._of("ABOVE", other)

    def __ge__(self, other: Operand) -> Elements:
        return self._of("REACHES", other)

    def __lt__(self, other: Operand) -> Elements:
        return self._elements(other) > self

    def __le__(self, other: Operand) -> Elements:
        return self._elements(other) >= self

    def __eq__(self, other: object) -> Elements:  # type: ignore[override]
        return self._of("SAME", other)

    def __ne__(self, other: object) -> Elements:  # type: ignore[override]
        return ~(self == other)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Elements) -> Elements:
        return self._of("TIMES", other)

    def __or__(self, other: Elements) -> Elements:
        return self._of("GREATER", other)

    def __neg__(self) -> Elements:
        return self._of("TIMES", -1.0)

    def __invert__(self) -> Elements:
        return self._of("SAME", 0.0)

    mul = __mul__

    def mul_(self, other: Operand) -> Elements:
        """Times the other, in place."""
        return self._with("TIMES", other)

    def div_(self, other: Operand) -> Elements:
        """Divided by the other, in place."""
        return self._with("OVER", other)

    def sub_(self, other: Operand) -> Elements:
        """Without the other, in place."""
        return self._with("MINUS", other)

    def add_(self, other: Operand, *, alpha: float = 1.0) -> Elements:
        """With the other times alpha, rounded once, in place."""
        if alpha == 1.0:
            return self._with("PLUS", other)
        return self._set("FUSE", self.place, self._elements(other).place, alpha)

    def abs(self) -> Elements:
        """The magnitude."""
        return self._made("SIZE", self.place)

    def abs_(self) -> Elements:
        """The magnitude, in place."""
        return self._set("SIZE", self.place)

    def sign(self) -> Elements:
        """1, 0 or −1."""
        return self._made("SIGN", self.place)

    def reciprocal_(self) -> Elements:
        """1 divided by it, in place."""
        return self._set("OVER", self._elements(1.0).place, self.place)

    def minimum(self, other: Operand) -> Elements:
        """The lesser."""
        return self._of("LESSER", other)

    def maximum(self, other: Operand) -> Elements:
        """The greater."""
        return self._of("GREATER", other)

    def clamp_(self, min: float | None = None, max: float | None = None) -> Elements:
        """No less and no more than these, in place."""
        for code, bound in (("GREATER", min), ("LESSER", max)):
            if bound is not None:
                self._with(code, bound)
        return self

    def clamp(self, min: float) -> Elements:
        """No less than this."""
        return self._of("GREATER", min)

    def where(self, condition: Elements, other: Operand) -> Elements:
        """Itself where it holds, elsewhere the other."""
        return self._made("CHOOSE", self.place, self._elements(other).place, condition.place)

    def masked_fill_(self, mask: Elements, number: float) -> Elements:
        """The number where the mask is, in place."""
        return self._set("CHOOSE", self._elements(number).place, self.place, mask.place)

    def masked_fill(self, mask: Elements, number: float) -> Elements:
        """The number where the mask is."""
        return self._made("CHOOSE", self._elements(number).place, self.place, mask.place)

    def clone(self) -> Elements:
        """A copy."""
        return self._made("COPY", self.place)

    def to(self, dtype: object) -> Elements:
        """Itself: a trace knows of one dtype."""
        return self

    def new_zeros(self, shape: object) -> Elements:
        """As many zeros."""
        return self._made("FILL", 0.0)
