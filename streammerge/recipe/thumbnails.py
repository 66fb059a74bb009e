"""Thumbnails: small pictures of a model, which modelspec has in the metadata as data URLs (RFC 2397)."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Final

from streammerge.errors import RecipeError, format_size
from streammerge.recipe.options import Options

THUMBNAIL: Final = "modelspec.thumbnail"


LARGEST: Final = 500_000
"""Pictures of more bytes are refused: every program that looks at the model's header reads them."""


KINDS: Final = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
"""How the files of pictures begin."""


def with_thumbnail(options: Options, path: Path) -> Options:
    """The options with a picture among the metadata; RecipeError if it is none, or one that they have already."""
    if any(key == THUMBNAIL for key, _ in options.meta):
        raise RecipeError(f"{THUMBNAIL} is given twice", advice="Give --thumbnail, or --meta, but not both.")
    return replace(options, meta=(*options.meta, (THUMBNAIL, data_url(path))))


def data_url(path: Path) -> str:
    """The picture in the file as `data:image/png;base64,…`."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: can't be read as a thumbnail: {error}") from error
    if len(data) > LARGEST:
        raise RecipeError(
            f"{path}: a thumbnail of more than {format_size(LARGEST)} is not written",
            advice="Make it smaller: 256 x 256.",
        )
    return f"data:image/{_kind_of(data, path)};base64,{base64.b64encode(data).decode()}"


def _kind_of(data: bytes, path: Path) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    found = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    if found is None:
        raise RecipeError(f"{path}: is no picture in PNG, JPEG, WebP or GIF", advice="Convert it first.")
    return found
