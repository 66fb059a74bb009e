"""The journal: what is read back is what was written before it was torn, and one run has it at a time."""

from __future__ import annotations

import hashlib
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.compute.job import Job
from streammerge.errors import OutputError
from streammerge.findings import Finding
from streammerge.formats.layout import lay_out
from streammerge.storage import resume as resuming
from streammerge.storage.journal import journal_path, lock_journal, read_journal_file
from streammerge.storage.ledger import Coverage, Entry, Ledger, Span
from streammerge.storage.placing import Placing, Step, temporary_name
from streammerge.storage.records import VERSION, Contents, decode, encode
from streammerge.tensors import DTYPES, TensorInfo

# ── the ledger ───────────────────────────────────────────────────────────────────────────────────────────────────────

SPANS = st.lists(st.builds(Span, st.integers(0, 2), st.integers(0, 40), st.integers(0, 40)), max_size=25)


@given(SPANS, st.builds(Span, st.integers(0, 2), st.integers(0, 40), st.integers(1, 40)))
def test_coverage_is_a_set_of_bytes(spans, asked):
    held = {(file, byte) for file, start, stop in spans for byte in range(start, stop)}
    coverage = Coverage(spans)
    assert coverage.nbytes == len(held)
    assert bool(coverage) == bool(held)
    assert {(file, byte) for file, start, stop in coverage for byte in range(start, stop)} == held
    if asked.start < asked.stop:
        assert coverage.covers(asked) == all((asked.file, byte) in held for byte in range(asked.start, asked.stop))


@given(SPANS)
def test_spans_that_touch_become_one(spans):
    found = sorted(Coverage(spans))
    assert all(a.file != b.file or a.stop < b.start for a, b in itertools.pairwise(found))
    assert all(span.start < span.stop for span in found)


def job(name: str = "x", offset: int = 100, elements: int = 10) -> Job:
    return Job(name, TensorInfo(DTYPES["F32"], (elements,)), None, None, 1, offset)


def test_a_ledger_has_what_was_found_and_tells_only_what_is_new():
    ledger = Ledger(1000, Entry(Coverage([Span(1, 100, 120)]), {"x": Finding(3)}))
    assert ledger.has(job(), 0, 20)
    assert ledger.has(job(), 8, 12)
    assert not ledger.has(job(), 8, 21)
    assert not ledger.has_all(job())
    assert ledger.has_all(job(elements=5))
    assert ledger.has_all(job(elements=0))
    ledger.finish(job(), 20, 30, Finding(2), read=20)
    ledger.finish(job(), 30, 40, Finding(5), read=20)
    ledger.finish(job("y", 300), 0, 4, Finding(), read=0)
    entry = ledger.take()
    assert list(entry.spans) == [Span(1, 120, 140), Span(1, 300, 304)]
    assert entry.findings == {"x": Finding(7)}
    assert ledger.findings == {"x": Finding(10)}
    assert (ledger.done_bytes, ledger.bytes_read) == (20 + 24, 40), "what was there is done, and was not read"
    assert not ledger.take().spans
    assert not ledger.has(job(), 20, 30), "only what was there when the run began is left out"


def test_a_new_ledger_has_nothing_not_even_empty_tensors():
    assert not Ledger().has_all(job(elements=0))
    assert not Ledger().has(job(), 0, 4)


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())))
def test_a_record_is_read_as_it_was_written(record):
    line = encode(record)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode(line) == record


@given(st.data())
def test_a_record_that_is_damaged_is_none(data):
    line = bytearray(encode({"progress": [[0, 1, 2]], "findings": {}}))
    at = data.draw(st.integers(0, len(line) - 1))
    line[at] ^= data.draw(st.integers(1, 255))
    assert decode(bytes(line)) is None
    assert decode(bytes(line[:at])) is None


PARTIAL = ".out.safetensors.0123456789abcdef.partial"


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".out.safetensors.streammerge-journal"


def written(path, records: int = 5):
    """A journal with so many records of progress, after the two that begin it."""
    journal = lock_journal(path, create=True)
    assert journal is not None
    journal.begin("out.safetensors", {PARTIAL: "out.safetensors"})
    journal.identify({"recipe": {"a": 1}})
    for number in range(records):
        journal.add(Entry(Coverage([Span(0, 10 * number, 10 * number + 10)]), {"x": Finding(1, inputs={"a": 1})}))
    journal.close()
    return path


def test_a_journal_says_what_was_written(path):
    contents = read_journal_file(written(path))
    assert contents.temporaries == (PARTIAL,)
    assert contents.fingerprint == {"recipe": {"a": 1}}
    assert list(contents.spans) == [Span(0, 0, 50)]
    assert contents.findings == {"x": Finding(5, inputs={"a": 5})}
    assert contents.nbytes == path.stat().st_size


def test_a_journal_that_is_cut_anywhere_says_what_its_whole_records_say(path):
    data = written(path).read_bytes()
    ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole = sum(end <= length for end in ends)
        contents = read_journal_file(path)
        assert contents.nbytes == ([0, *ends][whole])
        assert contents.spans.nbytes == 10 * max(whole - 2, 0)


