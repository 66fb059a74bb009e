"""Imports point one way, cost little, and give what is promised; files stay short enough to be read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge

PACKAGE = Path(streammerge.__file__).parent

ORDER = [
    # the vocabulary
    *("errors", "tensors", "formats.tables", "", "compute.machine", "findings", "recipe.options", "progress"),
    # what a process costs
    *("tools.bench.launcher", "tools.bench.measuring", "tools.bench.floor"),
    # what is on disk
    *("formats", "formats.descriptors", "formats.files", "formats.library", "formats.bounds"),
    *("formats.header_entries", "formats.safetensors", "formats.shards"),
    *("formats.torchzip.directory", "formats.torchzip.machine", "formats.torchzip.steps", "formats.torchzip.pickles"),
    *("formats.torchzip.state_dicts", "formats.torchzip.archive", "formats.mapping", "formats.readers"),
    # methods
    *("methods.contract", "methods.results", "methods.registry", "methods.place", "methods.statistics.gram"),
    *("methods.statistics.slices", "methods.statistics.sums"),
    *(
        "methods.statistics.ranks",
        "methods.statistics.histograms",
        "methods.statistics.brackets",
        "methods.statistics.ranking",
    ),
    *("methods.linear", "methods.directions", "methods.means", "methods.sparse", "methods.dropping"),
    *("methods.agreement", "methods.competition", "methods.selection"),
    *("methods.matrices", "methods.decomposition", "methods.tasks", "methods.matrix", "methods.rotation"),
    *("methods.subspaces", "methods.isotropic", "methods.alignment", "methods.interference"),
    *("methods.diffusion", "methods.placed", "methods.cosines", "methods.likeness", "methods.medians"),
    *("methods.smoothing", "methods.filters", "methods.loading", "methods"),
    # what is asked for
    *(
        "models.adapters",
        "models.architecture",
        "recipe.scalars",
        "models.blocks",
        "recipe.presets",
        "recipe.blockwise",
    ),
    *(
        "models.layers",
        "recipe.parameters",
        "recipe.effects",
        "recipe.spellings",
        "recipe.recipe",
        "plan.globs",
        "models.extent",
        "plan.tuning",
    ),
    *("recipe.parse", "recipe.files", "recipe.packaged", "recipe.metadata", "recipe.carrying"),
    # models as expressions
    *(
        "compute.expressions",
        "compute.magnitudes",
        "models.scales",
        "models.codes",
        "models.quantised",
        "models.checkpoints",
        "models.presence",
        "models.views",
        "plan.problems",
    ),
    *("compute.application", "models.decisions", "models.merged", "plan.functions"),
    # what will happen
    *(
        "formats.layout",
        "compute.costs",
        "plan.jobs",
        "plan.plan",
        "storage.ledger",
        "storage.target",
        "tools.indexes",
        "formats.claims",
        "plan.inputs",
        "report",
        "storage.copying",
    ),
    # what is left of a merge that was stopped
    *(
        "formats.locking",
        "storage.fingerprint",
        "storage.placing",
        "storage.side_files",
        "storage.records",
        "storage.journal",
        "storage.finished",
        "storage.resume",
        "storage.leftovers",
    ),
    # what happens
    *(
        "compute.rounding",
        "compute.devices",
        "compute.gather",
        "compute.evaluate",
        "compute.examine",
        "compute.survey",
        "workers.windows",
        "workers.sampling",
        "workers.schedule",
        "storage.writer",
    ),
    *(
        "storage.bookkeeping",
        "storage.hashing",
        "workers.checking",
        "workers.machine",
        "tools.verification",
        "workers.confirmation",
        "engine",
        "public",
        "tools.bench.benchmark",
    ),
    # what is shown
    *("tools.inspection", "tools.comparison", "tools.plotting", "tools.similarity", "cli.streams", "cli.screen"),
    # the example
    *(
        "tools.demo",
        "tools.demo.layers",
        "tools.demo.midas",
        "tools.demo.text",
        "tools.demo.unet",
        "tools.demo.vae",
        "tools.demo.layouts",
        "tools.demo.noise",
    ),
    *("tools.demo.files", "tools.demo.reference", "tools.demo.story"),
    # the program
    *("cli.manual", "plan.entries", "cli.words", "cli.commands", "cli.main", "__main__"),
]
"""Every module; each imports only what stands before it. "" is the package itself."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name without `streammerge.`, and its file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> set[str]:
    """Modules of the package that are imported when this one is: not those of functions, nor for type checkers."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if short(name) in modules() else str(node.module) for name in inside}
    return {short(name) for name in names if name.partition(".")[0] == "streammerge"}


def short(name: str) -> str:
    return name.partition("streammerge")[2].lstrip(".")


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(modules())


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_before_it(name):
    before = ORDER[: ORDER.index(name)]
    back = imported(modules()[name]) - set(before)
    assert not back, f"{name} imports {back}, which must not know of it"


def test_imports_are_found():
    """The test above would pass with nothing found."""
    assert imported(modules()["cli.main"]) == {"", "errors", "cli.screen", "streams"}
    assert {"storage.copying", "compute.devices", "workers.windows"} <= imported(modules()["workers.schedule"])
    assert "methods" in imported(modules()["recipe.recipe"])


# ── what is imported when ────────────────────────────────────────────────────────────────────────────────────────────

LISTING = """
import sys
try:
    {code}
except SystemExit:
    pass
print("loaded:", *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def loaded(code: str, folder: Path) -> set[str]:
    """The packages that are loaded after this code ran in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", LISTING.format(code=code)], capture_output=True, text=True, check=True, cwd=folder
    )
    return set(done.stdout.rpartition("loaded:")[2].split())


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
        (command(), {"rich", "yaml"}),
        (command("--help"), {"rich", "yaml"}),
        (command("--version"), {"rich", "yaml"}),
        (command("plan", "--help"), {"rich", "yaml"}),
        (command("compare", "--help"), {"rich", "yaml"}),
        (command("inspect", "a.safetensors"), {"rich", "yaml"}),
        (command("inspect", "a.ckpt", "--tensors"), {"rich", "yaml"}),
        (command("methods"), {"rich", "yaml"}),
        (command("methods", "ties"), {"rich", "yaml"}),
        (command("recipes"), {"rich"}),
        (command("recipes", "sd2-depth"), {"rich"}),
        (command("plan", "a.safetensors", "b.ckpt"), {"rich", "yaml"}),
        (command("plan", "recipe.yaml", "--json"), {"rich"}),
        (command("a.safetensors", "b.safetensors", "--dry-run"), {"rich", "yaml"}),
        (command("verify", "a.safetensors"), {"rich", "yaml"}),
    ],
)
def test_what_only_looks_at_headers_loads_nothing_slow(folder, code, without):
    assert not loaded(code, folder) & (SLOW | without)


def test_what_computes_loads_torch(folder):
    words = ("a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q")
    packages = loaded(command(*words), folder)
    assert "torch" in packages
    assert not packages & {"matplotlib", "yaml"}


# ── the package's face ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_public_names():
    assert streammerge.__all__ == [
        "Checkpoint",
        "CheckpointError",
        "DeviceError",
        "MergeError",
        "MethodError",
        "Model",
        "OutputError",
        "PlanError",
        "RecipeError",
        "TensorInfo",
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


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_there_is_no_drawer_for_everything():
    assert not {"utils", "util", "helpers", "common", "misc"} & {name.rpartition(".")[2] for name in modules()}
