"""What stopped merges left is found, told from what running ones use, and removed; shards never show a mixture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import streammerge
from streammerge.cli.main import main
from streammerge.errors import OutputError
from streammerge.formats.layout import lay_out
from streammerge.storage.journal import lock_journal
from streammerge.storage.leftovers import age, find_leftovers, remove
from streammerge.storage.placing import Placing, Step, put_in_place, state_of, temporary_name
from streammerge.storage.records import JOURNAL_SUFFIX
from streammerge.storage.target import find_older
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import make_tensors, save_models
from tests.storage.outputs import digests

HEX = "0123456789abcdef"


@pytest.fixture
def paths(tmp_path):
    return save_models(tmp_path / "models", a=make_tensors(1), b=make_tensors(2))


def merge(paths, output, **options):
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(paths["b"])], **options.pop("keys", {})}
    return streammerge.merge(recipe, output=output, threads=1, sync=False, **options)


def stale(folder: Path) -> set[str]:
    """A folder with leftovers, and with what only looks like them."""
    left = {f".out.safetensors.{HEX}.partial", f".x.{HEX}.retired", f".y.{HEX}.partial"}
    for name in (*left, "out.safetensors", f"x.{HEX}.partial", ".x.partial", f".x.{HEX[:-1]}.partial", ".journal"):
        (folder / name).write_text("0123456789")
    journal = lock_journal(folder / f".out.safetensors{JOURNAL_SUFFIX}", create=True)
    assert journal is not None
    journal.begin("out.safetensors", {f".out.safetensors.{HEX}.partial": "out.safetensors"})
    journal.close()
    return {*left, f".out.safetensors{JOURNAL_SUFFIX}"}


# ── what is left ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_leftovers_are_found_and_nothing_else(tmp_path):
    left = stale(tmp_path)
    found = find_leftovers(tmp_path)
    assert {leftover.path.name for leftover in found} == left
    assert not any(leftover.in_use for leftover in found)
    assert all("10 B, 0 seconds old" in str(leftover) for leftover in found if not leftover.is_journal)


def test_clean_removes_them(tmp_path, capsys):
    left = stale(tmp_path)
    others = set(digests(tmp_path)) - left
    assert main(["clean", str(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in left)
    assert "4 files, " in out
    assert "would be removed" in out
    assert set(digests(tmp_path)) == left | others
    assert main(["clean", str(tmp_path)]) == 0
    assert "were removed" in capsys.readouterr().out
    assert set(digests(tmp_path)) == others
    assert main(["clean", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "nothing is left of merges that were stopped\n"


def test_what_a_running_merge_uses_stays(tmp_path, capsys):
    stale(tmp_path)
    journal = lock_journal(tmp_path / f".out.safetensors{JOURNAL_SUFFIX}", create=False)
    assert journal is not None
    assert main(["clean", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("in use") == 2
    assert (tmp_path / f".out.safetensors.{HEX}.partial").exists()
    assert not (tmp_path / f".y.{HEX}.partial").exists()
    journal.close()


def test_what_is_resumed_meanwhile_stays(tmp_path):
    stale(tmp_path)
    found = find_leftovers(tmp_path)
    journal = lock_journal(tmp_path / f".out.safetensors{JOURNAL_SUFFIX}", create=False)
    assert journal is not None
    assert {leftover.path.name for leftover in remove(found)} == {f".x.{HEX}.retired", f".y.{HEX}.partial"}
    assert (tmp_path / f".out.safetensors.{HEX}.partial").exists()
    journal.close()


def test_clean_wants_a_folder(tmp_path, capsys):
    assert main(["clean", str(tmp_path / "nothing")]) == 1
    assert "nothing: is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 seconds"), (119, "119 seconds"), (180, "3 minutes"), (1e6, "12 days")]
)
def test_ages(seconds, text):
    assert age(seconds) == text


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS = (
    Step("index", "old index", retire=True),
    Step("1", "old 1", retire=True),
    Step("new 1", "1"),
    Step("new 2", "2"),
    Step("new index", "index"),
)
BEFORE = {"index": "old", "1": "old", "new 1": "new", "new 2": "new", "new index": "new", "3": "old"}
AFTER = {"index": "new", "1": "new", "2": "new"}


def fill(folder: Path) -> Placing:
    """Files that are to be renamed, and how."""
    for name, text in BEFORE.items():
        (folder / name).write_text(text)
    return Placing(STEPS, ("3",), {name: state_of(folder / name) for name in BEFORE})


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


class Stop(BaseException):
    """Ends a process, in effect."""


@pytest.mark.parametrize("sync", [False, True])
def test_files_get_their_names(tmp_path, sync):
    put_in_place(fill(tmp_path), tmp_path, sync=sync)
    assert texts(tmp_path) == AFTER


@pytest.mark.parametrize("number", range(len(STEPS)))
@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt(), Stop()])
def test_a_step_that_fails_has_all_undone(tmp_path, monkeypatch, number, error):
    placing = fill(tmp_path)
    whole = Step.make

    def make(step, folder):
        if step == STEPS[number]:
            raise error
        whole(step, folder)

    monkeypatch.setattr(Step, "make", make)
    with pytest.raises(type(error)):
        put_in_place(placing, tmp_path, sync=False)
    assert texts(tmp_path) == BEFORE


@pytest.mark.parametrize("number", range(len(STEPS) + 1))
def test_what_was_stopped_between_two_steps_is_finished(tmp_path, number):
    placing = fill(tmp_path)
    for step in STEPS[:number]:
        step.make(tmp_path)
    assert placing.unexpected(tmp_path) == []
    assert placing.has_begun(tmp_path) == bool(number)
    names = texts(tmp_path)
    assert names.get("index") != "new" or {"1", "2"} <= {name for name, text in names.items() if text == "new"}
    put_in_place(placing, tmp_path, sync=False)
    assert texts(tmp_path) == AFTER
    put_in_place(placing, tmp_path, sync=False)
    assert texts(tmp_path) == AFTER


@pytest.mark.parametrize("how", ["resume", "clean"])
@pytest.mark.parametrize("number", range(4))
def test_an_output_that_was_complete_is_put_in_place(tmp_path, paths, monkeypatch, capsys, number, how):
    """As if the process had been killed after so many renamings: then nothing is undone either."""
    merge(paths, tmp_path / "right" / "out.safetensors", shard_size="1MB")
    merge(paths, tmp_path / "new" / "out.safetensors", shard_size="1MB", keys={"seed": 9})
    right = digests(tmp_path / "right")
    made: list[Step] = []
    whole = Step.make

    def make(step, folder):
        if len(made) == number:
            raise Stop
        made.append(step)
        whole(step, folder)

    with monkeypatch.context() as patches:
        patches.setattr(Step, "make", make)
        patches.setattr(Step, "undo", lambda *_: None)
        with pytest.raises(Stop):
            merge(paths, tmp_path / "new" / "out.safetensors", shard_size="1MB", force=True)
    if not number:
        assert len(digests(tmp_path / "new")) == len(right), "nothing had begun, so nothing is kept"
        return
    assert not (tmp_path / "new" / "out.safetensors.index.json").exists()
    with pytest.raises(OutputError, match="is complete and was stopped while it was put in place"):
        merge(paths, tmp_path / "new" / "out.safetensors", force=True)
    if how == "clean":
        assert main(["clean", str(tmp_path / "new")]) == 0
        assert "has been put in place" in capsys.readouterr().out
    else:
        report = merge(paths, tmp_path / "new" / "out.safetensors", shard_size="1MB", resume=True)
        assert report.bytes_read == 0
    assert digests(tmp_path / "new") == right


# ── older outputs ────────────────────────────────────────────────────────────────────────────────────────────────────

FORMS = {"single": {}, "two": {"shard_size": "1500kB"}, "more": {"shard_size": "1MB"}}


@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
def test_an_older_output_in_any_form_is_replaced_whole(tmp_path, paths, old, new):
    merge(paths, tmp_path / "right" / "out.safetensors", **FORMS[new])
    merge(paths, tmp_path / "out" / "out.safetensors", keys={"dtype": "fp16"}, **FORMS[old])
    with pytest.raises(OutputError, match="the output exists"):
        merge(paths, tmp_path / "out" / "out.safetensors", **FORMS[new])
    merge(paths, tmp_path / "out" / "out.safetensors", force=True, **FORMS[new])
    assert digests(tmp_path / "out") == digests(tmp_path / "right")


def test_an_input_is_no_older_output(tmp_path, paths):
    merge(paths, tmp_path / "m", shard_size="1MB")
    before = digests(tmp_path / "m")
    with pytest.raises(OutputError, match="what the output replaces is the same file as the index of the input"):
        streammerge.merge(streammerge.passthrough(tmp_path / "m"), output=tmp_path / "m", force=True)
    assert digests(tmp_path / "m") == before


def test_shards_that_no_index_names_are_reported_and_stay(tmp_path, paths, capsys):
    shutil.copy(paths["a"], tmp_path / "out-00001-of-00009.safetensors")
    words = [str(paths["a"]), str(paths["b"]), "-o", str(tmp_path / "out.safetensors"), "--no-sync"]
    assert main(words) == 0
    assert "1 shards of an older output are left: out-00001-of-00009.safetensors" in capsys.readouterr().err
    assert (tmp_path / "out-00001-of-00009.safetensors").exists()


def test_only_files_by_the_output_s_name_are_older(tmp_path):
    layout = lay_out(tmp_path / "out.safetensors", {"x": TensorInfo(DTYPES["F32"], (4,))}, {})
    assert find_older(layout).superseded == ()
    names = ["out-00001-of-00002.safetensors", "out-00002-of-00002.safetensors", "out-00001-of-00003.safetensors"]
    for name in (*names, "out-1-of-2.safetensors", "other-00001-of-00002.safetensors", "out.safetensors"):
        (tmp_path / name).touch()
    assert {path.name for path in find_older(layout).strays} == set(names)
    index = tmp_path / "out.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": names[0], "y": "other-00001-of-00002.safetensors"}}))
    assert [path.name for path in find_older(layout).superseded] == [index.name, names[0]]
    index.write_text("broken")
    assert [path.name for path in find_older(layout).superseded] == [index.name]


def test_names_are_not_guessed_for_what_makes_room(tmp_path):
    assert len({temporary_name(tmp_path / "x", ".retired").name for _ in range(50)}) == 50
