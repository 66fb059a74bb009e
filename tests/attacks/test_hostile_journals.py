"""A journal that came with a download: no command changes a file for it that is not of its output, and none crashes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.cli.main import main
from streammerge.findings import Finding
from streammerge.storage.placing import state_of
from streammerge.storage.records import VERSION, encode
from tests.make.models import make_tensors, save_model
from tests.storage.outputs import digests

JOURNAL = ".o.safetensors.streammerge-journal"
HEX = "0123456789abcde"
TEMPORARY = [f".o.safetensors.{HEX}{digit}.partial" for digit in "01"]
SHARDS = ["o-00001-of-00002.safetensors", "o-00002-of-00002.safetensors", "o.safetensors.index.json"]
INNOCENT = ["a.safetensors", "b.safetensors", "precious.safetensors", "notes.txt", "o.safetensors", *SHARDS]
OURS = (".partial", ".retired", "-journal")

COMMANDS: dict[str, list[str]] = {
    "clean": ["clean", "."],
    "merge": ["a.safetensors", "b.safetensors", "-o", "o.safetensors", "-q"],
    "resume": ["a.safetensors", "b.safetensors", "-o", "o.safetensors", "-q", "--resume"],
    "force": ["a.safetensors", "b.safetensors", "-o", "o.safetensors", "-q", "--force"],
    "shards": ["a.safetensors", "b.safetensors", "-o", "o.safetensors", "-q", "--force", "--shard-size", "3KB"],
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    for seed, name in enumerate(["a", "b", "precious"]):
        save_model(folder / f"{name}.safetensors", make_tensors(seed, shapes={"x": (40, 30), "y": (700,)}))
    for name in (*INNOCENT[3:], *TEMPORARY, f".precious.safetensors.{HEX}f.partial"):
        (folder / name).write_text(f"the content of {name}")
    return folder


NAMES = st.sampled_from(
    [*INNOCENT, *TEMPORARY, f".o.safetensors.{HEX}7.retired", "../x", "/etc/passwd", "", ".", "\0", "\ud800", "new"]
) | st.text(max_size=5)
PLAIN = st.none() | st.booleans() | st.integers(-5, 5) | st.just(10**400) | st.floats() | NAMES
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))
FILES = st.lists(st.tuples(NAMES, NAMES) | st.tuples(st.sampled_from(TEMPORARY), st.just("o.safetensors")), max_size=2)
STEPS = st.lists(
    st.tuples(NAMES, NAMES, st.booleans()) | st.tuples(st.sampled_from(TEMPORARY), st.just("o.safetensors")), max_size=3
)
RECORDS = st.one_of(
    st.fixed_dictionaries(
        {"begin": st.sampled_from([VERSION, 1]), "output": st.just("o.safetensors") | NAMES, "files": FILES}
    ),
    st.fixed_dictionaries({"begin": VALUES, "output": VALUES, "files": VALUES}),
    st.fixed_dictionaries({"identity": VALUES | st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, max_size=2))}),
    st.fixed_dictionaries(
        {
            "progress": st.lists(st.tuples(*[st.integers(-1, 2**70)] * 3), max_size=3) | VALUES,
            "findings": st.dictionaries(NAMES, st.just(Finding(3).to_json()) | VALUES, max_size=2) | VALUES,
        }
    ),
    st.fixed_dictionaries({"placing": STEPS | VALUES, "superseded": st.lists(NAMES, max_size=2), "states": VALUES}),
    st.dictionaries(st.sampled_from(["begin", "placing", "progress", "identity", "x"]), VALUES, max_size=3),
)


def line(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).hexdigest().encode() + b" " + text + b"\n"


@st.composite
def journals(draw: st.DrawFn) -> bytes:
    """Records that are nearly right, most behind a beginning that is; a byte of some changed, with the checksum."""
    first = encode({"begin": VERSION, "output": "o.safetensors", "files": [[TEMPORARY[0], "o.safetensors"]]})
    lines = [first] * draw(st.integers(0, 1)) + list(map(encode, draw(st.lists(RECORDS, max_size=3))))
    if draw(st.booleans()) and lines:
        number = draw(st.integers(0, len(lines) - 1))
        text = bytearray(lines[number][17:-1])
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
        lines[number] = line(bytes(text))
    return b"".join(lines) + draw(st.sampled_from([b"", b"torn", line(b"[" * 5000), line(b"9" * 5000)]))


def after(template: Path, folder: Path, journal: bytes, command: str) -> tuple[int, dict[str, str], dict[str, str]]:
    """The exit code of a command beside this journal, and what was there before and after."""
    shutil.copytree(template, folder, dirs_exist_ok=True)
    (folder / JOURNAL).write_bytes(journal)
    before = digests(folder)
    with pytest.MonkeyPatch.context() as patches:
        patches.chdir(folder)
        code = main(COMMANDS[command])
    return code, before, digests(folder)


@given(journals(), st.sampled_from(sorted(COMMANDS)))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_journal_does_harm(tmp_path_factory, template, capsys, journal, command):
    code, before, found = after(template, tmp_path_factory.mktemp("hostile") / "f", journal, command)
    assert code in (0, 1)
    replaced = {"o.safetensors", *SHARDS} if command in ("force", "shards") else set()
    for name, content in before.items():
        if not name.endswith(OURS) and name not in replaced:
            assert found.get(name) == content, name
    capsys.readouterr()


def placing(folder: Path, **changes: Any) -> bytes:
    """A journal of a complete output, as it would be written in this folder."""
    states = {name: state_of(folder / name) for name in (TEMPORARY[0], "o.safetensors", *SHARDS)}
    record = {
        "placing": [[TEMPORARY[0], "o.safetensors", False]],
        "superseded": SHARDS,
        "states": states,
        **changes,
    }
    begin = {"begin": VERSION, "output": "o.safetensors", "files": [[TEMPORARY[0], "o.safetensors"]]}
    return encode(begin) + encode({"identity": {"recipe": {}}}) + encode(record)


def test_a_journal_that_is_right_is_acted_on(tmp_path, template):
    """Or else the test above would pass with nothing that could do harm."""
    code, before, found = after(template, tmp_path / "f", placing(template), "clean")
    assert code == 0
    assert found["o.safetensors"] == before[TEMPORARY[0]]
    assert not set(SHARDS) & set(found)


@pytest.mark.parametrize("command", ["clean", "force", "shards"])
@pytest.mark.parametrize("changed", ["o.safetensors", TEMPORARY[0]])
def test_what_is_another_than_the_journal_says_is_not_replaced(tmp_path, template, capsys, changed, command):
    states = json.loads(placing(template).splitlines()[-1][17:])["states"]
    states[changed] = "1 " + "0" * 32
    code, before, found = after(template, tmp_path / "f", placing(template, states=states), command)
    assert (code, found) == (1, before)
    err = capsys.readouterr().err
    assert f"\n  {changed}\n" in err
    assert ("Move o.safetensors elsewhere and run this again." in err) == (changed == "o.safetensors")


@pytest.mark.parametrize("advice", ["move", "remove"])
def test_the_advice_where_a_journal_is_not_acted_on_is_good(tmp_path, template, capsys, advice):
    states = json.loads(placing(template).splitlines()[-1][17:])["states"] | {"o.safetensors": "1 x"}
    journal = placing(template, states=states)
    code, before, _ = after(template, tmp_path / "f", journal, "clean")
    assert code == 1
    if advice == "move":
        (tmp_path / "f" / "o.safetensors").replace(tmp_path / "elsewhere")
    else:
        assert f"remove {JOURNAL}" in capsys.readouterr().err
        (tmp_path / "f" / JOURNAL).unlink()
    assert main(["clean", str(tmp_path / "f")]) == 0
    found = digests(tmp_path / "f")
    assert found["o.safetensors"] == before[TEMPORARY[0] if advice == "move" else "o.safetensors"]


def test_older_files_that_are_others_now_stay(tmp_path, template):
    states = json.loads(placing(template).splitlines()[-1][17:])["states"] | {SHARDS[0]: "1 x"}
    _, before, found = after(template, tmp_path / "f", placing(template, states=states), "clean")
    assert found["o.safetensors"] == before[TEMPORARY[0]]
    assert [found.get(name) for name in SHARDS] == [before[SHARDS[0]], None, None]


@pytest.mark.parametrize("command", ["clean", "merge", "resume"])
def test_a_record_that_is_none_is_told(tmp_path, template, capsys, command):
    (tmp_path / "f").mkdir()
    journal = encode(
        {"begin": VERSION, "output": "o.safetensors", "files": [["precious.safetensors", "o.safetensors"]]}
    )
    shutil.copytree(template, tmp_path / "f", dirs_exist_ok=True)
    for name in ("o.safetensors", *SHARDS):
        (tmp_path / "f" / name).unlink()
    (tmp_path / "f" / JOURNAL).write_bytes(journal)
    with pytest.MonkeyPatch.context() as patches:
        patches.chdir(tmp_path / "f")
        assert main([word for word in COMMANDS[command] if word != "-q"]) == 0
    said = capsys.readouterr()
    assert "line 1 is not as streammerge writes it" in said.out + said.err
    assert (tmp_path / "f" / "precious.safetensors").exists()
    assert not (tmp_path / "f" / JOURNAL).exists()


def test_an_unfinished_file_that_has_another_name_too_is_not_gone_on_with(tmp_path, template):
    """Who writes to it, would write to the other."""
    from streammerge.storage.records import Contents

    shutil.copytree(template, tmp_path / "f")
    contents = Contents("o", {TEMPORARY[0]: "o.safetensors"}, {})
    assert contents.can_resume(tmp_path / "f")
    (tmp_path / "f" / TEMPORARY[0]).unlink()
    (tmp_path / "f" / TEMPORARY[0]).hardlink_to(tmp_path / "f" / "precious.safetensors")
    assert not contents.can_resume(tmp_path / "f")
    (tmp_path / "f" / TEMPORARY[0]).unlink()
    (tmp_path / "f" / TEMPORARY[0]).symlink_to("precious.safetensors")
    assert not contents.can_resume(tmp_path / "f")
