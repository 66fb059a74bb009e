"""What the page on diffusion models says to type is typed: every command in its tables, with miniatures."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from docs import make
from streammerge.cli.main import main
from streammerge.models.dialects import Naming, recognise
from streammerge.models.dialects.translation import Translated
from tests.make.diffusion import diffusion_model, part_of
from tests.make.models import MemoryModel, Tensors, info_of, near, normal, save_model
from tests.make.pipelines import INDEX

PAGE = make.ROOT / "docs" / "diffusion.md"

UNET, VAE = "model.diffusion_model.", "first_stage_model."

RECIPE = """
merge_method: weighted_sum
models: [a.safetensors, b.safetensors]
parameters: {alpha: 0.3}
"""


def commands() -> list[str]:
    """Every command that stands in a row of a table."""
    rows = [line for line in make.read(PAGE).splitlines() if line.startswith("| ")]
    return list(dict.fromkeys(found for row in rows for found in re.findall(r"`(streammerge [^`]+)`", row)))


def in_naming(tensors: Tensors, naming: Naming) -> Tensors:
    found = recognise({name: info_of(tensor) for name, tensor in tensors.items()})
    assert found is not None
    view = Translated(MemoryModel(tensors), found.named(naming))
    return {name: view.read(name, 0, info.elements).reshape(info.shape) for name, info in view.tensors.items()}


def t5() -> Tensors:
    block = "encoder.block.0.layer."
    made = {f"{block}0.SelfAttention.{part}.weight": normal((8, 8), 1, torch.bfloat16) for part in "qkvo"}
    return {**made, "shared.weight": normal((9, 8), 2, torch.bfloat16), f"{block}0.layer_norm.weight": torch.ones(8)}


def vae_of_flux() -> Tensors:
    """A VAE for latents of 16 channels."""
    vae = part_of(diffusion_model("sd1", 3), VAE)
    vae["decoder.conv_in.weight"] = normal((vae["decoder.conv_in.weight"].shape[0], 16, 3, 3), 1, torch.float16)
    return vae


def lora(model: Tensors, seed: int) -> Tensors:
    weight = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    rows, columns = model[weight].shape
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    return {
        f"{stem}.lora_up.weight": normal((rows, 2), seed, torch.float16),
        f"{stem}.lora_down.weight": normal((2, columns), seed + 1, torch.float16),
        f"{stem}.alpha": torch.tensor(1.0),
    }


def models() -> Iterator[tuple[str, Tensors]]:
    a, flux = diffusion_model("sd1", 1), diffusion_model("flux", 1, torch.bfloat16)
    b, c = near(a, 2, 0.1), near(a, 3, 0.1)
    yield from (("a", a), ("b", b), ("c", c), ("ema/a", with_averages(a)), ("ema/b", with_averages(b)))
    first = f"{UNET}input_blocks.0.0.weight"
    yield "inpainting", a | {first: torch.cat([a[first]] * 3, 1)[:, :9].contiguous()}
    yield "unet", {name: tensor for name, tensor in near(a, 4).items() if name.startswith(UNET)}
    yield "vae", part_of(near(a, 5), VAE)
    yield from ((f"lora-{name}", lora(a, seed)) for name, seed in (("a", 6), ("b", 7)))
    yield from (("flux1-dev", flux), ("flux1-b", near(flux, 8)), ("flux-diffusers", in_naming(flux, "diffusers")))
    clip = part_of(diffusion_model("sd1", 9), "cond_stage_model.transformer.")
    yield from (("clip_l", clip), ("t5xxl", t5()), ("ae", vae_of_flux()))
    yield "flux1-schnell", {name: tensor for name, tensor in near(flux, 11).items() if "guidance_in" not in name}
    yield from families()
    yield "all", below(UNET, flux) | below("text_encoders.t5xxl.transformer.", t5())


def families() -> Iterator[tuple[str, Tensors]]:
    """Fine-tunes of transformers that have no VAE and no text encoders beside them."""
    sd35, wan, chroma = diffusion_model("sd3", 1), diffusion_model("wan", 1), chroma_model()
    yield from (("sd35-a", sd35), ("sd35-b", near(sd35, 2)))
    yield from (("wan-high", wan), ("wan-low", near(wan, 2)), ("wan-b", near(wan, 3)))
    yield from (("chroma", chroma), ("chroma-a", near(chroma, 2)), ("chroma-b", near(chroma, 3)))


def chroma_model() -> Tensors:
    """Flux with one module that gives all modulations."""
    flux, without = diffusion_model("flux", 12), ("_mod.lin", "modulation.lin", "vector_in", "guidance_in", "time_in")
    own = {f"distilled_guidance_layer.layers.0.{part}_layer.weight": normal((8, 8), 1) for part in ("in", "out")}
    return {**{name: tensor for name, tensor in flux.items() if not any(part in name for part in without)}, **own}


def with_averages(model: Tensors) -> Tensors:
    weights = {name: tensor for name, tensor in model.items() if name.startswith(UNET)}
    return model | {f"model_ema.{name[6:].replace('.', '')}": tensor.clone() for name, tensor in weights.items()}


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def save_pipeline_part(folder: Path, stem: str, tensors: Tensors) -> None:
    save_model(folder / f"{stem}.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"_class_name": "X"}))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, tensors in models():
        save_model(folder / f"{name}.safetensors", tensors)
    pipeline = in_naming(diffusion_model("sd1", 10), "diffusers")
    for part in ("unet", "vae", "text_encoder"):
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_pipeline_part(folder / "pipeline" / part, stem, part_of(pipeline, f"{part}."))
    for name, values in (("scheduler/scheduler_config", {}), ("tokenizer/vocab", {}), ("model_index", INDEX)):
        path = folder / "pipeline" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))
    (folder / "by-block.yaml").write_text(RECIPE)
    return folder


def test_commands_are_found() -> None:
    found = commands()
    assert len(found) > 60
    tools = {row.split("|")[1].strip() for row in make.read(PAGE).splitlines() if row.startswith("| ")}
    assert {"A1111", "SuperMerger", "ComfyUI", "kohya", "Model-Mixer", "Model toolkit", "sd-mecha"} <= tools


@pytest.mark.parametrize("command", commands())
def test_what_is_said_to_be_typed_can_be(command: str, files: Path, tmp_path: Path, monkeypatch) -> None:
    words = shlex.split(command)[1:]
    output = words[words.index("-o") + 1] if "-o" in words else ""
    averaged = files / "ema" if "ema" in command else files
    for path in [*averaged.iterdir(), *files.iterdir()]:
        if path.name != output and not (tmp_path / path.name).exists():
            (tmp_path / path.name).symlink_to(path, target_is_directory=path.is_dir())
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    assert not output or Path(output).exists()
