"""What must be known of whole tensors before a block can be computed: passes over them, and which come first."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge.compute.costs import compute_dtype, piece_count, piece_elements, target_of, together_blocks
from streammerge.compute.expressions import (
    ByBlock,
    ByGram,
    ByWhole,
    Measured,
    ModelStatistics,
    Node,
    Product,
    SharedStatistics,
    Surveyed,
    Together,
    measured_together,
    surveyed,
)
from streammerge.compute.makers import Maker, Statistics, StretchMeasurer
from streammerge.errors import MethodError
from streammerge.methods.statistics.gram import Gram, GramPass
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.slices import SliceGramPass, SliceGrams, Slicing
from streammerge.tensors import DTYPES, DType

if TYPE_CHECKING:
    import torch


Stretches = Callable[[DType, Statistics], StretchMeasurer]
"""Gives what measures many blocks of inputs that are computed in this dtype."""


class Survey:
    """The passes that an expression needs over its tensors before it can be computed.

    Nodes whose inputs are known are measured together; a node above them has its turn in a later pass. It is
    `suspicious` once what was measured may hold infinite values or NaNs, of which the output may not tell. What is
    measured of whole models has to be among `measured` already; what another tensor of this run needs too is `shared`.
    """

    def __init__(
        self,
        root: Node,
        compute: DType = DTYPES["F32"],
        measured: ModelStatistics | None = None,
        shared: SharedStatistics | None = None,
    ) -> None:
        self.compute = compute
        self.shared: SharedStatistics = {} if shared is None else shared
        applied = {id(node): node for node in surveyed(root)}
        before = measured or {}
        self.known: dict[int, Any] = {
            id(node): before[together] for node, together in measured_together(root) if together in before
        }
        self.waiting = [node for key, node in applied.items() if key not in self.known]
        self.passes: dict[int, tuple[Surveyed, Pass[Any]]] = {}
        self.suspicious = False
        self._start_ready()

    @property
    def complete(self) -> bool:
        """Whether everything is known, so that blocks can be computed."""
        return not self.passes

    @property
    def ordered(self) -> bool:
        """Whether what is measured must be added in the order of the blocks."""
        return any(step.ordered for _, step in self.passes.values())

    @property
    def bulky(self) -> bool:
        """Whether the measure of a block is a good part of its size."""
        return any(step.bulky for _, step in self.passes.values())

    @property
    def blocks(self) -> int:
        """The number of blocks to measure: of the longest tensor, because views make tensors longer and shorter."""
        return max((piece_count(node) for node, _ in self.passes.values()), default=0)

    @property
    def step_elements(self) -> int:
        """How many elements a block to be measured has at the most."""
        return max((piece_elements(node) for node, _ in self.passes.values()), default=1)

    def measure(self, maker: Maker, block: int) -> dict[int, Any]:
        """What the current passes want to know of one block, those whose tensor has it."""
        measurer = maker.measurer(self.compute, self.known)
        found = {
            key: measurer.measure(step, node, block, block)
            for key, (node, step) in self.passes.items()
            if block < piece_count(node) and step.wants(block)
        }
        if measurer.suspicious:
            self.suspicious = True
        return found

    def measure_all(self, stretches: Stretches, blocks: range) -> dict[int, dict[int, Any]]:
        """The same of many blocks, by their numbers."""
        measurer = stretches(self.compute, self.known)
        found: dict[int, dict[int, Any]] = {block: {} for block in blocks}
        for key, (node, step) in self.passes.items():
            pieces = [block for block in blocks if block < piece_count(node) and step.wants(block)]
            for block, measured in measurer.measure_all(step, node, pieces, 0):
                found[block][key] = measured
        if measurer.suspicious:
            self.suspicious = True
        return found

    def add(self, block: int, measured: Mapping[int, Any]) -> None:
        """Take in the measures of one block."""
        for key, found in measured.items():
            self.passes[key][1].add(block, found)

    def finish_pass(self) -> None:
        """After the last block: go on to the next passes, if there are any."""
        for key, (node, step) in list(self.passes.items()):
            del self.passes[key]
            self._take(node, step.finish())
        self._start_ready()

    def _start_ready(self) -> None:
        for node in list(self.waiting):
            if all(id(child) in self.known for child in _measured_below(node)):
                self.waiting.remove(node)
                if not self._is_told(node):
                    self._take(node, _first_step(node, wide=self.compute.bits == 64))

    def _is_told(self, node: Surveyed) -> bool:
        """Take in what another tensor has measured, if it has."""
        found = self.shared.get(node.shared) if isinstance(node, ByBlock) and node.shared else None
        if found is None:
            return False
        self.known[id(node)] = found.statistics
        self.suspicious |= found.suspicious
        return True

    def _take(self, node: Surveyed, outcome: Any) -> None:  # noqa: ANN401
        """Note a pass's outcome: another pass, or a result."""
        if isinstance(outcome, Pass):
            self.passes[id(node)] = node, outcome
        elif isinstance(node, ByGram):
            self.suspicious |= not outcome.is_finite
            self.known[id(node)] = _coefficients(node, outcome)
        else:
            self.known[id(node)] = outcome
            if isinstance(node, ByBlock) and node.shared:
                self.shared[node.shared] = Measured(outcome, self.suspicious)