def test_what_follows_a_torn_record_is_ignored_and_written_over(path):
    data = written(path).read_bytes()
    second = data.index(b"\n", data.index(b'"progress"')) + 1
    path.write_bytes(data[:second] + b"\0" * 30 + data[second:])
    journal = lock_journal(path, create=False)
    assert journal is not None
    assert journal.contents.spans.nbytes == 10
    journal.add(Entry(Coverage([Span(0, 90, 95)])))
    journal.close()
    assert list(read_journal_file(path).spans) == [Span(0, 0, 10), Span(0, 90, 95)]


def says_nothing(contents: Contents) -> bool:
    return not (contents.nbytes or contents.names or contents.spans or contents.fingerprint)


@pytest.mark.parametrize("data", [b"", b"\n", b"hello\n", b"\0" * 100, encode({"unknown": 1}), encode({"begin": 99})])
def test_what_is_no_journal_says_nothing(path, data):
    path.write_bytes(data)
    assert says_nothing(read_journal_file(path))
    assert says_nothing(read_journal_file(path.with_name("not there")))


SHARDS = ["out-00001-of-00002.safetensors", "out-00002-of-00002.safetensors", "out.safetensors.index.json"]
HEXES = ["0123456789abcde" + digit for digit in "0123456789abcdef"]
FILES = {f".{name}.{HEXES[number]}.partial": name for number, name in enumerate(SHARDS)}
ROOM = f".{SHARDS[0]}.{HEXES[9]}.retired"
PLACING = Placing(
    (Step(SHARDS[0], ROOM, True), *(Step(temporary, final) for temporary, final in FILES.items())),
    ("out.safetensors",),
    {SHARDS[0]: "10 abc"},
)


def begin(files=FILES, output="out.safetensors", version=VERSION):
    return {"begin": version, "output": output, "files": [list(pair) for pair in dict(files).items()]}


def place(steps=PLACING.steps, superseded=PLACING.superseded, states=PLACING.states):
    plain = [[step.source, step.target, step.retire] for step in steps]
    return {"placing": plain, "superseded": list(superseded), "states": dict(states)}


def test_what_is_about_to_happen_to_names_is_remembered(path):
    journal = lock_journal(path, create=True)
    assert journal is not None
    journal.begin("out.safetensors", FILES)
    journal.place(PLACING, sync=True)
    journal.close()
    found = read_journal_file(path)
    assert found.placing == PLACING
    assert found.names == {*FILES, *SHARDS, ROOM, "out.safetensors"}
    assert not found.problem


STRANGE = ["../x", "/etc/passwd", "a\\b", "", ".", "..", 7, None, "x\0", "\ud800", [], {}, True, "precious", "a" * 300]
NOT_TEMPORARY = [*STRANGE, "out.safetensors", f".x.{HEXES[0]}.partial", f".out.safetensors.{HEXES[0]}.retired"]
NOT_OF_THE_OUTPUT = [*STRANGE, "x.safetensors", "out.json", "out-1-of-2.safetensors", "outx.safetensors", PARTIAL]


def refuses(path, *records) -> bool:
    """Whether the last of these records, and no other, is told to be none of ours."""
    path.write_bytes(b"".join(map(encode, records)))
    contents = read_journal_file(path)
    return contents.problem == f"line {len(records)} is not as streammerge writes it"


@pytest.mark.parametrize("name", NOT_TEMPORARY)
def test_an_unfinished_file_is_one_of_the_output_by_its_name(path, name):
    pair = [name, "out.safetensors"]
    assert refuses(path, {"begin": VERSION, "output": "out.safetensors", "files": [pair]})
    assert says_nothing(read_journal_file(path))


@pytest.mark.parametrize("name", NOT_OF_THE_OUTPUT)
def test_a_file_is_put_in_place_as_one_of_the_output(path, name):
    temporary = f".{name}.{HEXES[0]}.partial"
    assert refuses(path, {"begin": VERSION, "output": "out.safetensors", "files": [[temporary, name]]})
    assert refuses(path, begin(), place(superseded=[name]))
    assert refuses(path, begin(), place((*PLACING.steps[:-1], Step(PLACING.steps[-1].source, name))))


@pytest.mark.parametrize("output", [*STRANGE, "other.safetensors", "out", "out.sft", "x/../out.safetensors"])
def test_an_output_is_that_of_the_journal_s_name(path, output):
    assert refuses(path, {"begin": VERSION, "output": output, "files": []})


@pytest.mark.parametrize("name", NOT_TEMPORARY)
def test_what_makes_room_is_an_older_output_and_gets_a_hidden_name(path, name):
    assert refuses(path, begin(), place((Step(SHARDS[0], name, True), *PLACING.steps[1:])))
    assert refuses(path, begin(), place((Step(name, ROOM, True), *PLACING.steps[1:])))
    assert refuses(path, begin(), place((Step(ROOM, name), *PLACING.steps[1:])))


