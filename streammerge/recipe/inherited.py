"""What an output's metadata has from its inputs': what says how it is to be used, licences, and a title of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from streammerge.recipe.options import LONGEST
from streammerge.recipe.recipe import Input, Recipe, Rule

USE: Final = frozenset(
    {
        *(
            f"modelspec.{key}"
            for key in (
                *("sai_model_spec", "architecture", "implementation", "implementation_version", "resolution"),
                *("prediction_type", "predict_key", "timestep_range", "encoder_layer", "preprocessor"),
                *("is_negative_embedding", "data_format", "format_type", "format_template", "language"),
                *("unet_dtype", "vae_dtype"),
            )
        ),
        *("ss_base_model_version", "ss_v2", "ss_v_parameterization", "ss_zero_terminal_snr"),
        *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"),
        *("v_pred", "ztsnr", "prediction_type", "model_type", "config"),
    }
)
"""The keys of metadata that say how a model is to be used."""


IMPLEMENTATION: Final = "modelspec.implementation"


DIFFUSERS: Final = "diffusers"


TITLE: Final = "modelspec.title"


ARCHITECTURE: Final = "modelspec.architecture"


OF_ADAPTERS: Final = "/lora"
"""What modelspec has behind the architecture of a model that an adapter is for."""


LONGEST_TITLE: Final = 200
"""A longer title is none that another could have in it."""


NAMED: Final = 5
"""So many inputs are named in a title."""


DESCRIPTION: Final = frozenset(
    f"modelspec.{key}"
    for key in ("title", "author", "description", "date", "usage_hint", "thumbnail", "tags", "trigger_phrase")
)
"""The keys of metadata that describe one model, and are true of nothing that is merged of it and others."""


IDENTITIES: Final = frozenset({"linear", "n_average", "passthrough"})
"""Methods that give of a single model what it is."""


LICENCE: Final = "modelspec.license"


LICENCES: Final = "streammerge.licenses"


MERGED_FROM: Final = "modelspec.merged_from"


LICENCE_KEYS: Final = (LICENCE, "license")


BOTH: Final = " AND "
"""Between licences that all hold, as in an SPDX expression."""


QUANTISATION: Final = "_quantization_metadata"
"""ComfyUI's key for what its layers are quantised as."""


STALE: Final = ("format", "sshs_model_hash", "sshs_legacy_hash", QUANTISATION)
"""The keys of metadata that are true of one file alone: hashes, and what is said of single tensors."""


HASH: Final = "modelspec.hash_"
"""How modelspec's keys begin for hashes, of any kind, of a file's tensors."""


MetadataOf = Callable[[Path], Mapping[str, str]]


def carried_metadata(recipe: Recipe, metadata_of: MetadataOf) -> dict[str, str]:
    """What the output's metadata has from the inputs'; nested recipes' layouts and licences count."""
    layout = recipe.named[recipe.layout_name]
    nested = layout.source if isinstance(layout.source, Recipe) else None
    own = metadata_of(layout.path) if nested is None else carried_metadata(nested, metadata_of)
    stays = stays_itself(recipe)
    carried = {key: value for key, value in own.items() if len(value) <= LONGEST and _carries(recipe, key)}
    if recipe.is_extraction and "/" not in carried.get(ARCHITECTURE, "/"):
        carried[ARCHITECTURE] += OF_ADAPTERS
    stated = licences(recipe, metadata_of)
    if any(stated.values()):
        distinct = dict.fromkeys(part for text in stated.values() if text for part in text.split(BOTH))
        carried[LICENCE] = BOTH.join(distinct)
        carried[LICENCES] = json.dumps(stated, ensure_ascii=False, separators=(",", ":"))
    titles = dict.fromkeys(
        title for path in recipe.paths() if (title := metadata_of(path).get("modelspec.title")) and len(title) < LONGEST
    )
    if titles and not (stays and len(titles) == 1):
        carried[MERGED_FROM] = ", ".join(titles)
    if not stays and any(key.startswith("modelspec.") for key in own):
        carried[TITLE] = title_of(recipe, metadata_of)
    return carried


def named_so(metadata: Mapping[str, str], naming: str | None) -> dict[str, str]:
    """The metadata with the program whose names the output has, where another naming is asked for.

    By modelspec tensors are called as in it; who else's the original names of a diffusers model are isn't known.
    """
    said, is_theirs = metadata.get(IMPLEMENTATION), naming == DIFFUSERS
    if said is None or naming is None or (said == DIFFUSERS) == is_theirs:
        return dict(metadata)
    rest = {key: text for key, text in metadata.items() if not key.startswith(IMPLEMENTATION)}
    return {**rest, IMPLEMENTATION: DIFFUSERS} if is_theirs else rest


def _carries(recipe: Recipe, key: str) -> bool:
    """Whether an output has what the layout's metadata say under a key: what a whole model is, its parts are not."""
    if recipe.only not in ("", "unet", "transformer") and key == ARCHITECTURE:
        return False
    if stays_itself(recipe) and recipe.is_conversion:
        return key in USE or (key not in STALE and not key.startswith((HASH, "streammerge.")))
    return key in USE or (key in DESCRIPTION and stays_itself(recipe))


def stays_itself(recipe: Recipe) -> bool:
    """Whether one model goes into the output and stays what it is: its form may change, or a whole component."""
    entry = recipe.inputs[0]
    is_plain = entry == Input(entry.name, entry.source, entry=entry.entry)  # no parameters, adapters, layers
    is_alone = len(recipe.inputs) == 1 and recipe.base is None and isinstance(entry.source, Path)
    changes = recipe.parameters or any(rule.parameters or _puts_in(rule) for rule in recipe.rules)
    return recipe.method in IDENTITIES and is_alone and is_plain and not changes


def _puts_in(rule: Rule) -> bool:
    """Whether a rule has tensors of another model in this one's place, and no whole component."""
    return rule.action == "take" and not rule.component


def title_of(recipe: Recipe, metadata_of: MetadataOf) -> str:
    """A merge's own title: `linear of MyMix and b`, by its inputs' titles where they have one, else by their names."""
    names = [_title_in(entry, metadata_of) for entry in recipe.named.values()]
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{recipe.method} of {', '.join(names[:NAMED])}{more}"


def _title_in(entry: Input, metadata_of: MetadataOf) -> str:
    if isinstance(entry.source, Recipe):
        return entry.name
    title = metadata_of(entry.path).get(TITLE, "")
    return title if 0 < len(title) <= LONGEST_TITLE else entry.name


def licences(recipe: Recipe, metadata_of: MetadataOf) -> dict[str, str | None]:
    """The licence that each input states, those of nested recipes as `NAME/INPUT`; None for one that states none."""
    found: dict[str, str | None] = {}
    for entry in recipe.named.values():
        if isinstance(entry.source, Recipe):
            inner = licences(entry.source, metadata_of)
            found |= {f"{entry.name}/{name}": text for name, text in inner.items()}
        else:
            found[entry.name] = licence(metadata_of(entry.path))
        for each in entry.adapters:
            found[f"{entry.name}+{each.name}"] = licence(metadata_of(each.path))
    return found


def licence(metadata: Mapping[str, str]) -> str | None:
    """The licence that a file states, if it does."""
    texts = [text for key in LICENCE_KEYS if (text := metadata.get(key)) and len(text) <= LONGEST]
    return texts[0] if texts else None
