"""Which dict in a checkpoint of torch is the model's state dict, and which tensors of the file are not in it.

Training programs wrap a state dict in dicts of their own, beside its averages, the optimizer's tensors, the state of
random generators. It is found by structure: by names as modules give them (`layer.weight`), or a key that is known to
wrap a model. Where more than one fits, none is picked: whoever asks has to name it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from streammerge.errors import SHOWN
from streammerge.formats.torchzip.machine import Bounds, Inert, MalformedPickleError, PickledDict, PickledObject
from streammerge.formats.torchzip.pickles import PickledStorage, PickledTensor, Unreadable

TENSORS: Final = (PickledTensor, PickledStorage, Unreadable)
"""What stands for a tensor, or for something of that kind."""

TOP: Final = "."
"""What the outermost dict is called, as the entry to take."""

_MODEL: Final = re.compile(r"(?<![a-z])(state_?dict|model|module|net|network|generator|ema|params|weights?)(?![a-z])")
_TRAINING: Final = re.compile(r"(?<![a-z])(optim[a-z]*|(lr)?schedulers?|scaler|rng|callbacks?|loops)(?![a-z])")
_LOOKED_AT: Final = 400  # bytes of what a pickle may take for each list, dict or object that is looked into
_SHOWN_PATH: Final = 200  # characters of a path that are shown

Path = tuple["Path", str] | None
"""The keys that lead to a value, the last one first; None is the outermost value's."""


class NoStateDictError(Exception):
    """No dict with names in the checkpoint holds tensors."""


class ChoiceError(Exception):
    """It can't be told which dict is the model, or it has tensors that would be lost; `found` lists what there is.

    `example` is an entry that can be chosen, if there is one.
    """

    def __init__(self, what: str, found: list[str], example: str) -> None:
        super().__init__(what)
        self.what, self.found, self.example = what, found, example


@dataclass(frozen=True, slots=True)
class LeftTensors:
    """Tensors of a file that are not in the model: how many, and the names of the first."""

    count: int = 0
    first: tuple[str, ...] = ()

    @classmethod
    def of(cls, paths: Iterable[Path]) -> LeftTensors:
        """All these, the first five by name."""
        rest = iter(paths)
        first = tuple(map(text_of, islice(rest, SHOWN)))
        return cls(len(first) + sum(1 for _ in rest), first)

    def __add__(self, other: LeftTensors) -> LeftTensors:
        return LeftTensors(self.count + other.count, (*self.first, *other.first)[:SHOWN])

    def to_json(self) -> dict[str, Any]:
        """The same in plain values."""
        return {"count": self.count, "first": list(self.first)}

    def __str__(self) -> str:
        noun = "1 tensor that is" if self.count == 1 else f"{self.count:,} tensors that are"
        return f"{noun} not the model's: {', '.join(self.first)}{', …' if self.count > len(self.first) else ''}"


NONE_LEFT: Final = LeftTensors()


@dataclass(slots=True)
class _Candidate:
    """A dict: how many tensors it has under names, what makes it look like a state dict (its tensors' names, its key),
    and the most tensors that a dict below it has which looks like one."""

    path: Path
    values: PickledDict
    count: int
    dotted: bool
    named: bool
    below: int = 0

    @classmethod
    def of(cls, path: Path, values: PickledDict) -> _Candidate:
        names = [key for key, value in values.items() if isinstance(key, str) and isinstance(value, TENSORS)]
        dotted = any("." in name for name in names)
        return cls(path, values, len(names), dotted, bool(names) and path is not None and _is_model(path[1]))

    @property
    def looks_right(self) -> bool:
        """Whether it looks like a state dict, and not only like some tensors."""
        return self.dotted or self.named

    @property
    def is_wrapper(self) -> bool:
        """Whether its tensors are some loose ones around a state dict: not more, and not named like a module's."""
        return not self.dotted and self.below >= self.count and self.below > 0

    def __str__(self) -> str:
        return f"{text_of(self.path)}   {self.count:,} tensor{'s' * (self.count != 1)}"


