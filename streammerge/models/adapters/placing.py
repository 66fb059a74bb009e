"""Which tensors of a model the modules of an adapter change, and what of it doesn't fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from streammerge.errors import SHOWN, PlanError, count, listed, plural
from streammerge.models.adapters.accounts import Account, Given
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.dialects import unparalleled
from streammerge.models.adapters.experts import Experts
from streammerge.models.adapters.orders import UNKNOWN, is_of_unknown_order
from streammerge.models.adapters.parameters import bare, ends
from streammerge.models.adapters.targets import Targets
from streammerge.models.configs import embedding_and_head
from streammerge.models.dialects import Source
from streammerge.models.views import Decoded
from streammerge.tensors import TensorInfo, described


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


@dataclass
class Placing:
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
    doubles: list[str] = field(default_factory=list)
    """The modules that change what another of the adapter's modules changes."""
    tensors: set[str] = field(default_factory=set)
    placed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)
    kinds: set[str] = field(default_factory=set)

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
        told += self._told_of_tokens()
        told += self._told_of_inversions()
        told += self._told_of_targets()
        return Account(self.name, self.model, self.given, self.placed, tuple(self.left), tuple(told))

    def _told_of_inversions(self) -> Iterator[str]:
        """Which tensors are none of the adapter's, and nothing is made of them."""
        if names := self.given.adapter.inversions:
            are = plural(names, "is", "are")
            yield f"{count(names, 'tensor')} {are} of a textual inversion, and {are} left out: {listed(names)}"

    def _told_of_tokens(self) -> Iterator[str]:
        """What has to be known of a vocabulary that was resized, and of an embedding that is the output's too."""
        for name in sorted(self.resized.keys() & self.tensors):
            now, before = self.resized[name].shape[0], self.model.tensors[name].shape[0]
            told = "the tokenizer that goes with them is the adapter's, not the model's"
            yield f"{name} has {now:,} rows by it, and had {before:,}: {told}"
        embedding, head = embedding_and_head(self.model.tensors)
        if embedding in self.tensors and not head and self.kinds != {"tokens"}:
            yield f"it changes {embedding}: where a head is tied to that, so that it isn't stored, it changes too"

    def _told_of_targets(self) -> Iterator[str]:
        """What the config says is changed, and the model has, and the adapter has nothing of."""
        adapter = self.given.adapter
        configs = [config for config in adapter.configs.values() if config.targets]
        own = {end for module in adapter.roles for end in ends(bare(unparalleled(module)))} if configs else set()
        there = {end for name in self.model.tensors for end in ends(name.removesuffix(".weight"))} if configs else set()
        for config in configs:
            lacking = [target for target in config.targets if target in there and target not in own]
            if lacking:
                yield f"{config.where} names {listed(lacking)} in target_modules, of which the adapter has no weights"

    def _place(self, module: str) -> None:
        changes = self.given.adapter.changes(module)
        found = {part: self._found(module, part, change) for part, change in changes.items()}
        lacking = [part for part, source in found.items() if source is None and not changes[part].optional]
        if lacking:
            self.left[module] = lacking[0]
            return
        for part, source in found.items():
            if source is not None:
                self._use(module, part, changes[part], source)
        first = next(iter(changes.values()))
        self.kinds.add(first.kind)
        self.told.update([first.told] if first.told else [])

    def _found(self, module: str, part: str, change: Change) -> Source | None:
        """The tensor that a module's part is: of experts those of all of them, which may lie transposed."""
        if not isinstance(change, Experts):
            return self.targets.find(bare(module), part)
        source = self.targets.experts(bare(module), part)
        if source is None or not change.fits(source.info.shape):
            return source
        is_turned = self._lies(module, change, source)
        if is_turned is None:
            told = "has square matrices, and nothing tells whether they lie transposed"
            self.misfits.append(f"{module}.{part}   {listed(source.tensors)} {told}")
        return replace(source, transposed=bool(is_turned))

    def _lies(self, module: str, change: Experts, source: Source) -> bool | None:
        """Whether the matrices of experts lie transposed: square ones as others of their layer do; None if none tell.

        PEFT knows experts that are stored apart as one tensor since it says its version, and then none lie transposed.
        """
        told = change.lies(source.info.shape)
        others = (other for other in self.given.adapter.parameters if bare(other) == bare(module) and other != module)
        for other in others if told is None else ():
            for part, beside in self.given.adapter.changes(other).items():
                found = self.targets.experts(bare(other), part)
                told = beside.lies(found.info.shape) if found and isinstance(beside, Experts) else told
        has_version = any("peft_version" in config.said for config in self.given.adapter.configs.values())
        return False if told is None and len(source.pieces) > 1 and has_version else told

    def _use(self, module: str, part: str, change: Change, source: Source) -> None:
        if problem := self._misfit(change, source):
            self.misfits.append(f"{module}.{part}   {problem}")
            return
        if other := self._overlapped(source):
            self.doubles.append(f"{module}.{part}   {other} changes {', '.join(source.tensors)} too")
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
        names = listed(source.tensors)
        infos = [self.model.tensors[name] for name in source.tensors]
        if any(name in self.model.left for name in source.tensors):
            return f"{names} is quantised in a way that streammerge can't decode: name the model as it was before"
        if not all(info.dtype.mergeable for info in infos):
            return f"{names} is {infos[0].dtype}, which is never changed"
        if any(is_of_unknown_order(name, self.model.tensors) for name in source.tensors):
            return f"{names} {UNKNOWN}"
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
        if self.doubles:
            raise PlanError(
                f"{self.given.name}: {count(self.doubles, 'module')} of {len(self.given.adapter):,} "
                f"{plural(self.doubles, 'changes', 'change')} what another changes in {self.name}",
                found=self.doubles,
                advice="It may have the same modules in two namings: leave one of both out of the file.",
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
