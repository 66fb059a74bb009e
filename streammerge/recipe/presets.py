"""Block weights that have names: SuperMerger's presets, 26 values for Stable Diffusion and 20 for SDXL.

With x from 0 at IN00 to 1 at the last OUT, s(x) = 3x² − 2x³ and fold(t) the triangle wave that is 0 at even numbers and
1 at odd ones, the curves are |1 − 2x|, s(x), fold(k s(x)), s(fold(k x)), (1 + cos πx) / 2 and cubics. BASE is 0 but in
ALL_B. SDXL's are Model-Mixer's, whose fourths and cosine are waves of 4, 5, 5 and 4 blocks; a preset that SDXL has no
values of its own for is Stable Diffusion's without IN09 to IN11 and OUT09 to OUT11, as SuperMerger has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from streammerge.errors import RecipeError, suggestion

Curve = Callable[[float], float]
Weights = tuple[float, ...]

SD: Final = 26
SDXL: Final = 20


def _smooth(x: float) -> float:
    return x * x * (3 - 2 * x)


def _fold(t: float) -> float:
    return 1 - abs(1 - t % 2)


def _cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def _times(k: int) -> Curve:
    return lambda x: _fold(k * _smooth(x))


def _waves(k: int) -> Curve:
    return lambda x: _smooth(_fold(k * x))


def _uneven(x: float) -> float:
    """From 0 to 4 over SDXL's 19 blocks, in steps of 4, 5, 5 and 4 blocks."""
    block = 18 * x
    return block / 4 if block <= 4 else 4 - (18 - block) / 4 if block >= 14 else 1 + (block - 4) / 5


def _true_hermite(x: float) -> float:
    return (1 + 100 * x - 231 * x**2 + 154 * x**3) / 24 if x else 0.0


def _fake_hermite(x: float) -> float:
    return (25 * x - 57 * x**2 + 38 * x**3) / 6


def _xl_hermite(x: float) -> float:
    return (50 * x - 123 * x**2 + 82 * x**3) / 9


def _drawn(curve: Curve, count: int) -> Weights:
    """The curve at every block, without the noise of its last digits: what is 0 is not read, and must be 0."""
    return (0.0, *(round(curve(number / (count - 2)), 12) for number in range(count - 1)))


def _steps(text: str) -> Weights:
    """A value for every block from IN00: 0, 1, or `h` for a half."""
    return (0.0, *({"0": 0.0, "1": 1.0, "h": 0.5}[letter] for letter in text))


def _curves(*, xl: bool) -> dict[str, tuple[str, Curve]]:
    """Every curve by name, with the name of its reverse."""
    curves: dict[str, tuple[str, Curve]] = {"GRAD_V": ("GRAD_A", lambda x: abs(1 - 2 * x))}
    curves["SMOOTHSTEP"] = ("REVERSE-SMOOTHSTEP", _smooth)
    curves |= {f"SMOOTHSTEP*{k}": (f"R_SMOOTHSTEP*{k}", _times(k)) for k in (2, 3, 4)}
    curves |= {f"SMOOTHSTEP/{k}": (f"R_SMOOTHSTEP/{k}", _waves(k)) for k in (2, 3, 4)}
    curves["COSINE"] = ("REVERSE_COSINE", _cosine)
    if not xl:
        curves["TRUE_CUBIC_HERMITE"] = ("TRUE_REVERSE_CUBIC_HERMITE", _true_hermite)
        curves["FAKE_CUBIC_HERMITE"] = ("FAKE_REVERSE_CUBIC_HERMITE", _fake_hermite)
        return curves
    curves["SMOOTHSTEP/4"] = ("R_SMOOTHSTEP/4", lambda x: _smooth(_fold(_uneven(x))))
    curves["COSINE"] = ("REVERSE_COSINE", lambda x: _cosine(_uneven(x)))
    curves["CUBIC_HERMITE"] = ("REVERSE_CUBIC_HERMITE", _xl_hermite)
    return curves


