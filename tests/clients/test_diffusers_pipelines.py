"""diffusers loads what we write, folders and files, without a name more or less, and it computes what it should.

The pipelines are small ones of diffusers' own with random weights. Of each merge a reference is made in float64, from
what diffusers itself loads of the inputs, and a forward step of every component is compared with it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.cli.main import main
from tests.clients.miniatures import PIPELINES, UNET, depth, sd1
from tests.make.models import normal

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

Parts = dict[str, Any]


def save(pipeline: Any, path: Path, seed: int, **options: Any) -> Path:
    """Give all weights new values, and have diffusers save the pipeline."""
    for model in parts_of(pipeline).values():
        state = model.state_dict()
        for number, (name, tensor) in enumerate(state.items()):
            if tensor.is_floating_point():
                state[name] = normal(tensor.shape, 10_000 * seed + number, tensor.dtype, 0.1)
        model.load_state_dict(state)
    pipeline.save_pretrained(path, **options)
    return path


def parts_of(pipeline: Any) -> Parts:
    return {name: each for name, each in pipeline.components.items() if isinstance(each, torch.nn.Module)}


def load(kind: Any, folder: Path, **options: Any) -> Any:
    """The pipeline, without what its index says that it does without."""
    index = json.loads((folder / "model_index.json").read_text())
    without = {name: None for name, stated in index.items() if stated == [None, None]}
    return kind.from_pretrained(folder, local_files_only=True, **without, **options)


def step(model: Any) -> Any:
    """One step forward of a component, on noise that is always the same, in the dtype of its weights."""
    dtype, config = model.dtype, model.config
    noise = normal((1, getattr(config, "in_channels", 4), 8, 8), 1, dtype)
    with torch.no_grad():
        if isinstance(model, diffusers.AutoencoderKL):
            latent = model.encode(normal((1, 3, 16, 16), 2, dtype)).latent_dist.mode()
            return torch.cat([latent.flatten(), model.decode(latent).sample.flatten()])
        if isinstance(model, diffusers.UNet2DConditionModel):
            added = {"text_embeds": normal((1, 1280), 3, dtype), "time_ids": torch.ones(1, 6, dtype=dtype)}
            text = normal((1, 8, config.cross_attention_dim), 4, dtype)
            return model(noise, torch.tensor(7), text, added_cond_kwargs=added).sample
        if isinstance(model, diffusers.SD3Transformer2DModel):
            text, pooled = normal((1, 8, 16), 4, dtype), normal((1, 2048), 5, dtype)
            return model(noise, text, pooled, torch.tensor([7])).sample
        if isinstance(model, diffusers.FluxTransformer2DModel):
            text, pooled = normal((1, 8, 8), 4, dtype), normal((1, 768), 5, dtype)
            known = {
                "guidance": torch.ones(1, dtype=dtype),
                "img_ids": torch.zeros(16, 3),
                "txt_ids": torch.zeros(8, 3),
            }
            return model(normal((1, 16, 4), 6, dtype), text, pooled, torch.ones(1, dtype=dtype), **known).sample
        return model(torch.tensor([[48, 3, 4, 5, 6, 7, 8, 49]])).last_hidden_state


def assert_close(found: Parts, a: Path, b: Path, kind: Any) -> None:
    """Every component is the mean of both models', within rounding."""
    others = [parts_of(load(kind, path)) for path in (a, b)]
    assert found.keys() == others[0].keys()
    for name, model in found.items():
        states = [other[name].double().state_dict() for other in others]
        mean = {key: (states[0][key] + states[1][key]) / 2 for key in states[0]}
        own = model.double().state_dict()
        assert own.keys() == mean.keys()
        expected = others[0][name]
        expected.load_state_dict({key: mean[key] if own[key].is_floating_point() else own[key] for key in own})
        seen, right = step(model), step(expected)
        assert right.abs().max() > 0
        assert torch.allclose(seen, right, rtol=1e-4, atol=1e-5 * float(right.abs().max())), name


def assert_same_weights(one: Any, other: Any) -> None:
    expected = other.state_dict()
    assert one.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in one.state_dict().items())


