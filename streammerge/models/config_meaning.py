"""What configs say of the arithmetic that weights are for: where it is another, equal shapes hide that models differ.

A merge of weights that were trained with different bases of rotary positions, or numbers of heads, is a model that
loads, and speaks nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

KEYS: Final = frozenset(
    {
        *("model_type", "hidden_act", "hidden_activation", "hidden_activation_function", "activation_function"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "num_heads", "is_gated_act"),
        *("rope_theta", "rope_type", "factor", "partial_rotary_factor", "rotary_pct", "rope_local_base_freq"),
        *("original_max_position_embeddings", "position_embedding_type", "alibi", "sliding_window"),
        *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "parallel_attn", "use_parallel_residual"),
        *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale"),
        *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
        *("num_experts_per_tok", "norm_topk_prob", "scoring_func", "routed_scaling_factor", "topk_method"),
        *("image_size", "patch_size", "vision_feature_layer", "vision_feature_select_strategy"),
    }
)
"""Keys that change what the same weights compute, also of configs within configs."""

SWITCHES: Final = frozenset({"sliding_window", "rope_scaling", "attn_logit_softcapping", "final_logit_softcapping"})
"""Keys of which null says that there is no such thing; of others it leaves the value to the library."""

MAX_DEPTH: Final = 3
"""How deep configs within configs are looked into."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A key, joined with dots where it is one of an inner config, with its value in the one and in the other config."""

    key: str
    own: Any
    other: Any


def contradictions(own: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Contradiction]:
    """What both configs say, each otherwise; what one of them leaves to its library is not told.

    A language model is compared with the language model of one that is given images, if that has one of its type.
    """
    if own.get("model_type") != other.get("model_type"):
        for name, inner in own.items():
            if isinstance(inner, Mapping) and inner.get("model_type") == other.get("model_type") is not None:
                yield from _within(inner, other, f"{name}.", 2)
                return
    yield from _within(own, other, "", 1)


def _within(own: Mapping[str, Any], other: Mapping[str, Any], called: str, depth: int) -> Iterator[Contradiction]:
    for key, value in own.items():
        theirs = other.get(key)
        is_told = key in KEYS if None not in (value, theirs) else key in SWITCHES and key in other
        if isinstance(value, Mapping) and isinstance(theirs, Mapping) and depth < MAX_DEPTH:
            yield from _within(value, theirs, f"{called}{key}.", depth + 1)
        elif is_told and theirs != value:
            yield Contradiction(f"{called}{key}", value, theirs)
