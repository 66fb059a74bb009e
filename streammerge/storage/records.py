"""What a journal says, record by record: taken in only as this program would have written it.

A journal may have come with a download, and its checksums are no secret. So every record is checked: the output's name
against the journal's own, the names of files against the output's, numbers against their ranges.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from streammerge.findings import Finding
from streammerge.formats.layout import OutputName, is_file_name
from streammerge.storage.fingerprint import Fingerprint
from streammerge.storage.ledger import Coverage, Entry, Span
from streammerge.storage.placing import RETIRED_SUFFIX, TEMPORARY_SUFFIX, Placing, Step, is_hidden_name

VERSION: Final = 2

MAX_LINE: Final = 64 << 20
"""The longest record, in bytes, that is read: one that names a million tensors."""

MAX_CONTAINERS: Final = 2**18
"""The most lists and maps in a record: each takes a hundred bytes or more of memory."""

MAX_POSITION: Final = 2**63

JOURNAL_SUFFIX: Final = ".streammerge-journal"


@dataclass
class Contents:
    """What a journal says. `nbytes` is how much of the file are whole records.

    `files` are the unfinished files of the output that is called `output` if it is one file, each with the name that it
    is to get. `problem` says which record is none of ours, if one is: it ends what is read.
    """

    output: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    spans: Coverage = field(default_factory=Coverage)
    findings: dict[str, Finding] = field(default_factory=dict)
    placing: Placing | None = None
    nbytes: int = 0
    problem: str = ""

    @property
    def temporaries(self) -> tuple[str, ...]:
        """The unfinished files."""
        return tuple(self.files)

    @property
    def names(self) -> frozenset[str]:
        """Every file that is unfinished, or renamed or removed in the end."""
        return frozenset(self.temporaries).union(names_of(self.placing) if self.placing else ())

    @property
    def entry(self) -> Entry:
        """What is on the disk now; it does not grow with what is written down later."""
        return Entry(Coverage(self.spans), copy.deepcopy(self.findings))

    def can_resume(self, folder: Path) -> bool:
        """Whether something is on the disk, and the files that it is in are there: all but what is made last."""
        files = [name for name, final in self.files.items() if is_file_name(Path(final))]
        return self.fingerprint is not None and bool(files) and all(_is_plain_file(folder / name) for name in files)


def _is_plain_file(path: Path) -> bool:
    """Whether it is a file that has this name and no other: then nothing else changes if it is written to."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def journal_name(output: str) -> str:
    """What the journal of an output is called."""
    name = output
    encoded = name.encode(errors="surrogatepass")
    if len(encoded) > 200:
        name = f"{name[:50]}.{hashlib.blake2b(encoded, digest_size=8).hexdigest()}"
    return f".{name}{JOURNAL_SUFFIX}"


def is_journal_of(name: str, output: str) -> bool:
    """Whether this is the output's journal, or one that was set aside."""
    plain = journal_name(output)
    aside = re.escape(plain.removesuffix(JOURNAL_SUFFIX)) + r"\.[0-9a-f]{16}" + re.escape(JOURNAL_SUFFIX)
    return name == plain or re.fullmatch(aside, name) is not None


def encode(record: Mapping[str, Any]) -> bytes:
    """A line with the record and its checksum."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return _checksum(text) + b" " + text + b"\n"


def is_whole(line: bytes) -> bool:
    """Whether all of a record is there."""
    checksum, _, text = line.partition(b" ")
    return text.endswith(b"\n") and _checksum(text[:-1]) == checksum


def decode(line: bytes) -> Mapping[str, Any] | None:
    """The line's record; None if it is not whole, or no map."""
    text = line.partition(b" ")[2]
    if not is_whole(line) or text.count(b"[") + text.count(b"{") > MAX_CONTAINERS:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _checksum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).hexdigest().encode()


