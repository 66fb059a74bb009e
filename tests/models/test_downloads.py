"""Models that are fetched from the hub, and outputs that are pushed there, by a stand-in for its library."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import CheckpointError, OutputError, RecipeError
from streammerge.models.downloads import needed_files
from streammerge.models.hub import HubName, located
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.vocabulary import Vocabulary
from tests.make.folders import llama_config, llama_tensors, save_folder, save_llama

COMMIT = "0123abcd" * 5


class RepositoryNotFoundError(Exception):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(Exception):
    pass


class ConnectionError(Exception):
    pass


class Hub:
    """What is used of huggingface_hub: `folders` are its models, `log` what was asked of it."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.log: list[tuple[str, Any]] = []
        self.error: Exception | None = None
        self.token: str | None = "hf_x"

    def HfApi(self) -> Hub:
        return self

    def get_token(self) -> str | None:
        return self.token

    def asked(self, what: str, *details: Any) -> None:
        self.log.append((what, details))
        if self.error is not None:
            raise self.error

    def model_info(self, name: str, revision: str, files_metadata: bool) -> Any:
        self.asked("info", name, revision)
        if name not in self.folders:
            raise RepositoryNotFoundError(name)
        if revision not in ("main", COMMIT):
            raise RevisionNotFoundError(revision)
        root = self.folders[name]
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        siblings = [SimpleNamespace(rfilename=p.relative_to(root).as_posix(), size=p.stat().st_size) for p in files]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def snapshot_download(self, name: str, revision: str, allow_patterns: list[str], cache_dir: str) -> str:
        folder = Path(cache_dir) / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / COMMIT
        root, taken = self.folders[name], []
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            called = path.relative_to(root).as_posix()
            if any(fnmatch.fnmatch(called, pattern) for pattern in allow_patterns):
                (snapshot / called).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / called)
                taken.append(called)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(COMMIT)
        self.asked("download", name, sorted(taken))
        return str(snapshot)

    def repo_exists(self, name: str) -> bool:
        return name in self.folders

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        self.asked("repo", name, private)

    def create_branch(self, name: str, branch: str, exist_ok: bool) -> None:
        self.asked("branch", name, branch)

    def upload_folder(self, repo_id: str, folder_path: str, revision: str | None, **more: Any) -> Any:
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        sent = [each for each in files if any(fnmatch.fnmatch(each, p) for p in more["allow_patterns"])]
        self.asked("upload", repo_id, revision, sorted(sent))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = save_llama(tmp_path / "remote" / "tiny", 1, shards=2)
    for name in ("pytorch_model.bin", "optimizer.pt", "x.gguf", "onnx/model.onnx", "original/consolidated.00.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    made = Hub({"org/tiny": folder, "org/one": save_llama(tmp_path / "remote" / "one", 2)})
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


BESIDE = [
    *("chat_template.jinja", "config.json", "generation_config.json"),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
]


def test_what_is_needed_is_fetched_once_and_nothing_else(hub):
    found = located(Path("org/tiny"))
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert hub.log[1] == ("download", ("org/tiny", sorted([*BESIDE, *shards, "model.safetensors.index.json"])))
    assert located(Path("hf://org/tiny"), "hf://org/tiny") == found
    assert located(Path("org/tiny"), f"org/tiny@{COMMIT[:7]}") == found
    assert len(hub.log) == 2
    with streammerge.open_model("org/tiny") as model:
        assert model.tensors.keys() == llama_tensors(1).keys()


def test_a_merge_of_names_fetches_them(hub, capsys):
    assert main(["org/tiny", "org/one@main", "-o", "OUT", "-q"]) == 0
    assert f"model: org/tiny@{COMMIT}\n" in Path("OUT/README.md").read_text()
    assert [what for what, _ in hub.log] == ["info", "info", "download", "download"]
    assert main(["verify", "OUT"]) == 0
    assert "are what the recipe gives" in capsys.readouterr().out


def test_a_recipe_is_read_without_asking_the_hub(hub):
    raw = {"merge_method": "linear", "models": ["org/tiny", {"model": {"path": "org/one", "revision": "v1"}}]}
    recipe = parse_recipe({**raw, "tokenizer_source": {"path": "org/one", "revision": "v1"}}, Path())
    assert recipe.vocabulary == Vocabulary("one", is_model=True)
    assert [entry.source for entry in recipe.inputs] == [HubName("org/tiny"), HubName("org/one", "v1")]
    assert [entry.name for entry in recipe.inputs] == ["tiny", "one"]
    assert not hub.log


def test_nothing_is_fetched_until_all_models_are_found(hub, capsys):
    assert main(["org/tiny", "org/none", "gone.safetensors", "-o", "OUT"]) == 1
    told = capsys.readouterr().err
    assert "2 models of the recipe can't be had" in told
    assert "org/none: there is no such file or folder here" in told
    assert "gone.safetensors: can't be read: No such file" in told
    assert [what for what, _ in hub.log] == ["info", "info"]


def test_a_base_that_is_one_of_the_models_is_known_by_where_it_lies(hub):
    raw = {"merge_method": "task_arithmetic", "models": [{"model": "org/tiny", "parameters": {"weight": 1}}]}
    with pytest.raises(RecipeError, match="the base is the same model as tiny"):
        streammerge.merge({**raw, "base_model": f"org/tiny@{COMMIT}"}, output="OUT")


def test_a_bound_model_may_be_named_as_on_the_hub(hub):
    assert main(["--recipe", "weighted-sum", "a=org/tiny", "b=hf://org/one", "-o", "OUT", "-q"]) == 0
    assert f"model: org/tiny@{COMMIT}\n" in Path("OUT/README.md").read_text()


def test_what_is_there_in_part_is_completed(hub):
    found = located(Path("org/tiny"))
    (found / "model-00002-of-00002.safetensors").unlink()
    assert located(Path("org/tiny")) == found
    assert (found / "model-00002-of-00002.safetensors").is_file()


def test_shards_under_odd_names_are_fetched_after_their_index(hub):
    folder = hub.folders["org/tiny"]
    (folder / "model-00002-of-00002.safetensors").rename(folder / "rest[1].safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002-of-00002.safetensors", "rest[1].safetensors"))
    assert (located(Path("org/tiny")) / "rest[1].safetensors").is_file()


