"""Recipes made up by chance give a merge of which every parameter is accounted for, or an error; nothing else."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.errors import MergeError
from streammerge.models.merged import Merged
from streammerge.plan.inputs import OpenInputs
from streammerge.plan.plan import plan_merge
from streammerge.plan.sources import Sources
from streammerge.recipe.options import Options
from streammerge.recipe.parse import parse_recipe
from tests.make.models import merge_to, normal, save_model
from tests.make.recipes import NAMES, damaged, whole_recipe

TENSORS = ("layers.0.attn.q", "layers.0.mlp.up", "layers.1.attn.q", "layers.1.mlp.up", "layers.2.mlp.up")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for seed, name in enumerate((*NAMES, "base", "other")):
        shapes = {f"{each}.weight": (4, 6) for each in TENSORS} | {"norm.weight": (5,)}
        tensors = {each: normal(shape, 100 * seed + n) for n, (each, shape) in enumerate(shapes.items())}
        save_model(path / name / "model.safetensors", tensors)
    return path


def planned(raw: Any, folder: Path) -> Merged:
    """The merge, planned in full."""
    opened = OpenInputs()
    try:
        merged = opened.merge(parse_recipe(raw, folder))
        plan_merge(merged, folder / "out.safetensors", Options(), Sources()).to_json()
        return merged
    finally:
        opened.close()


def settings_in(raw: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every parameter of the outermost recipe: the map that it stands in, and its name."""
    for entry in (raw, *raw["models"], *raw.get("rules", [])):
        parameters = entry.get("parameters") if isinstance(entry, dict) else None
        if parameters:
            yield from ((parameters, name) for name in parameters)


def tuned(merged: Merged) -> list[Any]:
    return [dict(decision.parameters) for decision in merged.decisions]


NOWHERE = "changes nothing", "taken without effect"


def check_that_all_is_accounted_for(raw: dict[str, Any], merged: Merged, folder: Path) -> None:
    """Without any one of its parameters the merge is another, or can't be made, or a remark names the parameter."""
    for number, (_, name) in enumerate(settings_in(raw)):
        less = copy.deepcopy(raw)
        holder, _ = list(settings_in(less))[number]
        value = holder.pop(name)
        try:
            without = planned(less, folder)
        except MergeError:
            continue
        told = any(name in remark and any(mark in remark for mark in NOWHERE) for remark in merged.remarks)
        same = tuned(without) == tuned(merged)
        assert told or not same or is_among(value, name, without), (raw, name, merged.remarks)


def is_among(value: Any, name: str, without: Merged) -> bool:
    """Whether tensors have this very value without its being set: by default, or from another place."""
    parts = value if isinstance(value, list) else [value]
    given = {part["value"] if isinstance(part, dict) else part for part in parts}
    found = [each.get(name) for each in tuned(without)]
    return not given.isdisjoint(one for each in found for one in (each if isinstance(each, tuple) else (each,)))


def test_whole_recipes_are_planned_with_every_parameter_or_refused(folder):
    chance, made = random.Random(20), 0
    for _ in range(150):
        raw = whole_recipe(chance)
        try:
            merged = planned(raw, folder)
        except MergeError:
            continue
        made += 1
        check_that_all_is_accounted_for(raw, merged, folder)
    assert made > 40


def test_damaged_recipes_are_planned_or_refused(folder):
    chance = random.Random(21)
    for _ in range(400):
        raw = damaged(chance, whole_recipe(chance))
        with contextlib.suppress(MergeError):
            assert planned(raw, folder).tensors is not None


def test_recipes_that_are_planned_are_merged(folder, tmp_path):
    chance = random.Random(22)
    for _ in range(40):
        raw = whole_recipe(chance)
        try:
            made = merge_to(tmp_path / "out.safetensors", parse_recipe(raw, folder), threads=1)
        except MergeError:
            continue
        again = merge_to(tmp_path / "again.safetensors", parse_recipe(raw, folder), threads=2)
        assert made.keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in made.items())
