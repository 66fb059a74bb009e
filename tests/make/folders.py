"""Folders as transformers saves them, in miniature: a Llama's tensors by their true names, a config, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS = 8, 12, 2

TOKENIZER = {
    "tokenizer.json": '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
    "special_tokens_map.json": "{}",
    "generation_config.json": '{"eos_token_id": 2}',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
}


def llama_tensors(seed: int, *, layers=2, vocab=16, tie=False, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A Llama's weights."""
    made = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,)} | ({} if tie else {"lm_head.weight": (vocab, HIDDEN)})
    return {name: torch.randn(shape, generator=made).to(dtype) for name, shape in shapes.items()}


def llama_config(*, layers=2, vocab=16, tie=False, dtype=torch.float32) -> dict[str, Any]:
    """Its config."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": tie,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def save_folder(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    files: Mapping[str, str | bytes] = TOKENIZER,
    *,
    shards: int = 1,
    stem: str = "model",
) -> Path:
    """The folder: its weights in so many files, its config, and other files by their names."""
    path.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    parts = [names[number::shards] for number in range(shards)]
    called = [f"{stem}-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    called = called if shards > 1 else [f"{stem}.safetensors"]
    for name, part in zip(called, parts, strict=True):
        save_file({each: tensors[each].contiguous() for each in part}, path / name, {"format": "pt"})
    if shards > 1:
        places = {each: name for name, part in zip(called, parts, strict=True) for each in part}
        index = {"metadata": {}, "weight_map": places}
        (path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save_llama(
    path: Path, seed: int = 1, files: Mapping[str, str | bytes] = TOKENIZER, *, shards: int = 1, **made: Any
) -> Path:
    """A Llama's folder."""
    return save_folder(path, llama_tensors(seed, **made), llama_config(**made), files, shards=shards)


IMAGES = {
    "vision_tower.embeddings.class_embedding": (4,),
    "vision_tower.encoder.layers.0.mlp.fc1.weight": (6, 4),
    "vision_tower.encoder.layers.1.mlp.fc1.weight": (6, 4),
    "multi_modal_projector.linear_1.weight": (HIDDEN, 4),
}
"""What a model of images and text has beside its language model, by the names' ends."""


def image_tensors(seed: int, **made: Any) -> dict[str, torch.Tensor]:
    """The weights of a Llama that is given images."""
    text = {
        name.replace("model.", "model.language_model.", 1): value for name, value in llama_tensors(seed, **made).items()
    }
    drawn = torch.Generator().manual_seed(seed + 1000)
    return {**{f"model.{name}": torch.randn(shape, generator=drawn) for name, shape in IMAGES.items()}, **text}


def save_images(path: Path, seed: int = 1, files: Mapping[str, str | bytes] = TOKENIZER, **made: Any) -> Path:
    """Its folder."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": llama_config(**made),
        "vision_config": {"num_hidden_layers": 2, "hidden_size": 4},
    }
    return save_folder(path, image_tensors(seed, **made), config, files)
