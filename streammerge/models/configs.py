"""A model's config.json, as it has to be beside weights that were merged: it says what was written.

Only what follows from the tensors is changed, and only where the config agreed with them before: their dtype, the size
of the vocabulary, the number of layers, whether the output's embeddings are the input's, whether weights are codes. A
config that is right stays as it is, byte for byte.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.formats.objects import UnreadableError
from streammerge.models.codes import find_quantised
from streammerge.models.layers import Layers, read_config, sections, tower_of
from streammerge.tensors import TensorInfo

Tensors = Mapping[str, TensorInfo]

DTYPE_KEYS: Final = ("torch_dtype", "dtype")
"""What the dtype is called, by older and by newer versions of transformers."""

COUNT_KEYS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What the number of layers is called."""

ENCODER_COUNTS: Final = ("num_layers", "encoder_layers", "num_hidden_layers")
DECODER_COUNTS: Final = ("num_decoder_layers", "decoder_layers")
"""What it is called for the halves of an encoder-decoder."""

NUMBERED_KEYS: Final = (
    *("first_k_dense_replace", "mlp_only_layers", "decoder_sparse_step", "moe_layer_start_index", "attn_layer_offset"),
    *("attn_layer_period", "cross_attention_layers", "interleave_moe_layer_step", "global_attn_every_n_layers"),
)
"""Keys that say something of layers by their numbers."""

TIED: Final = "tie_word_embeddings"

QUANTISATION: Final = "quantization_config"

OF_DIFFUSERS: Final = "_class_name"
"""By this key a config is diffusers', which states no dtype."""

DEFAULTS: Final = ("F64", "F32", "F16", "BF16")
"""The dtypes in which a model can be made, whatever single weights of it are stored as."""

