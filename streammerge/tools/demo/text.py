"""Text models: the two namings of CLIP's text encoder, and Llama."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streammerge.tools.demo.layers import Shapes, linear, nest, norm, weight

VOCABULARY = 49408
POSITIONS = 77


def clip(*, width: int = 768, layers: int = 12, vocabulary: int = VOCABULARY) -> Shapes:
    """CLIP's text encoder as `transformers` names it; the defaults are CLIP-L, of Stable Diffusion 1 and XL."""
    layer = nest(
        {
            "self_attn": nest({f"{part}_proj": linear(width, width) for part in ("k", "v", "q", "out")}),
            "layer_norm1": norm(width),
            "mlp": nest({"fc1": linear(width, 4 * width), "fc2": linear(4 * width, width)}),
            "layer_norm2": norm(width),
        }
    )
    return nest(
        {
            "embeddings": {
                "position_ids": (1, POSITIONS),
                "token_embedding.weight": (vocabulary, width),
                "position_embedding.weight": (POSITIONS, width),
            },
            **{f"encoder.layers.{number}": layer for number in range(layers)},
            "final_layer_norm": norm(width),
        }
    )


def open_clip(*, width: int, layers: int, vocabulary: int = VOCABULARY, head: bool = True) -> Shapes:
    """CLIP's text encoder as OpenCLIP names it: CLIP-H has a width of 1024 and 24 layers, CLIP-G 1280 and 32.

    `head` is the projection to where images and texts meet, and its temperature; making images needs neither.
    """
    layer = nest(
        {
            "ln_1": norm(width),
            "attn": {
                "in_proj_weight": (3 * width, width),
                "in_proj_bias": (3 * width,),
                **nest({"out_proj": linear(width, width)}),
            },
            "ln_2": norm(width),
            "mlp": nest({"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)}),
        }
    )
    return {
        "positional_embedding": (POSITIONS, width),
        **({"text_projection": (width, width), "logit_scale": ()} if head else {}),
        **nest({f"transformer.resblocks.{number}": layer for number in range(layers)}),
        **nest({"token_embedding": weight(vocabulary, width), "ln_final": norm(width)}),
    }


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A language model in the words of its configuration file; the defaults are Llama 3's, of 8 B parameters."""

    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    intermediate_size: int = 14336
    vocab_size: int = 128256
    tie_word_embeddings: bool = False

    def narrowed(self, scale: int) -> LlamaConfig:
        """The same architecture, every width divided by `scale`."""
        return replace(
            self,
            hidden_size=self.hidden_size // scale,
            intermediate_size=self.intermediate_size // scale,
            vocab_size=self.vocab_size // scale,
        )


def llama(config: LlamaConfig) -> Shapes:
    """The names and shapes of a Llama's tensors; with tied embeddings it has no `lm_head`."""
    hidden, wide = config.hidden_size, config.intermediate_size
    shared = config.num_key_value_heads * hidden // config.num_attention_heads
    layer = nest(
        {
            "self_attn.q_proj": weight(hidden, hidden),
            "self_attn.k_proj": weight(shared, hidden),
            "self_attn.v_proj": weight(shared, hidden),
            "self_attn.o_proj": weight(hidden, hidden),
            "mlp.gate_proj": weight(wide, hidden),
            "mlp.up_proj": weight(wide, hidden),
            "mlp.down_proj": weight(hidden, wide),
            "input_layernorm": weight(hidden),
            "post_attention_layernorm": weight(hidden),
        }
    )
    return nest(
        {
            "model.embed_tokens": weight(config.vocab_size, hidden),
            **{f"model.layers.{number}": layer for number in range(config.num_hidden_layers)},
            "model.norm": weight(hidden),
            **({} if config.tie_word_embeddings else {"lm_head": weight(config.vocab_size, hidden)}),
        }
    )
