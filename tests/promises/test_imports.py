"""Imports point one way, cost little, and give what is promised; files stay short enough to be read."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge
from streammerge.compute.kernels.library import kernels
from tests.promises.rooms import ROOMS

PACKAGE = Path(streammerge.__file__).parent

DOOR = "the door"
"""The package's own `__init__` and `__main__`, above all rooms."""

ORDER = [DOOR, *(name for name, _ in ROOMS)]

MAY_REACH_TORCH = {"compute", "workers", "engine", "tools"}
"""Rooms that may import torch when they are imported; all others import it where they compute."""

TORCHLESS = {
    *("compute.expressions", "compute.job", "compute.costs", "compute.application", "compute.magnitudes"),
    "compute.machine",
}
"""Modules of these rooms that plans are made with: they must not."""

UPWARD: dict[tuple[str, str], str] = {}
"""Imports that go up all the same, each with its reason."""


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name without `streammerge.`, and its file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(name: str) -> str:
    first = name.partition(".")[0]
    return DOOR if first in ("", "__main__") else first


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(path: Path) -> set[str]:
    """Modules of the package that this one imports: at once, in a function, or for type checkers only."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if short(name) in modules() else str(node.module) for name in inside}
    return {short(name) for name in names if name.partition(".")[0] == "streammerge"}


def short(name: str) -> str:
    return name.partition("streammerge")[2].lstrip(".")


def test_every_module_is_in_a_room():
    assert {room(name) for name in modules()} == set(ORDER)
    assert len(ORDER) <= 19


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_room_imports_only_those_below_it(name):
    place = ORDER.index(room(name))
    up = {other for other in imported(modules()[name]) if ORDER.index(room(other)) < place}
    assert up == {other for importer, other in UPWARD if importer == name}, f"{name} must not know of {up}"


def test_modules_do_not_import_in_circles():
    waiting = {name: imported(path) - {name} for name, path in modules().items()}
    while free := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"circles among {sorted(waiting)}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_torch_is_reached_only_where_something_is_computed(name):
    body = parsed(modules()[name]).body
    at_once = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    at_once |= {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}
    reaches = any(other.partition(".")[0] == "torch" for other in at_once)
    assert not reaches or (room(name) in MAY_REACH_TORCH and name not in TORCHLESS)


def test_imports_are_found():
    """The tests above would pass with nothing found."""
    assert "errors" in imported(modules()["cli.main"])
    assert {"compute.makers", "storage.copying", "workers.windows"} <= imported(modules()["workers.schedule"])
    assert "methods" in imported(modules()["recipe.recipe"])
    assert "engine" in imported(modules()["cli.commands.merge"]), "one that is imported late"


# ── what is imported when ────────────────────────────────────────────────────────────────────────────────────────────

LISTING = """
import sys
try:
    {code}
except SystemExit:
    pass
print("loaded:", *sys.modules)
"""


def loaded(code: str, folder: Path) -> set[str]:
    """The modules that are loaded after this code ran in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", LISTING.format(code=code)], capture_output=True, text=True, check=True, cwd=folder
    )
    return set(done.stdout.rpartition("loaded:")[2].split())


def loaded_packages(code: str, folder: Path) -> set[str]:
    return {name.partition(".")[0] for name in loaded(code, folder)}


def command(*words: str) -> str:
    return f"from streammerge.cli.main import main; assert main({list(words)!r}) in (0, 2)"


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a", "b"):
        save_file({"x": torch.ones(3)}, tmp_path / f"{name}.safetensors")
        torch.save({"x": torch.ones(3)}, tmp_path / f"{name}.ckpt")
    (tmp_path / "recipe.yaml").write_text("merge_method: linear\nmodels: [a.safetensors, b.ckpt]\n")
    return Path(tmp_path)


