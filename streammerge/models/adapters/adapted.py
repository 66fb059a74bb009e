"""A model with adapters in it: a view whose changed tensors are expressions over the model's and the adapters' factors.

Adapters are put in one after the other, in their order; it matters only where one of them goes by the weights that it
finds, as DoRA does. What none of them changes is the model's, bytes of its file that are copied as such.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from streammerge.compute.expressions import Node
from streammerge.errors import SHOWN, PlanError, count, listed, plural
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.files import Adapter, kinds_of
from streammerge.models.adapters.targets import Targets
from streammerge.models.configs import embedding_and_head
from streammerge.models.dialects import Source
from streammerge.models.dialects.pieces import rows
from streammerge.models.views import Decoded, View
from streammerge.tensors import Model, TensorInfo, described

Strength = Callable[[str], float]
"""How strong an adapter is in the tensor of this name."""

USE_BYTES: Final = 900
"""What is kept in memory of a module: its tensors by their roles, and which tensor it changes."""


@dataclass(frozen=True)
class Given:
    """An adapter that is to be put into a model: what it is called, and how strong it is in each tensor."""

    name: str
    adapter: Adapter
    strength: Strength


@dataclass(frozen=True, slots=True)
class Use:
    """A module's part in a tensor: rows [start, stop) of it are changed as rows from `first` on of the module's are."""

    given: Given
    module: str
    part: str
    start: int
    stop: int
    first: int
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A line of an account: what a module does to which tensors, with which rank and which strength of its own."""

    module: str
    tensors: tuple[str, ...]
    kind: str
    rank: int
    scale: float
    weight: float

    def __str__(self) -> str:
        rank = f", rank {self.rank}" if self.rank else ""
        return f"{self.module} → {', '.join(self.tensors)}: {self.kind}{rank}, scale {self.scale:g} × {self.weight:g}"


@dataclass(frozen=True)
class Account:
    """What became of an adapter: which of its modules are applied to which tensors, and which are left out.

    `told` are further things that the user should know.
    """

    model: str
    adapter: str
    modules: int
    rows: Callable[[], Iterator[Row]]
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    scales: Mapping[float, int]
    tensors: int
    left: tuple[str, ...] = ()
    told: tuple[str, ...] = ()

    @property
    def applied(self) -> int:
        """How many modules are applied."""
        return self.modules - len(self.left)

    @property
    def _all(self) -> str:
        return count(range(self.modules), "module")

    def __str__(self) -> str:
        ranks = [f"rank {_spread(self.ranks)}"] if self.ranks else []
        scales = [f"scale {_spread(self.scales)}"] if self.scales else []
        what = ", ".join([kinds_of(self.kinds) or "nothing", *ranks, *scales])
        return (
            f"{self.adapter} in {self.model}: {self.applied:,} of {self._all} applied, "
            f"to {count(range(self.tensors), 'tensor')}: {what}"
        )

    def remarks(self) -> Iterator[str]:
        """What is told of it, a sentence each."""
        yield str(self)
        yield from (f"{self.adapter}: {told}" for told in self.told)
        if self.left:
            yield (
                f"{self.adapter}: {count(self.left, 'module')} {plural(self.left, 'is', 'are')} not in {self.model} "
                f"and left out: {listed(self.left)}"
            )

    def to_json(self) -> dict[str, object]:
        """Plain values, each module with what it does."""
        return {
            "model": self.model,
            "adapter": self.adapter,
            "modules": self.modules,
            "applied": self.applied,
            "left_out": list(self.left),
            "rows": [
                {
                    "module": row.module,
                    "tensors": list(row.tensors),
                    "kind": row.kind,
                    "rank": row.rank,
                    "scale": row.scale,
                    "weight": row.weight,
                }
                for row in self.rows()
            ],
        }


def _spread(found: Mapping[int, int] | Mapping[float, int]) -> str:
    """`16`, or `4 to 16`."""
    low, high = min(found), max(found)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


