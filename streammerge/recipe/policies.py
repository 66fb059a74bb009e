"""What may be done with tensors that a model doesn't have, has in another shape or beside what is used, or means
otherwise."""

from __future__ import annotations

from typing import Final, Literal

ShapePolicy = Literal["error", "overlap", "keep", "pad", "slice"]

MissingPolicy = Literal["error", "keep", "drop"]

EmaPolicy = Literal["keep", "drop", "use"]

PredictionPolicy = Literal["error", "merge"]

SHAPE_POLICIES: Final = ("error", "overlap", "keep", "pad", "slice")

MISSING_POLICIES: Final = ("error", "keep", "drop")

EMA_POLICIES: Final = ("keep", "drop", "use")

PARTS: Final = (
    *("unet", "transformer", "controlnet", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("clip_l", "clip_g", "t5", "depth_estimator"),
)
"""What parts of diffusion models are called: as diffusers' folders are, text encoders also as ComfyUI calls them."""

PREDICTION_POLICIES: Final = ("error", "merge")
