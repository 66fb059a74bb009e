"""What metadata say of the model: a title of its own, entries and a picture of the user's, what one model keeps."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import streammerge
from streammerge.errors import RecipeError
from streammerge.recipe.options import Options, parse_entry
from streammerge.recipe.thumbnails import LARGEST, data_url, with_thumbnail
from tests.make.models import make_tensors, save_model

SHAPES = {"x": (4, 3)}
DESCRIBED = {
    "modelspec.title": "MyMix",
    "modelspec.author": "someone",
    "modelspec.thumbnail": "data:image/png;base64,AAAA",
    "modelspec.trigger_phrase": "abc",
    "modelspec.license": "MIT",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.hash_sha256": "0x12",
    "sshs_model_hash": "12",
}


@pytest.fixture
def models(tmp_path) -> list[str]:
    """A model with a description, and one without."""
    a = save_model(tmp_path / "a.safetensors", make_tensors(1, shapes=SHAPES), DESCRIBED)
    b = save_model(tmp_path / "b.safetensors", make_tensors(2, shapes=SHAPES))
    return [str(a), str(b)]


def made(folder: Path, models: list[Any], method: str = "linear", **options: Any) -> dict[str, str]:
    """The metadata of the merge."""
    recipe = {"merge_method": method, "models": models, **options.pop("keys", {})}
    streammerge.merge(recipe, output=folder / "out.safetensors", sync=False, force=True, **options)
    with safe_open(folder / "out.safetensors", "pt") as file:
        return dict(file.metadata())


def test_a_merge_has_a_title_of_its_own(tmp_path, models):
    found = made(tmp_path, models)
    assert found["modelspec.title"] == "linear of MyMix, b"
    assert found["modelspec.merged_from"] == "MyMix"
    for key in ("author", "thumbnail", "trigger_phrase", "hash_sha256"):
        assert f"modelspec.{key}" not in found
    assert "sshs_model_hash" not in found


def test_no_title_where_the_layout_has_no_modelspec(tmp_path, models):
    assert "modelspec.title" not in made(tmp_path, models[::-1])


def test_titles_that_are_no_titles(tmp_path, models):
    long = save_model(tmp_path / "c.safetensors", make_tensors(3, shapes=SHAPES), {"modelspec.title": "x" * 500})
    assert made(tmp_path, [str(long), *models])["modelspec.title"] == "linear of c, MyMix, b"
    many = [{"model": models[0], "name": f"m{number}"} for number in range(7)]
    assert made(tmp_path, many)["modelspec.title"].endswith(" and 2 more")


def test_one_model_keeps_what_describes_it(tmp_path, models):
    found = made(tmp_path, models[:1], dtype="bf16")
    for key in ("title", "author", "thumbnail", "trigger_phrase", "license"):
        assert found[f"modelspec.{key}"] == DESCRIBED[f"modelspec.{key}"]
    assert "modelspec.merged_from" not in found
    assert "modelspec.hash_sha256" not in found


@pytest.mark.parametrize(
    "keys",
    [
        {"parameters": {"weight": 0.5, "normalize": False}},
        {"rules": [{"match": "x", "parameters": {"weight": 0.5}}]},
        {"rules": [{"match": "x", "take": "b.safetensors"}]},
    ],
)
def test_what_is_no_longer_the_model_does_not(tmp_path, models, keys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert made(tmp_path, models[:1], keys=keys)["modelspec.title"] != "MyMix"


def test_entries_of_the_users_own_win(tmp_path, models):
    meta = {"modelspec.title": "Mine = yours", "modelspec.license": "MIT", "note": "", "ключ": "ü\n"}
    found = made(tmp_path, models, meta=meta)
    assert {key: found[key] for key in meta} == meta
    assert made(tmp_path, models, meta=meta, metadata=False)["note"] == ""


def test_entries_are_made_again(tmp_path, models):
    first = made(tmp_path, models, meta={"note": "a=b"})
    recorded = streammerge.recipe.metadata.read_recorded(tmp_path / "out.safetensors", first, {})
    assert recorded.options(Options()).meta == (("note", "a=b"),)
    assert recorded.options(Options(meta=(("note", "c"),))).meta == (("note", "c"),)


def test_a_strangers_settings_do_no_harm(tmp_path, models):
    first = made(tmp_path, models)
    for meta, kept in (('["format"]', None), ('["nowhere", 1, null]', ()), ('"note"', ()), ("{}", ())):
        metadata = first | {"streammerge.settings": f'{{"meta": {meta}}}'}
        if kept is None:
            with pytest.raises(RecipeError, match="not to be written by hand"):
                streammerge.recipe.metadata.read_recorded(tmp_path / "out.safetensors", metadata, {})
        else:
            recorded = streammerge.recipe.metadata.read_recorded(tmp_path / "out.safetensors", metadata, {})
            assert recorded.options(Options()).meta == kept


@pytest.mark.parametrize(
    "word",
    [
        *("", "x", "=y", " =y", "format=pt", "streammerge.recipe={}", "modelspec.hash_sha256=0x1", "sshs_model_hash=1"),
        *("sshs_legacy_hash=1", "x=" + "y" * 1_000_001, "x=\udc80"),
    ],
)
def test_entries_that_are_none(word):
    with pytest.raises(RecipeError):
        parse_entry(word)


def test_one_key_twice(tmp_path, models):
    with pytest.raises(RecipeError, match="'x' is given twice"):
        made(tmp_path, models, meta=["x=1", "x=2"])


PICTURES = {
    "png": b"\x89PNG\r\n\x1a\n..",
    "jpeg": b"\xff\xd8\xff\xe0..",
    "gif": b"GIF89a..",
    "webp": b"RIFF....WEBPVP8 ",
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(tmp_path, kind):
    path = tmp_path / "picture"
    path.write_bytes(PICTURES[kind])
    url = data_url(path)
    assert url == f"data:image/{kind};base64,{base64.b64encode(PICTURES[kind]).decode()}"
    assert with_thumbnail(Options(), path).meta == (("modelspec.thumbnail", url),)
    with pytest.raises(RecipeError, match="given twice"):
        with_thumbnail(Options(meta=(("modelspec.thumbnail", "x"),)), path)


@pytest.mark.parametrize(
    "content", [b"", b"<svg/>", b"RIFF....WAVE", b"\x89PNG", b"\xff\xd8\xff" + bytes(LARGEST), None]
)
def test_what_is_no_thumbnail(tmp_path, content):
    path = tmp_path / "picture"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match="picture"):
        data_url(path)
    with pytest.raises(RecipeError, match="thumbnail"):
        data_url(tmp_path)
