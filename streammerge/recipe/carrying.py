"""Which of the inputs' metadata the output has too.

What says how a model is to be used is the layout model's. What it is called, who made it, how it was trained and what
its bytes hash to is not carried: it is not true of the merge. Licences hold for what is made of the licensed, so those
of all inputs are listed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from streammerge.recipe.parse import Recipe

USE: Final = frozenset(
    {
        *(
            f"modelspec.{key}"
            for key in (
                *("sai_model_spec", "architecture", "implementation", "implementation_version", "resolution"),
                *("prediction_type", "predict_key", "timestep_range", "encoder_layer", "preprocessor"),
                *("is_negative_embedding", "data_format"),
            )
        ),
        *("ss_base_model_version", "ss_v2", "ss_v_parameterization", "ss_zero_terminal_snr"),
        *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"),
        *("v_pred", "ztsnr", "prediction_type", "model_type", "config"),
    }
)
"""The keys of metadata that say how a model is to be used."""

LONGEST: Final = 1_000_000
"""Values of more characters are not carried."""

LICENCE: Final = "modelspec.license"
LICENCES: Final = "streammerge.licenses"
MERGED_FROM: Final = "modelspec.merged_from"
LICENCE_KEYS: Final = (LICENCE, "license")
BOTH: Final = " AND "
"""Between licences that all hold, as in an SPDX expression."""

MetadataOf = Callable[[Path], Mapping[str, str]]


def carried_metadata(recipe: Recipe, metadata_of: MetadataOf) -> dict[str, str]:
    """What the output's metadata has from the inputs'; nested recipes' layouts and licences count."""
    layout = recipe.named[recipe.layout_name].source
    own = carried_metadata(layout, metadata_of) if isinstance(layout, Recipe) else metadata_of(layout)
    carried = {key: value for key, value in own.items() if key in USE and len(value) <= LONGEST}
    stated = licences(recipe, metadata_of)
    if any(stated.values()):
        distinct = dict.fromkeys(part for text in stated.values() if text for part in text.split(BOTH))
        carried[LICENCE] = BOTH.join(distinct)
        carried[LICENCES] = json.dumps(stated, ensure_ascii=False, separators=(",", ":"))
    titles = dict.fromkeys(
        title for path in recipe.paths() if (title := metadata_of(path).get("modelspec.title")) and len(title) < LONGEST
    )
    if titles:
        carried[MERGED_FROM] = ", ".join(titles)
    return carried


def licences(recipe: Recipe, metadata_of: MetadataOf) -> dict[str, str | None]:
    """The licence that each input states, those of nested recipes as `NAME/INPUT`; None for one that states none."""
    found: dict[str, str | None] = {}
    for entry in recipe.named.values():
        if isinstance(entry.source, Recipe):
            inner = licences(entry.source, metadata_of)
            found |= {f"{entry.name}/{name}": text for name, text in inner.items()}
        else:
            metadata = metadata_of(entry.source)
            texts = [text for key in LICENCE_KEYS if (text := metadata.get(key)) and len(text) <= LONGEST]
            found[entry.name] = texts[0] if texts else None
    return found
