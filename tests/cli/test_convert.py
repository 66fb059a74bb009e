"""`streammerge convert`: one model in another form, with what its author said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import streammerge
from tests.make.diffusion import diffusion_model, part_of
from tests.make.models import assert_same_bytes, load_model, make_tensors, save_model

VAE = "first_stage_model."
OWN = {
    "modelspec.title": "mine",
    "modelspec.author": "me",
    "modelspec.license": "MIT",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.thumbnail": "data:image/jpeg;base64,AAAA",
    "ss_tag_frequency": "{}",
    "trigger": "a word",
}
STALE = {
    "modelspec.hash_sha256": "0x1",
    "modelspec.hash_md5": "0x4",
    "sshs_model_hash": "2",
    "sshs_legacy_hash": "3",
    "format": "pt",
}


def metadata_of(path):
    with streammerge.open_model(path) as model:
        return dict(model.metadata)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = diffusion_model("sd1", 1, torch.float32)
    save_model(tmp_path / "a.safetensors", tensors, {**OWN, **STALE})
    return tensors


def test_names_dtypes_and_parts_are_changed_and_nothing_else(model, run):
    vae = part_of(diffusion_model("sd1", 2, torch.float32), VAE)
    words = (
        "--vae",
        save_model(Path("vae.safetensors"), vae),
        "--dtype",
        "fp16",
        "--dtype",
        "vae=keep",
        "--drop",
        "text_encoder",
        "-q",
    )
    result = run("convert", "a.safetensors", *words, "-o", "out.safetensors")
    assert result.code == 0, result.err
    expected = {name: tensor.half() for name, tensor in model.items() if name.startswith("model.")}
    expected |= {VAE + name: tensor for name, tensor in vae.items()}
    assert_same_bytes(load_model(Path("out.safetensors")), expected)
    assert run("verify", "out.safetensors", "--all").code == 0


def test_a_part_alone_may_be_another_models(model, run):
    other = diffusion_model("sd1", 2, torch.float32)
    save_model(Path("b.safetensors"), other)
    result = run("convert", "a.safetensors", "--only", "vae", "--vae", "b.safetensors", "-o", "vae.safetensors")
    assert result.code == 0, result.err
    assert "left out" not in result.out + result.err
    expected = {name: tensor for name, tensor in other.items() if name.startswith(VAE)}
    assert_same_bytes(load_model(Path("vae.safetensors")), expected)


def test_a_model_that_is_converted_keeps_what_its_author_said(model, run):
    assert run("convert", "a.safetensors", "--dtype", "fp16", "-o", "out.safetensors", "-q").code == 0
    found = metadata_of("out.safetensors")
    assert {key: found.get(key) for key in OWN} == OWN
    assert not (STALE.keys() - {"format"}) & found.keys()
    assert "modelspec.merged_from" not in found
    assert run("convert", "a.safetensors", "--only", "vae", "-o", "vae.safetensors", "-q").code == 0
    assert "modelspec.architecture" not in metadata_of("vae.safetensors")


def test_the_metadata_name_the_program_whose_names_the_output_has(model, run):
    said = "modelspec.implementation"
    versioned = {said: "sgm", f"{said}_version": "1"}
    save_model(Path("a.safetensors"), model, versioned)
    for source, output, naming in (
        ("a", "theirs", "diffusers"),
        ("theirs", "ours", "original"),
        ("a", "b", "original"),
    ):
        words = (f"{source}.safetensors", "--names", naming, "-o", f"{output}.safetensors", "-q")
        assert run("convert", *words).code == 0
    found = {name: metadata_of(f"{name}.safetensors") for name in ("theirs", "ours", "b")}
    assert found["theirs"][said] == "diffusers"
    assert f"{said}_version" not in found["theirs"]
    assert said not in found["ours"]
    assert versioned.items() <= found["b"].items()


def test_a_merge_does_not_keep_what_one_author_said(model, run):
    assert run("a.safetensors", "a.safetensors:0.5", "-o", "out.safetensors", "-q").code == 0
    found = metadata_of("out.safetensors")
    assert found["modelspec.title"].startswith("linear of mine")
    assert "trigger" not in found


def test_a_model_of_any_kind_is_cast_and_cut_into_shards(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    tensors = make_tensors(1)
    save_model(tmp_path / "a.safetensors", tensors)
    assert run("convert", "a.safetensors", "--dtype", "bf16", "--shard-size", "200kB", "-o", "out", "-q").code == 0
    assert_same_bytes(load_model(tmp_path / "out"), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a.safetensors",), "the output is missing"),
        ((), "required: MODEL"),
        (("a.safetensors", "b.safetensors", "-o", "x"), "unrecognized arguments"),
        (("a.safetensors", "-m", "ties", "-o", "x"), "unrecognized arguments"),
        (("recipe.yaml", "-o", "x.safetensors"), "convert takes a model, and this is a recipe"),
        (("a.safetensors", "--dtype", "vea=fp16", "-o", "x.safetensors"), "no part of a model is called 'vea'"),
        (("a.safetensors", "--dtype", "vae=half", "-o", "x.safetensors"), "unknown dtype 'half'"),
        (("a.safetensors", "--only", "vea", "-o", "x.safetensors"), "invalid choice: 'vea'"),
        (("a.safetensors", "--take", "vae=", "-o", "x.safetensors"), "expected GLOB=MODEL"),
        (
            ("lora.safetensors", "-o", "x.safetensors"),
            "adapters are added up, where rules or a conversion has no meaning",
        ),
        (("a.safetensors", "--vae", "no.safetensors", "-o", "x.safetensors"), "no.safetensors: can't be read"),
        (("a.safetensors", "--vae", "a.safetensors", "--take", "vae=a.safetensors", "-o", "x"), "1 rule matches no"),
    ],
)
def test_what_makes_no_sense_is_refused(model, run, tmp_path, words, said):
    factors = {f"lora_unet_x.lora_{way}.weight": torch.zeros(4, 4) for way in ("up", "down")}
    save_model(tmp_path / "lora.safetensors", factors)
    (tmp_path / "recipe.yaml").write_text("merge_method: linear\nmodels: [a.safetensors]\n")
    result = run("convert", *words)
    assert result.code
    assert said in result.err
    assert not (tmp_path / "x.safetensors").exists()
