"""The README and the pages are current, complete, and lead somewhere."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import streammerge
from docs import make
from streammerge.cli.main import COMMANDS
from streammerge.methods import METHODS
from streammerge.recipe.options import Options
from streammerge.recipe.parse import KEYS
from streammerge.recipe.policies import MISSING_POLICIES, SHAPE_POLICIES
from tests.promises.pages import PAGES, anchors, links
from tests.promises.rooms import ROOMS

TEXTS = {page.name: make.read(page) for page in PAGES}
BESIDE = [
    make.ROOT / path for path in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/NOTES.md", "tests/RELIABILITY.md")
]
"""Pages that people write beside the documentation."""


def test_generated_parts_are_current():
    stale = [str(path) for path, text in make.current().items() if make.read(path) != text]
    assert not stale, "run `make docs`"


def test_every_part_has_its_place():
    placed = [found["name"] for text in TEXTS.values() for found in make.BLOCK.finditer(text)]
    assert sorted(placed) == sorted(make.PARTS)


def test_what_is_not_current_is_made_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    page, readme = tmp_path / "docs" / "safety.md", tmp_path / "README.md"
    page.write_text("<!-- limits: made by docs/make.py -->\nold\n<!-- end of limits -->\n", encoding="utf-8")
    readme.write_text("nothing is made here\n", encoding="utf-8")
    for name, path in (("ROOT", tmp_path), ("README", readme), ("PICTURE", tmp_path / "docs" / "rooms.svg")):
        monkeypatch.setattr(make, name, path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert make.main(["--check"]) == 1
    assert re.findall(r"\S+ is not current", capsys.readouterr().err) == [
        f"{Path('docs', name)} is not current" for name in ("safety.md", "rooms.svg")
    ]
    assert "old" in make.read(page)
    assert make.main([]) == 0
    assert "75,000 tensors" in make.read(page)
    assert make.main(["--check"]) == 0


def test_the_readme_fits_a_screen():
    assert make.README.stat().st_size <= 8000


@pytest.mark.parametrize(
    ("page", "line"),
    [
        ("methods.md", "| `nearswap` | θ = θ₀ + g (θ₁ − θ₀),   g = min(t / \\|θ₁ − θ₀\\|, 1) | block | required | "),
        ("options.md", "| `-m, --method M` | the merge method (default: linear; "),
        ("options.md", "| `--on-nonfinite error\\|warn\\|ignore` | infinite values and NaN (default: warn) |\n"),
        ("commands.md", "| `--all` | compute every byte again, not only samples |\n"),
        ("commands.md", "    streammerge demo [FOLDER] [options]\n"),
        ("commands.md", "| `[FOLDER]` | where to put the models (default: demo) |\n"),
        ("python.md", "| `sync` | `--no-sync` | `True` |\n"),
        ("diffusion.md", f"| `OUT07` | `{'▁' * 19}{'█' * 7}` | `{'▁' * 13}{'█' * 7}` |\n"),
        ("safety.md", "| an index of shards | 24 MiB (a quarter of that beyond ASCII), 262,144 values |\n"),
        ("README.md", "| **streammerge** | "),
    ],
)
def test_generated_parts_say_what_is_so(page, line):
    assert f"\n{line}" in TEXTS[page]


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.name)
def test_paths_are_there(page):
    for path in re.findall(r"(?<![\w/.])(?:streammerge|tests|docs|examples|benchmarks)/[\w./*-]*\w", make.read(page)):
        assert list(make.ROOT.glob(path)), path


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_links_are_found():
    assert "methods.md" in {link.rpartition("/")[2] for link in links(make.README)}
    assert "where-models-differ" in anchors(make.ROOT / "docs" / "recipes.md")
    assert "streammerge-verify" in anchors(make.ROOT / "docs" / "commands.md")


def test_every_page_can_be_found_from_the_readme():
    linked = {(make.ROOT / link.partition("#")[0]).resolve() for link in links(make.README)}
    assert {page for page in PAGES if page != make.README} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_rows_of_a_table_are_equally_long(page):
    fenceless = re.sub(r"```.*?```", "", TEXTS[page.name], flags=re.DOTALL)
    for block in re.findall(r"(?:^\|.*\n)+", fenceless, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1, block


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_table(name):
    assert f"\n| `{name}` |" in TEXTS["methods.md"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_heading(name):
    assert f"\n## streammerge {name}\n" in TEXTS["commands.md"]


@pytest.mark.parametrize("field", dataclasses.fields(Options), ids=lambda field: field.name)
def test_every_option_is_told_to_python_programs_and_to_those_who_type(field):
    row = re.search(rf"^\| `{field.name}` \| `(--[a-z-]+)` \| `(.*)` \|$", TEXTS["python.md"], re.MULTILINE)
    assert row is not None
    assert row[2] == repr(field.default)
    assert f"`{row[1]}" in TEXTS["options.md"]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_a_recipe_is_told(key):
    table = TEXTS["recipes.md"].partition("| key | what it says |\n")[2].partition("\n\n")[0]
    assert f"`{key}`" in "".join(row.split("|")[1] for row in table.splitlines())


@pytest.mark.parametrize(("key", "policies"), [("shape_mismatch", SHAPE_POLICIES), ("missing", MISSING_POLICIES)])
def test_every_policy_is_told(key, policies):
    table = TEXTS["recipes.md"].partition(f"\n| `on_{key}` | ")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(policies)


def test_every_public_name_is_told():
    for name in streammerge.__all__:
        assert re.search(rf"\b{name}\b", TEXTS["python.md"]), name


def test_every_option_of_a_merge_is_told():
    for option in make.named(make.parser_of()):
        assert re.search(rf"`(-\w, )?{option}\b", TEXTS["options.md"]), option


def test_every_error_is_told():
    for name in (name for name in streammerge.__all__ if name.endswith("Error")):
        assert f"`{name}`" in TEXTS["python.md"]


def test_the_readme_names_ten_methods():
    paragraph = TEXTS["README.md"].partition("## Methods\n\n")[2].partition("[more than fifty others]")[0]
    named = re.findall(r"`(\w+)`", paragraph)
    assert len(named) == 10
    assert set(named) <= set(METHODS)
    assert len(METHODS) - len(named) > 50


def test_other_tools_names_lead_to_methods_that_are_there():
    table = TEXTS["methods.md"].partition("<!-- other names -->")[2].partition("<!-- end of other names -->")[0]
    cells = [row.split("|")[3] for row in table.strip().splitlines()[2:]]
    words = {word for cell in cells for word in re.findall(r"`([a-z_]+)`", cell)}
    known = {parameter.name for method in METHODS.values() for parameter in method.parameters} | {"on_missing"}
    assert len(cells) > 10
    assert words <= {*METHODS, *known}


def test_the_picture_shows_every_room():
    picture = ElementTree.fromstring(make.read(make.PICTURE))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == [text for room in ROOMS for text in room]
    assert max(len(what) for _, what in ROOMS) <= 90, "longer lines would leave the picture"


# ── what helps those who work on it ──────────────────────────────────────────────────────────────────────────────────


def makefile() -> str:
    return (make.ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version():
    text = (make.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert versions[0] == streammerge.__version__
    assert versions == sorted(versions, key=lambda each: [int(part) for part in each.split(".")], reverse=True)


def test_pre_commit_checks_what_lint_checks():
    config = yaml.safe_load((make.ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    entries = [hook["entry"] for hook in config["repos"][0]["hooks"]]
    lint = makefile().partition("\nlint:")[2].partition("\n\n")[0]
    assert len(entries) == 3
    for entry in entries:
        assert f"\t$(BIN)/{entry}" in lint


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("make") is None, reason="there is no make, or no shell")
def test_make_tells_its_targets():
    done = subprocess.run(["make"], cwd=make.ROOT, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY: (.*)$", makefile(), re.MULTILINE)
    assert phony is not None
    told = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert sorted(told) == sorted(phony[1].split())


def test_contributing_fits_a_screen():
    assert len(make.read(make.ROOT / "CONTRIBUTING.md").splitlines()) <= 60