def take_in(contents: Contents, record: Mapping[str, Any], journal: str) -> bool:
    """Add what the record of a journal of this name says; False, and nothing added, if it is none of ours."""
    match record:
        case {"begin": int(version), "output": str(output), "files": [*pairs]} if version == VERSION:
            return _begin(contents, output, pairs, journal)
        case {"identity": dict(topics)} if all(isinstance(names, dict) for names in topics.values()):
            contents.fingerprint = topics
            return True
        case {"progress": [*spans], "findings": dict(findings)}:
            return _progress(contents, spans, findings)
        case {"placing": [*steps], "superseded": [*names], "states": dict(states)}:
            return _placing(contents, steps, names, states)
    return False


def _begin(contents: Contents, output: str, pairs: list[Any], journal: str) -> bool:
    named = OutputName.of(Path(output))
    if str(named.single) != output or Path(output).name != output or not is_journal_of(journal, output):
        return False
    for pair in pairs:
        match pair:
            case [str(temporary), str(final)] if _may_be_output_s(named, final):
                if not is_hidden_name(temporary, _last_part(final), TEMPORARY_SUFFIX):
                    return False
            case _:
                return False
    contents.output, contents.files = output, dict(pairs)
    return len(set(contents.files.values())) == len(pairs)


def _may_be_output_s(named: OutputName, name: str) -> bool:
    return named.has(name) or named.has_within(name) or named.may_be_beside(name)


def _progress(contents: Contents, spans: list[Any], findings: Mapping[str, Any]) -> bool:
    found = {name: _finding(values) for name, values in findings.items()}
    if None in found.values() or not all(_is_span(span, len(contents.files)) for span in spans):
        return False
    for span in spans:
        contents.spans.add(Span(*span))
    for name, finding in found.items():
        assert finding is not None
        contents.findings.setdefault(name, Finding()).add(finding)
    return True


def _is_span(span: Any, files: int) -> bool:  # noqa: ANN401
    """Whether it is bytes of one of so many files."""
    if not isinstance(span, list) or len(span) != 3 or not all(map(_is_count, span)):
        return False
    return bool(span[0] < files and span[1] <= span[2])


def _finding(values: Any) -> Finding | None:  # noqa: ANN401
    """What a record says of a tensor; None if that is none of ours."""
    if not isinstance(values, dict) or values.keys() != {part.name for part in fields(Finding)}:
        return None
    counts = [values[name] for name in ("nonfinite", "overflowed", "saturated", "vanished", "elements")]
    inputs = values["inputs"]
    if not isinstance(inputs, dict) or not all(_is_count(value) for value in (*counts, *inputs.values())):
        return None
    numbers = (values["largest"], values["limit"])
    if not all(type(number) is float for number in numbers) or not isinstance(values["dtype"], str):
        return None
    return Finding(**values)


def _is_count(value: Any) -> bool:  # noqa: ANN401
    return type(value) is int and 0 <= value < MAX_POSITION


def _placing(contents: Contents, steps: list[Any], superseded: list[Any], states: Mapping[str, Any]) -> bool:
    """Whether the steps give every unfinished file its name, and remove nothing but an output of this name."""
    named = OutputName.of(Path(contents.output))
    made: list[Step] = []
    for step in steps:
        match step:
            case [str(source), str(target), bool(retire)]:
                made.append(Step(source, target, retire))
            case _:
                return False
    places = {step.source: step.target for step in made if not step.retire}
    rooms = {step.source: step.target for step in made if step.retire}
    finals = set(places.values())
    if not places or places != contents.files or len(places) + len(rooms) != len(made) or made[-1].retire:
        return False
    if not all(
        (final in finals or named.has(final) or named.has_within(final))
        and is_hidden_name(room, _last_part(final), RETIRED_SUFFIX)
        for final, room in rooms.items()
    ):
        return False
    if len(set(rooms.values())) < len(rooms) or not all(isinstance(state, str) for state in states.values()):
        return False
    if not all(isinstance(name, str) and named.has(name) and name not in finals for name in superseded):
        return False
    contents.placing = Placing(tuple(made), tuple(superseded), states)
    return True


def _last_part(name: str) -> str:
    """The file's own name, without those of folders."""
    return name.rpartition("/")[2]


def names_of(placing: Placing) -> Iterator[str]:
    """Every file that is renamed or removed."""
    for step in placing.steps:
        yield from (step.source, step.target)
    yield from placing.superseded