@dataclass(frozen=True, eq=False)
class Adapted(View):
    """A model with adapters in it; `uses` has of each changed tensor what changes it, in the adapters' order.

    `resized` are the tensors that have other rows than the model's: those of a vocabulary that was resized.
    """

    model: Model
    uses: Mapping[str, Sequence[Use]]
    accounts: tuple[Account, ...] = ()
    resized: Mapping[str, TensorInfo] = field(default_factory=dict)

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The model's values' tensors."""
        return {**self.values.tensors, **self.resized} if self.resized else self.values.tensors

    def adapters_of(self, name: str) -> list[str]:
        """What the adapters are called that change a tensor."""
        return list(dict.fromkeys(use.given.name for use in self.uses.get(name, ()) if use.given.strength(name)))

    @property
    def kept_bytes(self) -> int:
        """What is kept in memory of all modules."""
        return USE_BYTES * sum(account.modules for account in self.accounts)

    def node(self, name: str) -> Node:
        """The tensor, changed by every module that changes it."""
        node = self.values.node(name)
        for use in self.uses.get(name, ()):
            strength = use.given.strength(name)
            if strength:
                node = _used(use, node, strength)
        return node


def _used(use: Use, node: Node, strength: float) -> Node:
    change, height = _change(use), use.stop - use.start
    if change.is_linear and change.shape and change.shape[0] != height:
        change = change.of_rows(use.first, use.first + height)
    if height == rows(node.info):
        return change.applied(node, strength)
    return change.applied_to_rows(node, use.start, use.stop, strength)


def _change(use: Use) -> Change:
    change = use.given.adapter.changes(use.module)[use.part]
    return change.turned() if use.turned else change


def adapted(name: str, model: Model, given: Iterable[Given], *, drop: bool = False) -> Adapted:
    """The model of this name with the adapters in it; PlanError if a module has no tensor there, unless those are to be
    dropped, or doesn't fit the one that it has."""
    values = model if isinstance(model, Decoded) else Decoded(model)
    targets, uses, resized = Targets(values.tensors), dict[str, list[Use]](), dict[str, TensorInfo]()
    accounts = tuple(_Placing(name, values, targets, each, uses, resized, drop=drop).account() for each in given)
    return Adapted(values, uses, accounts, resized)