def assert_all_is_loaded(folder: Path, parts: Parts) -> None:
    """No component misses a tensor, or has one that it doesn't know."""
    for name, model in parts.items():
        _, told = type(model).from_pretrained(folder / name, output_loading_info=True, local_files_only=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        assert not told["mismatched_keys"]


@pytest.mark.parametrize("shard_size", [None, "300kB"])
@pytest.mark.parametrize("name", PIPELINES)
def test_folders(tmp_path, name, shard_size):
    a, b = (save(PIPELINES[name](), tmp_path / folder, seed) for seed, folder in enumerate("ab", 1))
    streammerge.merge(streammerge.linear(a, b), output=tmp_path / "out", sync=False, shard_size=shard_size)
    made = load(type(PIPELINES[name]()), tmp_path / "out")
    assert_all_is_loaded(tmp_path / "out", parts_of(made))
    assert_close(parts_of(made), a, b, type(made))
    assert made.scheduler.config == load(type(made), a).scheduler.config


@pytest.mark.parametrize("name", PIPELINES)
def test_there_and_back_are_the_same_bytes(tmp_path, name):
    """A pipeline, as a checkpoint in original names, and that as the pipeline again."""
    a = save(PIPELINES[name](), tmp_path / "a", 1)
    other = save(PIPELINES[name](), tmp_path / "b", 2)
    assert main(["convert", str(a), "--names", "original", "-o", str(tmp_path / "one.safetensors"), "-q"]) == 0
    assert main([f"{other}:0", str(tmp_path / "one.safetensors"), "-o", str(tmp_path / "out"), "-q"]) == 0
    with streammerge.open_model(a) as before, streammerge.open_model(tmp_path / "out") as after:
        assert before.tensors.keys() == after.tensors.keys()
        for key, info in before.tensors.items():
            assert torch.equal(before.read(key, 0, info.elements), after.read(key, 0, info.elements)), key


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_half_precision(tmp_path, variant):
    a, b = (
        save(sd1().to(torch.float16), tmp_path / name, n, variant=variant or None) for n, name in enumerate("ab", 1)
    )
    assert main([str(a), str(b), "-o", str(tmp_path / "out"), "-q"]) == 0
    made = load(diffusers.StableDiffusionPipeline, tmp_path / "out")
    assert made.text_encoder.dtype == torch.float16  # as its config says
    states = [parts_of(load(diffusers.StableDiffusionPipeline, x, variant=variant or None)) for x in (a, b)]
    for name, model in parts_of(made).items():
        first, second = (state[name].state_dict() for state in states)
        for key, tensor in model.state_dict().items():
            mean = (first[key].double() + second[key].double()) / 2
            assert torch.equal(tensor.double(), mean.to(torch.float16).double() if tensor.is_floating_point() else mean)


@pytest.mark.parametrize("name", PIPELINES)
def test_single_files(tmp_path, name):
    """Checkpoints in original names, text encoders and all, as diffusers reads those of their makers."""
    a, b = (save(PIPELINES[name](), tmp_path / folder, seed) for seed, folder in enumerate("ab", 1))
    one = tmp_path / "one.safetensors"
    streammerge.merge(streammerge.linear(a, b), output=one, names="original", sync=False)
    streammerge.merge(streammerge.linear(a, b), output=tmp_path / "out", sync=False)
    right = load(type(PIPELINES[name]()), tmp_path / "out")
    for file in sorted(a.rglob("*.safetensors")):
        file.unlink()  # nothing of it can be loaded
    given = {"transformer": right.transformer} if name == "Flux" else {}  # of one width alone: that of the real models
    without = dict.fromkeys(each for each, model in right.components.items() if model is None)
    options = {"config": str(a), "local_files_only": True}
    made = type(right).from_single_file(one, **options, **without, **given)
    expected = parts_of(right)
    assert parts_of(made).keys() == expected.keys()
    for part, model in parts_of(made).items():
        if isinstance(model, transformers.T5EncoderModel):
            model.tie_weights()  # its embeddings have a second name, which from_single_file leaves empty
        if (name, part) == ("SD 3", "text_encoder"):  # diffusers has no projection here, whatever the file has
            model.text_projection.weight.data = expected[part].text_projection.weight.data
        assert_same_weights(model, expected[part])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_component_alone(tmp_path, part):
    """A component in diffusers' names, beside a config of its kind."""
    a, b = (save(sd1(), tmp_path / name, seed) for seed, name in enumerate("ab", 1))
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    folder = tmp_path / part
    folder.mkdir()
    words = ["--only", part, "--names", "diffusers", "-o", str(folder / f"{stem}.safetensors"), "-q"]
    assert main([str(a), str(b), *words]) == 0
    shutil.copy(a / part / "config.json", folder)
    kind = type(parts_of(sd1())[part])
    _, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert main([str(a / part), str(b / part), "-o", str(tmp_path / "own"), "-q"]) == 0
    _, told = kind.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


# ── Stable Diffusion 2 with depth ────────────────────────────────────────────────────────────────────────────────────


def image_of(pipeline: Any) -> torch.Tensor:
    """What two steps make of an image, the text's embeddings given."""
    pipeline.set_progress_bar_config(disable=True)
    found: torch.Tensor = pipeline(
        image=normal((1, 3, 64, 64), 1).clamp(-1, 1),
        depth_map=normal((1, 64, 64), 2),
        strength=1.0,
        num_inference_steps=2,
        prompt_embeds=normal((1, 8, 1024), 3),
        negative_prompt_embeds=normal((1, 8, 1024), 4),
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    return found


def test_depth_to_image(tmp_path):
    """A checkpoint with a UNet for depth, taken apart, and its parts put into diffusers' pipeline for it."""
    a = save(depth(), tmp_path / "a", 1)
    right = load(diffusers.StableDiffusionDepth2ImgPipeline, a)
    one = str(tmp_path / "one.safetensors")
    assert main(["convert", str(a), "--names", "original", "-o", one, "-q"]) == 0
    parts = {}
    for name, model in parts_of(right).items():
        if name == "depth_estimator":
            continue
        folder, stem = tmp_path / name, "model" if name == "text_encoder" else "diffusion_pytorch_model"
        folder.mkdir()
        shutil.copy(a / name / "config.json", folder)
        file = str(folder / f"{stem}.safetensors")
        assert main(["convert", one, "--only", name, "--names", "diffusers", "-o", file, "-q"]) == 0
        parts[name] = type(model).from_pretrained(folder, local_files_only=True)
        assert_same_weights(parts[name], model)
    made = diffusers.StableDiffusionDepth2ImgPipeline(
        **parts,
        tokenizer=None,
        scheduler=right.scheduler,
        depth_estimator=right.depth_estimator,
        feature_extractor=right.feature_extractor,
    )
    assert torch.allclose(image_of(made), image_of(right), atol=1e-3)


def test_a_pipeline_for_depth(tmp_path):
    """Merged with one that knows nothing of depth: a channel, and the depth model, stay its own."""
    a = save(depth(), tmp_path / "a", 1)
    other = depth()
    plain = diffusers.StableDiffusionPipeline(
        vae=other.vae,
        text_encoder=other.text_encoder,
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**{**UNET, "cross_attention_dim": 1024, "use_linear_projection": True}),
        scheduler=other.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    b = save(plain, tmp_path / "b", 2)
    words = ["--on-shape-mismatch", "overlap", "--on-missing", "keep", "-o", str(tmp_path / "out"), "-q"]
    assert main([str(a), str(b), *words]) == 0
    made = load(diffusers.StableDiffusionDepth2ImgPipeline, tmp_path / "out")
    assert_all_is_loaded(tmp_path / "out", parts_of(made))
    before = load(diffusers.StableDiffusionDepth2ImgPipeline, a)
    first = "conv_in.weight"
    kept, own = made.unet.state_dict()[first], before.unet.state_dict()[first]
    assert torch.equal(kept[:, 4:], own[:, 4:])
    assert not torch.equal(kept[:, :4], own[:, :4])
    for key, tensor in before.depth_estimator.state_dict().items():
        assert torch.equal(made.depth_estimator.state_dict()[key], tensor)
    assert torch.isfinite(image_of(made)).all()