def _first_step(node: Surveyed, *, wide: bool) -> Any:  # noqa: ANN401  (a pass, or a result)
    match node:
        case ByGram():
            slices, count = node.slices, len(node.inputs)
            if slices is None:
                return GramPass(count, tasks=node.method.of_tasks)
            return SliceGramPass(Slicing.of(node.info.shape, slices), count, piece_elements(node))
        case ByWhole():
            return WholePass(node) if node.info.elements else _nothing()
        case Product():
            return FactorsPass() if node.info.elements else ()
        case ByBlock(together=Together()):
            raise RuntimeError("statistics of a whole model have to be taken before those of its tensors")
        case ByBlock():
            target = replace(target_of(node), wide=wide)
            statistics = node.method.statistics
            return statistics.begin(target, node.parameters) if statistics else None


def _nothing() -> torch.Tensor:
    import torch

    return torch.empty(0)


def _coefficients(node: ByGram, found: Gram | SliceGrams) -> Any:  # noqa: ANN401
    """One number per input; of slices a tensor with a row per input, in which every slice has its number."""
    if isinstance(found, Gram):
        coefficients = node.method.coefficients(found, node.parameters)
        if len(coefficients) != len(node.inputs):
            raise MethodError(
                f"method {node.method.name!r} gave {len(coefficients)} coefficients for {len(node.inputs)} inputs"
            )
        return coefficients
    import torch

    made = torch.empty(len(node.inputs), found.products.shape[1], dtype=torch.float64)
    for number, gram in enumerate(found):
        made[:, number] = torch.tensor(node.method.coefficients(gram, node.parameters), dtype=torch.float64)
    return made


def _measured_below(node: Node) -> Iterator[Node]:
    return (part for part in surveyed(node) if part is not node)