@pytest.mark.parametrize(
    "record",
    [
        place(()),
        place(PLACING.steps[:-1]),
        place((*PLACING.steps, PLACING.steps[-1])),
        place(PLACING.steps[1:] + PLACING.steps[:1]),
        place((*PLACING.steps[:1], Step(SHARDS[1], ROOM, True), *PLACING.steps[1:])),
        place(superseded=SHARDS[:1]),
        place(states={SHARDS[0]: 7}),
        {"placing": [[1]], "superseded": [], "states": {}},
        {"placing": [], "superseded": [], "states": {}},
        {"placing": [], "superseded": []},
        {"identity": 7},
        {"identity": {"recipe": 7}},
        {"progress": [[1]], "findings": {}},
        {"progress": [[0, 2, 1]], "findings": {}},
        {"progress": [[3, 0, 1]], "findings": {}},
        {"progress": [[-1, 0, 1]], "findings": {}},
        {"progress": [[0, 0, 2**63]], "findings": {}},
        {"progress": [[0, 0.0, 1]], "findings": {}},
        {"progress": [[False, 0, 1]], "findings": {}},
        {"progress": [], "findings": {"x": {}}},
        {"progress": [], "findings": {"x": {**Finding().to_json(), "nonfinite": -1}}},
        {"progress": [], "findings": {"x": {**Finding().to_json(), "largest": "1"}}},
        {"progress": [], "findings": {"x": {**Finding().to_json(), "inputs": {"a": None}}}},
        {"progress": [], "findings": {"x": {**Finding().to_json(), "more": 1}}},
        {"progress": [[0, 0, 1]] * 300_000, "findings": {}},
        {"unknown": 1},
        {},
    ],
    ids=lambda record: str(record)[:60],
)
def test_a_record_that_this_program_would_not_write_is_told(path, record):
    assert refuses(path, begin(), record)
    found = read_journal_file(path)
    assert (found.placing, found.fingerprint, found.findings, found.spans.nbytes) == (None, None, {}, 0)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b"xx", b"[]", b'"\xff"', b"NaN", b""])
def test_what_is_no_record_at_all_is_told(path, text):
    line = hashlib.blake2b(text, digest_size=8).hexdigest().encode() + b" " + text + b"\n"
    path.write_bytes(encode(begin()) + line)
    found = read_journal_file(path)
    assert found.problem == "line 2 is not as streammerge writes it"
    assert found.temporaries == tuple(FILES)


@pytest.mark.parametrize("stem", ["out", "模" * 78, "a.b", "x" * 200, ".hidden", "new\nline", "out.0123456789abcdef"])
def test_any_output_s_journal_is_read_back(tmp_path, stem):
    layout = lay_out(tmp_path / f"{stem}.safetensors", {"x": TensorInfo(DTYPES["F32"], (4,))}, {})
    for path in (journal_path(layout), resuming.aside(journal_path(layout))):
        journal = lock_journal(path, create=True)
        assert journal is not None
        temporary = temporary_name(layout.paths[0]).name
        journal.begin(layout.paths[0].name, {temporary: layout.paths[0].name})
        journal.place(Placing((Step(temporary, layout.paths[0].name),)), sync=False)
        journal.close()
        found = read_journal_file(path)
        assert (found.temporaries, found.placing is not None, found.problem) == ((temporary,), True, "")


# ── the lock ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_run_has_a_journal_at_a_time(path):
    journal = lock_journal(path, create=True)
    assert journal is not None
    assert lock_journal(path, create=True) is None
    journal.remove()
    assert not path.exists()
    second = lock_journal(path, create=True)
    assert second is not None
    second.close()
    third = lock_journal(path, create=False)
    assert third is not None
    third.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_lock_of_a_run_that_is_killed_is_free(path):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        lock_journal(path, create=True)
        os.write(writing, b"x")
        os.read(reading, 0)
        import time

        time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    assert lock_journal(path, create=True) is None
    os.kill(child, 9)
    os.waitpid(child, 0)
    journal = lock_journal(path, create=True)
    assert journal is not None
    journal.close()


def test_a_link_is_no_journal(tmp_path, path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(OutputError, match="is no journal"):
        lock_journal(path, create=True)
    path.unlink()
    os.link(victim, path)
    with pytest.raises(OutputError, match="is no journal"):
        lock_journal(path, create=True)
    assert victim.read_text() == "precious"


def test_every_form_of_an_output_has_one_journal(tmp_path):
    infos = {"x": TensorInfo(DTYPES["F32"], (4,)), "y": TensorInfo(DTYPES["F32"], (4,))}
    single = lay_out(tmp_path / "out.safetensors", infos, {})
    sharded = lay_out(tmp_path / "out.safetensors", infos, {}, 16)
    assert len(sharded.files) == 2
    assert journal_path(single) == journal_path(sharded) == tmp_path / ".out.safetensors.streammerge-journal"
    folder = lay_out(tmp_path / "out", infos, {})
    assert journal_path(folder) == tmp_path / "out" / ".model.safetensors.streammerge-journal"
    names = {journal_path(lay_out(tmp_path / f"{'模' * 78}{end}.safetensors", infos, {})).name for end in "ab"}
    assert len(names) == 2
    assert all(len(name.encode()) <= 255 for name in names)
