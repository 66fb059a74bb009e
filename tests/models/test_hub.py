"""Names on the hub are found in the local cache, as huggingface_hub lays it out; nothing is downloaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import CheckpointError
from streammerge.models.hub import HubName, cache_of, located, meant, name_of
from tests.make.folders import save_llama

COMMIT, OTHER = "a1b2c3d4" * 5, "a1b2ffff" * 5


def cache(home: Path, name="org/tiny", commits=(COMMIT,), refs=None) -> Path:
    """A model in the cache: its files are links into blobs."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    for seed, commit in enumerate(commits):
        made = save_llama(home / "made" / commit, seed, {"README.md": "---\nlicense: mit\n---\n"})
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        for path in made.iterdir():
            blob = folder / "blobs" / f"{commit[:6]}{path.name}"
            path.rename(blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    for ref, commit in (refs if refs is not None else {"main": commits[0]}).items():
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/tiny", HubName("org/tiny")),
        ("org/tiny@main", HubName("org/tiny", "main")),
        ("hf://org/tiny@refs/pr/1", HubName("org/tiny", "refs/pr/1")),
        ("meta-llama/Llama-3.1-8B", HubName("meta-llama/Llama-3.1-8B")),
        *(
            (text, None)
            for text in ("tiny", "a/b/c", "/a/b", "../a", "a/..", "a/b.safetensors", "a/b.ckpt", "", "a/@x")
        ),
        *((text, None) for text in ("org/tiny@", "org/tiny@../x", "a b/c", "-a/b", "hf://", "hf://x", "a\\b/c")),
    ],
)
def test_names(text, name):
    assert HubName.of(text) == name


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/x", "HF_HOME": "/y"}, Path("/x")),
        ({"HUGGINGFACE_HUB_CACHE": "/x"}, Path("/x")),
        ({"HF_HOME": "/y", "XDG_CACHE_HOME": "/z"}, Path("/y/hub")),
        ({"XDG_CACHE_HOME": "/z"}, Path("/z/huggingface/hub")),
        ({}, Path.home() / ".cache" / "huggingface" / "hub"),
    ],
)
def test_where_the_cache_is(environment, folder):
    assert cache_of(environment) == folder


def test_revisions(home):
    folder = cache(home, commits=(COMMIT, OTHER), refs={"main": COMMIT, "v1": OTHER, "refs/pr/1": OTHER})
    first, second = (folder / "snapshots" / commit for commit in (COMMIT, OTHER))
    for word in ("org/tiny", "org/tiny@main", "hf://org/tiny", f"org/tiny@{COMMIT}", "org/tiny@a1b2c3"):
        assert located(Path(word), word) == first
    for word in ("org/tiny@v1", "org/tiny@refs/pr/1", "org/tiny@a1b2f"):
        assert located(Path(word), word) == second
    assert located(folder) == first
    for word in ("org/tiny@v2", "org/tiny@a1b2", "org/tiny@dead"):
        with pytest.raises(
            CheckpointError, match=r"(?s)of the revisions in Hugging Face's cache.*hf download org/tiny"
        ):
            located(Path(word), word)
    assert name_of(first) == HubName("org/tiny", COMMIT)
    assert name_of(first / "model.safetensors") == HubName("org/tiny", COMMIT)
    assert name_of(Path("/models/org/tiny")) is None


def test_the_only_revision_is_meant_where_no_branch_is_known(home):
    folder = cache(home, refs={})
    assert located(Path("org/tiny")) == folder / "snapshots" / COMMIT


@pytest.mark.parametrize("text", ["../../secret", "", "x" * 300, "\xff"])
def test_a_ref_leads_nowhere_but_to_a_revision(home, text):
    cache(home, commits=(COMMIT, OTHER), refs={"main": text})
    with pytest.raises(CheckpointError, match=r"is none of the revisions|is more than one of the revisions"):
        located(Path("org/tiny"))


def test_what_is_here_comes_before_what_is_cached(home):
    cache(home)
    here = save_llama(Path("org/tiny"), 7)
    assert located(Path("org/tiny")) == here


def test_a_merge_of_names(home, capsys):
    cache(home)
    cache(home, "org/other", (OTHER,))
    Path("r.yaml").write_text(
        "merge_method: linear\nmodels: [{model: org/tiny}, {model: {path: org/other, revision: main}}]"
    )
    assert main(["r.yaml", "-o", "OUT", "-q", "--dtype", "bf16"]) == 0
    card = Path("OUT/README.md").read_text()
    assert "base_model:\n- org/tiny\n- org/other\n" in card
    assert "license: mit" in card
    assert f"model: org/tiny@{COMMIT}\n" in card
    assert json.loads(Path("OUT/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert main(["verify", "OUT"]) == 0  # its models are found again by their names
    assert "are what the recipe gives" in capsys.readouterr().out
    assert main(["OUT", "--recipe-from-metadata", "-o", "AGAIN", "-q"]) == 0
    a, b = (load_file(f"{name}/model.safetensors") for name in ("OUT", "AGAIN"))
    assert all((a[name] == b[name]).all() for name in a)
    assert main(["org/tiny:0.5", "hf://org/other:0.5", "-o", "WORDS", "-q"]) == 0
    assert main(["inspect", "org/tiny"]) == 0


def test_what_is_not_there_says_how_to_get_it(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["org/nope", "org/tiny@main", "a.safetensors", "-o", "OUT"]) == 1
    told = capsys.readouterr().err
    assert "3 models of the recipe can't be had" in told
    assert "org/nope: it is not in Hugging Face's cache" in told
    assert "org/tiny@main: it is not in Hugging Face's cache" in told
    assert "a.safetensors: can't be read: No such file" in told
    assert "pip install huggingface_hub" in told
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["hf://org/nope@v1", "-o", "OUT"]) == 1
    assert "org/nope@v1: it is not in Hugging Face's cache" in (told := capsys.readouterr().err)
    assert "this machine is offline" in told
    with pytest.raises(CheckpointError, match="is no model's name"):
        streammerge.open_model("hf://nope")
    with pytest.raises(CheckpointError, match="can't be read: No such file"):
        streammerge.open_model("nope.safetensors")


def test_a_folder_beside_the_recipe_makes_a_path_of_a_name(home, tmp_path):
    (tmp_path / "recipes" / "models").mkdir(parents=True)
    path = tmp_path / "recipes" / "models" / "a"
    assert meant(path, "models/a") == path
    assert meant(tmp_path / "recipes" / "org" / "a", "org/a") == HubName("org/a")
