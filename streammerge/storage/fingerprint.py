"""What decides the bytes of an output, in short: so that an interrupted merge is continued only as what it was.

A fingerprint has topics, each with named values. Two are compared name by name, so that a refusal can say what changed.
Threads, windows, bounds of memory and the way of reading are not in it: they don't change a byte.
"""

from __future__ import annotations

import inspect
import itertools
import marshal
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from streammerge.compute.expressions import Node, applications
from streammerge.compute.identity import MARK, Describer, digest
from streammerge.compute.machine import torch_version
from streammerge.formats.files import ByteFile, read_errors
from streammerge.plan.plan import Plan
from streammerge.storage.placing import name_within
from streammerge.version import __version__

Fingerprint = Mapping[str, Mapping[str, Any]]
"""Topic → name → plain value. One that begins with MARK is a digest, which is not worth showing."""

ENDS: Final = 1 << 20
"""How much of an input's beginning and end is looked at: a header or directory, and some of the data."""

MOST_DIGESTS: Final = 1 << 12
"""So many digests of tensors are kept at the most."""

ASKED: Final = ("program", "recipe", "input", "output")
"""Topics that tell what was asked for, and of which files: nothing is the same that does not tell them."""

FOLLOWING: Final = ("tensor", "output")
"""Topics that change when another does, and tell nothing more then."""


def fingerprint_of(plan: Plan) -> Fingerprint:
    """What decides the bytes of the plan's output: what was asked for, and what every tensor will be made of."""
    return {
        **request_of(plan),
        "content": {str(file.path.resolve()): _ends(file) for file in plan.inputs},
        "method": {method.name: _source_of(method.function) for method in _methods(plan.jobs.firsts())},
        "tensor": dict(_tensors(plan)),
    }


def _tensors(plan: Plan) -> Iterator[tuple[str, str]]:
    """A digest for each tensor, or, where there are very many, for some that follow each other."""
    describe, jobs = Describer(plan.inputs), iter(plan.jobs)
    together = -(-len(plan.jobs) // MOST_DIGESTS)
    while some := list(itertools.islice(jobs, together)):
        more = f" and {len(some) - 1} after it" if len(some) > 1 else ""
        yield some[0].name + more, digest(map(describe.job, some))


def request_of(plan: Plan) -> Fingerprint:
    """What was asked for, and of which files: enough to tell finished outputs from each other, and told in no time."""
    return {
        "program": {
            "streammerge": __version__,
            "torch": torch_version(),
            "device": plan.options.device,
        },
        "recipe": dict(_flat(plan.description)),
        "input": {key: value for file in _read(plan) for key, value in _identity(file)},
        "output": dict(_files(plan)),
    }


def can_be_told(plan: Plan) -> bool:
    """Whether everything that is merged has an identity; models that are objects of some program have none."""
    return all(kind.is_told for kind in plan.jobs.kinds)


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What changed, one line each, in what was asked for and all else that `before` tells; what only follows from a
    change is left out."""
    topics = dict.fromkeys((*ASKED, *before))
    found = {topic: list(_compare(topic, before.get(topic, {}), now.get(topic, {}))) for topic in topics}
    causes = [line for topic, lines in found.items() if topic not in FOLLOWING for line in lines]
    return causes or [line for lines in found.values() for line in lines]


def _compare(topic: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in {**before, **now}:
        old, new = (found.get(name, "not there") for found in (before, now))
        if old != new:
            is_digest = str(old).startswith(MARK) and str(new).startswith(MARK)
            yield f"{topic} {name}: {'is another' if is_digest else f'was {_shown(old)}, is {_shown(new)}'}"


def _shown(value: Any) -> str:  # noqa: ANN401
    return "there" if str(value).startswith(MARK) else str(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """`models.0.parameters.weight`, 0.5: the leaves of nested values."""
    if isinstance(value, Mapping | list | tuple) and value:
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in entries:
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value if isinstance(value, int | str | None) else repr(value)


def _identity(file: ByteFile) -> Iterator[tuple[str, Any]]:
    """What tells a state of an input from another."""
    path, identity = file.path.resolve(), file.identity
    yield f"{path} (size in bytes)", identity.nbytes
    yield f"{path} (time of change in ns)", identity.modified_ns
    yield f"{path} (inode)", identity.inode


def _ends(file: ByteFile) -> str:
    """A digest of the file's beginning and end."""
    with read_errors(file.path), file.path.open("rb") as opened:
        ends = opened.read(ENDS)
        if file.nbytes > ENDS:
            opened.seek(max(file.nbytes - ENDS, ENDS))
            ends += opened.read(ENDS)
    return digest(ends)


def _read(plan: Plan) -> Iterator[ByteFile]:
    """Every file that the output is made of: models', and companions that are copied."""
    yield from plan.inputs
    yield from plan.output.copied


def _files(plan: Plan) -> Iterator[tuple[str, str]]:
    """What each file begins with, or is; of a copy, where it comes from."""
    folder = plan.output.folder
    for file in plan.output.files:
        yield name_within(folder, file.path), digest(file.header.pieces())
    for companion in plan.output.companions:
        source = companion.source
        yield companion.name, digest(companion.pieces()) if source is None else f"a copy of {source.path.resolve()}"
    for index in plan.output.indexes:
        yield name_within(folder, index.path), digest(index.pieces())


def _methods(nodes: Iterable[Node]) -> list[Any]:
    """Every method that is applied, those that are folded into coefficients not among them."""
    found = {part.method.name: part.method for node in nodes for part in applications(node)}
    return [found[name] for name in sorted(found)]


def _source_of(function: Callable[..., Any]) -> str:
    """A digest of the file that a method is written in, or of its code where there is no file."""
    try:
        return digest(Path(inspect.getfile(function)).read_bytes())
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return digest(marshal.dumps(code) if code else repr(function).encode())