class FactorsPass(Pass["tuple[torch.Tensor, ...]"]):
    """A pass that takes in the factors of a product, whole: what is to be held while rows are multiplied by them."""

    def __init__(self) -> None:
        self.factors: tuple[torch.Tensor, ...] = ()

    def measure(self, block: int, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The factors, in main memory, where every lane may use them."""
        return tuple(factor.cpu() for factor in inputs)

    def add(self, block: int, measured: tuple[torch.Tensor, ...]) -> None:
        """Keep them."""
        self.factors = measured

    def finish(self) -> tuple[torch.Tensor, ...]:
        """They."""
        return self.factors


class WholePass(Pass["torch.Tensor"]):
    """A pass that computes a whole tensor: the only one that gets the tensor's elements all at once."""

    def __init__(self, node: ByWhole) -> None:
        self.node = node
        self.result: Any = None

    def measure(self, block: int, inputs: Sequence[Any]) -> torch.Tensor:
        """The whole output, flattened, in main memory: any lane may be the one that wants a block of it."""
        import torch

        from streammerge.compute.devices import is_out_of_memory  # late: it needs torch

        node = self.node
        try:
            made = node.method.compute(target_of(node).place(0), inputs, node.parameters)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            finite = all(bool(torch.isfinite(values).all()) for values in inputs if isinstance(values, torch.Tensor))
            if finite and not isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                raise
            reason = f"torch can't decompose it ({error})" if finite else "an input holds infinite values or NaNs"
            raise MethodError(
                f"method {node.method.name!r} can't be applied to this tensor: {reason}",
                advice="Copy the tensor with --keep or a rule" + ("." if finite else ", or mend the input."),
            ) from error
        return made.reshape(-1).cpu()

    def add(self, block: int, measured: torch.Tensor) -> None:
        """Keep it."""
        self.result = measured

    def finish(self) -> torch.Tensor:
        """It, from which blocks will be cut."""
        made: torch.Tensor = self.result
        return made


class TogetherSurvey:
    """The passes over several tensors as if they were one, their blocks counted through in the tensors' order.

    The `result` is there when it is complete. `dtypes` are what members are computed in, by their `id`, where it is not
    their own. It need not be suspicious: each of the tensors is given to its method once more, when it is written.
    """

    suspicious = False

    def __init__(self, together: Together, dtypes: Mapping[int, DType] | None = None) -> None:
        self.members = together.members
        self.dtypes = dtypes or {}
        self.known: dict[int, Any] = {}
        self.blocks = together_blocks(together)
        self.first_blocks = [member.first_block for member in self.members]
        first, parts = self.members[0], tuple(map(target_of, self.members))
        elements = sum(part.elements for part in parts)
        wide = any(self._dtype(member).bits == 64 for member in self.members)
        assert first.method.statistics is not None
        self.step: Pass[Any] | None = None
        self.result: Any = None
        target = replace(target_of(first), name="", shape=(elements,), parts=parts, wide=wide)
        self._take(first.method.statistics.begin(target, first.parameters))

    @property
    def complete(self) -> bool:
        """Whether the statistics are known."""
        return self.step is None

    @property
    def ordered(self) -> bool:
        """Whether what is measured must be added in the order of the blocks."""
        return self.step is not None and self.step.ordered

    @property
    def bulky(self) -> bool:
        """Whether the measure of a block is a good part of its size."""
        return self.step is not None and self.step.bulky

    @property
    def step_elements(self) -> int:
        """How many elements a block to be measured has at the most."""
        return piece_elements(self.members[0])

    def measure(self, maker: Maker, block: int) -> Any:  # noqa: ANN401
        """What the current pass wants to know of one block."""
        assert self.step is not None
        number = bisect.bisect_right(self.first_blocks, block) - 1
        member = self.members[number]
        measurer = maker.measurer(self._dtype(member), self.known)
        wants = self.step.wants(block)
        return measurer.measure(self.step, member, block - member.first_block, block) if wants else None

    def measure_all(self, stretches: Stretches, blocks: range) -> dict[int, Any]:
        """The same of many blocks, by their numbers, one tensor after the other."""
        found = dict.fromkeys(blocks)
        assert self.step is not None
        while blocks:
            number = bisect.bisect_right(self.first_blocks, blocks[0]) - 1
            member = self.members[number]
            first = member.first_block
            own = range(blocks.start, min(blocks.stop, first + piece_count(member)))
            measurer = stretches(self._dtype(member), self.known)
            pieces = [block - first for block in own if self.step.wants(block)]
            found.update(measurer.measure_all(self.step, member, pieces, first))
            blocks = range(own.stop, blocks.stop)
        return found

    def _dtype(self, member: ByBlock) -> DType:
        """What the tensor is computed in."""
        return self.dtypes.get(id(member)) or compute_dtype(member, member.info.dtype)

    def add(self, block: int, measured: Any) -> None:  # noqa: ANN401
        """Take in the measure of one block."""
        assert self.step is not None
        if measured is not None:
            self.step.add(block, measured)

    def finish_pass(self) -> None:
        """After the last block: go on to the next pass, if there is one."""
        assert self.step is not None
        self._take(self.step.finish())

    def _take(self, outcome: Any) -> None:  # noqa: ANN401
        if isinstance(outcome, Pass):
            self.step = outcome
        else:
            self.step, self.result = None, outcome
