"""Tensors that are copied from a model: as they are stored, decoded, or mended where they have to be positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from streammerge.errors import count, plural
from streammerge.models.codes import Quantised
from streammerge.models.decisions import Decision
from streammerge.models.dtypes import Storage, stored_as
from streammerge.models.positions import are_positions, mended, what_is_broken
from streammerge.models.quantised import CodedModels
from streammerge.models.views import Decoded, node_of
from streammerge.plan.baking import told_adapters
from streammerge.plan.meaning import Meaning
from streammerge.plan.problems import Problems
from streammerge.tensors import DType, Model, TensorInfo


@dataclass
class Copies:
    """Decides on copies; `values` are the models as numbers, `coded` says which weights of theirs are codes.

    `codes_of` are weights whose codes are copied, each with the model that they are of. The rest is told: what was
    `mended`, what is `uncast` because it can't be decoded, by kind, and what is `alike` already, by the dtype that it
    was to get.
    """

    models: Mapping[str, Model]
    layout: str
    values: Mapping[str, Decoded]
    coded: CodedModels
    meaning: Meaning
    problems: Problems
    codes_of: dict[str, str] = field(default_factory=dict)
    mended: dict[str, str] = field(default_factory=dict)
    uncast: dict[str, dict[str, None]] = field(default_factory=dict)
    alike: dict[DType, dict[str, None]] = field(default_factory=dict)
    looked_at: dict[tuple[str, str], str] = field(default_factory=dict)

    def copy(self, name: str, model: str, why: str, dtype: Storage | None) -> Decision:
        """The tensor as this model has it, in the dtype that is wanted."""
        self.meaning.note_copied(name, model)
        if broken := self._broken(model, name):
            return self._mend(name, model, broken)
        node, quantised = node_of(self.models[model], name), self.coded.find(model, name)
        if quantised is not None:
            if self._stay(quantised, node.info, dtype):
                self._note_codes(name, model, quantised, node.info, dtype)
                dtype = None
            elif not quantised.is_readable:
                return self.refuse(name, {model: quantised}, self.problems.uncopied)
            else:
                node, why = self.values[model].node(name), f"{why}, decoded"
        why += told_adapters(self.models, name, {model: node}, node)
        info = stored_as(node.info, dtype)
        cast = "" if info == node.info else f", stored as {info.dtype}"
        return Decision(name, "copied", f"from {model}: {why}{cast}", info, node)

    def _broken(self, model: str, name: str) -> str:
        """What is wrong with a model's tensor that has to be positions, if it has and anything is; looked at once."""
        if not are_positions(name, self.models[model].tensors[name]):
            return ""
        if (model, name) not in self.looked_at:
            self.looked_at[model, name] = what_is_broken(self.models[model], name)
        return self.looked_at[model, name]

    def _mend(self, name: str, model: str, broken: str) -> Decision:
        node = mended(name, self.models[model].tensors[name].shape)
        self.mended[name] = f"{name}: {model}'s are no positions ({broken}), and are written as 0, 1, 2 …"
        return Decision(name, "copied", f"mended: {model}'s are {broken}", node.info, node)

    def _stay(self, quantised: Quantised, info: TensorInfo, dtype: Storage | None) -> bool:
        """Whether a weight's codes are copied, with all that belongs to them."""
        is_kept = not quantised.is_readable or stored_as(info, dtype) == info
        return is_kept and self.coded.stay_whole(quantised)

    def _note_codes(self, name: str, model: str, quantised: Quantised, info: TensorInfo, dtype: Storage | None) -> None:
        """Note codes that are copied, and why they don't get the dtype that is wanted."""
        self.codes_of[name] = model
        if dtype is not None and not quantised.is_readable:
            self.uncast.setdefault(quantised.kind, {})[name] = None
        elif dtype is not None:
            self.alike.setdefault(info.dtype, {})[name] = None

    def refuse(self, name: str, quantised: Mapping[str, Quantised], problems: list[str]) -> Decision:
        """Note that codes can't be decoded."""
        kinds = ", ".join(f"{model}: {weight.kind}" for model, weight in quantised.items())
        problems.append(f"{name}   {kinds}")
        return Decision(name, "dropped", "its codes can't be decoded", self.models[self.layout].tensors[name])

    def beside(self, name: str, info: TensorInfo) -> Decision:
        """What belongs to a weight's codes goes where they go: copied with them, or left out where they are decoded."""
        codes = self.coded.beside.get(name)
        model = self.codes_of.get(codes) if codes is not None else self._marking(self.coded.marks[name])
        if model is None:
            gone = "the weights that it belongs to are decoded"
            if codes is None:
                gone = "no weights with scales of its kind are left"
            return Decision(name, "dropped", gone, info)
        node = node_of(self.models[model], name)
        return Decision(name, "copied", f"from {model}: it belongs to quantised weights", node.info, node)

    def _marking(self, prefix: str) -> str | None:
        """The layout, if it has to keep a mark of scaled weights: some whose names start so are copied as codes."""
        return self.layout if any(codes.startswith(prefix) for codes in self.codes_of) else None

    def remarks(self) -> Iterator[str]:
        """What the user should know of them."""
        yield from self.mended.values()
        for kind, names in self.uncast.items():
            told = f"{count(names, 'quantised weight')} ({kind}) {plural(names, 'stays', 'stay')} as stored"
            yield f"{told}: streammerge can't decode {plural(names, 'it', 'them')}, so no other dtype is given"
        for dtype, alike in self.alike.items():
            told = f"{count(alike, 'weight')} with {plural(alike, 'a scale', 'scales')} {plural(alike, 'is', 'are')}"
            rest = f"all else that this dtype is for is stored as {dtype} without, norms and biases too"
            yield f"{told} {dtype} already, and {plural(alike, 'keeps it', 'keep them')}; {rest}"