_EMBEDDING: Final = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared|token_embd"
    r"|(?:backbone|rwkv)\.embeddings?)\.weight"
)
_HEADS: Final = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Adapted:
    """A config that fits the tensors: its `values`, what was `changed`, in words, and `notes` on what could not be."""

    values: Mapping[str, Any]
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def encoded(self) -> bytes:
        """As the libraries write it."""
        return (json.dumps(self.values, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def config_in(folder: Path, name: str = "config.json") -> Mapping[str, Any] | None:
    """The values of a folder's config, None if it has none; CheckpointError if it is none that could be adapted."""
    file = folder / name
    if not file.is_file():
        return None
    try:
        return read_config(file)
    except UnreadableError as problem:
        raise CheckpointError(
            f"{file}: can't be read as the model's config, which the output has to get: {problem}",
            advice="Fetch it again, or use --no-companions to write weights alone.",
        ) from None


def adapt(
    config: Mapping[str, Any],
    before: Tensors,
    after: Tensors,
    *,
    untied: bool = False,
    layers: Sequence[int] | None = None,
) -> Adapted:
    """The config of a model whose tensors were those `before`, for those `after`.

    `untied` says that the output's embeddings, if they are written, are others than the input's; `layers` which of the
    layers each is now, if they are others.
    """
    values = copy.deepcopy(dict(config))
    changed = [*_dtypes(values, before, after), *_vocabulary(values, before, after), *_layers(values, before, after)]
    changed += _by_layer(values, config, layers) if layers is not None else ()
    changed += _decoded(values, before, after)
    if not (has_head(after) and (untied or not has_head(before))):
        return Adapted(values, tuple(changed))
    if values.get("is_encoder_decoder"):  # T5 scales what goes into a head that is tied
        return Adapted(values, tuple(changed), (f"{TIED} stays, though the output's embeddings are not the input's",))
    return Adapted(values, (*changed, *_untie(values)))


def _set(section: dict[str, Any], key: str, value: Any) -> Iterator[str]:  # noqa: ANN401
    """Set it if it is another, and say so."""
    if section[key] != value:
        yield f"{key}: {str(section[key])[:40]} → {value}"
        section[key] = value


def _parts(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config, and those of the model's parts in it."""
    return (part for _, part in sections(values) if isinstance(part, dict))


def main_dtype(tensors: Tensors) -> str:
    """What a model of these tensors is made in, as torch calls it: what most bytes are; "" if nothing says it."""
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        if info.dtype.name in DEFAULTS:
            sizes[info.dtype.torch_name] += info.nbytes + 1
    return sizes.most_common(1)[0][0] if sizes else ""


def _dtypes(values: dict[str, Any], before: Tensors, after: Tensors) -> Iterator[str]:
    """What weights are stored as; of a part that was another than the whole only where all is one dtype now."""
    new, old = main_dtype(after), main_dtype(before)
    if not new:
        return
    is_one = len({info.dtype for info in after.values() if info.dtype.name in DEFAULTS}) == 1
    stated = next((_plain(values[key]) for key in DTYPE_KEYS if values.get(key) is not None), None)
    for section in list(_parts(values)):
        for key in DTYPE_KEYS:
            if section.get(key) is not None and (section is values or is_one or _plain(section[key]) in (stated, old)):
                yield from _set(section, key, new) if _plain(section[key]) != new else ()
    if stated is None and new != old and OF_DIFFUSERS not in values:
        values[DTYPE_KEYS[0]] = new
        yield f"{DTYPE_KEYS[0]}: {new}"


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _vocabulary(values: dict[str, Any], before: Tensors, after: Tensors) -> Iterator[str]:
    """The rows of the embedding."""
    rows, now = _rows(before), _rows(after)
    for section in _parts(values):
        if len(rows) == len(now) == 1 and section.get("vocab_size") in rows:
            yield from _set(section, "vocab_size", next(iter(now)))


def _rows(tensors: Tensors) -> set[int]:
    found = (info.shape for name, info in tensors.items() if _EMBEDDING.fullmatch(name))
    return {shape[0] for shape in found if len(shape) == 2}


def _layers(values: dict[str, Any], before: Tensors, after: Tensors) -> Iterator[str]:
    """The layers of the stack that has the number of them that the config says: of each tower, and of each half of an
    encoder-decoder, its own."""
    old, new = Layers.of(before).counts, Layers.of(after).counts
    moved = {
        (tower_of(stack), _half(stack, values), old[stack]): new[stack]
        for stack in old.keys() & new.keys()
        if old[stack] != new[stack]
    }
    towers = {tower_of(stack) for stack in old}
    for path, section in sections(values) if moved else ():
        tower = tower_of(path) if path or 0 in towers else min(towers)
        for half, keys in enumerate((COUNT_KEYS, ENCODER_COUNTS, DECODER_COUNTS)):
            for key in keys:
                place = (tower, half, section.get(key))
                if place in moved and not isinstance(section[key], bool) and isinstance(section, dict):
                    yield from _set(section, key, moved[place])


def _half(stack: str, values: Mapping[str, Any]) -> int:
    """1 for the encoder of an encoder-decoder, 2 for its decoder, 0 for what is neither."""
    if not values.get("is_encoder_decoder"):
        return 0
    return 2 if "decoder" in stack.split(".") else 1


def _by_layer(values: dict[str, Any], config: Mapping[str, Any], layers: Sequence[int]) -> Iterator[str]:
    """What is listed for every layer, for those that there are now."""
    for section, (path, old) in zip(_parts(values), sections(config), strict=True):
        if tower_of(path):  # the layers are those of the language model
            continue
        counts = {old[key] for key in COUNT_KEYS if key in old}
        for key, value in old.items():
            if isinstance(value, list) and len(value) in counts and "layer" in key and max(layers) < len(value):
                yield from _set(section, key, [value[number] for number in layers])


def numbered_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys by which the config speaks of layers by their numbers, which are others in a stack of slices."""
    found = [key for _, section in sections(config) for key in NUMBERED_KEYS if section.get(key)]
    return list(dict.fromkeys(found))


def _decoded(values: dict[str, Any], before: Tensors, after: Tensors) -> Iterator[str]:
    """Nothing is said of codes where weights were decoded."""
    parts = [part for part in _parts(values) if part.get(QUANTISATION) is not None]
    for section in parts if parts and are_decoded(before, after) else ():
        if section.pop(QUANTISATION) is not None:
            yield f"{QUANTISATION}: removed, the weights are decoded"


def are_decoded(before: Tensors, after: Tensors) -> bool:
    """Whether weights were stored as codes, and none are any more."""
    return bool(find_quantised(before)) and not find_quantised(after)


def _untie(values: dict[str, Any]) -> Iterator[str]:
    """Have what is written be loaded: a head of its own is no copy of the embedding any more."""
    parts = list(_parts(values))
    tied = [part for part in parts if part.get(TIED) is True]
    for part in tied or ([] if any(TIED in part for part in parts) else [values]):
        part[TIED] = False
    if tied:
        yield f"{TIED}: true → false"


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the config says that the output's embeddings are the input's."""
    return any(part.get(TIED) is True for _, part in sections(config))


def has_head(tensors: Tensors) -> bool:
    """Whether the output's embeddings are a tensor of their own."""
    return any(map(is_head, tensors))


def is_head(name: str) -> bool:
    """Whether a tensor is the output's embeddings, by its name."""
    return name.endswith(_HEADS) and ".".join(name.split(".")[-2:]) in _HEADS


def embedding_and_head(tensors: Iterable[str]) -> tuple[str, str]:
    """The names of the input's and of the output's embeddings; "" for what is not there, or not one."""
    names = [name for name in tensors if name.endswith(".weight")]
    found = [[name for name in names if is_one(name)] for is_one in (_EMBEDDING.fullmatch, is_head)]
    embedding, head = (names[0] if len(names) == 1 else "" for names in found)
    return embedding, head