def _all_steps(count: int, steps: Mapping[str, str]) -> dict[str, Weights]:
    """The presets that are level, or level at both ends, and those of `steps`."""
    blocks = count - 1
    levels = {"FLAT_25": 0.25, "FLAT_75": 0.75}
    ends = {f"WRAP{2 * each:02}": "1" * each + "0" * (blocks - 2 * each) + "1" * each for each in (4, 6, 7, 8)}
    return {
        **{name: (0.0, *[level] * blocks) for name, level in levels.items()},
        **{name: _steps(text) for name, text in {**ends, **steps}.items()},
        "ALL_A": (0.0,) * count,
        "ALL_B": (1.0,) * count,
    }


def _table(count: int, curves: Mapping[str, tuple[str, Curve]], steps: Mapping[str, str]) -> dict[str, Weights]:
    table = _all_steps(count, steps)
    for name, (reverse, curve) in curves.items():
        table[name] = _drawn(curve, count)
        table[reverse] = _drawn(lambda x, curve=curve: 1 - curve(x), count)  # type: ignore[misc]
    return dict(sorted(table.items()))


PRESETS: Final[Mapping[int, Mapping[str, Weights]]] = {
    SD: _table(
        SD,
        _curves(xl=False),
        {
            "MID12_50": "00000" + "h" * 14 + "000000",
            "OUT07": "0" * 18 + "1" * 7,
            "OUT12": "0" * 13 + "1" * 12,
            "OUT12_5": "0" * 12 + "h" + "1" * 12,
            "RING08_SOFT": "00000" + "h111h" + "00000" + "h111h" + "00000",
            "RING08_5": "000000" + "1111" + "00000" + "1111" + "000000",
            "RING10_5": "00000" + "11111" + "00000" + "11111" + "00000",
            "RING10_3": "000000" + "11111" + "000" + "11111" + "000000",
        },
    ),
    SDXL: _table(
        SDXL,
        _curves(xl=True),
        {
            "MID12_50": "000" + "h" * 13 + "000",
            "OUT07": "0" * 12 + "1" * 7,
            "OUT09": "0" * 10 + "1" * 9,
            "OUT09_5": "0" * 9 + "h" + "1" * 9,
            "RING08_SOFT": "00" + "h111h" + "00000" + "h111h" + "00",
            "RING08_5": "000000" + "1111111" + "000000",
            "RING10_5": "00" + "11111" + "00000" + "11111" + "00",
            "RING10_3": "000" + "11111" + "000" + "11111" + "000",
        },
    ),
}
"""The presets by the number of their values."""

_WORDS: Final = {"2": "HALF", "3": "ONE_THIRD", "4": "ONE_FOURTH"}

_ALIASES: Final = {
    "REVERSE_SMOOTHSTEP": "REVERSE-SMOOTHSTEP",
    **{f"{k}{r}SMOOTHSTEP": f"{r}SMOOTHSTEP*{k}" for k in _WORDS for r in ("", "R_")},
    **{f"{word}_{r}SMOOTHSTEP": f"{r}SMOOTHSTEP/{k}" for k, word in _WORDS.items() for r in ("", "R_")},
}
"""sd-meh's names, which no shell takes for patterns."""


def find_preset(name: str, where: str) -> str:
    """The name of the preset that is meant; RecipeError, which says where, if there is none."""
    wanted = name.strip().upper()
    wanted = _ALIASES.get(wanted, wanted)
    known = sorted({known for table in PRESETS.values() for known in table})
    if wanted not in known:
        raise RecipeError(
            f"{where}: there is no preset {name!r}",
            advice=f"{suggestion(wanted, [*known, *_ALIASES])}Presets: {', '.join(known)}.",
        )
    return wanted


def preset_weights(name: str) -> list[Weights]:
    """The preset's values, as many lists as there are numbers of them."""
    return [table[name] for table in PRESETS.values() if name in table]
