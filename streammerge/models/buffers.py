"""What libraries compute themselves and some store: the frequencies of rotary positions, and causal masks.

They follow from the config, so the layout's fit what it says, and a model that lacks them lacks nothing.
"""

from __future__ import annotations

import re
from typing import Final

from streammerge.tensors import TensorInfo

_FREQUENCIES: Final = re.compile(r"(?:.*\.)?rotary\w*\.(?:original_)?inv_freq")
"""Llama's and others' `rotary_emb`, by the layer or once; vision towers' `rotary_pos_emb`."""

_ATTENTION: Final = r"(?:.*\.)?(?:h\.\d+\.(?:attn(?:\.attention)?|crossattention)|(?:h|layers)\.\d+\.attention)"

_MASK: Final = re.compile(rf"{_ATTENTION}\.bias")
"""The masks of GPT-2, GPT-J, GPT-Neo and GPT-NeoX: [1, 1, n, n]."""

_MASKED: Final = re.compile(rf"{_ATTENTION}\.masked_bias")
"""Beside them, the one number that stands for what is masked."""


def is_computed(name: str, info: TensorInfo) -> bool:
    """Whether the tensor is a buffer that a library computes from the config: by its name and its shape."""
    if name.endswith("inv_freq"):
        return len(info.shape) == 1 and bool(_FREQUENCIES.fullmatch(name))
    if name.endswith(".masked_bias"):
        return info.elements == 1 and bool(_MASKED.fullmatch(name))
    if not name.endswith(".bias") or len(info.shape) != 4:
        return False
    return info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3] and bool(_MASK.fullmatch(name))