@dataclass
class _Placing:
    """The work of `adapted` for one adapter: finds each module's tensors, and collects what doesn't fit."""

    name: str
    model: Decoded
    targets: Targets
    given: Given
    uses: dict[str, list[Use]]
    resized: dict[str, TensorInfo]
    drop: bool
    left: dict[str, str] = field(default_factory=dict)
    """The modules that aren't in the model, each with the part that it would change there."""
    misfits: list[str] = field(default_factory=list)
    tensors: set[str] = field(default_factory=set)
    placed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    scales: Counter[float] = field(default_factory=Counter)

    def account(self) -> Account:
        """Go through all modules; PlanError with all of a kind that is wrong."""
        adapter = self.given.adapter
        for module in adapter.roles:
            self._place(module)
        self._refuse()
        told = [
            f"{count(range(number), 'module')} {'has' if number == 1 else 'have'} {what}: it counts as the rank"
            for what, number in self.told.items()
        ]
        if not any(self.given.strength(tensor) for tensors in self.placed.values() for tensor in tensors):
            told.append("its weight is 0 in all of these tensors: it changes nothing, and is not read")
        told += self._told_of_tokens()
        return Account(
            self.name,
            self.given.name,
            len(adapter),
            functools.partial(_rows, self.given, self.placed),
            self.kinds,
            self.ranks,
            self.scales,
            len(self.tensors),
            tuple(self.left),
            tuple(told),
        )

    def _told_of_tokens(self) -> Iterator[str]:
        """What has to be known of a vocabulary that was resized, and of an embedding that is the output's too."""
        for name in sorted(self.resized.keys() & self.tensors):
            now, before = self.resized[name].shape[0], self.model.tensors[name].shape[0]
            told = "the tokenizer that goes with them is the adapter's, not the model's"
            yield f"{name} has {now:,} rows by it, and had {before:,}: {told}"
        embedding, head = embedding_and_head(self.model.tensors)
        if embedding in self.tensors and not head and self.kinds.keys() != {"tokens"}:
            yield f"it changes {embedding}: where a head is tied to that, so that it isn't stored, it changes too"

    def _place(self, module: str) -> None:
        changes = self.given.adapter.changes(module)
        found = {part: self.targets.find(module, part) for part in changes}
        lacking = [part for part, source in found.items() if source is None and not changes[part].optional]
        if lacking:
            self.left[module] = lacking[0]
            return
        for part, source in found.items():
            if source is not None:
                self._use(module, part, changes[part], source)
        first = next(iter(changes.values()))
        self.kinds[first.kind] += 1
        self.scales[first.scale] += 1
        self.ranks.update([first.rank] if first.rank else [])
        self.told.update([first.told] if first.told else [])

    def _use(self, module: str, part: str, change: Change, source: Source) -> None:
        if problem := self._misfit(change, source):
            self.misfits.append(f"{module}.{part}   {problem}")
            return
        if other := self._overlapped(source):
            self.misfits.append(f"{module}.{part}   {other} changes {', '.join(source.tensors)} too")
            return
        if change.resizes(source.info.shape) and self.given.strength(source.tensors[0]):
            self.resized[source.tensors[0]] = described(source.info.dtype, change.shape)
        first = 0
        for piece in source.pieces:
            height = piece.stop - piece.start
            use = Use(self.given, module, part, piece.start, piece.stop, first, source.transposed)
            self.uses.setdefault(piece.tensor, []).append(use)
            first += height
        self.tensors.update(source.tensors)
        self.placed[module] = (*self.placed.get(module, ()), *source.tensors)

    def _overlapped(self, source: Source) -> str:
        """Another module of the adapter that changes some of the same rows; nothing if there is none."""
        for piece in source.pieces:
            for use in self.uses.get(piece.tensor, ()):
                if use.given is self.given and use.start < piece.stop and piece.start < use.stop:
                    return use.module
        return ""

    def _misfit(self, change: Change, source: Source) -> str:
        """Why a change can't be made to a tensor; nothing if it can."""
        names = ", ".join(source.tensors)
        infos = [self.model.tensors[name] for name in source.tensors]
        if any(name in self.model.left for name in source.tensors):
            return f"{names} is quantised in a way that streammerge can't decode"
        if not all(info.dtype.mergeable for info in infos):
            return f"{names} is {infos[0].dtype}, which is never changed"
        if len(source.pieces) > 1 and not change.is_linear:
            return f"{change.kind} of what is several tensors here: {names}"
        if source.transposed and not change.can_be_turned:
            return f"{change.kind} of {names}, which lies transposed"
        if not self.resized.keys().isdisjoint(source.tensors):
            return f"another adapter has given {names} other rows"
        if change.resizes(source.info.shape) and {*source.tensors} <= {*embedding_and_head(self.model.tensors)}:
            is_whole = self.given.strength(names) in (0, 1)
            return (
                ""
                if is_whole
                else f"has {change.shape[0]} rows, and {names} {infos[0].shape[0]}: its weight has to be 1"
            )
        if not change.fits(source.info.shape):
            return f"changes {list(change.shape)}, and {names} is {list(source.info.shape)}"
        return ""

    def _check_vocabulary(self) -> None:
        """Add to what doesn't fit where the input's embedding and the output's come to have different rows."""
        names = [name for name in embedding_and_head(self.model.tensors) if name]
        before, after = ({found[name].shape[0] for name in names} for found in (self.model.tensors, self._after))
        if len(before) == 1 and len(after) > 1:
            rows = (f"{self._after[name].shape[0]} rows of {name}" for name in names)
            self.misfits.append(f"it comes to {' and '.join(rows)}, of which there should be as many")

    @property
    def _after(self) -> Mapping[str, TensorInfo]:
        return {**self.model.tensors, **self.resized}

    def _refuse(self) -> None:
        if self.resized:
            self._check_vocabulary()
        if self.misfits:
            raise PlanError(
                f"{self.given.name}: {count(self.misfits, 'module')} of {len(self.given.adapter):,} "
                f"{plural(self.misfits, 'does', 'do')} not fit the tensors of {self.name}",
                found=self.misfits,
                advice="Name the model that the adapter was made for.",
            )
        everything = f"{len(self.given.adapter):,}"
        if self.left and len(self.left) == len(self.given.adapter):
            raise PlanError(
                f"{self.given.name}: none of its modules ({everything}) is in {self.name}",
                found=list(self._told()),
                advice="Name the model that the adapter was made for, or leave the adapter out.",
            )
        if self.left and not self.drop:
            raise PlanError(
                f"{self.given.name}: {count(self.left, 'module')} of {everything} "
                f"{plural(self.left, 'is', 'are')} not in {self.name}",
                found=list(self._told()),
                advice="Name the model that the adapter was made for, or leave them out with --on-missing drop.",
            )

    def _told(self) -> Iterator[str]:
        """The modules that aren't in the model; beside those that are shown, what is nearest there."""
        for number, (module, part) in enumerate(self.left.items()):
            near = self.targets.near(module, part) if number < SHOWN else ""
            yield f"{module}.{part}" + (f"   the nearest: {near}" if near else "")


def _rows(given: Given, placed: Mapping[str, tuple[str, ...]]) -> Iterator[Row]:
    """An account, line by line, made when it is asked for."""
    for module, tensors in placed.items():
        change = next(iter(given.adapter.changes(module).values()))
        yield Row(module, tensors, change.kind, change.rank, change.scale, given.strength(tensors[0]))