SLOW = {"torch", "numpy", "safetensors", "matplotlib"}


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import streammerge", {"rich", "yaml", "psutil"}),
        (
            "import streammerge; streammerge.open_model; streammerge.merge; streammerge.slerp; dir(streammerge)",
            {"rich"},
        ),
        ("import streammerge; streammerge.open_model('a.ckpt')", {"rich", "yaml", "psutil"}),
        (command(), {"rich", "yaml", "psutil"}),
        (command("--help"), {"rich", "yaml"}),
        (command("--version"), {"rich", "yaml"}),
        (command("plan", "--help"), {"rich", "yaml"}),
        (command("compare", "--help"), {"rich", "yaml"}),
        (command("inspect", "a.safetensors"), {"rich", "yaml", "psutil"}),
        (command("inspect", "a.ckpt", "--tensors"), {"rich", "yaml"}),
        (command("methods"), {"rich", "yaml", "psutil"}),
        (command("methods", "ties"), {"rich", "yaml"}),
        (command("recipes"), {"rich"}),
        (command("recipes", "sd2-depth"), {"rich"}),
        (command("plan", "a.safetensors", "b.ckpt"), {"rich", "yaml", "psutil"}),
        (command("plan", "recipe.yaml", "--json"), {"rich"}),
        (command("a.safetensors", "b.safetensors", "--dry-run"), {"rich", "yaml"}),
        (command("verify", "a.safetensors"), {"rich", "yaml"}),
    ],
)
def test_what_only_looks_at_headers_loads_nothing_slow(folder, code, without):
    assert not loaded_packages(code, folder) & (SLOW | without)


MERGING = {"engine", "workers", "storage", "plan"}


@pytest.mark.parametrize(
    ("code", "rooms"),
    [
        (command("--help"), {*MERGING, "tools", "models", "compute", "methods", "formats", "report"}),
        (command("plan", "--help"), {*MERGING, "tools", "models", "compute", "methods", "formats", "report"}),
        (command("inspect", "--help"), {*MERGING, "tools", "models", "compute", "methods", "formats", "report"}),
        (command("inspect", "a.safetensors"), {*MERGING, "methods"}),
        (command("inspect", "a.ckpt", "--json"), {*MERGING, "methods"}),
        (command("methods"), {*MERGING, "tools", "models", "recipe.parse"}),
        (command("methods", "ties", "--json"), {*MERGING, "tools", "models", "recipe.parse"}),
        (command("plan", "a.safetensors", "b.safetensors"), {"tools", "cli.manual", "cli.commands.merge"}),
    ],
)
def test_a_command_loads_no_room_that_it_has_no_use_for(folder, code, rooms):
    found = {short(name) for name in loaded(code, folder) if name.startswith("streammerge.")}
    assert {"cli.main", "recipe.options"} <= found
    assert not {name for name in found if name in rooms or room(name) in rooms}


@pytest.mark.parametrize("method", ["linear", "crossover"])
def test_torch_is_loaded_where_there_are_no_loops(folder, method):
    words = ("a.safetensors", "b.safetensors", "-m", method, "-o", "out.safetensors", "-q")
    packages = loaded_packages(command(*words), folder)
    assert ("torch" in packages) == (method == "crossover" or kernels() is None)
    assert not packages & {"matplotlib", "yaml"}


# ── the package's face ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_public_names():
    assert streammerge.__all__ == [
        "Cast",
        "Checkpoint",
        "CheckpointError",
        "Decoded",
        "DeviceError",
        "MergeError",
        "MethodError",
        "Model",
        "OutputError",
        "PlanError",
        "RecipeError",
        "Renamed",
        "TensorInfo",
        "View",
        "load_methods",
        "make_plan",
        "merge",
        "open_model",
    ]
    for name in streammerge.__all__:
        assert getattr(streammerge, name).__name__ == name
        assert name in dir(streammerge)


def test_every_method_is_a_function_of_the_package():
    from streammerge.methods import METHODS

    for name, method in METHODS.items():
        function = getattr(streammerge, name)
        assert callable(function)
        assert function.__name__ == name
        assert function.__doc__ == method.doc
        assert name in dir(streammerge)


def test_all_errors_are_one_family():
    errors = [getattr(streammerge, name) for name in streammerge.__all__ if name.endswith("Error")]
    assert len(errors) == 7
    assert all(issubclass(error, streammerge.MergeError) for error in errors)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'streammerge' has no attribute 'slurp'"):
        _ = streammerge.slurp
    assert not hasattr(streammerge, "_private")


# ── the files ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_there_is_no_drawer_for_everything():
    assert not {"utils", "util", "helpers", "common", "misc"} & {name.rpartition(".")[2] for name in modules()}