def test_a_folder_that_is_here_makes_a_path_of_a_name(hub):
    Path("org").mkdir()
    with pytest.raises(CheckpointError, match=r"can't be read: No such file .* not in Hugging Face's cache"):
        streammerge.open_model("org/tiny")
    assert not hub.log


def test_metadata_of_strangers_fetch_nothing(hub, capsys):
    assert main(["org/one", "-o", "OUT", "-q"]) == 0
    shutil.rmtree(Path("..") / "hf")
    hub.log.clear()
    assert main(["verify", "OUT"]) == 0
    assert "values: not checked" in capsys.readouterr().out
    assert not hub.log


def test_metadata_of_strangers_complete_nothing(hub):
    assert main(["org/tiny", "-o", "OUT", "-q"]) == 0
    for shard in Path("..").glob("hf/**/model-0000*"):
        shard.unlink()
    hub.log.clear()
    assert main(["verify", "OUT"]) == 1
    assert not hub.log


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RepositoryNotFoundError("404"), ("it is private", "HF_TOKEN")),
        (GatedRepoError("403"), ("accepted its terms", "https://huggingface.co/org/tiny")),
        (RevisionNotFoundError("404"), ("no such revision", "/tree/main")),
        (ConnectionError("no route"), ("can't be reached", "HF_ENDPOINT")),
        (ValueError("odd\nthing"), ("the hub's library says: odd", "try again")),
    ],
)
def test_what_the_hub_refuses_is_told_in_words(hub, error, words, capsys):
    hub.error = error
    assert main(["org/tiny", "org/one", "-o", "OUT"]) == 1
    told = capsys.readouterr().err
    assert all(word in told for word in ("org/tiny: ", "Nothing was written.", *words))


