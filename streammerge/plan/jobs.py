"""The jobs of a merge: what each tensor of the output is made of, and what it costs, once for all of a kind."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from streammerge.compute import costs
from streammerge.compute.card_costs import OnCard
from streammerge.compute.costs import compute_dtype, copied_from, is_copy
from streammerge.compute.expressions import Node, Together, has_external, is_merged, measured_together
from streammerge.compute.job import Job
from streammerge.compute.kernels.maker import is_compiled, is_summed, maker_bytes
from streammerge.compute.magnitudes import check_magnitudes
from streammerge.errors import PlanError
from streammerge.formats.layout import OutputLayout
from streammerge.models.decisions import Fate
from streammerge.models.encoding import has_codes
from streammerge.models.merged import Merged
from streammerge.recipe.options import Options
from streammerge.tensors import DType, TensorInfo


@dataclass(frozen=True, slots=True)
class Kind:
    """What the jobs of all tensors of one fate have in common: so many, and what each of them costs.

    `operations` are of all its elements, `decomposed` those of decompositions of matrices; `has_loops` says whether
    there are compiled loops for it, on whatever device it is computed.

    `is_looked_at` says of copies that their bytes go through our memory, `is_compiled` of what is computed that it is
    all done by compiled loops, `is_summed` that all but products of matrices is. `is_together` and `is_told` say of
    their expressions that statistics are taken of the whole model, and that nothing is in them that can't be told
    apart. `card_bytes` is what of the `held_bytes` a card would hold.
    """

    info: TensorInfo
    count: int
    compute: DType | None
    is_looked_at: bool
    is_together: bool
    is_told: bool
    is_compiled: bool
    is_summed: bool
    lane_bytes: int
    on_card: OnCard
    held_bytes: int
    card_bytes: int
    bytes_read: int
    passes: int
    operations: int
    decomposed: int
    has_loops: bool

    @classmethod
    def of(cls, fate: Fate, node: Node, options: Options) -> Kind:
        """By the expression of the first of them."""
        info = fate.info
        # nobody looks at what the system copies: its bytes go through our memory instead, as they are
        is_looked_at = options.on_nonfinite == "error" and info.dtype.has_nonfinite and is_copy(node, info)
        compute = info.dtype if is_looked_at else _compute_dtype(node, info, options)
        if compute is not None:
            check_magnitudes(fate.first, node, compute)
            _check_scales(fate.first, node, compute)
        node = copied_from(node) if is_looked_at else node
        has_loops = compute is not None and is_compiled(node, info.dtype, compute)
        is_by_kernels = has_loops and options.device == "cpu"
        return cls(
            info,
            fate.tensors,
            compute,
            is_looked_at,
            any(measured_together(node)),
            not has_external(node),
            is_by_kernels,
            compute is not None and options.device == "cpu" and is_summed(node, info.dtype, compute),
            _maker_bytes(node, info, compute, is_compiled=is_by_kernels),
            OnCard() if compute is None or options.device == "cpu" else OnCard.of(node, info, compute),
            costs.held_bytes(node, compute or info.dtype),
            costs.card_bytes(node, compute or info.dtype),
            costs.bytes_read(node),
            costs.passes(node),
            0 if compute is None else costs.operations(node),
            costs.decomposed(node),
            has_loops,
        )


def _check_scales(name: str, node: Node, compute: DType) -> None:
    """PlanError if scales would be rounded to 16 bits."""
    if compute.bits < 32 and has_codes(node):
        raise PlanError(
            f"tensor {name}: it is stored with a scale, which {compute} is too coarse for",
            advice="Leave out --compute-dtype, or use fp32 or fp64.",
        )


def _maker_bytes(node: Node, info: TensorInfo, compute: DType | None, *, is_compiled: bool) -> int:
    if compute is None:
        return 0
    return maker_bytes(node, info) if is_compiled else costs.lane_bytes(node, info, compute)


class Jobs(Sequence[Job]):
    """A job for every tensor of the output, in the order of its bytes, made when its turn comes."""

    def __init__(self, merged: Merged, layout: OutputLayout, options: Options) -> None:
        self._decisions = merged.decisions
        self._files = layout.files
        self._ends = list(itertools.accumulate(len(file.header.names) for file in layout.files))
        self._kinds = tuple(
            None if fate.action == "dropped" else Kind.of(fate, merged.nodes[fate.first], options)
            for fate in merged.decisions.fates
        )
        self._nodes = merged.nodes

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of jobs that there are."""
        return [kind for kind in self._kinds if kind is not None]

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(kind.count * kind.info.nbytes for kind in self.kinds)

    @property
    def together(self) -> int:
        """How many tensors are measured with others before anything is written."""
        return sum(kind.count for kind in self.kinds if kind.is_together)

    def firsts(self) -> Iterator[Node]:
        """The expression of the first tensor of each kind: in every other the same methods are applied."""
        return (self._nodes[fate.first] for fate in self._decisions.fates if fate.action != "dropped")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: int) -> Job:  # type: ignore[override]  # nobody wants slices
        place = range(len(self))[place]
        file = bisect.bisect_right(self._ends, place)
        header, prefix = self._files[file].header, self._files[file].prefix
        place -= self._ends[file] - len(header.names)
        return self._job(prefix + header.names[place], file, header.starts[place])

    def __iter__(self) -> Iterator[Job]:
        for number, file in enumerate(self._files):
            for name, start in zip(file.header.names, file.header.starts, strict=True):
                yield self._job(file.prefix + name if file.prefix else name, number, start)

    def where(self, wanted: Callable[[Kind], bool]) -> Iterator[Job]:
        """The jobs of these kinds."""
        numbers = {number for number, kind in enumerate(self._kinds) if kind is not None and wanted(kind)}
        return (job for job in self if self._decisions.number(job.name) in numbers) if numbers else iter(())

    def _job(self, name: str, file: int, start: int) -> Job:
        kind = self._kinds[self._decisions.number(name)]
        assert kind is not None
        make = self._looked_at if kind.is_looked_at else self._made
        return Job(name, kind.info, None, kind.compute, file, start, make, is_compiled=kind.is_compiled)

    def _made(self, name: str) -> Node:
        return self._nodes[name]

    def _looked_at(self, name: str) -> Node:
        return copied_from(self._nodes[name])


def _compute_dtype(node: Node, info: TensorInfo, options: Options) -> DType | None:
    """What a tensor is computed in: nothing if its bytes are copied; the user's choice holds for merged ones."""
    if is_copy(node, info):
        return None
    return (options.compute_dtype if is_merged(node) else None) or compute_dtype(node, info.dtype)


def together_of(jobs: Iterable[Job]) -> Mapping[Together, Mapping[int, DType]]:
    """What has to be measured of the whole model before anything is written, and what its tensors are computed in."""
    dtypes: dict[int, DType] = {}
    found: dict[int, Together] = {}
    for job in jobs:
        if job.compute is not None:
            for part, together in measured_together(job.node):
                found[id(together)] = together
                dtypes.setdefault(id(part), job.compute)
    return {
        together: {id(member): dtypes[id(member)] for member in together.members if id(member) in dtypes}
        for together in found.values()
    }
