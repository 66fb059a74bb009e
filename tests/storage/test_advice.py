"""What errors about files advise is done, to the command that failed: then it does what the advice says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge.cli.main import main
from tests.make.models import load_model, make_tensors, save_model
from tests.storage.stopped_merges import stop

SHAPES = {f"layers.{number}.w": (512, 300) for number in range(6)}
MERGE = ["a.safetensors", "b.safetensors", "-o", "out.safetensors", "--threads", "1", "-q"]
JOURNAL = Path(".out.safetensors.streammerge-journal")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_model(tmp_path / f"{name}.safetensors", make_tensors(seed, shapes=SHAPES))
    return tmp_path


def done(words: list[str]) -> None:
    """The command does what was asked."""
    assert main(words) == 0
    output = Path(words[words.index("-o") + 1])
    assert load_model(output).keys() == SHAPES.keys()


def nothing() -> None:
    pass


def link_leads_nowhere() -> None:
    Path("out.safetensors").symlink_to("nowhere")


def output_exists() -> None:
    Path("out.safetensors").write_text("old")


def hashes_exist() -> None:
    Path("out.safetensors.sha256").write_text("old")


def journal_is_a_folder() -> None:
    JOURNAL.mkdir()


def journal_is_a_link() -> None:
    Path("elsewhere").write_text("x")
    JOURNAL.symlink_to("elsewhere")


def journal_has_two_names() -> None:
    Path("other").write_text("x")
    os.link("other", JOURNAL)


def output_is_a_folder() -> None:
    Path("out.safetensors").mkdir()


def remove(path: Path) -> Callable[[list[str]], list[str]]:
    def mend(words: list[str]) -> list[str]:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        return words

    return mend


def with_more(*more: str) -> Callable[[list[str]], list[str]]:
    return lambda words: [*words, *more]


def with_output(name: str) -> Callable[[list[str]], list[str]]:
    return lambda words: [*words[: words.index("-o") + 1], name, *words[words.index("-o") + 2 :]]


CASES: dict[str, tuple[Callable[[], None], list[str], str, Callable[[list[str]], list[str]]]] = {
    "exists, force": (output_exists, [], "Use --force to replace it", with_more("--force")),
    "exists, another name": (output_exists, [], "or choose another name", with_output("new.safetensors")),
    "exists, to be resumed": (output_exists, ["--resume"], "Use --force to replace it", with_more("--force")),
    "a link": (link_leads_nowhere, [], "Remove it, or choose another name", remove(Path("out.safetensors"))),
    "a folder": (output_is_a_folder, [], "Choose another name", with_output("new.safetensors")),
    "an input": (nothing, ["--force", "-o", "a.safetensors"], "Choose another name for the output", lambda _: MERGE),
    "no safetensors": (nothing, ["-o", "x.ckpt"], "Name the output x.safetensors", lambda _: MERGE),
    "below a file": (nothing, ["-o", "a.safetensors/x.safetensors"], "Choose another name or folder", lambda _: MERGE),
    "hashes, force": (hashes_exist, ["--hash"], "Use --force to replace it", with_more("--force")),
    "hashes, removed": (hashes_exist, ["--hash"], "or remove it", remove(Path("out.safetensors.sha256"))),
    "journal, folder": (journal_is_a_folder, [], "Remove it.", remove(JOURNAL)),
    "journal, link": (journal_is_a_link, [], "Remove it.", remove(JOURNAL)),
    "journal, names": (journal_has_two_names, [], "Remove it.", remove(JOURNAL)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_advice_about_the_output_is_good(folder, capsys, case):
    prepare, more, advice, mend = CASES[case]
    prepare()
    words = [*(MERGE[:2] if "-o" in more else MERGE), *more]
    assert main(words) == 1
    assert advice in capsys.readouterr().err
    done(mend(words))


@pytest.mark.parametrize("make", [journal_is_a_link, journal_has_two_names])
def test_an_advice_of_clean_is_good(folder, capsys, make):
    make()
    assert main(["clean"]) == 1
    assert capsys.readouterr().err.endswith("is no journal of streammerge's\n  Remove it.\n")
    JOURNAL.unlink()
    assert main(["clean"]) == 0


def interrupted(monkeypatch, **options) -> None:
    """A merge to the output that was stopped, and can be resumed."""
    raw = {"merge_method": "linear", "models": ["a.safetensors", "b.safetensors"]}
    stop(monkeypatch, raw, Path("out.safetensors"), **options)


@pytest.mark.parametrize("there", [False, True])
def test_one_advice_is_given_where_a_merge_can_not_be_resumed(folder, capsys, monkeypatch, there):
    if there:
        output_exists()
    interrupted(monkeypatch, force=there)
    words = [*MERGE, "--dtype", "fp16"]
    assert main([*words, "--resume"]) == 1
    err = capsys.readouterr().err
    advice = "use --force instead of --resume" if there else "leave out --resume"
    assert f"Undo the change, or {advice} to merge from the beginning. What is there of it is left as it is." in err
    assert err.count("--resume") == 1
    if there:
        done([*MERGE, "--resume", "--force"])
        done([*words, "--force"])
    else:
        done(words)


@pytest.mark.parametrize("there", [False, True])
def test_one_advice_is_given_where_what_was_left_is_damaged(folder, capsys, monkeypatch, there):
    if there:
        output_exists()
    interrupted(monkeypatch, force=there)
    (partial,) = Path().glob(".*.partial")
    with partial.open("r+b") as file:
        file.write(b"\x01")
    assert main([*MERGE, "--resume", *(["--force"] if there else [])]) == 1
    err = capsys.readouterr().err
    assert "Merge from the beginning: without --resume, and with --force if there is an older output." in err
    assert err.count("--resume") == 1
    done([*MERGE, *(["--force"] if there else [])])


def test_the_advice_for_an_interrupted_merge_is_good(folder, capsys, monkeypatch):
    """`streammerge clean` removes it, the same command with --resume goes on."""
    interrupted(monkeypatch)
    assert main(["clean", "."]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors"]
    interrupted(monkeypatch)
    done([*MERGE, "--resume"])


def test_the_advice_for_shards_of_another_merge_is_good(folder, capsys):
    assert main(["a.safetensors", "-o", "out", "--shard-size", "2MB", "-q"]) == 0
    shutil.copy("a.safetensors", "out/model-00001-of-00009.safetensors")
    assert main(["verify", "out", "a=a.safetensors", "-q"]) == 1
    assert "Remove shards of another merge" in capsys.readouterr().err
    Path("out/model-00001-of-00009.safetensors").unlink()
    assert main(["verify", "out", "a=a.safetensors", "-q"]) == 0


def test_the_advice_for_other_inputs_is_good(folder, capsys):
    assert main([*MERGE, "--hash-inputs"]) == 0
    shutil.copy("b.safetensors", "right.safetensors")
    save_model(folder / "b.safetensors", make_tensors(7, shapes=SHAPES))
    assert main(["verify", "out.safetensors", "-q"]) == 1
    assert "Name the right ones as NAME=PATH" in capsys.readouterr().err
    assert main(["verify", "out.safetensors", "b=right.safetensors", "-q"]) == 0
