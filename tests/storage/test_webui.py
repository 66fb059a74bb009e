"""What A1111's merger writes into metadata is written for models that it knows, and inherited from those before."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.storage.old_hashes import old_short_hash
from tests.make.diffusion import diffusion_model, part_of
from tests.make.models import merge_to, near, save_model

A, B = diffusion_model("sd1", 1), near(diffusion_model("sd1", 1), 2)
OLD = {
    "sd_merge_recipe": json.dumps({"type": "webui", "multiplier": 0.3}),
    "sd_merge_models": json.dumps({"aa": {"name": "older.safetensors", "legacy_hash": "1", "sd_merge_recipe": None}}),
}


@pytest.fixture
def paths(tmp_path) -> dict[str, Path]:
    return {
        "a": save_model(tmp_path / "a.safetensors", A, OLD),
        "b": save_model(tmp_path / "b.safetensors", B),
        "c": save_model(tmp_path / "c.safetensors", near(A, 3)),
        "vae": save_model(tmp_path / "my.vae.safetensors", part_of(B, "first_stage_model.")),
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def written(folder: Path, recipe: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    merge_to(folder / "out.safetensors", recipe, hash_inputs=True, **options)
    with streammerge.open_model(folder / "out.safetensors") as model:
        return tuple(json.loads(model.metadata.get(f"sd_merge_{key}", "null")) for key in ("recipe", "models"))


def test_a_weighted_sum(tmp_path, paths):
    recipe = {"merge_method": "weighted_sum", "models": [str(paths[name]) for name in ("a", "b")]}
    said, models = written(tmp_path, {**recipe, "parameters": {"alpha": 0.3}, "dtype": "float16"})
    assert said == {
        "type": "streammerge",
        "interp_method": "Weighted sum",
        "multiplier": 0.3,
        "save_as_half": True,
        "primary_model_hash": sha256(paths["a"]),
        "secondary_model_hash": sha256(paths["b"]),
        "tertiary_model_hash": None,
        "custom_name": None,
        "config_source": None,
        "bake_in_vae": None,
        "discard_weights": "",
        "is_inpainting": False,
        "is_instruct_pix2pix": False,
    }
    own = {
        "name": "a.safetensors",
        "legacy_hash": old_short_hash(paths["a"]),
        "sd_merge_recipe": {"type": "webui", "multiplier": 0.3},
    }
    other = {"name": "b.safetensors", "legacy_hash": old_short_hash(paths["b"]), "sd_merge_recipe": None}
    older = json.loads(OLD["sd_merge_models"])
    assert models == {sha256(paths["a"]): own, sha256(paths["b"]): other, **older}


def test_weights_are_a_weighted_sum_too(tmp_path, paths):
    models = [{"model": str(paths[name]), "parameters": {"weight": weight}} for name, weight in (("a", 3), ("b", 1))]
    said, _ = written(tmp_path, {"merge_method": "linear", "models": models})
    assert (said["interp_method"], said["multiplier"]) == ("Weighted sum", 0.25)


def test_add_difference_with_a_vae(tmp_path, paths):
    recipe = {
        "merge_method": "add_difference",
        "models": [str(paths["a"]), str(paths["b"])],
        "base_model": str(paths["c"]),
        "rules": [{"component": "vae", "take": str(paths["vae"])}, {"match": "cond_stage_model.*", "drop": True}],
    }
    said, models = written(tmp_path, recipe)
    assert (said["interp_method"], said["multiplier"]) == ("Add difference", 1.0)
    assert said["tertiary_model_hash"] == sha256(paths["c"])
    assert said["bake_in_vae"] == "my.vae.safetensors"
    assert said["discard_weights"] == "cond_stage_model.*"
    assert {sha256(path) for path in paths.values()} <= models.keys()


BY_BLOCK = {"merge_method": "weighted_sum", "parameters": {"alpha": {"blocks": {"IN00": 0.1, "default": 0.3}}}}


@pytest.mark.parametrize("keys", [BY_BLOCK, {"merge_method": "slerp", "parameters": {"t": 0.3}}])
def test_what_a1111_has_no_number_for_has_none(tmp_path, paths, keys):
    said, _ = written(tmp_path, {"models": [str(paths["a"]), str(paths["b"])], **keys})
    assert said["multiplier"] is None
    assert said["interp_method"] == ("slerp" if keys["merge_method"] == "slerp" else "Weighted sum")


def test_nothing_is_written_for_others(tmp_path, paths):
    two = [str(paths["a"]), str(paths["b"])]
    assert written(tmp_path, {"merge_method": "linear", "models": two}, metadata=False) == (None, None)
    other = save_model(tmp_path / "x.safetensors", {"layers.0.weight": A["model.diffusion_model.out.2.bias"]})
    assert written(tmp_path, {"merge_method": "linear", "models": [str(other), str(other)]}) == (None, None)
    merge_to(tmp_path / "plain.safetensors", {"merge_method": "linear", "models": two})
    with streammerge.open_model(tmp_path / "plain.safetensors") as model:
        assert "sd_merge_recipe" not in model.metadata, "inputs are not read to the end unless their hashes are wanted"


def test_one_model_in_another_form_keeps_its_own(tmp_path, paths):
    recipe = {"merge_method": "linear", "models": [str(paths["a"])], "rules": [{"match": "*", "keep": True}]}
    said, models = written(tmp_path, {**recipe, "dtype": "bfloat16"})
    assert said == json.loads(OLD["sd_merge_recipe"])
    assert models == json.loads(OLD["sd_merge_models"])


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"a":' * 9000])
def test_odd_metadata_of_inputs_are_no_error(tmp_path, paths, text):
    odd = save_model(tmp_path / "odd.safetensors", A, {"sd_merge_models": text, "sd_merge_recipe": text})
    said, models = written(tmp_path, {"merge_method": "linear", "models": [str(odd), str(paths["b"])]})
    assert said["primary_model_hash"] == sha256(odd)
    assert models[sha256(odd)]["sd_merge_recipe"] is None


def test_what_the_user_says_comes_first(tmp_path, paths):
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(paths["b"])]}
    said, _ = written(tmp_path, recipe, meta=(("sd_merge_recipe", '"mine"'),))
    assert said == "mine"
