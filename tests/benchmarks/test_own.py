"""streammerge as a tool: its recipes, every method, and the GPU where there is one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks import checking, inputs, own
from benchmarks.cases import CASES, COMPARED, Case
from benchmarks.peers.plain import PLAIN
from benchmarks.tools import CannotRun, Job

MERGES = [case for case in COMPARED if case.merge.method != "bake"]
"""The cases that have recipes; what is baked is a command."""


@pytest.mark.parametrize("case", MERGES, ids=lambda case: case.name)
def test_own_recipes_are_recipes(case: Case, tmp_path):
    from streammerge.recipe.parse import parse_recipe

    raw = yaml.safe_load(yaml.safe_dump(own.recipe(case.merge, case.layout)))
    bound = {role: tmp_path / role for role in case.merge.roles}
    recipe = parse_recipe(raw, tmp_path, bound, "recipe")
    assert recipe.method == case.merge.method


@pytest.mark.parametrize("tool", ["streammerge", "script"])
def test_an_adapter_is_put_in_right(made, tmp_path, tool):
    case = CASES["bake"]
    models = inputs.find_or_make(case, made, quick=True)
    (tmp_path / "out").mkdir()
    job = Job(case, models, tmp_path / "out", tmp_path, Path(sys.executable))
    command = own.command(job, case.merge, case.layout) if tool == "streammerge" else PLAIN.command(job)
    subprocess.run(command.words, check=True, capture_output=True)
    verdict = checking.check(case.merge, case.layout, models, tmp_path / "out")
    assert verdict.ok, verdict.text
    wrong = replace(case.merge, weights=(1.0, 0.5))
    assert not checking.check(wrong, case.layout, models, tmp_path / "out").ok


@pytest.mark.parametrize("name", sorted(CASES["methods"].variants))
def test_every_method_can_be_measured(made, tmp_path, name):
    """What the case `methods` asks of a method is a merge that it can do."""
    from streammerge.cli.main import main

    case = CASES["methods"]
    models = inputs.find_or_make(case, made, quick=True)
    job = Job(case, models, tmp_path, tmp_path, Path(sys.executable))
    command = own.variant(name, case.variants[name]).command(job)
    assert main(["plan", *command.words[3:], "-q"]) == 0


def test_the_gpu_is_asked_for_where_there_is_one(made, tmp_path, monkeypatch):
    case = CASES["one-tensor"]
    job = Job(case, inputs.find_or_make(case, made, quick=True), tmp_path, tmp_path, Path(sys.executable))
    monkeypatch.setattr(own, "has_cuda", lambda: True)
    assert own.CUDA.command(job).words[-2:] == ("--device", "cuda")
    monkeypatch.setattr(own, "has_cuda", lambda: False)
    with pytest.raises(CannotRun, match="no CUDA device"):
        own.CUDA.command(job)


def test_peers_are_compared_without_the_sync():
    names = [tool.name for tool in own.own_tools(CASES["ties"])]
    assert names == ["streammerge", "streammerge-sync", "streammerge-cuda", "streammerge:linear"]
