"""The files that cases merge: real layouts, random values, written in a stream."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.cases import GIGABYTES, MODELS, SIXTEEN, UNET, Case, adapted
from streammerge.formats.layout import split
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.demo.files import Fill, write_safetensors, write_torch_zip
from streammerge.tools.demo.layouts import MINIATURE, checkpoint
from streammerge.tools.demo.noise import FineTune, Noise
from streammerge.tools.demo.text import LlamaConfig, llama

Tensors = Mapping[str, TensorInfo]

COMPLETE: Final = "complete"
"""The file that tells that a set of inputs was written to its end."""

LLAMA: Final = LlamaConfig(
    hidden_size=3072,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    intermediate_size=8192,
    tie_word_embeddings=True,
)
"""3.2 billion parameters, 0.8 GB of them (in bfloat16) one embedding: the sizes of Llama 3.2 3B."""

SHARD_BYTES: Final = 2_000_000_000


@dataclass(frozen=True)
class InputSet:
    """Models by role. Given whether it is to be a miniature, `tensors` describes them; `base` is whom all fine-tune."""

    tensors: Callable[[bool], Mapping[str, Tensors]]
    base: str
    container: str = "safetensors"

    def nbytes(self, *, quick: bool) -> int:
        """The size of all its tensors."""
        return sum(info.nbytes for tensors in self.tensors(quick).values() for info in tensors.values())


def article(dtype: str) -> Callable[[bool], Mapping[str, Tensors]]:
    """SD 2's base, its depth model, and Waifu Diffusion."""

    def tensors(quick: bool) -> Mapping[str, Tensors]:
        scale = MINIATURE if quick else 1
        return {role: checkpoint(f"sd2-{role}", dtype=dtype, scale=scale) for role in ("base", "depth", "waifu")}

    return tensors


def alike(
    layout: Callable[[int], Tensors], *roles: str, full: int = 1, small: int = MINIATURE
) -> Callable[[bool], Mapping[str, Tensors]]:
    """Models of one layout, its widths divided by `full`, or by `small` in a miniature."""

    def tensors(quick: bool) -> Mapping[str, Tensors]:
        one = layout(small if quick else full)
        return dict.fromkeys(roles, one)

    return tensors


def sd2_unet(scale: int) -> Tensors:
    """SD 2's UNet alone."""
    return {name: info for name, info in checkpoint("sd2-base", scale=scale).items() if name.startswith(UNET)}


def llama_3b(scale: int) -> Tensors:
    """A Llama of 3 billion parameters in bfloat16."""
    return {name: TensorInfo(DTYPES["BF16"], shape) for name, shape in llama(LLAMA.narrowed(scale)).items()}


def one_tensor(scale: int) -> Tensors:
    """One tensor of 4 GB."""
    return {"embedding.weight": TensorInfo(DTYPES["F16"], (62_500 // scale, 32_000 // scale))}


def plain(megabytes: int) -> Callable[[int], Tensors]:
    """A model of this size: square matrices of 8 MB, each with a bias."""

    def layout(scale: int) -> Tensors:
        half, side = DTYPES["F16"], 2000 // scale
        count = max(1, round(megabytes / 8))
        matrices = {f"layers.{number:04}.weight": TensorInfo(half, (side, side)) for number in range(count)}
        return matrices | {f"layers.{number:04}.bias": TensorInfo(half, (side,)) for number in range(count)}

    return layout


def with_lora(quick: bool) -> Mapping[str, Tensors]:
    """SDXL, and a LoRA of all matrices of its UNet's transformers, in kohya's names."""
    model, rank = checkpoint("sdxl", scale=MINIATURE if quick else 1), 4 if quick else 128
    lora = {}
    for name, info in model.items():
        module = adapted(name)
        if module and len(info.shape) == 2:
            lora[f"{module}.lora_up.weight"] = TensorInfo(info.dtype, (info.shape[0], rank))
            lora[f"{module}.lora_down.weight"] = TensorInfo(info.dtype, (rank, info.shape[1]))
    return {"model": model, "lora": lora}


SETS: Final[Mapping[str, InputSet]] = {
    "article-fp16": InputSet(article("F16"), "base"),
    "article-fp32-ckpt": InputSet(article("F32"), "base", "ckpt"),
    "sdxl": InputSet(alike(lambda scale: checkpoint("sdxl", scale=scale), "a", "b"), "a"),
    "bake": InputSet(with_lora, "model"),
    "sd2": InputSet(alike(lambda scale: checkpoint("sd2-base", scale=scale), "base", "a", "b"), "base"),
    "llama": InputSet(alike(llama_3b, "base", "a", "b"), "base", "shards"),
    "sixteen": InputSet(alike(lambda scale: checkpoint("sd1", scale=scale), *SIXTEEN, full=4), "m01"),
    "one-tensor": InputSet(alike(one_tensor, "a", "b", small=50), "a"),
    "unet": InputSet(alike(sd2_unet, "base", "a", "b"), "base"),
    **{
        f"scale-{gigabytes}GB": InputSet(alike(plain(round(float(gigabytes) * 500)), "a", "b", small=100), "a")
        for gigabytes in GIGABYTES
    },
    "scale-models": InputSet(
        alike(plain(100), *(f"m{number:02}" for number in range(1, MODELS[-1] + 1)), small=100), "m01"
    ),
}
"""Every set of inputs by name."""


def find_or_make(case: Case, folder: Path, *, quick: bool) -> dict[str, Path]:
    """The case's inputs by role, made if they aren't there; OSError if the disk has no room."""
    made = set_folder(case, folder, quick=quick)
    chosen = SETS[case.input_set]
    suffix = {"safetensors": ".safetensors", "ckpt": ".ckpt", "shards": ""}[chosen.container]
    tensors = chosen.tensors(quick)
    paths = {role: made / f"{role}{suffix}" for role in tensors}
    if not (made / COMPLETE).exists():
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        noise = Noise(tensors[chosen.base])
        for role, path in paths.items():
            fill = noise.values if role == chosen.base else FineTune(role, tensors[role], noise).values
            write_model(path, tensors[role], fill, chosen.container, quick=quick)
        (made / COMPLETE).touch()
    return {role: path for role, path in paths.items() if role in used_roles(case)}


def used_roles(case: Case) -> set[str]:
    """Every input that the case or one of its variants needs."""
    return {role for merge in (case.merge, *case.variants.values()) for role in merge.roles}


def set_folder(case: Case, folder: Path, *, quick: bool) -> Path:
    """Where a case's set of inputs is."""
    return folder / "inputs" / (f"{case.input_set}-quick" if quick else case.input_set)


def write_model(path: Path, tensors: Tensors, fill: Fill, container: str, *, quick: bool) -> None:
    """Write a model as a file, or as a folder of shards."""
    if container == "shards":
        write_shards(path, tensors, fill, quick=quick)
    elif container == "ckpt":
        write_torch_zip(path, tensors, fill)
    else:
        write_safetensors(path, tensors, fill)


def write_shards(folder: Path, tensors: Tensors, fill: Fill, *, quick: bool) -> None:
    """A language model as it is published: shards, their index, and the configuration."""
    folder.mkdir(parents=True)
    total = sum(info.nbytes for info in tensors.values())
    shards = split(dict(tensors), total // 4 if quick else SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, fill)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = llama_config(LLAMA.narrowed(MINIATURE) if quick else LLAMA)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def llama_config(config: LlamaConfig) -> dict[str, Any]:
    """`config.json` as transformers reads it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }


def files_of(path: Path) -> list[Path]:
    """The weights' files of a model."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
