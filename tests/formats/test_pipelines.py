"""The folder of a diffusers pipeline is one model."""

from __future__ import annotations

import json

import pytest
import torch

import streammerge
from streammerge.errors import CheckpointError
from tests.make.diffusion import diffusion_model, part_of
from tests.make.models import assert_same_bytes, load_model, merge_to, save_model

CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
}
PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline of three components, each with two tensors."""
    folder = tmp_path / "pipeline"
    for part, stem in PARTS.items():
        save_model(folder / part / f"{stem}.safetensors", {"a.weight": torch.ones(2), "b": torch.zeros(3)})
        (folder / part / "config.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **CLASSES}))
    return folder


def names(path):
    with streammerge.open_model(path) as model:
        return list(model.tensors)


ALL = [f"{part}.{name}" for part in PARTS for name in ("a.weight", "b")]


def test_its_components_are_one_model(pipeline):
    assert names(pipeline) == ALL
    assert names(pipeline / "model_index.json") == ALL
    with streammerge.open_model(pipeline) as model:
        assert model.container == "diffusers pipeline (unet, vae, text_encoder)"
        assert model.path == pipeline
        assert torch.equal(model.read("unet.a.weight", 0, 2), torch.ones(2))


def test_a_folder_that_the_index_does_not_name_is_not_its_own(pipeline):
    save_model(pipeline / "vae_1_0" / "diffusion_pytorch_model.safetensors", {"c": torch.ones(1)})
    assert names(pipeline) == ALL


def test_without_an_index_the_usual_folders_are_meant(pipeline):
    (pipeline / "model_index.json").unlink()
    save_model(pipeline / "vae_1_0" / "diffusion_pytorch_model.safetensors", {"c": torch.ones(1)})
    assert names(pipeline) == ALL


def test_an_index_without_components_means_the_usual_folders(pipeline):
    (pipeline / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert names(pipeline) == ALL


def test_a_variant_is_taken_where_there_is_nothing_else(pipeline):
    for part, stem in PARTS.items():
        (pipeline / part / f"{stem}.safetensors").rename(pipeline / part / f"{stem}.fp16.safetensors")
    assert names(pipeline) == ALL


def test_weights_that_are_no_variant_come_first(pipeline):
    save_model(pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors", {"c": torch.ones(1)})
    torch.save({"c": torch.ones(1)}, pipeline / "text_encoder" / "pytorch_model.bin")
    assert names(pipeline) == ALL


def test_of_a_variant_safetensors_come_first(pipeline):
    file = pipeline / "text_encoder" / "model.safetensors"
    file.rename(file.with_name("model.fp16.safetensors"))
    torch.save({"c": torch.ones(1)}, file.with_name("pytorch_model.fp16.bin"))
    assert names(pipeline) == ALL


def test_torch_files_are_taken_where_there_are_no_others(pipeline):
    (pipeline / "text_encoder" / "model.safetensors").unlink()
    torch.save({"c": torch.ones(1)}, pipeline / "text_encoder" / "pytorch_model.bin")
    assert names(pipeline)[-1] == "text_encoder.c"


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_of_a_component(pipeline, variant):
    folder = pipeline / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    shards = {name: f"diffusion_pytorch_model{variant}-{n:05}-of-00002.safetensors" for n, name in enumerate("xy", 1)}
    for name, file in shards.items():
        save_model(folder / file, {name: torch.ones(2)})
    index = folder / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert names(pipeline)[:2] == ["unet.x", "unet.y"]


def test_several_variants_are_refused(pipeline):
    file = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    for variant in ("fp16", "non_ema"):
        save_model(file.with_name(f"diffusion_pytorch_model.{variant}.safetensors"), {"c": torch.ones(1)})
    file.unlink()
    with pytest.raises(CheckpointError, match="unet: the folder holds 2 variants of the weights") as error:
        names(pipeline)
    assert [name.split(".")[1] for name in error.value.found] == ["fp16", "non_ema"]


def test_a_component_without_its_weights_is_refused(pipeline):
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 component that model_index.json names has no weights\n  vae   Autoe"):
        names(pipeline)


def test_a_component_that_is_not_there_is_refused(pipeline):
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (pipeline / "unet" / "config.json").unlink()
    (pipeline / "unet").rmdir()
    with pytest.raises(CheckpointError, match="unet   UNet2DConditionModel"):
        names(pipeline)


def test_a_checkpoint_beside_the_components_is_refused(pipeline):
    save_model(pipeline / "sd.safetensors", {"c": torch.ones(1)})
    with pytest.raises(CheckpointError, match="is a diffusers pipeline, and holds a model beside it\n  sd"):
        names(pipeline)
    assert names(pipeline / "sd.safetensors") == ["c"]
    assert names(pipeline / "model_index.json") == ALL


@pytest.mark.parametrize("text", ["", "[]", "{", '{"unet": 1, "unet": 2}', " " * 300_000])
def test_an_index_that_cannot_be_read_is_refused(pipeline, text):
    (pipeline / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match="can't be read as a pipeline's index"):
        names(pipeline)


def test_an_index_does_not_point_outside(pipeline):
    save_model(pipeline.parent / "x" / "model.safetensors", {"c": torch.ones(1)})
    (pipeline / "model_index.json").write_text(json.dumps({"../x": ["diffusers", "X"], **CLASSES}))
    assert names(pipeline) == ALL


def test_a_pipeline_is_written_as_a_folder_or_a_file(pipeline, tmp_path):
    streammerge.merge(str_recipe(pipeline), output=tmp_path / "folder", sync=False)
    assert names(tmp_path / "folder") == ALL
    assert list(merge_to(tmp_path / "out.safetensors", str_recipe(pipeline))) == sorted(ALL)


def test_what_all_components_say_is_said_of_the_whole(pipeline):
    for number, (part, stem) in enumerate(PARTS.items()):
        said = {"title": "x", "own": str(number), "format": "pt"}
        save_model(pipeline / part / f"{stem}.safetensors", {"a.weight": torch.ones(2)}, said)
    with streammerge.open_model(pipeline) as model:
        assert model.metadata == {"title": "x", "format": "pt"}


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"prediction_type": "v_prediction"}', "v_prediction"), ("{}", ""), ("{", ""), ('{"prediction_type": 1}', "")],
)
def test_what_its_scheduler_says(pipeline, text, said):
    (pipeline / "scheduler/scheduler_config.json").write_text(text)
    with streammerge.open_model(pipeline) as model:
        assert model.scheduler.prediction_type == said


def test_a_pipeline_merges_with_a_checkpoint(tmp_path):
    one = diffusion_model("sd1", 1)
    a = save_model(tmp_path / "a.safetensors", one)
    streammerge.merge(str_recipe(a), output=tmp_path / "d.safetensors", names="diffusers", sync=False)
    diffusers = load_model(tmp_path / "d.safetensors")
    for part, stem in PARTS.items():
        save_model(tmp_path / "pipe" / part / f"{stem}.safetensors", part_of(diffusers, f"{part}."))
    made = merge_to(tmp_path / "out", streammerge.linear(a, tmp_path / "pipe"))
    assert_same_bytes(made, merge_to(tmp_path / "same", streammerge.linear(a, a)))


def str_recipe(path):
    return {"merge_method": "linear", "models": [str(path)]}
