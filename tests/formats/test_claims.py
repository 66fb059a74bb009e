"""What is written is none of what is read, nor written twice, however the two are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.cli.main import main
from streammerge.errors import OutputError
from streammerge.formats.claims import Claim, Claims, file_key
from tests.make.models import make_tensors, save_model
from tests.storage.outputs import digests

SHAPES = {"x": (40, 30), "y": (700,)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Models `a` and `b`, `deep/` empty, and a folder `F` of shards with its index and config."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_model(tmp_path / f"{name}.safetensors", make_tensors(seed, shapes=SHAPES))
    (tmp_path / "deep").mkdir()
    save_model(tmp_path / "F" / "part-1.safetensors", make_tensors(2, shapes={"x": (40, 30)}))
    save_model(tmp_path / "F" / "part-2.safetensors", make_tensors(3, shapes={"y": (700,)}))
    index = {"weight_map": {"x": "part-1.safetensors", "y": "part-2.safetensors"}}
    (tmp_path / "F" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "F" / "config.json").write_text("{}")
    return tmp_path


def unchanged(folder: Path, *words: str) -> None:
    """The command is refused, and changes nothing."""
    before = digests(folder)
    assert main([*words, "-q"]) == 1
    assert digests(folder) == before


def linked(path: Path, link: Path) -> Path:
    link.symlink_to(path.absolute())
    return link


def hard_linked(path: Path, link: Path) -> Path:
    link.hardlink_to(path)
    return link


WAYS: dict[str, Callable[[Path, Path], Path]] = {
    "its name": lambda path, link: path,
    "a link": linked,
    "a hard link": hard_linked,
    "a roundabout way": lambda path, link: Path("deep/..") / path,
    "a link to a link": lambda path, link: linked(linked(path, Path("deep/first")), link),
    "its folder's link": lambda path, link: linked(path.parent, Path("side")) / path.name,
}
"""Ways to write of a file, beside making a link that ends as a report does."""

READ = [
    "a.safetensors",
    "F/part-2.safetensors",
    "F/model.safetensors.index.json",
    "F/config.json",
    "recipe.yaml",
    "m.py",
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("read", READ)
def test_a_report_is_nothing_that_is_read(folder, capsys, way, read):
    recipe = {"merge_method": "linear", "models": ["a.safetensors", "b.safetensors", "F"]}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    Path("m.py").write_text(
        "from streammerge.methods import LinearMethod, method\n"
        "@method(LinearMethod)\ndef claimed() -> list[float]:\n    '''θ'''\n    return [1.0]\n"
    )
    path = WAYS[way](Path(read), Path("report.json"))
    try:
        unchanged(folder, "recipe.yaml", "--methods", "m.py", "-o", "out.safetensors", "--report", str(path))
    finally:
        streammerge.methods.METHODS.pop("claimed", None)
    assert "the same file as" in (err := capsys.readouterr().err) or "is named like a model or a recipe" in err


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_a_table_or_plot_is_nothing_that_is_compared(folder, way, option):
    blob = shutil.copy("a.safetensors", "blob.png")
    path = WAYS[way](Path(blob), Path("report.json" if option == "--csv" else "other.png"))
    unchanged(folder, "compare", "blob.png", "F", option, str(path))


@pytest.mark.parametrize("way", WAYS)
def test_an_output_is_no_input(folder, way):
    path = WAYS[way](Path("a.safetensors"), Path("out.safetensors"))
    unchanged(folder, "a.safetensors", "b.safetensors", "-o", str(path), "--force")


@pytest.mark.parametrize("way", ["a link", "a hard link", "a link to a link"])
@pytest.mark.parametrize("name", ["out-00001-of-00002.safetensors", "out.safetensors.index.json", "out.safetensors"])
def test_no_file_of_an_output_is_an_input(folder, way, name):
    """`out.safetensors` would be an older output's, which shards replace."""
    WAYS[way](Path("a.safetensors"), Path(name))
    unchanged(folder, "a.safetensors", "b.safetensors", "-o", "out.safetensors", "--force", "--shard-size", "3KB")


def test_a_file_of_hashes_is_no_input(folder, capsys):
    shutil.copy("a.safetensors", "out.safetensors.sha256")
    unchanged(folder, "b.safetensors", "./out.safetensors.sha256", "-o", "out.safetensors", "--hash", "--force")
    assert "Choose another name for the output." in capsys.readouterr().err
    assert main(["b.safetensors", "out.safetensors.sha256", "-o", "other.safetensors", "--hash", "-q"]) == 0


