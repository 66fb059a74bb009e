"""An output's metadata: how it was made, so that it can be made again, and what it inherits from its inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.cli.main import main
from streammerge.errors import RecipeError
from streammerge.recipe.inherited import carried_metadata
from streammerge.recipe.metadata import (
    RECIPE,
    SETTINGS,
    is_beside,
    read_recorded,
    recipe_metadata,
    stored_names,
)
from streammerge.recipe.options import Options
from streammerge.recipe.parse import parse_recipe
from tests.make.models import make_tensors, near, save_model

SHAPES = {"x": (4, 3), "y.1": (7,), "z": (2, 2)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a base and three models near to it."""
    monkeypatch.chdir(tmp_path)
    base = make_tensors(0, shapes=SHAPES)
    for number, name in enumerate(("base", "a", "b", "c")):
        save_model(Path(f"{name}.safetensors"), near(base, number) if number else base)
    return tmp_path


def metadata_of(path) -> dict[str, str]:
    with streammerge.open_model(path) as model:
        return dict(model.metadata)


MERGES = {
    "weights": ("a.safetensors:0.3", "b.safetensors:0.7"),
    "the same model twice": ("a.safetensors:0.3", "a.safetensors:0.7", "--dtype", "fp16"),
    "a base and rules": (
        *("a.safetensors", "b.safetensors", "--base", "base.safetensors", "-m", "ties", "-p", "density=0.5"),
        *("--take", "y.*=c.safetensors", "--drop", "z", "--layout", "c.safetensors"),
    ),
    "a seed": (
        *("a.safetensors", "b.safetensors", "--base", "base.safetensors", "-m", "dare_linear", "-p", "density=0.4"),
        *("--seed", "7"),
    ),
    "a base that is a model": (
        "a.safetensors",
        "b.safetensors",
        "--base",
        "a.safetensors",
        "-m",
        "slerp",
        "-p",
        "t=0.2",
    ),
    "another arithmetic": ("a.safetensors", "b.safetensors", "--compute-dtype", "fp16"),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_what_the_metadata_tell_gives_the_same_file_again(folder, merge):
    assert main([*merge, "-o", "out.safetensors", "-q", "--no-sync"]) == 0
    assert main(["out.safetensors", "--recipe-from-metadata", "-o", "again.safetensors", "-q", "--no-sync"]) == 0
    assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes()


def test_a_recipe_with_a_nested_one_and_shards_is_made_again(folder):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base.safetensors",
        "models": [
            {"model": {"merge_method": "linear", "models": ["a.safetensors", "b.safetensors"]}, "name": "mix"},
            {"model": "c.safetensors", "parameters": {"weight": [{"filter": "x", "value": 0.2}, {"value": 1}]}},
        ],
        "rules": [{"match": "z", "parameters": {"weight": {"mix": 0.3, "c": 0.1}}, "dtype": "bf16"}],
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert main(["recipe.yaml", "-o", "out", "--shard-size", "40", "-q", "--no-sync"]) == 0
    words = [f"{name}={name}.safetensors" for name in ("base", "a", "b", "c")]
    assert main(["out", "--recipe-from-metadata", *words, "-o", "again", "-q", "--no-sync"]) == 0
    first, second = ({path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("out", "again"))
    assert len(first) == 3
    assert first == second


def test_models_that_are_elsewhere_are_named(folder, capsys):
    Path("results").mkdir()
    assert main(["a.safetensors", "b.safetensors", "-o", "results/out.safetensors", "-q", "--no-sync"]) == 0
    again = ["results/out.safetensors", "--recipe-from-metadata", "-o", "again.safetensors", "-q", "--no-sync"]
    assert main([*again, "a=a.safetensors"]) == 1
    error = capsys.readouterr().err
    assert "needs models that are not beside it\n  b=PATH   b.safetensors\n" in error
    assert main([*again, "a=a.safetensors", "d=b.safetensors"]) == 1
    assert "has no model 'd'" in capsys.readouterr().err
    assert main([*again, "a=a.safetensors", "b=b.safetensors"]) == 0
    assert Path("again.safetensors").read_bytes() == Path("results/out.safetensors").read_bytes()


def test_files_of_one_name_are_told_apart_and_folders_are_not_told():
    paths = [Path("/home/me/one/model.safetensors"), Path("/home/me/two/model.safetensors"), Path("/srv/x.ckpt")]
    assert list(stored_names(paths).values()) == ["one/model.safetensors", "two/model.safetensors", "x.ckpt"]
    assert stored_names([paths[0], paths[0]]) == {paths[0]: "model.safetensors"}


def test_the_users_choice_comes_before_the_metadata(folder):
    assert main(["a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q", "--no-sync"]) == 0
    again = ["out.safetensors", "--recipe-from-metadata", "-o", "again.safetensors", "-q", "--no-sync"]
    assert main([*again, "--dtype", "fp16"]) == 0
    with streammerge.open_model("again.safetensors") as model:
        assert {info.dtype.name for info in model.tensors.values()} == {"F16"}


def test_no_metadata_leaves_the_recipe_out(folder, capsys):
    assert main(["a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q", "--no-metadata"]) == 0
    assert metadata_of("out.safetensors") == {"format": "pt"}
    assert main(["out.safetensors", "--recipe-from-metadata", "-o", "again.safetensors"]) == 1
    assert "out.safetensors: there is no recipe in its metadata" in capsys.readouterr().err


METHOD = """
from streammerge.methods import LinearMethod, method

@method(LinearMethod)
def halves() -> tuple[float, ...]:
    '''θ = (θ₁ + θ₂) / 2'''
    return (0.5, 0.5)
"""


def test_methods_of_the_users_own_are_named_and_not_run_unasked(folder, capsys):
    from streammerge.methods import METHODS

    Path("mine.py").write_text(METHOD)
    before = dict(METHODS)
    try:
        words = ["a.safetensors", "b.safetensors", "-m", "halves", "--methods", "mine.py"]
        assert main([*words, "-o", "out.safetensors", "-q", "--no-sync"]) == 0
        assert json.loads(metadata_of("out.safetensors")[SETTINGS]) == {"methods": ["mine.py"]}
        METHODS.pop("halves")
        again = ["out.safetensors", "--recipe-from-metadata", "-o", "again.safetensors", "-q", "--no-sync"]
        assert main(again) == 1
        assert "uses merge methods of a file, mine.py, which is not part of it" in capsys.readouterr().err
        assert main([*again, "--methods", "mine.py"]) == 0
        assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes()
    finally:
        METHODS.clear()
        METHODS.update(before)


# ── recipes of strangers ─────────────────────────────────────────────────────────────────────────────────────────────


def recorded(recipe, folder=Path(), **bindings):
    return read_recorded(Path(folder) / "out.safetensors", {RECIPE: json.dumps(recipe)}, bindings)


def entry(model: str, name: str = "m") -> dict[str, str]:
    return {"model": model, "name": name}


ESCAPES = ["/etc/passwd", "../x", "a/../../x", "C:x", "C:\\x", "\\\\host\\x", "~/x", "a//b", ".", "", "x\0y", "a/./b"]


@pytest.mark.parametrize("stored", ESCAPES)
def test_no_path_leads_out_of_the_outputs_folder(tmp_path, stored):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "out.safetensors").touch()
    (tmp_path / "x").touch()
    recipe = {"merge_method": "linear", "models": [entry(stored)]}
    with pytest.raises(RecipeError, match="needs models that are not beside it"):
        recorded(recipe, inner)
    found = recorded(recipe, inner, m=tmp_path / "x")
    assert found.recipe.inputs[0].source == tmp_path / "x"
    assert not is_beside(stored) or stored == "~/x"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"models": ["/etc/passwd"]}, "is none that streammerge wrote"),
        ({"models": {}}, "is none that streammerge wrote"),
        ({"models": [{"model": {"path": "/etc/passwd"}, "name": "m"}]}, "is none that streammerge wrote"),
        ({"inputs": {"m": "a model"}}, "is none that streammerge wrote"),
        ({"base_model": "/etc/passwd"}, "refers to '/etc/passwd', which is none of its models"),
        ({"layout": ["m"]}, "which is none of its models"),
        ({"rules": [{"match": "*", "take": "/etc/passwd"}]}, "which is none of its models"),
        ({"rules": [{"match": "*", "take": {"path": "x"}}]}, "is none that streammerge wrote"),
        ({"rules": 3}, "rules must be a list"),
        ({"merge_method": "no_such"}, "no_such"),
    ],
)
def test_what_refers_to_files_otherwise_is_refused(tmp_path, change, problem):
    recipe = {"merge_method": "linear", "models": [entry("m.safetensors")], **change}
    with pytest.raises(RecipeError, match=problem):
        recorded(recipe, tmp_path, m=tmp_path / "m.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"models":' * 5000, '{"a":' * 90_000 + "1" + "}" * 90_000])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    with pytest.raises(RecipeError):
        read_recorded(tmp_path / "out.safetensors", {RECIPE: text}, {})


