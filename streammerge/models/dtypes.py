"""The dtypes that models are stored in, each in the spellings that are understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from streammerge.errors import RecipeError, suggestion
from streammerge.tensors import DTYPES, DType, TensorInfo, described


@dataclass(frozen=True, slots=True)
class Scaled:
    """How ComfyUI has diffusion models in 8 bits: large matrices as floats of this type, each with a scale.

    What is not such a matrix is stored as it would be anyway. `torch_name` is what this is called among dtypes.
    """

    codes: DType
    torch_name: str


Storage = DType | Scaled
"""How tensors may be stored."""


STORED_DTYPES: Final[Mapping[str, Storage | None]] = {
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
    "fp8_scaled": Scaled(DTYPES["F8_E4M3"], "fp8_scaled"),
    "fp8_scaled_e5m2": Scaled(DTYPES["F8_E5M2"], "fp8_scaled_e5m2"),
}
"""Every spelling of a dtype that options and recipes know; `keep` is the layout model's own."""


def parse_dtype(raw: Any, where: str) -> Storage | None:  # noqa: ANN401
    """The way to store that is meant, None for `keep`."""
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


def parse_element_dtype(raw: Any, where: str) -> DType | None:  # noqa: ANN401
    """The same where single tensors are stored, which have no room for scales beside them."""
    found = parse_dtype(raw, where)
    if isinstance(found, Scaled):
        raise RecipeError(
            f"{where}: {raw} is a dtype of whole models, which have scales beside their weights",
            advice="Merge or convert the model with this dtype.",
        )
    return found


def stored_as(info: TensorInfo, dtype: Storage | None) -> TensorInfo:
    """The description with the asked-for dtype, if it is one and the elements are floating point.

    What stands beside weights with scales keeps its own, unless that is of 8 bits.
    """
    if dtype is None or not info.dtype.mergeable:
        return info
    if isinstance(dtype, Scaled):
        return described(DTYPES["BF16"], info.shape) if info.dtype.bits == 8 else info
    return described(dtype, info.shape)
