"""What is there already is made sure of instead of made again; what was changed of it is told by its part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streammerge.cli.main import main
from tests.make.models import make_tensors, save_model
from tests.storage.outputs import digests

SHAPES = {"x": (40, 30), "y": (700,), "z": (3,)}
FORMS = {"one file": [], "shards": ["--shard-size", "3KB"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_model(tmp_path / f"{name}.safetensors", make_tensors(seed, shapes=SHAPES), {"modelspec.license": "MIT"})
    return tmp_path


OF_MODEL = ["-m", "ties", "--base", "a.safetensors", "-p", "density=0.5", "-p", "scope=model"]
MERGE = ["a.safetensors", "b.safetensors", "-o", "out", "--no-sync", "--threads", "1"]


def states(folder: Path) -> dict[str, tuple[str, int]]:
    return {name: (digest, (folder / name).stat().st_mtime_ns) for name, digest in digests(folder).items()}


# ── --resume of what is complete ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--no-metadata"],
        ["--hash"],
        ["--verify"],
        ["-m", "ties", "--base", "a.safetensors"],
        OF_MODEL,
        ["--verify", *OF_MODEL],
    ],
)
def test_nothing_is_done_where_the_output_is_there(folder, capsys, form, more):
    assert main([*MERGE, *FORMS[form], *more]) == 0
    before = states(folder / "out")
    assert main([*MERGE, *FORMS[form], *more, "--resume", "--report", "report.json"]) == 0
    assert states(folder / "out") == before
    out, err = capsys.readouterr()
    what = "every byte of 3 tensors is" if "--verify" in more else "of 3 tensors are"
    assert "nothing to do: the output is there already" in err
    assert f"{what} what the recipe gives" in err
    report = json.loads(Path("report.json").read_text())
    assert report["resumed_bytes"] == sum(path.stat().st_size for path in Path("out").glob("*.safetensors"))
    assert ("hashes" in report and bool(report["hashes"])) == ("--hash" in more)
    rows = [line.split()[0] for line in out.splitlines()]
    assert rows.count("tensors") == rows.count("time") == 2
    assert rows.count("bytes") == rows.count("rate") == rows.count("run") == 1, "the second run did nothing"


def test_hashes_are_made_where_they_are_missing(folder):
    assert main(MERGE) == 0
    assert main([*MERGE, "--resume", "--hash"]) == 0
    assert main(["verify", "out/model.safetensors", "-q"]) == 0
    Path("out/model.safetensors.sha256").write_text("others")
    assert main([*MERGE, "--resume", "--hash", "-q"]) == 1
    Path("out/model.safetensors.sha256").unlink()
    assert main([*MERGE, "--resume", "--hash", "-q"]) == 0


def another_weight(folder):
    return ["-p", "normalize=false"]


def another_dtype(folder):
    return ["--dtype", "bf16"]


def another_input(folder):
    save_model(folder / "b.safetensors", make_tensors(9, shapes=SHAPES), {"modelspec.license": "MIT"})
    return []


def a_damaged_output(folder):
    for path in Path("out").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-len(data) // 2] ^= 64
        path.write_bytes(data)
    return []


def an_older_index(folder):
    shutil.copy("out/model.safetensors", "out/model-00001-of-00001.safetensors")
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    Path("out/model.safetensors.index.json").write_text(json.dumps(index))
    return []


@pytest.mark.parametrize("metadata", [[], ["--no-metadata"]])
@pytest.mark.parametrize(
    "change", [another_weight, another_dtype, another_input, a_damaged_output, an_older_index], ids=lambda f: f.__name__
)
def test_another_output_is_not_taken_for_it(folder, capsys, change, metadata):
    assert main([*MERGE, *metadata, "-q"]) == 0
    more = [*metadata, *change(folder), "-q"]
    before = states(folder / "out")
    assert main([*MERGE, *more, "--resume"]) == 1
    err = capsys.readouterr().err
    assert "the output exists" in err
    assert "Use --force to replace it" in err
    assert "Nothing was written." in err
    assert states(folder / "out") == before
    assert main([*MERGE, *more, "--force"]) == 0
    assert main([*MERGE, *more, "--resume"]) == 0


def test_force_makes_it_again(folder, capsys):
    assert main([*MERGE, "-q"]) == 0
    before = states(folder / "out")
    assert main([*MERGE, "--resume", "--force"]) == 0
    assert "nothing to resume" in capsys.readouterr().err
    assert states(folder / "out") != before
    assert {name: digest for name, (digest, _) in before.items()} == digests(folder / "out")


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_again(path: Path, metadata: dict[str, str] | None = None, flip: str = "") -> None:
    """Write the file with safetensors' own library, with these metadata beside its own, and a value changed."""
    with safe_open(path, framework="pt") as opened:
        own = opened.metadata()
    tensors = load_file(path)
    if flip in tensors:
        tensors[flip].view(-1)[0] += 1
    save_file(tensors, path, {**own, **(metadata or {})})