def test_a_recipe_nested_without_end_is_refused(tmp_path):
    recipe = {"merge_method": "linear", "models": [entry("m")]}
    for _ in range(150):
        recipe = {"merge_method": "linear", "models": [{"model": recipe, "name": "m"}]}
    with pytest.raises(RecipeError):
        recorded(recipe, tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["m", "linear"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["model", "name", "models", "merge_method", "take", "match", "rules", "base_model", "layout"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(["merge_method", "models", "rules", "base_model", "layout", "dtype"]), VALUES))
def test_any_values_give_a_recipe_or_an_error(recipe):
    with pytest.raises(RecipeError):
        recorded(recipe, Path("nowhere"))


# ── hashes of inputs ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_inputs_hashes_are_recorded_on_request_and_checked(folder, capsys):
    words = ["a.safetensors", "b.safetensors", "--hash-inputs", "-o", "out.safetensors", "-q", "--no-sync"]
    assert main(words) == 0
    again = ["out.safetensors", "--recipe-from-metadata", "-o", "again.safetensors", "-q", "--no-sync"]
    assert main([*again, "--hash-inputs"]) == 0
    assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes()
    content = bytearray(Path("b.safetensors").read_bytes())
    content[-1] ^= 1
    Path("b.safetensors").write_bytes(content)
    assert main([*again, "--force"]) == 1
    assert "not the b.safetensors that was merged" in capsys.readouterr().err
    assert main(["verify", "out.safetensors", "-q"]) == 1


# ── what is carried ──────────────────────────────────────────────────────────────────────────────────────────────────

XL = {
    "format": "pt",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.prediction_type": "v",
    "modelspec.resolution": "1024x1024",
    "modelspec.title": "My XL",
    "modelspec.hash_sha256": "0x1234",
    "modelspec.thumbnail": "data:image/jpeg;base64,AAAA",
    "modelspec.license": "OpenRAIL++",
    "sshs_model_hash": "1234",
    "ss_learning_rate": "0.1",
    "ss_base_model_version": "sdxl_base_v1-0",
    "v_pred": "",
    "streammerge.recipe": "{}",
}


def carried(recipe, **models):
    return carried_metadata(parse_recipe(recipe, Path()), lambda path: models[path.stem])


def test_what_says_how_to_use_a_model_is_the_layouts():
    found = carried({"merge_method": "linear", "models": ["a", "b"], "layout": "b"}, a={"v_pred": "no"}, b=XL)
    assert found == {
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": "1024x1024",
        "ss_base_model_version": "sdxl_base_v1-0",
        "v_pred": "",
        "modelspec.license": "OpenRAIL++",
        "modelspec.title": "linear of a, My XL",
        "modelspec.merged_from": "My XL",
        "streammerge.licenses": '{"a":null,"b":"OpenRAIL++"}',
    }


def test_licences_of_all_inputs_are_listed():
    nested = {"model": {"merge_method": "linear", "models": ["b", "c"]}, "name": "mix"}
    found = carried(
        {"merge_method": "task_arithmetic", "models": ["a", nested], "base_model": "d"},
        a={"modelspec.license": "MIT AND OpenRAIL"},
        b={"license": "OpenRAIL"},
        c={},
        d={"modelspec.license": "CC-BY-NC"},
    )
    assert found["modelspec.license"] == "MIT AND OpenRAIL AND CC-BY-NC"
    assert json.loads(found["streammerge.licenses"]) == {
        "a": "MIT AND OpenRAIL",
        "mix/b": "OpenRAIL",
        "mix/c": None,
        "base": "CC-BY-NC",
    }


def test_the_output_has_what_is_carried(tmp_path):
    tensors = make_tensors(0, shapes=SHAPES)
    paths = [save_model(tmp_path / f"{name}.safetensors", tensors, XL) for name in ("a", "b")]
    recipe = {"merge_method": "linear", "models": [str(path) for path in paths]}
    for metadata, left_out in (
        (True, set()),
        (False, {"streammerge.recipe", "modelspec.merged_from", "modelspec.title"}),
    ):
        out = tmp_path / "out.safetensors"
        streammerge.merge(recipe, output=out, sync=False, force=True, metadata=metadata)
        found = metadata_of(out)
        assert found["modelspec.architecture"] == XL["modelspec.architecture"]
        assert found["modelspec.license"] == "OpenRAIL++"
        assert not left_out & found.keys()
        assert found.get("modelspec.title") in (None, "linear of My XL, My XL")
        assert (RECIPE in found) == metadata


def test_options_that_change_bytes_are_recorded_and_others_are_not():
    recipe = parse_recipe({"merge_method": "linear", "models": ["a"]}, Path())
    plain = recipe_metadata(recipe, Options())
    assert SETTINGS not in plain
    assert recipe_metadata(recipe, Options(threads=1, io="mmap", device="cuda", sync=False)) == plain
    assert json.loads(recipe_metadata(recipe, Options(shard_size=5))[SETTINGS]) == {"shard_size": 5}
