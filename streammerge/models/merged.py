"""A merge of models as a model: what becomes of every tensor, decided from the recipe and the headers alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.compute.expressions import ModelStatistics, Node, stored_leaves
from streammerge.compute.parts import unrounded
from streammerge.formats.files import ByteFile
from streammerge.formats.tables import Column
from streammerge.models.adapters.accounts import Account
from streammerge.models.decisions import Decision, Decisions, Expressions
from streammerge.models.extent import Extent
from streammerge.models.layers import Layers, layers_of
from streammerge.models.prediction import Sampling
from streammerge.models.presence import Names
from streammerge.models.tokenizers import Tokenizer
from streammerge.models.views import beneath, node_of
from streammerge.tensors import Model, TensorInfo

if TYPE_CHECKING:
    import torch

    from streammerge.formats.companions import Companion
    from streammerge.models.adapters.factored import Factored
    from streammerge.models.adapters.ranks import Spectrum


@dataclass(frozen=True)
class Merged:
    """A merge, computed when it is read.

    Per input, `left_out` are its tensors that the layout doesn't have, `lacking` the layout's that it doesn't have.
    Inputs of an input that is a merge itself count too, as `inner/model`. `kept_bytes` is what is kept in memory of
    quantised weights, of other names and of adapters. `remarks` are what the user should know of the recipe, `layout`
    is the model whose tensors the merge has, `extent` how much has been planned for it, and `accounts` what became of
    adapters. `restated` are metadata of inputs that have to say something else, or nothing, of the output, `stated` are
    metadata that its tensors need, `config` is what the output's config has to say if it is of another kind than the
    layout. `tokenizer` has the tokens that come out, if they are not the layout's. `sampling` is what has to be said of
    how it is sampled, if the layout is a pipeline, whose tensors don't tell. What reading from it measures of the whole
    model is kept for the next time. `companions` are all that lies beside its weights, if it says so itself.

    Of an adapter that is made of factors `factored` are its parts. What is measured of these, if they have to be, is
    for it to `settle` what is written.
    """

    decisions: Decisions
    left_out: Names = field(default_factory=dict)
    lacking: Names = field(default_factory=dict)
    kept_bytes: int = 0
    remarks: tuple[str, ...] = ()
    layout: Model | None = None
    extent: Extent = field(default_factory=Extent)
    accounts: tuple[Account, ...] = ()
    restated: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, str] = field(default_factory=dict)
    factored: Factored | None = None
    companions: tuple[Companion, ...] | None = None
    config: Mapping[str, Any] | None = None
    tokenizer: Tokenizer | None = None
    sampling: Sampling | None = None
    settle: Callable[[Mapping[str, Spectrum]], Merged] | None = None
    _measured: ModelStatistics = field(default_factory=dict, init=False, repr=False, compare=False)

    @functools.cached_property
    def layers(self) -> Layers:
        """The layers that a gradient goes over: the layout's."""
        return layers_of(self.layout) if self.layout is not None else Layers.of(self.tensors)

    @property
    def path(self) -> Path | None:
        """Where the layout lies, which a config.json may lie beside."""
        return getattr(beneath(self.layout), "path", None) if self.layout is not None else None

    @functools.cached_property
    def tensors(self) -> Column[TensorInfo]:
        """The output's tensors, in the layout's order."""
        return self.decisions.tensors()

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The output's tensors as expressions."""
        return Expressions(self.decisions, self.tensors.names)

    def node(self, name: str) -> Node:
        """The tensor's expression for a merge of this merge: rounded to its stored dtype only if that was asked for."""
        return self.decisions.given(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the merged tensor, in the dtype in which it would be stored."""
        from streammerge.compute.reading import read_merged

        return read_merged(self.nodes[name], self.tensors[name].dtype, start, stop, self._measured)


def as_merged(model: Model) -> Merged:
    """Any model as a merge: its tensors as they are, and what is told of the merge that it is a view of."""
    if isinstance(model, Merged):
        return model
    tensors, inner = model.tensors, beneath(model)

    def copied(name: str) -> Decision:
        info = tensors[name]
        return Decision(name, "copied", "from the model", info, unrounded(node_of(model, name), info))

    made = Decisions(tensors, copied)
    return replace(inner, decisions=made) if isinstance(inner, Merged) else Merged(made, layout=model)


def files_of(merged: Merged) -> list[ByteFile]:
    """Every file that is read by a merge of models that were opened elsewhere."""
    stored = (leaf for node in merged.nodes.values() for leaf in stored_leaves(node))
    return list({id(leaf.file): leaf.file for leaf in stored}.values())
