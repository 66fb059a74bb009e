"""Models whose output's embeddings are the input's, and are written once: merged with others that have two.

transformers calls the weights of the head `lm_head.weight` and leaves them out where they are tied. A model that is
tied does have them: they are its embedding's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.configs import TIED, config_in, embedding_and_head, has_head
from streammerge.models.folders import root_of
from streammerge.models.layers import sections
from streammerge.models.views import Renamed
from streammerge.tensors import Model

_WITH_HEADS: Final = ("CausalLM", "LMHead", "ConditionalGeneration", "MaskedLM")
"""What the names of architectures have in them that have a head of words."""


def with_heads(models: Mapping[str, Model]) -> tuple[dict[str, Model], list[str]]:
    """The models, those that are tied with their head as a tensor of its own if others have one; and what was done."""
    if len({has_head(model.tensors) for model in models.values()}) == 1:
        return dict(models), []
    found = {name: embedding_and_head(model.tensors) for name, model in models.items()}
    heads = {head for _, head in found.values() if head}
    if len(heads) != 1:
        return dict(models), []
    head, changed, told = heads.pop(), dict(models), []
    for name, (embedding, own) in found.items():
        if embedding and not own and is_tied(models[name]):
            own_names = {each: each for each in models[name].tensors}
            changed[name] = Renamed(models[name], {**own_names, head: embedding})
            told.append(f"{name} ties its output to its input: its {head} is its {embedding}")
    return changed, told


def is_tied(model: Model) -> bool:
    """Whether a model without a head of its own uses its embedding: by its config, which can't be meant otherwise."""
    root = root_of(model)
    folder = root.folder if isinstance(root, Checkpoint) else None
    config = None if folder is None else _config(folder)
    if not config:
        return False
    if any(part.get(TIED) is False for _, part in sections(config)):
        return False
    named = config.get("architectures")
    names = [str(each) for each in named] if isinstance(named, list) else []
    return any(mark in name for name in names for mark in _WITH_HEADS)


def _config(folder: Path) -> Mapping[str, Any] | None:
    try:
        return config_in(folder)
    except CheckpointError:
        return None
