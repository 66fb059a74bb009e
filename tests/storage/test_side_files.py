"""Reports, tables, plots and hashes are written whole or not at all."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from streammerge.cli.main import main
from streammerge.errors import OutputError
from streammerge.storage.side_files import check_side_file, write_text, written_whole
from streammerge.tools import plotting
from tests.make.models import make_tensors, save_model


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_what_was_there(tmp_path, error, there):
    path = tmp_path / "report.json"
    if there:
        path.write_text("old")
    before = {entry.name: entry.read_text() for entry in tmp_path.iterdir()}
    raised = pytest.raises(OutputError if isinstance(error, OSError) else type(error))
    with raised, written_whole(path) as target:
        target.write_text("half of the n")
        raise error
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == before


@pytest.mark.parametrize("sync", [False, True])
def test_nothing_is_seen_of_it_before_it_is_whole(tmp_path, sync):
    path = tmp_path / "report.json"
    path.write_text("old")
    path.chmod(0o640)
    with written_whole(path, sync=sync) as target:
        target.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "latest.json").symlink_to("deep/report.json")
    for text in ("first", "second"):
        write_text(tmp_path / "latest.json", text)
        assert (tmp_path / "deep" / "report.json").read_text() == text
    assert (tmp_path / "latest.json").is_symlink()
    assert len(list((tmp_path / "deep").iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    check_side_file(pipe, "the report")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "news")
    reader.join()
    assert read == ["news"]
    assert pipe.is_fifo()


def test_a_name_that_is_no_unicode_is_json(tmp_path):
    write_text(tmp_path / "report.json", json.dumps({"path": "a\udcff模"}, ensure_ascii=False))
    assert json.loads((tmp_path / "report.json").read_text()) == {"path": "a\udcff模"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_model(tmp_path / f"{name}.safetensors", make_tensors(seed, shapes={"x": (40, 30)}))
    return tmp_path


MERGE = ["a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q"]

REFUSED = {
    "no folder": ("no/where.json", "its folder does not exist\n  Create it.", lambda: Path("no").mkdir()),
    "a file's": ("a.safetensors/where.json", "its folder does not exist\n  Name a file in a folder.", None),
    "a folder": ("where.json", "is a folder\n  Name a file.", lambda: Path("where.json").rmdir()),
    "a model's": ("x.safetensors", "is named like a model or a recipe", None),
    "a dash": ("-", "the report is written to a file\n  Name a file; /dev/stdout prints it.", None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_written_is_refused_before_the_work(folder, capsys, case):
    path, problem, mend = REFUSED[case]
    if case == "a folder":
        Path(path).mkdir()
    assert main([*MERGE, "--report", path]) == 1
    assert problem in capsys.readouterr().err
    assert not Path("out.safetensors").exists()
    if mend:
        mend()
    assert main([*MERGE, "--report", path if mend else "report.json"]) == 0


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_told_before_the_work(folder, capsys):
    Path("ro").mkdir(mode=0o500)
    assert main([*MERGE, "--report", "ro/report.json"]) == 1
    assert "permission denied" in capsys.readouterr().err
    assert not Path("out.safetensors").exists()


def test_a_report_that_fails_in_the_end_says_that_the_output_is_there(folder, capsys, monkeypatch):
    monkeypatch.setattr("streammerge.storage.side_files.temporary_name", lambda path: path.parent / "no" / path.name)
    assert main([*MERGE, "--report", "report.json"]) == 1
    assert capsys.readouterr().err.endswith("The output is complete.\n")
    assert Path("out.safetensors").exists()


def test_an_unknown_kind_of_picture_is_told_before_the_work(folder, capsys, monkeypatch):
    assert main(["compare", "a.safetensors", "b.safetensors", "-q", "--plot", "x.xyz"]) == 1
    said = capsys.readouterr()
    assert "x.xyz: there is no kind of picture 'xyz'" in said.err
    assert not said.out
    assert main(["compare", "a.safetensors", "b.safetensors", "-q", "--plot", "plain"]) == 0
    assert Path("plain").read_bytes().startswith(b"\x89PNG")
    assert plotting.kind_of_plot(Path("x.PDF")) == "pdf"
