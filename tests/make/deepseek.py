"""DeepSeek-V3's layout by its true names, in files that take no room: headers as they are, and holes for the values."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

HIDDEN, VOCABULARY, EXPERTS, DENSE = 7168, 129_280, 256, 3


def names(layers: int, narrow: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, all sizes that are no number of experts divided by `narrow`."""

    def shape(*sizes: int) -> tuple[int, ...]:
        return tuple(-(-size // narrow) for size in sizes)

    yield "model.embed_tokens.weight", shape(VOCABULARY, HIDDEN)
    for number in range(layers):
        layer = f"model.layers.{number}"
        for name, sizes in {
            "q_a_proj": (1536, HIDDEN),
            "q_a_layernorm": (1536,),
            "q_b_proj": (24_576, 1536),
            "kv_a_proj_with_mqa": (576, HIDDEN),
            "kv_a_layernorm": (512,),
            "kv_b_proj": (32_768, 512),
            "o_proj": (HIDDEN, 16_384),
        }.items():
            yield f"{layer}.self_attn.{name}.weight", shape(*sizes)
        yield from _feed_forward(f"{layer}.mlp", shape, is_dense=number < DENSE)
        yield f"{layer}.input_layernorm.weight", shape(HIDDEN)
        yield f"{layer}.post_attention_layernorm.weight", shape(HIDDEN)
    yield "model.norm.weight", shape(HIDDEN)
    yield "lm_head.weight", shape(VOCABULARY, HIDDEN)


def _feed_forward(place, shape, *, is_dense) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = 18_432 if is_dense else 2048
    if not is_dense:
        yield f"{place}.gate.weight", (EXPERTS, *shape(HIDDEN))
        yield f"{place}.gate.e_score_correction_bias", (EXPERTS,)
    experts = [place] if is_dense else [*(f"{place}.experts.{n}" for n in range(EXPERTS)), f"{place}.shared_experts"]
    for expert in experts:
        for name in ("gate_proj", "up_proj"):
            yield f"{expert}.{name}.weight", shape(width, HIDDEN)
        yield f"{expert}.down_proj.weight", shape(HIDDEN, width)


def save_deepseek(folder: Path, *, layers: int = 61, shards: int = 163, narrow: int = 1) -> int:
    """The folder, in bfloat16; how many tensors it has."""
    folder.mkdir(parents=True)
    tensors = list(names(layers, narrow))
    places: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = tensors[len(tensors) * number // shards : len(tensors) * (number + 1) // shards]
        _save_holes(folder / name, part)
        places |= dict.fromkeys((each for each, _ in part), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return len(tensors)


def _save_holes(path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    header, stop = {}, 0
    for name, shape in tensors:
        start, stop = stop, stop + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + stop)