def find_state_dict(contents: object, bounds: Bounds, entry: str = "") -> tuple[PickledDict, LeftTensors]:
    """The state dict of a checkpoint, and which tensors are left; `entry` names it where several fit.

    What lies beside it is left. Tensors that lie deeper in it, or have no name, would be lost: unless the entry was
    named, that is a ChoiceError, as is a second dict that fits. No dict of tensors at all is a NoStateDictError, and
    more than can be looked through within the bounds a MalformedPickleError.
    """
    most = bounds.held // _LOOKED_AT
    if not isinstance(contents, PickledDict):
        raise NoStateDictError
    candidates = _candidates(contents)
    if entry:
        named = {id(each): each for each in _named(contents, entry)}
        if len(named) != 1:
            what = f"{len(named)} dicts in it are called {entry!r}" if named else f"there is no dict {entry!r} in it"
            raise ChoiceError(what, list(map(str, candidates)), "" if named else _example(candidates))
        (chosen,) = named.values()
        return chosen, LeftTensors.of(path for path, _ in _walk(contents, None, _own(chosen), most))
    candidate = _decide(candidates)
    own = _own(candidate.values)
    inside = _walk(candidate.values, candidate.path, own, most)
    nested = [path for path, training in inside if not training]
    if nested:
        lies = "1 tensor lies" if len(nested) == 1 else f"{len(nested):,} tensors lie"
        has = "has" if len(nested) == 1 else "have"
        what = f"{lies} deeper than those of the state dict, or {has} no name, and would be lost"
        raise ChoiceError(what, list(map(text_of, nested)), text_of(candidate.path))
    if parts := _near(candidate, contents, own, most):
        found = [str(candidate), *(f"{text_of(path)}   a tensor" for path in parts)]
        raise ChoiceError("it can't be told which of its tensors are the model", found, text_of(candidate.path))
    return candidate.values, LeftTensors.of(path for path, _ in _walk(contents, None, own, most))


def _near(candidate: _Candidate, contents: PickledDict, own: set[int], most: int) -> list[Path]:
    """The tensors that may be parts of the model as those of the candidate are: all that lie where the model does.

    That is in the outermost dict that is called a model, or anywhere if none is. Loose ones in the dicts around the
    candidate are no parts, nor is what training needs.
    """
    steps: list[tuple[Path, str]] = []
    path = candidate.path
    while path is not None:
        steps.append(path)
        path = path[0]
    steps.reverse()
    around = [contents]
    for _, key in steps:
        inner = around[-1][key]
        assert isinstance(inner, PickledDict)
        around.append(inner)
    outermost = next((number for number, (_, key) in enumerate(steps, 1) if _is_model(key)), 0)
    loose = own.union(*map(_own, around))
    walked = _walk(around[outermost], steps[outermost - 1] if outermost else None, loose, most)
    return [path for path, training in walked if not training]


def _decide(candidates: list[_Candidate]) -> _Candidate:
    """The one that looks like a state dict where a key says that it is one, or else the only one."""
    unnamed = not any(candidate.named for candidate in candidates)
    fitting = [
        candidate
        for candidate in candidates
        if (candidate.looks_right or candidate.below or unnamed) and not candidate.is_wrapper
    ]
    if not fitting:
        raise NoStateDictError
    if len(fitting) > 1:
        raise ChoiceError(
            f"{len(fitting)} dicts of tensors in it could be the model", list(map(str, fitting)), _example(fitting)
        )
    return fitting[0]


def _candidates(contents: PickledDict) -> list[_Candidate]:
    """The dicts that hold tensors under names, through dicts with names alone and outside of what training needs."""
    seen, found = {id(contents)}, []
    pending: list[tuple[Path, PickledDict]] = [(None, contents)]
    while pending:
        path, here = pending.pop()
        found.append(_Candidate.of(path, here))
        inner = [(key, value) for key, value in here.items() if isinstance(key, str) and isinstance(value, PickledDict)]
        for key, value in reversed(inner):
            if id(value) not in seen and not _is_training(key, value):
                seen.add(id(value))
                pending.append(((path, key), value))
    below: dict[int, int] = {}
    for candidate in reversed(found):  # those below come after those above
        candidate.below = below.get(id(candidate.path), 0)
        if candidate.path is not None:
            most = max(candidate.below, candidate.count if candidate.looks_right else 0)
            parent = id(candidate.path[0])
            below[parent] = max(below.get(parent, 0), most)
    return [candidate for candidate in found if candidate.count]