def test_a_disk_that_is_too_small_is_told_before(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(CheckpointError, match="are free"):
        located(Path("org/tiny"))
    assert [what for what, _ in hub.log] == ["info"]


def test_files_that_are_needed():
    assert needed_files(["pytorch_model.bin", "config.json", "a.onnx"], "x") == ["pytorch_model.bin", "config.json"]
    assert needed_files(["pytorch_model.bin", "model.safetensors"], "x") == ["model.safetensors"]
    shards = ["pytorch_model.bin.index.json", "pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin"]
    assert needed_files([*shards, "model-1-of-2.safetensors"], "x") == shards
    assert needed_files(["odd.safetensors", "README.md"], "x") == ["odd.safetensors", "README.md"]
    pipeline = ["model_index.json", "unet/config.json", "unet/a.safetensors", "vae/b.bin", "unet/c.bin"]
    pipeline += ["all.safetensors", "unet/a.fp16.safetensors", "vae/b.fp16.bin", "text_encoder/model.onnx", ".git"]
    assert needed_files(pipeline, "x") == pipeline[:4]
    two = ["model.safetensors.index.json", "model-1-of-1.safetensors", "model.safetensors"]
    for names in ([], ["config.json"], ["a.safetensors", "b.safetensors"], two):
        with pytest.raises(CheckpointError, match="on the hub, it holds"):
            needed_files(names, "x")


# ── what is pushed ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_finished_folder_is_pushed_with_its_card_and_nothing_else(hub, capsys):
    save_folder(Path("OUT"), {}, None, {"notes.txt": "mine"})
    Path("OUT/model.safetensors").unlink()
    words = ["org/tiny", "org/one", "-o", "OUT", "--shard-size", "2kB", "--upload", "me/merge@v2"]
    assert main(words) == 0
    told = capsys.readouterr().err
    assert ("repo", ("me/merge", True)) in hub.log, "private"
    assert ("branch", ("me/merge", "v2")) in hub.log
    what, (name, revision, sent) = hub.log[-1]
    assert (what, name, revision) == ("upload", "me/merge", "v2")
    assert {"README.md", "config.json", "model.safetensors.index.json", "tokenizer.json"} <= set(sent)
    assert "notes.txt" not in sent
    assert len([each for each in sent if each.endswith(".safetensors")]) > 1
    assert "is private" in told
    assert "uploaded: https://huggingface.co/me/merge/commit/1" in told


def test_a_push_that_fails_leaves_the_output_and_says_how_to_push_it_again(hub, capsys, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(hub, "upload_folder", fail)
    assert main(["org/tiny", "org/one", "-o", "OUT", "--upload", "org/one", "-q"]) == 1
    told = capsys.readouterr().err
    assert "the output was not uploaded" in told
    assert "hf upload org/one OUT ." in told
    assert "The output is complete." in told
    assert load_file("OUT/model.safetensors").keys() == llama_tensors(1).keys()
    assert json.loads(Path("OUT/config.json").read_text()) == llama_config()


@pytest.mark.parametrize(
    ("output", "name", "change", "told"),
    [
        ("OUT.safetensors", "me/merge", {}, "the output is a file"),
        ("OUT", "merge", {}, "is no model's name"),
        ("OUT", "../x/y", {}, "is no model's name"),
        ("OUT", "me/merge", {"token": None}, "nobody is logged in"),
        ("OUT", "me/merge", {"offline": True}, "offline"),
        ("OUT", "me/merge", {"library": None}, "isn't installed"),
    ],
)
def test_what_can_not_be_pushed_is_told_before_anything_is_merged(hub, monkeypatch, output, name, change, told):
    located(Path("org/one"))
    hub.token = change.get("token", "x")
    if "offline" in change:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "library" in change:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OutputError, match=told):
        streammerge.merge({"merge_method": "linear", "models": ["org/one"]}, output=output, upload=name)
    assert not Path(output).exists()