PARTS = {
    "metadata": ({"modelspec.license": "GPL"}, "", 'modelspec.license: found "GPL", expected "MIT"'),
    "more metadata": ({"modelspec.author": "mine"}, "", 'modelspec.author: found "mine", expected none'),
    "another title": ({"modelspec.title": "mine"}, "", 'modelspec.title: found "mine", expected "linear of a, b"'),
    "tensors": ({}, "x", "1 tensor is not what the recipe gives\n  x\n"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", [["--all"], []])
@pytest.mark.parametrize("part", PARTS)
def test_it_is_told_which_part_was_changed(folder, capsys, part, how, form):
    assert main([*MERGE, *FORMS[form], "-q"]) == 0
    bound = ["a=a.safetensors", "b=b.safetensors"]
    assert main(["verify", "out", *how, *bound, "-q"]) == 0
    metadata, flip, problem = PARTS[part]
    for path in sorted(Path("out").glob("*.safetensors")):
        save_again(path, metadata, flip)
    capsys.readouterr()
    assert main(["verify", "out", *how, *bound, "-q"]) == 1
    said = capsys.readouterr()
    assert problem in said.err
    assert "Every byte" not in said.out
    assert ("the tensors are what the recipe gives, 1 value of the metadata not" in said.err) == (part != "tensors")


def test_the_advice_for_changed_metadata_is_good(folder, capsys):
    assert main(["a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q"]) == 0
    right = Path("out.safetensors").read_bytes()
    save_again(Path("out.safetensors"), {"modelspec.license": "GPL"})
    assert main(["verify", "out.safetensors", "--all", "-q"]) == 1
    assert "Merge again to have it as it was, with --recipe-from-metadata." in capsys.readouterr().err
    again = ["out.safetensors", "--recipe-from-metadata", "-o", "out.safetensors", "--force", "-q"]
    assert main(again) == 0
    assert Path("out.safetensors").read_bytes() == right


def test_a_header_that_was_written_otherwise_is_told(folder, capsys):
    assert main(["a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q", "--dtype", "fp16"]) == 0
    tensors = load_file("out.safetensors")
    with safe_open("out.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    text = json.dumps({"__metadata__": metadata, **entries(tensors)}, indent=1).encode()
    body = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    Path("out.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    assert main(["verify", "out.safetensors", "--all", "-q"]) == 0
    out = capsys.readouterr().out
    assert "values: every byte of 3 tensors is what the recipe gives" in out
    assert "headers: out.safetensors is laid out otherwise than streammerge does it" in out
    assert "Every byte" not in out


def entries(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, object]]:
    start, found = 0, dict[str, dict[str, object]]()
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.itemsize
        found[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    return found


def test_metadata_of_another_version_are_not_compared(folder, capsys):
    assert main(["a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q"]) == 0
    save_again(Path("out.safetensors"), {"streammerge.version": "0.0.1", "modelspec.license": "GPL"})
    assert main(["verify", "out.safetensors", "-q"]) == 0
    assert "metadata: not compared: written by version 0.0.1" in capsys.readouterr().out


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_plan_is_shown_even_if_the_disk_is_too_small(folder, capsys, monkeypatch, how):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    assert main(["plan", "a.safetensors", "b.safetensors", *how]) == 1
    said = capsys.readouterr()
    assert "not enough disk" in said.err
    if how:
        assert json.loads(said.out)["free_disk_bytes"] == 10
    else:
        assert "free disk  10 B" in said.out
    assert len(digests(folder)) == 2
