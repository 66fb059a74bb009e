"""Averages of checkpoints of one training: which these are, in the order of their steps, and what each weighs.

Weights by which a mean of checkpoints stands for a decay of the learning rate: with d falling from d(0) = 1 to
d(1) = 0, the j-th of K checkpoints, from j = 0 on, weighs d(j/K) − d((j+1)/K). So the steps before checkpoint j count
d(j/K)-fold, as if they had been made at that rate.

WSM, Tian et al. 2025, arXiv:2507.17634; the mean of the last checkpoints is LAWA, Kaddour 2022, arXiv:2209.14981.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError, RecipeError, listed
from streammerge.models.located import known_by, model_files
from streammerge.recipe.checks import MAX_INPUTS
from streammerge.recipe.scalars import number_of_text

DECAYS: Final[Mapping[str, Callable[[float], float]]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
"""How a learning rate falls from 1 to 0, by name."""

GOING_BY_ORDER: Final = DECAYS.keys() - {"linear"}
"""Those by which not all checkpoints weigh the same."""

_STEP: Final = re.compile(r"(?P<stem>.*?)(?P<step>\d{1,18})")


@dataclass(frozen=True)
class Averaged:
    """Checkpoints in their order, the step of each if all are known, and `remarks` on what was chosen."""

    checkpoints: tuple[str, ...]
    steps: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()

    def check_order(self, count: int | None, weights: str | None) -> None:
        """RecipeError if checkpoints of one folder are named in another order than their steps', as a shell's `*` has
        them, and the last of them are asked for or a decay that goes by it."""
        named = [(path.parent, _STEP.fullmatch(path.name)) for path in map(Path, self.checkpoints)]
        of_one = len({(parent, match["stem"] if match else None) for parent, match in named}) == 1
        steps = [int(match["step"]) for _, match in named if match] if of_one else []
        if steps != sorted(steps) and (count is not None or weights in GOING_BY_ORDER):
            asked = "--last" if count is not None else f"--weights {weights}"
            raise RecipeError(
                f"{asked} goes by the order of the checkpoints, and they are not named in that of their steps",
                found=list(self.checkpoints),
                advice=f"Name them in order, or the folder that they are in: {named[0][0]}.",
            )

    def last(self, count: int | None) -> Averaged:
        """The last so many; RecipeError if there are fewer."""
        if count is None:
            return self
        if count > len(self.checkpoints):
            raise RecipeError(
                f"the last {count} of {len(self.checkpoints)} checkpoints are asked for",
                found=list(self.checkpoints),
                advice="Ask for fewer, or name more folders.",
            )
        return Averaged(self.checkpoints[-count:], self.steps[-count:], self.remarks)

    def remarks_on(self, weights: str | None) -> Iterator[str]:
        """What is to be told of these, weighed so: a decay takes steps to be equally far apart."""
        yield from self.remarks
        distances = {b - a for a, b in itertools.pairwise(self.steps)}
        if weights in DECAYS and len(distances) > 1:
            yield (
                f"{weights} is for checkpoints that are equally far apart, and between these are "
                f"{min(distances):,} to {max(distances):,} steps"
            )


def averaged(words: Sequence[str]) -> Averaged:
    """The checkpoints that words stand for: models, and folders of checkpoints, which stand for all of these."""
    checkpoints, known, remarks = list[str](), list[int](), list[str]()
    for word in words:
        steps = _steps_in(Path(word))
        known += steps
        checkpoints += map(str, steps.values()) if steps else [word]
        if steps and _reason(Path(word)) is None:
            remarks.append(f"{word} has weights of its own, which are not taken: its {len(steps)} checkpoints are")
    _check_each_once(checkpoints)
    are_known = len(known) == len(checkpoints) and known == sorted(set(known))
    return Averaged(tuple(checkpoints), tuple(known) if are_known else (), tuple(remarks))


def _check_each_once(checkpoints: Sequence[str]) -> None:
    """RecipeError if one is named twice, as where a folder is named beside a checkpoint that is in it."""
    models = [known_by(Path(checkpoint)) for checkpoint in checkpoints]
    times = Counter(models)
    if twice := [checkpoint for checkpoint, model in zip(checkpoints, models, strict=True) if times[model] > 1]:
        raise RecipeError(
            "a checkpoint is named more than once, and would weigh as much more", found=twice, advice="Name it once."
        )


def _steps_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their step, in order: folders with weights whose names end with a number."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for entry, stem, step in _numbered(folder):
        found.setdefault(stem, []).append((step, entry))
    stems = [stem for stem, entries in found.items() if any(_reason(entry) is None for _, entry in entries)]
    if not stems:
        return {}
    if len(stems) > 1:
        raise RecipeError(
            f"{folder}: checkpoints are called in {len(stems)} ways, and nobody can tell their order",
            found=[f"{stem}N   {len(found[stem])}" for stem in stems],
            advice="Name the checkpoints' own folders, in their order.",
        )
    entries = sorted(found[stems[0]])
    for step, entry in entries:
        if (reason := _reason(entry)) is not None:
            raise RecipeError(
                f"{entry}: it is called like the checkpoints beside it, and can't be read as one: {reason}",
                advice="Remove it, if it was never finished, or name the checkpoints' own folders.",
            )
        if sum(step == other for other, _ in entries) > 1:
            raise RecipeError(f"{folder}: two checkpoints are of step {step}", advice="Move one of them elsewhere.")
    return dict(entries)


def _numbered(folder: Path) -> Iterator[tuple[Path, str, int]]:
    """The folders in a folder whose names end with a number, each with what comes before it, and the number."""
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        folders = [entry for entry in entries if entry.is_dir()]
    except (OSError, ValueError):
        return
    for entry in folders:
        if match := _STEP.fullmatch(entry.name):
            yield entry, match["stem"], int(match["step"])


def _reason(path: Path) -> str | None:
    """Why a path holds no model; None if it does."""
    try:
        model_files(path)
    except CheckpointError as error:
        return error.what
    return None


def weights_of(text: str, count: int) -> list[float]:
    """What each of so many checkpoints weighs: equal shares, those of a decay, or numbers that are given."""
    if not text:
        return [1.0] * count
    if (decay := DECAYS.get(text)) is not None:
        if text == "linear":  # equal shares, which need no rounding
            return [1.0] * count
        return [decay(j / count) - decay((j + 1) / count) for j in range(count)]
    words = text.split(",")
    if len(words) == 1 and not _is_number(words[0]):
        raise RecipeError(
            f"--weights {text[:80]}: no such weights",
            advice=f"Name one of {', '.join(DECAYS)}, or give a number for each checkpoint: 0.2,0.3,0.5.",
        )
    given = [float(number_of_text(word.strip(), f"--weights {text[:80]}")) for word in words]
    if len(given) != count:
        raise RecipeError(
            f"--weights: {len(given)} numbers are given, for {count} checkpoints",
            advice="Give one for each, in their order.",
        )
    if not math.isfinite(sum(given)) or sum(given) == 0:
        raise RecipeError(
            f"--weights {text[:80]}: the sum of the weights is {sum(given):g}, and they are divided by it"
        )
    return given


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def average_recipe(found: Averaged, weights: Sequence[float]) -> dict[str, Any]:
    """A recipe's values for the weighted mean: the last comes first, whose layout, config and tokenizer are used."""
    if len(found.checkpoints) < 2:
        raise RecipeError(
            f"an average is of two checkpoints or more, and here is one: {listed(found.checkpoints)}",
            advice="Name more folders, or one that has the checkpoints in it.",
        )
    if len(found.checkpoints) > MAX_INPUTS:
        raise RecipeError(f"there are {len(found.checkpoints):,} checkpoints, and {MAX_INPUTS:,} are averaged at most")
    models = [
        {"model": checkpoint, "parameters": {"weight": weight}}
        for checkpoint, weight in zip(found.checkpoints, weights, strict=True)
    ]
    return {"merge_method": "linear", "models": models[::-1], "parameters": {"normalize": True}}
