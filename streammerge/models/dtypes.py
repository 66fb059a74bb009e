"""The dtypes that models are stored in, each in the spellings that are understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from streammerge.errors import RecipeError, suggestion
from streammerge.tensors import DTYPES, DType, TensorInfo, described

STORED_DTYPES: Final[Mapping[str, DType | None]] = {
    "keep": None,
    **{
        spelling: DTYPES[name]
        for name, spellings in {
            "F64": ("fp64", "float64"),
            "F32": ("fp32", "float32"),
            "F16": ("fp16", "float16"),
            "BF16": ("bf16", "bfloat16"),
            "F8_E4M3": ("fp8_e4m3", "float8_e4m3fn"),
            "F8_E5M2": ("fp8_e5m2", "float8_e5m2"),
        }.items()
        for spelling in spellings
    },
}
"""Every spelling of a dtype that options and recipes know; `keep` is the layout model's own."""


def parse_dtype(raw: Any, where: str) -> DType | None:  # noqa: ANN401
    """The stored dtype that is meant, None for `keep`."""
    spelling = str(raw).removeprefix("torch.")
    if spelling not in STORED_DTYPES:
        raise RecipeError(
            f"{where}: unknown dtype {raw!r}",
            advice=f"{_meant(spelling)}Known: {', '.join(STORED_DTYPES)}.",
        )
    return STORED_DTYPES[spelling]


def _meant(spelling: str) -> str:
    """'Did you mean …? ': the dtypes that begin so, for there are two of 8 bits; else one that comes near."""
    longer = [known for known in STORED_DTYPES if spelling.endswith("8") and known.startswith(spelling)]
    return f"Did you mean {' or '.join(map(repr, longer))}? " if longer else suggestion(spelling, list(STORED_DTYPES))


def stored_as(info: TensorInfo, dtype: DType | None) -> TensorInfo:
    """The description with the asked-for dtype, if it is one and the elements are floating point."""
    return described(dtype, info.shape) if dtype and info.dtype.mergeable else info
