"""The README is true: its tables are current, its commands run, its Python runs."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from streammerge.cli import COMMANDS, main
from streammerge.demo.files import DemoModels, make_models
from streammerge.methods import METHODS
from tests import readme

TEXT = readme.README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> DemoModels:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: DemoModels) -> Path:
    """A folder with every file that the README's examples name."""
    torch_zips = make_models(tmp_path, container="ckpt")
    for path in (models.base, models.depth, models.waifu):
        shutil.copy(path, tmp_path / path.name)
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(models.waifu if name == "a.safetensors" else models.base, tmp_path / name)
    for name, path in (("b", torch_zips.waifu), ("base", torch_zips.base), ("depth", torch_zips.depth)):
        shutil.copy(path, tmp_path / f"{name}.ckpt")
    shutil.copy(torch_zips.waifu, tmp_path / "waifu.ckpt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[list[str]]:
    """Every command of the README's console examples."""
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ streammerge")) for line in lines if line.startswith("$ streammerge")]


def test_tables_are_current():
    assert readme.with_tables(TEXT) == TEXT, "run `make docs`"


def test_there_are_commands_to_run():
    assert len(commands()) >= 4


def test_commands_run(folder: Path):
    cut = [["a.safetensors:0.7", "b.ckpt:0.3"], ["a.safetensors", "b.safetensors"]]
    for words in commands():
        extra = ["--on-missing", "keep"] if words[:2] in cut else []
        assert main([*words, *extra, "-q"]) == 0, words
    assert (folder / "waifu-depth.safetensors").is_file()


def test_recipe_runs(folder: Path):
    (recipe,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert main(["recipe.yaml", "-o", "merged.safetensors", "-q"]) == 0


def test_python_runs(folder: Path):
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "import streammerge" in block)
    code = code.replace('output="merged.safetensors"', 'output="merged.safetensors", force=True')
    code = code.replace('"400MB"', '"8GB"')  # the tests' own process is larger
    shutil.copy(folder / "waifu.ckpt", folder / "b.ckpt")
    (folder / "recipe.yaml").write_text(
        "merge_method: weighted_sum\nmodels: [{model: a.safetensors}, {model: b.ckpt}]\n", encoding="utf-8"
    )
    exec(compile(code, "README.md", "exec"), {})
    assert (folder / "merged.safetensors").is_file()


def test_every_method_is_in_the_table():
    for name in METHODS:
        assert f"| `{name}` |" in TEXT


def test_other_tools_names_lead_to_methods_that_are_there():
    table = TEXT.partition("<!-- other names -->")[2].partition("<!-- end of other names -->")[0]
    cells = [row.split("|")[3] for row in table.strip().splitlines()[2:]]
    words = {word for cell in cells for word in re.findall(r"`([a-z_]+)`", cell)}
    known = {parameter.name for method in METHODS.values() for parameter in method.parameters} | {"on_missing"}
    assert len(cells) > 10
    assert words <= {*METHODS, *known}


def test_every_command_is_mentioned():
    for name in COMMANDS:
        assert f"streammerge {name}" in TEXT


def test_changelog_has_the_unreleased_changes():
    assert "## [Unreleased]" in (readme.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
