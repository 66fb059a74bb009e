"""What the keys of a recipe take: dtypes, seeds, flags and names, each in the spellings that are understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from streammerge.errors import RecipeError, suggestion
from streammerge.tensors import DTYPES, DType

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


def parse_seed(raw: Any, where: str) -> int | None:  # noqa: ANN401
    """The seed of what is random, None where it isn't set."""
    if raw is None or (isinstance(raw, int) and not isinstance(raw, bool)):
        return raw
    raise RecipeError(f"{where}: seed must be a whole number, found {raw!r}")


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


def parse_flag(raw: Any, where: str) -> bool:  # noqa: ANN401
    """true or false; text that only looks like one of them ('false', 'no') is none."""
    if isinstance(raw, bool):
        return raw
    raise RecipeError(
        f"{where} must be true or false, found {raw!r}", advice="Write true or false, without quotation marks."
    )


def parse_key(raw: Any, where: str) -> str:  # noqa: ANN401
    """A name that is not empty, a whole number being one too; "" where there is none."""
    if raw is None or (isinstance(raw, str | int) and not isinstance(raw, bool) and raw != ""):
        return "" if raw is None else str(raw)
    raise RecipeError(f"{where}: expected a name, found {raw!r}")


def parse_name(raw: Any, where: str) -> str:  # noqa: ANN401
    """A piece of text that is not empty; YAML's numbers, flags and dates are none."""
    if isinstance(raw, str) and raw:
        return raw
    raise RecipeError(f"{where} must be text, found {raw!r}", advice="Put it in quotation marks if it is a name.")
