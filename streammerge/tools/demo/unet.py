"""The denoiser of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streammerge.tools.demo.layers import Shapes, conv, linear, nest, norm, weight


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """A denoiser in the words of its configuration file; the defaults are Stable Diffusion 2's.

    `attention_resolutions` are the factors by which the image has shrunk at the levels that have transformers;
    `transformer_depth` is the number of blocks in a transformer of each level, the last one also the middle's.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    transformer_depth: tuple[int, ...] = (1, 1, 1, 1)
    context_dim: int = 1024
    use_linear_in_transformer: bool = True
    adm_in_channels: int = 0

    def narrowed(self, scale: int) -> UNetConfig:
        """The same architecture, every width divided by `scale`."""
        return replace(
            self,
            model_channels=self.model_channels // scale,
            context_dim=self.context_dim // scale,
            adm_in_channels=self.adm_in_channels // scale,
        )

    @property
    def time_channels(self) -> int:
        """The width of the time step's embedding."""
        return 4 * self.model_channels

    @property
    def level_channels(self) -> tuple[int, ...]:
        """The number of channels at each level, from the full resolution down."""
        return tuple(self.model_channels * factor for factor in self.channel_mult)

    def depth_at(self, level: int) -> int:
        """How many transformer blocks follow each residual block of the level: 0 where it has no attention."""
        return self.transformer_depth[level] if 2**level in self.attention_resolutions else 0


def unet(config: UNetConfig) -> Shapes:
    """The names and shapes of the denoiser's tensors."""
    down, skips = _input_blocks(config)
    label = _embedding(config.adm_in_channels, config.time_channels) if config.adm_in_channels else {}
    return nest(
        {
            "time_embed": _embedding(config.model_channels, config.time_channels),
            "label_emb.0": label,
            "input_blocks": down,
            "middle_block": _middle_block(config),
            "output_blocks": _output_blocks(config, skips),
            "out": nest({"0": norm(config.model_channels), "2": conv(config.model_channels, config.out_channels)}),
        }
    )


def _input_blocks(config: UNetConfig) -> tuple[Shapes, list[int]]:
    """The way down, and how many channels each of its blocks hands across to the way up."""
    channels = config.model_channels
    blocks = [nest({"0": conv(config.in_channels, channels)})]
    skips = [channels]
    for level, wanted in enumerate(config.level_channels):
        if level > 0:
            blocks.append(nest({"0.op": conv(channels, channels)}))
            skips.append(channels)
        for _ in range(config.num_res_blocks):
            blocks.append(_block(config, level, channels, wanted))
            channels = wanted
            skips.append(channels)
    return _numbered(blocks), skips


def _middle_block(config: UNetConfig) -> Shapes:
    channels = config.level_channels[-1]
    residual = _residual(channels, channels, config.time_channels)
    transformer = _transformer(config, channels, config.transformer_depth[-1])
    return nest({"0": residual, "1": transformer, "2": residual})


def _output_blocks(config: UNetConfig, skips: list[int]) -> Shapes:
    """The way up: one block more per level than down, each fed with what the way down handed across."""
    waiting = list(skips)
    channels = config.level_channels[-1]
    blocks = []
    for level, wanted in reversed(list(enumerate(config.level_channels))):
        for position in range(config.num_res_blocks + 1):
            grows = level > 0 and position == config.num_res_blocks
            blocks.append(_block(config, level, channels + waiting.pop(), wanted, grows=grows))
            channels = wanted
    return _numbered(blocks)


def _block(config: UNetConfig, level: int, inputs: int, outputs: int, *, grows: bool = False) -> Shapes:
    """A residual block, the level's transformer if it has one, and at the end of a level upwards an upsampler."""
    layers = [_residual(inputs, outputs, config.time_channels)]
    if depth := config.depth_at(level):
        layers.append(_transformer(config, outputs, depth))
    if grows:
        layers.append(nest({"conv": conv(outputs, outputs)}))
    return _numbered(layers)


def _residual(inputs: int, outputs: int, time_channels: int) -> Shapes:
    return nest(
        {
            "in_layers.0": norm(inputs),
            "in_layers.2": conv(inputs, outputs),
            "emb_layers.1": linear(time_channels, outputs),
            "out_layers.0": norm(outputs),
            "out_layers.3": conv(outputs, outputs),
            **({"skip_connection": conv(inputs, outputs, kernel=1)} if inputs != outputs else {}),
        }
    )


def _transformer(config: UNetConfig, channels: int, depth: int) -> Shapes:
    project = linear(channels, channels) if config.use_linear_in_transformer else conv(channels, channels, kernel=1)
    return nest(
        {
            "norm": norm(channels),
            "proj_in": project,
            "transformer_blocks": _numbered([_transformer_block(channels, config.context_dim)] * depth),
            "proj_out": project,
        }
    )


def _transformer_block(channels: int, context: int) -> Shapes:
    """Attention to the image, a gated feed-forward layer of four times the width, attention to the text."""
    return nest(
        {
            "attn1": _attention(channels, channels),
            "ff.net": nest({"0.proj": linear(channels, 8 * channels), "2": linear(4 * channels, channels)}),
            "attn2": _attention(channels, context),
            "norm1": norm(channels),
            "norm2": norm(channels),
            "norm3": norm(channels),
        }
    )


def _attention(channels: int, context: int) -> Shapes:
    return nest(
        {
            "to_q": weight(channels, channels),
            "to_k": weight(channels, context),
            "to_v": weight(channels, context),
            "to_out.0": linear(channels, channels),
        }
    )


def _embedding(inputs: int, outputs: int) -> Shapes:
    return nest({"0": linear(inputs, outputs), "2": linear(outputs, outputs)})


def _numbered(layers: list[Shapes]) -> Shapes:
    return nest({str(number): layer for number, layer in enumerate(layers)})
