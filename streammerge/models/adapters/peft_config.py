"""PEFT's adapter_config.json for factors whose alpha is their rank, so that the scale of every module is 1."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from streammerge.formats.companions import Companion
from streammerge.models.adapters.config import FILE, Config
from streammerge.models.adapters.dialects import PEFT
from streammerge.models.adapters.parameters import ends, parameter_path

BEGUN: Final[Mapping[str, Any]] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "bias": "none",
    "lora_dropout": 0.0,
    "modules_to_save": None,
}
"""What a config says that was made of no other."""


OF_MODELS: Final = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
"""What the config of an adapter says of its model, and is true of others that are made of it."""

OF_SAVED: Final = ("modules_to_save", "bias")
"""What the config says of tensors that are held whole."""

TASKS: Final[Mapping[str, str]] = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""What PEFT calls the tasks of models, by how the names of their classes end."""


RECURRENT: Final = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
"""The types of models of which PEFT takes no factors of the modules below."""

UNTAKEN: Final = frozenset({"out_proj", "conv1d"})


def is_taken(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT takes factors of a module of a model with this config.json."""
    return config.get("model_type") not in RECURRENT or module.rpartition(".")[2] not in UNTAKEN


def task_of(config: Mapping[str, Any]) -> str | None:
    """What PEFT calls the task of a model with this config.json; None where that doesn't tell."""
    found = config.get("architectures")
    classes = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    if config.get("is_encoder_decoder") is True and any(name.endswith("ForConditionalGeneration") for name in classes):
        return "SEQ_2_SEQ_LM"
    tasks = {task for end, task in TASKS.items() if any(name.endswith(end) for name in classes)}
    return tasks.pop() if len(tasks) == 1 else None


def said_alike(configs: Iterable[Config]) -> dict[str, Any]:
    """What configs say of the model: where one says something, and none another."""
    said = [config.said for config in configs]
    found: dict[str, Any] = {}
    for key in OF_MODELS:
        values = [own[key] for own in said if own.get(key) is not None]
        if values and all(value == values[0] for value in values):
            found[key] = values[0]
    if "base_model_name_or_path" not in found:
        found.pop("revision", None)  # of which model is not known
    return found


def config_of_ranks(
    ranks: Mapping[str, int],
    configs: Iterable[Config] = (),
    *,
    fan_in_fan_out: bool | None = None,
    of_model: Mapping[str, Any] | None = None,
    parameters: Mapping[str, str] | None = None,
) -> Companion:
    """The config for modules of these ranks, made of adapters with these configs, if any.

    Weights lie transposed (`fan_in_fan_out`) if any of the configs says so, unless it is said here; so is what is known
    `of_model`. Those that are wrappers of single `parameters` are named by these.
    """
    configs = list(configs)
    is_turned = any(config.fan_in_fan_out for config in configs) if fan_in_fan_out is None else fan_in_fan_out
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    wrapped = {module: parameter_path(module, name) for module, name in (parameters or {}).items() if module in ranks}
    called = {module: wrapped.get(module, module.removeprefix(PEFT)) for module in ranks}
    patterns = _patterns({called[module]: rank for module, rank in ranks.items()}, usual)
    own: dict[str, Any] = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": is_turned,
        "target_modules": sorted(called[module] for module in ranks if module not in wrapped),
    }
    if wrapped:
        versions = [str(config.said.get("peft_version") or "") for config in configs if config.parameters]
        own |= {"target_parameters": sorted(wrapped.values())}
        own |= {"peft_version": min(versions)} if all(versions) else {}
    said = {**BEGUN, **(said_alike(configs) if of_model is None else of_model), **own}
    text = json.dumps(dict(sorted(said.items())), indent=2) + "\n"
    return Companion(FILE, text.encode(), "the adapter's config")


def _patterns(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """The ranks that are not the usual one, by patterns that mean these modules.

    A pattern also fits longer names that end so, and the first that fits holds: the longest come first, those of the
    usual rank among them of which another's is the end.
    """
    others = {module for module, rank in ranks.items() if rank != usual}
    listed = (module for module in ranks if module in others or not others.isdisjoint(ends(module)))
    return {_exactly(module): ranks[module] for module in sorted(listed, key=lambda name: (-name.count("."), name))}


def _exactly(module: str) -> str:
    """A pattern that means this module: PEFT compares names with it from the beginning, or behind a dot."""
    return module.replace(".", r"\.")