def _is_model(key: str) -> bool:
    """Whether a key is one of those that wrap models."""
    return _MODEL.search(key.lower()) is not None


def _is_training(key: str | Inert, value: object) -> bool:
    """Whether this is an optimizer's state, or something else that only training needs."""
    name = key if isinstance(key, str) else key.name
    return _TRAINING.search(name.lower()) is not None or (
        isinstance(value, PickledDict) and {"state", "param_groups"} <= value.keys()
    )


def _named(contents: PickledDict, entry: str) -> Iterator[PickledDict]:
    """The dicts to which the keys lead that the entry joins with dots; keys may have dots themselves."""
    reached: list[list[PickledDict]] = [[contents], *([] for _ in entry)]  # by how much of the entry leads there
    if entry == TOP:
        yield contents
    for start in range(len(entry)):
        for here in reached[start]:
            for stop in range(start + 1, len(entry) + 1):
                inner = here.get(entry[start:stop])
                if isinstance(inner, PickledDict) and stop == len(entry):
                    yield inner
                elif isinstance(inner, PickledDict) and entry[stop] == ".":
                    reached[stop + 1].append(inner)


def _own(chosen: PickledDict) -> set[int]:
    """The tensors that the model has."""
    return {id(value) for key, value in chosen.items() if isinstance(key, str) and isinstance(value, TENSORS)}


def _walk(root: object, start: Path, own: set[int], most: int) -> Iterator[tuple[Path, bool]]:
    """The paths of all tensors that are not the model's own, each once; and whether only training needs them."""
    seen: set[int] = set()
    pending: list[tuple[Path, object, bool]] = [(start, root, False)]
    while pending:
        path, value, training = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, TENSORS) and id(value) not in own:
            yield path, training
        inner = []
        for place, key, part in _parts(value, path):
            if _may_hold(part, own):
                inner.append((place, part, training or (key is not None and _is_training(key, part))))
                if len(seen) + len(pending) + len(inner) > most:
                    raise MalformedPickleError(f"it has more than the {most} lists, dicts and objects that are read")
        pending.extend(reversed(inner))


def _may_hold(part: object, own: set[int]) -> bool:
    """Whether a part is a tensor that is not the model's own, or may hold one."""
    if isinstance(part, PickledTensor):
        return part.state is not None or id(part) not in own
    if isinstance(part, tuple):
        return len(part) > 0
    if isinstance(part, PickledObject):
        return len(part.parts) > 0
    return isinstance(part, PickledDict | Unreadable | PickledStorage)


def _parts(value: object, path: Path) -> Iterator[tuple[Path, str | Inert | None, object]]:
    """What a value is made of: each with its path, its key if it has one, and itself."""
    if isinstance(value, PickledDict):
        for key, part in value.items():
            yield (path, key if isinstance(key, str) else key.name), key, part
            if isinstance(key, PickledObject):
                yield (path, "(a key)"), None, key
        yield (path, "(attributes)"), None, getattr(value, "attributes", None)
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            yield (path, str(number)), None, part
    elif isinstance(value, PickledObject):
        has_attributes = value.name not in ("list", "set")
        for number, part in enumerate(value.parts):
            yield (path if has_attributes and isinstance(part, PickledDict) else (path, str(number))), None, part
    elif isinstance(value, PickledTensor):
        yield (path, "(state)"), None, value.state


def text_of(path: Path) -> str:
    """The path as an entry is named: `model.state_dict`, or `.` for the outermost."""
    keys: list[str] = []
    length = 0
    while path is not None and length <= _SHOWN_PATH:
        path, key = path
        keys.append(key)
        length += len(key) + 1
    text = ".".join(reversed(keys)) or TOP
    return text if length <= _SHOWN_PATH else f"…{text[-_SHOWN_PATH:]}"


def _example(candidates: list[_Candidate]) -> str:
    """The entry that a user is shown: the first that looks like a model's."""
    best = sorted(candidates, key=lambda candidate: not candidate.looks_right)
    return text_of(best[0].path) if best else ""
