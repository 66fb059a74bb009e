"""What mixtures that are built of dense models come out as: names of tensors, and a config.json.

Values that a dense model's config leaves out are written: its library's defaults for it are not those for the mixture.
The choice among architectures is mergekit's, as its documentation and its refusals tell.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Config = Mapping[str, Any]

LLAMAS: Final = ("llama", "mistral")

_FOR_ALL: Final[Config] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}

DEFAULTS: Final[Mapping[str, Config]] = {
    "llama": {**_FOR_ALL, "max_position_embeddings": 2048},
    "mistral": {**_FOR_ALL, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {**_FOR_ALL, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {**_FOR_ALL, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
"""What transformers takes where a dense model's config doesn't say it."""

THETA: Final = 10_000.0
"""The base of rotary positions that all of these take where nothing is said."""

_DENSE_ONLY: Final = ("attention_bias", "mlp_bias", "pretraining_tp", "auto_map", "layer_types", "_name_or_path")

Part = str
"""`gate_proj`, `up_proj` or `down_proj`: what the dense models' feed-forward layers call their matrices."""

PARTS: Final[tuple[Part, ...]] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """A kind of mixture: from which dense models it is built, and how many shared experts it may have.

    `block` is what stands for `mlp` in a layer, `parts` for the matrices' names; `shared` is what the shared expert is
    called, "" where there is none, and `gated` says whether tokens choose it by a weight of its own. `adds` are keys of
    its config. Biases of attention are `wanted`, may be there (`kept`), or must not.
    """

    name: str
    sources: tuple[str, ...]
    shares: tuple[int, ...]
    classes: tuple[str, str]
    adds: Callable[[Config, int, int, int], Config]
    block: str = "mlp"
    parts: Mapping[Part, str] | None = None
    shared: str = ""
    gated: bool = False
    biases: str = ""

    def expert(self, number: int, part: Part) -> str:
        """What a matrix of an expert is called in its layer."""
        called = part if self.parts is None else self.parts[part]
        return f"{self.block}.experts.{number}.{called}.weight"

    def shared_expert(self, part: Part) -> str:
        """What a matrix of the shared expert is called in its layer."""
        return f"{self.block}.{self.shared}.{part}.weight"

    @property
    def gate(self) -> str:
        """What the weights are called by which a layer chooses experts."""
        return f"{self.block}.gate.weight"

    @property
    def shared_gate(self) -> str:
        """What the weights are called by which the shared expert's part is chosen."""
        return f"{self.block}.shared_expert_gate.weight"

    def config(self, base: Config, experts: int, shared: int, per_token: int) -> dict[str, Any]:
        """The mixture's config: the base model's, with what makes a mixture of it."""
        model_type, cls = self.classes
        kept = {key: copy.deepcopy(value) for key, value in base.items() if key not in _DENSE_ONLY}
        said = {**filled(base), **kept}
        return {**said, "architectures": [cls], "model_type": model_type, **self.adds(said, experts, shared, per_token)}


def filled(base: Config) -> dict[str, Any]:
    """What a dense model's config leaves to its library."""
    found = {key: value for key, value in DEFAULTS[str(base.get("model_type"))].items() if base.get(key) is None}
    if base.get("rope_theta") is None:  # older versions of transformers look for it here, newer ones there
        positions = base.get("rope_parameters")
        found["rope_theta"] = positions.get("rope_theta", THETA) if isinstance(positions, dict) else THETA
    if base.get("num_key_value_heads") is None and "num_key_value_heads" not in found:
        found["num_key_value_heads"] = base.get("num_attention_heads")
    return found


def _mixtral(base: Config, experts: int, shared: int, per_token: int) -> Config:
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": per_token,
        "sliding_window": None,
        "output_router_logits": False,
    }


def _qwen2(base: Config, experts: int, shared: int, per_token: int) -> Config:
    own = base.get("intermediate_size")
    return {
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "qkv_bias": True,
        "sliding_window": None,
        "use_sliding_window": False,
        "shared_expert_intermediate_size": own,
        "moe_intermediate_size": own,
    }


def _qwen3(base: Config, experts: int, shared: int, per_token: int) -> Config:
    return {
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "moe_intermediate_size": base.get("intermediate_size"),
    }


_REMOTE: Final = "deepseek-ai/deepseek-moe-16b-base--"


def _deepseek(base: Config, experts: int, shared: int, per_token: int) -> Config:
    return {
        "n_routed_experts": experts,
        "n_shared_experts": shared or None,
        "num_experts_per_tok": per_token,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "moe_intermediate_size": base.get("intermediate_size"),
        "auto_map": {
            "AutoConfig": f"{_REMOTE}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_REMOTE}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_REMOTE}modeling_deepseek.DeepseekForCausalLM",
        },
    }


MIXTRAL: Final = Architecture(
    "Mixtral",
    LLAMAS,
    (0,),
    ("mixtral", "MixtralForCausalLM"),
    _mixtral,
    block="block_sparse_moe",
    parts={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
)
DEEPSEEK: Final = Architecture(
    "DeepSeek MoE", LLAMAS, (0, 1), ("deepseek", "DeepseekForCausalLM"), _deepseek, shared="shared_experts"
)
QWEN2: Final = Architecture(
    "Qwen MoE",
    (*LLAMAS, "qwen2"),
    (1,),
    ("qwen2_moe", "Qwen2MoeForCausalLM"),
    _qwen2,
    shared="shared_expert",
    gated=True,
    biases="wanted",
)
QWEN3: Final = Architecture("Qwen3 MoE", ("qwen3",), (0,), ("qwen3_moe", "Qwen3MoeForCausalLM"), _qwen3, biases="kept")

ARCHITECTURES: Final = (MIXTRAL, DEEPSEEK, QWEN2, QWEN3)
"""The first that fits is meant, unless one is named."""


def fitting(sources: Sequence[str], shared: int, prompts: bool, is_random: bool) -> list[Architecture]:
    """The architectures for models of these types, so many shared experts, and prompts for these or none."""
    return [
        each
        for each in ARCHITECTURES
        if len(set(sources)) == 1
        and sources[0] in each.sources
        and shared in each.shares
        and not (shared and (prompts if not each.gated else not (prompts or is_random)))
    ]
