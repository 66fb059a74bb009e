"""Comparing two models: inner products of every tensor that both have, in one streaming pass."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge.compute.devices import find_devices, open_lanes
from streammerge.compute.expressions import ByBlock, Node
from streammerge.compute.machine import CARD_BLOCKS, MIB, USUAL_BLOCKS, IoMode, choose_io, share_out
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.methods.registry import BlockMethod, Statistics
from streammerge.methods.statistics.gram import Gram, GramPass
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.stretches import Measures, Pending, Stretch
from streammerge.models.adapters.recognition import adapter_text
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.unwrapped import unwrapped
from streammerge.models.views import Decoded
from streammerge.report import Progress, Watch
from streammerge.tensors import DTYPES
from streammerge.tools.comparison import Comparison, ShapeMismatch, Similarity
from streammerge.workers.schedule import run
from streammerge.workers.windows import Window, Work

if TYPE_CHECKING:
    import torch


class ComparingPass(Pass[Any]):
    """One pass for two tensors' inner products, and for whether every element is the same in both, a NaN as a NaN."""

    ordered = True

    def __init__(self) -> None:
        self.gram = GramPass(2, lenient=True)
        self.identical = True

    def measure(self, block: int, inputs: Sequence[torch.Tensor]) -> tuple[bool, Any]:
        """Whether a block is the same, and its products."""
        return are_same(*inputs), self.gram.measure(block, inputs)

    def begin(self, stretch: Stretch, inputs: Sequence[torch.Tensor]) -> Pending | None:
        """The same of many blocks."""
        products = self.gram.begin(stretch, inputs)
        if products is None:
            return None
        unlike = stretch.counts(~_same(*inputs))

        def take(told: Sequence[torch.Tensor]) -> Measures:
            counted = dict(zip(stretch.blocks, told[0].tolist(), strict=True))
            shares, alone = products.take(told[1:])
            return {block: (not counted[block], share) for block, share in shares.items()}, alone

        return Pending([unlike, *products.tensors], take)

    def add(self, block: int, measured: tuple[bool, Any]) -> None:
        """Take a block into account."""
        identical, products = measured
        self.identical &= identical
        self.gram.add(block, products)

    def finish(self) -> tuple[Gram, bool]:
        """What is known of the whole tensors."""
        return self.gram.finish(), self.identical


def are_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all values are equal, or NaN in both."""
    import torch

    return torch.equal(a, b) or bool(_same(a, b).all())


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of every value whether both have it, or NaN."""
    return a.eq(b) | (a.isnan() & b.isnan())


INNER_PRODUCTS = BlockMethod(
    name="inner products",
    parameters=(),
    base="none",
    models=(2, 2),
    doc="",
    statistics=Statistics(lambda _, __: ComparingPass()),
)
"""Only surveyed, never computed."""


LANE_BYTES = 8 * MIB
"""What a lane takes that compares: two blocks as stored and in float64, and pieces of their differences."""


def compare_models(
    a: Checkpoint,
    b: Checkpoint,
    *,
    match: str = "*",
    device: str = "cpu",
    threads: int | None = None,
    io: IoMode = "auto",
    watch: Watch | None = None,
) -> Comparison:
    """The cosine similarity and distance of every floating-point tensor that both models have in the same shape.

    Codes with a scale are compared by their values, those that can't be decoded not at all.
    """
    bare = unwrapped({"A": a, "B": b}, "A")
    tensors_a, tensors_b = (model.tensors for model in bare.models.values())
    names_a = [name for name in tensors_a if fnmatch.fnmatchcase(name, match)]
    names_b = [name for name in tensors_b if fnmatch.fnmatchcase(name, match)]
    shared = [name for name in names_a if name in tensors_b]
    mismatched = [name for name in shared if tensors_a[name].shape != tensors_b[name].shape]
    alike = [name for name in shared if tensors_a[name].shape == tensors_b[name].shape]
    values = [Decoded(model) for model in bare.models.values()]
    comparable = [name for name in alike if all(model.has_values(name) for model in values)]
    found: dict[str, Similarity] = {}
    progress = Progress(sum(tensors_a[name].nbytes + tensors_b[name].nbytes for name in comparable))
    works = (_Comparing(name, [model.node(name) for model in values], found, progress) for name in comparable)
    paths = [file.path for file in (*a.files, *b.files)]
    devices = find_devices(device)
    allotted = replace(share_out(LANE_BYTES, threads), blocks=CARD_BLOCKS.get(devices[0].type, USUAL_BLOCKS))
    lanes = open_lanes(devices, choose_io(io, paths), allotted)
    run(works, [TensorMaker(lane) for lane in lanes], lambda: watch(progress) if watch else None)
    return Comparison(
        path_a=str(a.path),
        path_b=str(b.path),
        similarities=tuple(found[name] for name in comparable),
        shape_mismatches=tuple(ShapeMismatch(n, tensors_a[n].shape, tensors_b[n].shape) for n in mismatched),
        only_in_a=tuple(name for name in names_a if name not in tensors_b),
        only_in_b=tuple(name for name in names_b if name not in tensors_a),
        not_compared=tuple(name for name in alike if name not in found),
        adapter_a=adapter_text(a.tensors),
        adapter_b=adapter_text(b.tensors),
        remarks=bare.remarks,
    )


class _Comparing(Work):
    """A tensor under comparison: what is left of it are the figures that it puts among those found."""

    def __init__(self, name: str, nodes: Sequence[Node], found: dict[str, Similarity], progress: Progress) -> None:
        both = ByBlock(nodes[0].info, INNER_PRODUCTS, {}, tuple(nodes))
        super().__init__(name, both, DTYPES["F64"], progress)  # to the last digit
        self._found = found

    def begin_pass(self) -> list[Window]:
        """The windows of the one pass; when it is done, the figures."""
        if self.survey.complete:
            self._found[self.name] = _similarity(self)
        return super().begin_pass()


def _similarity(work: Work) -> Similarity:
    gram, identical = work.survey.known[id(work.node)]
    info = work.node.info
    return Similarity(
        name=work.name,
        shape=info.shape,
        elements=info.elements,
        cosine=gram.cosine(0, 1),
        norm_a=gram.norm(0),
        norm_b=gram.norm(1),
        norm_difference=0.0 if identical else gram.distance(1),
        identical=identical,
    )
