"""What A1111's checkpoint merger writes into metadata, and its readers look for: how a merge was made, and of what.

`sd_merge_recipe` names up to three models by their sha256, `sd_merge_models` has each of these with its name, its old
short hash, and how it was made itself, and those that it was made of. (A1111's `modules/extras.py`.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from streammerge.models.architecture import guess_architecture
from streammerge.models.checkpoints import Checkpoint
from streammerge.plan.inputs import OpenInputs
from streammerge.recipe.metadata import Hashes, stored_names
from streammerge.recipe.options import LONGEST
from streammerge.recipe.recipe import Input, Recipe
from streammerge.storage.old_hashes import old_short_hash

RECIPE: Final = "sd_merge_recipe"
MODELS: Final = "sd_merge_models"

KNOWN: Final = ("Stable Diffusion", "SDXL", "Flux", "Chroma")
"""How the architectures are called that A1111 and Forge load."""

HASHES: Final = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")

MOST: Final = 256
"""So many models are told of: they have models of their own."""


def merge_history(recipe: Recipe, opened: OpenInputs, hashes: Hashes) -> dict[str, str]:
    """The two entries, for a merge of models that A1111 knows; nothing for another, and for one model in another form.

    `hashes` are the sha256 of the inputs' files, by the names that recipes in metadata have for them.
    """
    layout = recipe.named[recipe.layout_name]
    if recipe.is_conversion or isinstance(layout.source, Recipe):
        return {}
    architecture = guess_architecture(opened.opened(layout.path).tensors)
    if not architecture.startswith(KNOWN):
        return {}
    files = dict(_files(recipe, opened, hashes))
    models: dict[str, Any] = {}
    for path, sha256 in files.items():
        models |= _told(opened.opened(path), sha256)
    made = {RECIPE: _recipe(recipe, files, architecture), MODELS: dict(list(models.items())[:MOST])}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in made.items()}


def _files(recipe: Recipe, opened: OpenInputs, hashes: Hashes) -> Iterator[tuple[Path, str]]:
    """The inputs that are one file each, with its sha256."""
    for path, name in stored_names(recipe.paths()).items():
        found = list(hashes.get(name, {}).values())
        if len(found) == 1 and len(opened.opened(path).files) == 1:
            yield path, found[0]


def _recipe(recipe: Recipe, files: Mapping[Path, str], architecture: str) -> dict[str, Any]:
    inputs = [*recipe.models, *([recipe.base] if recipe.base and recipe.base not in recipe.models else [])]
    found = [_hash(entry, files) for entry in inputs[: len(HASHES)]]
    method, multiplier = _method(recipe)
    vae = next((rule.model for rule in recipe.rules if rule.component == "vae" and rule.action == "take"), "")
    dropped = [glob for rule in recipe.rules if rule.action == "drop" for glob in rule.match]
    return {
        "type": "streammerge",
        **dict(zip(HASHES, [*found, None, None, None], strict=False)),
        "interp_method": method,
        "multiplier": multiplier,
        "save_as_half": recipe.dtype is not None and recipe.dtype.torch_name == "float16",
        "custom_name": None,
        "config_source": None,
        "bake_in_vae": _file_name(recipe, vae),
        "discard_weights": ", ".join(dropped),
        "is_inpainting": architecture.endswith("(inpainting)"),
        "is_instruct_pix2pix": architecture.endswith("(instruct-pix2pix)"),
    }


def _file_name(recipe: Recipe, model: str) -> str | None:
    source = recipe.named[model].source if model in recipe.named else None
    return source.name if isinstance(source, Path) else None


def _hash(entry: Input, files: Mapping[Path, str]) -> str | None:
    return files.get(entry.source) if isinstance(entry.source, Path) else None


def _method(recipe: Recipe) -> tuple[str, float | None]:
    """The method as A1111 calls it, and its multiplier, where that is one number; other methods by their own names."""
    alpha = recipe.parameters.get("alpha")
    number = float(alpha) if isinstance(alpha, int | float) else None
    if any(entry.parameters.get("alpha") is not None for entry in recipe.inputs) or _has_values(recipe):
        return recipe.method, None
    if recipe.method == "weighted_sum" and len(recipe.models) == 2:
        return "Weighted sum", 0.5 if alpha is None else number
    if recipe.method == "add_difference" and len(recipe.models) == 2:
        return "Add difference", 1.0 if alpha is None else number
    if recipe.method == "linear" and len(recipe.models) == 2 and set(recipe.parameters) <= {"weight"}:
        weights = [entry.parameters.get("weight", recipe.parameters.get("weight", 1.0)) for entry in recipe.models]
        numbers = [float(each) for each in weights if isinstance(each, int | float)]
        total = math.fsum(numbers)
        if len(numbers) == len(weights) and total:
            return "Weighted sum", numbers[1] / total
    return recipe.method, number


def _has_values(recipe: Recipe) -> bool:
    """Whether some tensors have values of their own."""
    return any(rule.parameters for rule in recipe.rules)


def _told(model: Checkpoint, sha256: str) -> dict[str, Any]:
    """A model under its hash, and those that it was made of under theirs."""
    path, metadata = model.files[0].path, model.metadata
    inner = _object(metadata.get(MODELS, ""))
    own = {"name": path.name, "legacy_hash": old_short_hash(path), RECIPE: _object(metadata.get(RECIPE, "")) or None}
    return {sha256: own, **inner}


def _object(text: str) -> dict[str, Any]:
    """What JSON says, if it is a map: a stranger may have written anything."""
    if not text.startswith("{") or len(text) > LONGEST:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