@pytest.mark.parametrize("how", [(), ("--shard-size", "3KB")])
@pytest.mark.parametrize("models", [("F",), ("F/part-1.safetensors",), ("F/model.safetensors.index.json",)])
def test_an_index_of_an_input_stays(folder, how, models):
    unchanged(folder, *models, "-o", "F", "--force", *how)
    unchanged(folder, *models, "-o", "F/model.safetensors", "--force", *how)
    assert main([*models, "-o", "F/other.safetensors", *how, "-q"]) == 0


def test_an_index_of_a_model_that_was_opened_stays(folder):
    before = digests(folder)
    with streammerge.open_model("F") as model, pytest.raises(OutputError, match="the index of the input"):
        streammerge.merge(streammerge.passthrough(model), output="F", force=True)
    assert digests(folder) == before


@pytest.mark.parametrize(
    "written",
    [
        ("--report", "out.safetensors.index.json"),
        ("--report", "OUT.safetensors.INDEX.json"),
        ("--report", "./deep/../out.safetensors.sha256"),
        ("--report", ".out.safetensors.streammerge-journal"),
        ("--report", "link.json"),
    ],
)
def test_nothing_is_written_twice(folder, written):
    Path("link.json").symlink_to("out-00001-of-00002.safetensors")
    merge = ("a.safetensors", "b.safetensors", "-o", "out.safetensors", "--hash", "--shard-size", "3KB")
    unchanged(folder, *merge, *written)
    assert main([*merge, "--report", "report.json", "-q"]) == 0


def test_a_table_is_no_plot(folder):
    unchanged(folder, "compare", "a.safetensors", "F", "--csv", "x.png", "--plot", "deep/../X.png")
    assert main(["compare", "a.safetensors", "F", "--csv", "x.csv", "--plot", "x.png", "-q"]) == 0


def test_a_benchmark_s_report_is_no_input(folder):
    shutil.copy("a.safetensors", "blob")
    unchanged(folder, "bench", "blob", "b.safetensors", "--report", "blob", "--runs", "1")


def test_an_output_may_replace_a_link_to_what_is_no_input(folder):
    Path("out.safetensors").symlink_to("F/part-1.safetensors")
    before = digests(folder / "F")
    assert main(["a.safetensors", "b.safetensors", "-o", "out.safetensors", "--force", "-q"]) == 0
    assert digests(folder / "F") == before
    assert not Path("out.safetensors").is_symlink()


def test_an_output_may_be_made_again_from_its_own_metadata(folder):
    words = ["-o", "out.safetensors", "-q"]
    assert main(["a.safetensors", "b.safetensors", *words]) == 0
    before = digests(folder)
    assert main(["out.safetensors", "--recipe-from-metadata", *words, "--force"]) == 0
    assert digests(folder) == before
    shutil.copy("out.safetensors", "blob")
    unchanged(folder, "blob", "--recipe-from-metadata", "-o", "new.safetensors", "--report", "blob")


def test_streams_are_no_files(folder):
    assert main(["a.safetensors", "b.safetensors", "-o", "out.safetensors", "--report", os.devnull, "-q"]) == 0
    assert main(["compare", "a.safetensors", "F", "--csv", os.devnull, "--plot", os.devnull, "-q"]) == 0


NAMES = st.lists(
    st.sampled_from(["a", "A", "b", "d/a", "d/../a", "l", "d/l", "new", "NEW", "d/new", "n/n"]), max_size=5
)


@given(NAMES, NAMES)
@settings(deadline=None)
def test_claims_clash_where_files_do(tmp_path_factory, read, written):
    """`l` leads to `a`, `d/l` to `new`, which isn't there; capitals count for files that are."""
    folder = tmp_path_factory.mktemp("claims")
    (folder / "d").mkdir()
    for name in ("a", "A", "b", "d/a"):
        (folder / name).write_text(name)
    (folder / "l").symlink_to("a")
    (folder / "d" / "l").symlink_to("../new")
    same = {"d/../a": "a", "l": "a", "d/l": "new", "NEW": "new"}
    plain_read, plain_written = ([same.get(name, name) for name in names] for names in (read, written))
    clash = set(plain_read) & set(plain_written) or len(set(plain_written)) < len(plain_written)
    claims = Claims(*(tuple(Claim(folder / name, "it") for name in names) for names in (read, written)))
    if clash:
        with pytest.raises(OutputError, match="is the same file as"):
            claims.check()
    else:
        claims.check()


def test_what_is_no_file_has_no_key(tmp_path):
    assert file_key(tmp_path) is None
    assert file_key(Path(os.devnull)) is None
    assert file_key(tmp_path / "a\0b") == file_key(tmp_path / "A\0B")
