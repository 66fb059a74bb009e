"""What an adapter's adapter_config.json, or its metadata, say of how it is to be applied: PEFT's way of telling it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.formats.objects import UnreadableError, object_of, read_object
from streammerge.models.wrappers import bare_name

MAX_CONFIG: Final = 4 * 2**20
"""The longest adapter_config.json, in bytes, that is read."""

FILE: Final = "adapter_config.json"

_HAS_CONFIG: Final = re.compile(r"adapter_model\..*|(?:\d+_)?adapters\.safetensors", re.DOTALL)
"""What the files of PEFT's adapters are called, and MLX's, beside which a config is theirs."""

MLX: Final = "MLX"
"""What a config of MLX's adapters is called here: it says nothing of PEFT's kinds."""

IN_METADATA: Final = "lora_adapter_metadata"
"""The key of a file's metadata under which diffusers keeps the configs of a pipeline's parts."""

KINDS: Final = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "BOFT", "TRAINABLE_TOKENS")
"""The kinds of PEFT's adapters that are read, as its configs call them."""

ALPHAS: Final[Mapping[str, str]] = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""Where the configs of those that have one say α."""

CHANGED_BASES: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin a LoRA that change the model's own weights too: without that change the LoRA means nothing."""

TRANSPOSED: Final = re.compile(r"(?:.*\.)?(?:c_attn|c_proj|c_fc|q_attn)")
"""The modules of GPT-2 and its kin whose weights lie transposed."""

NO_CHANGES: Final[Mapping[str, str]] = {
    "alora_invocation_tokens": "an activated LoRA, which changes nothing before certain tokens",
    "arrow_config": "a router among several adapters (Arrow)",
    "use_bdlora": "a LoRA of block-diagonal factors",
}
"""Keys of PEFT's LoRAs that are no change of weights, or another one, and what each of them makes it."""

MOST_TERMS: Final = 1000
"""The most terms of a series that are added up."""

_PLAIN: Final = re.compile(r"(?:\.\*\\?\.)?[\w.^$\\-]*")
"""A pattern of names that can't take long to match."""


@dataclass(frozen=True)
class Turning:
    """How PEFT's OFT makes rotations: by so many terms of a series, exactly if 0; no farther than `freedom`, if any."""

    terms: int = 0
    freedom: float = 0.0
    is_shared: bool = False


@dataclass(frozen=True)
class Config:
    """How strong a module's change is, where it isn't told by tensors: s = α/r, or α/√r if it is rank-stabilised.

    `where` is what errors call it. `is_dora` says that every module has lengths, `fan_in_fan_out` that weights lie
    transposed in the model. `tokens` are those that were trained alone, by the end of a module's name, or of any under
    "". `parameters` are the ends of names of tensors that are changed by themselves, and not as their module's weight.
    `said` is all that the file says.
    """

    where: str
    kind: str = "LORA"
    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    usual_rank: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    is_rank_stabilised: bool = False
    is_dora: bool = False
    fan_in_fan_out: bool = False
    turning: Turning | None = None
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    said: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def scale(self, module: str, rank: int) -> float:
        """The strength of a module's change that has this rank."""
        alpha = self.alpha_of(module)
        assert alpha is not None
        if self.kind == MLX:  # which says what it comes to
            return alpha
        if self.kind == "ADALORA":  # which prunes ranks, and divides by that with which it began
            return (alpha if alpha > 0 else self.usual_rank) / (self.usual_rank + 1e-5)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def alpha_of(self, module: str) -> float | None:
        """A module's α; None if nothing is said of it."""
        return next((each for pattern, each in self.alphas.items() if fits(pattern, module)), self.alpha)

    def rank(self, module: str) -> int:
        """The rank that a module is said to have, 0 if nothing is said."""
        return next((each for pattern, each in self.ranks.items() if fits(pattern, module)), self.usual_rank)

    @property
    def targets(self) -> tuple[str, ...]:
        """The ends of the names of modules that it says are changed as a whole; none if a pattern says so."""
        named = self.said.get("target_modules")
        return tuple(end for end in named if isinstance(end, str)) if isinstance(named, list) else ()

    def has_module(self, module: str) -> bool:
        """Whether it names the module as one that is changed as a whole."""
        return any(f".{module}".endswith(f".{end}") for end in self.targets)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The tokens of a module that were trained alone, in the order of their rows."""
        own = (each for end, each in self.tokens.items() if f".{module}".endswith(f".{end}" if end else ""))
        return next(own, ())


def fits(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's `alpha_pattern` means this module: by the end of its name, or by all of it."""
    return re.match(rf"(?:.*\.)?(?:{pattern})$", module) is not None


def read_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, Config]:
    """The configs of an adapter at this path, by how the names of the modules begin for which they hold; none if it
    has none."""
    beside = (path if path.is_dir() else path.parent) / FILE
    if (path.is_dir() or _HAS_CONFIG.fullmatch(path.name)) and beside.is_file():
        try:
            said = read_object(beside, MAX_CONFIG)
        except UnreadableError as problem:
            raise CheckpointError(f"{beside}: can't be read: {problem}", advice="Fetch it again.") from None
        return {"": replace(_config(said, str(beside)), tokens=_tokens(said, str(beside)), said=said)}
    if IN_METADATA not in metadata:
        return {}
    where = f"{path}: {IN_METADATA} in its metadata"
    try:
        return _by_component(object_of(metadata[IN_METADATA].encode("utf-8", "surrogatepass")), where)
    except UnreadableError as problem:
        raise CheckpointError(f"{where}: can't be read: {problem}", advice="Fetch it again.") from None


def _by_component(raw: Mapping[str, Any], where: str) -> dict[str, Config]:
    """The configs that diffusers keeps as `transformer.r`, `text_encoder.lora_alpha`, …"""
    components = dict.fromkeys(key.partition(".")[0] for key in raw)
    return {
        f"{name}.": _config({key.partition(".")[2]: raw[key] for key in raw if key.startswith(f"{name}.")}, where)
        for name in components
    }


def _config(raw: Mapping[str, Any], where: str) -> Config:
    """A config; CheckpointError for what it asks for and is not done."""
    if "lora_parameters" in raw:
        return _mlxs(raw, where)
    kind = str(raw.get("peft_type", "LORA")).upper()
    if kind not in KINDS:
        raise CheckpointError(f"{where}: {kind} adapters are not read", advice=f"Those that are: {', '.join(KINDS)}.")
    begun = str(raw.get("init_lora_weights")).lower()
    if begun.startswith(CHANGED_BASES):
        raise CheckpointError(
            f"{where}: it was begun with {begun}, which changes the model's own weights too",
            advice="Save it as a plain LoRA: in PEFT, save_pretrained(…, path_initial_model_for_weight_conversion=…).",
        )
    if raw.get("layer_replication"):
        raise CheckpointError(
            f"{where}: it stacks layers anew (layer_replication), which is not done here",
            advice="Stack the model's layers first (slices: in a recipe), and bake an adapter without that key.",
        )
    if other := next((what for key, what in NO_CHANGES.items() if raw.get(key)), ""):
        raise CheckpointError(f"{where}: it is {other}: it can't be put into a model")
    usual = Config(where, kind, fan_in_fan_out=bool(raw.get("fan_in_fan_out", False)))
    if kind == "ADALORA":
        alpha = _number(raw.get("lora_alpha", 8), where, "lora_alpha")
        return replace(usual, alpha=alpha, usual_rank=int(_number(raw.get("init_r", 12), where, "init_r")))
    if kind not in ALPHAS:
        return replace(usual, turning=_turning(raw, where) if kind == "OFT" else None)
    rank = int(_number(raw.get("r", 0), where, "r"))
    return replace(
        usual,
        alpha=_number(raw[ALPHAS[kind]], where, ALPHAS[kind]) if ALPHAS[kind] in raw else None,
        alphas=_patterns(raw, "alpha_pattern", where),
        usual_rank=rank,
        ranks={pattern: int(each) for pattern, each in _patterns(raw, "rank_pattern", where).items()},
        is_rank_stabilised=bool(raw.get("use_rslora", False)),
        parameters=_names(raw, "target_parameters", where),
        is_dora=bool(raw.get("use_dora", False)),
    )


def _mlxs(raw: Mapping[str, Any], where: str) -> Config:
    """A config of MLX's, which says what the product of the factors is multiplied by."""
    said, way = raw["lora_parameters"], raw.get("fine_tune_type", "lora")
    if not isinstance(said, dict) or way not in ("lora", "dora"):
        raise CheckpointError(f"{where}: it is MLX's, of the fine_tune_type {way!r}: lora and dora are read")
    scale, rank = _number(said.get("scale"), where, "scale"), int(_number(said.get("rank", 0), where, "rank"))
    return Config(where, MLX, alpha=scale, usual_rank=rank, is_dora=way == "dora")


def _turning(raw: Mapping[str, Any], where: str) -> Turning:
    """How PEFT's OFT makes rotations. CheckpointError where it isn't told, as by versions that made others."""
    if "use_cayley_neumann" not in raw:
        raise CheckpointError(f"{where}: it doesn't say use_cayley_neumann: OFT of an older form, which is not read")
    terms = int(_number(raw.get("num_cayley_neumann_terms", 5), where, "num_cayley_neumann_terms"))
    if raw["use_cayley_neumann"] and not 1 <= terms <= MOST_TERMS:
        raise CheckpointError(f"{where}: num_cayley_neumann_terms is {terms}, and should be 1 to {MOST_TERMS}")
    freedom = _number(raw.get("eps", 6e-5), where, "eps") if raw.get("coft") else 0.0
    return Turning(terms if raw["use_cayley_neumann"] else 0, freedom, bool(raw.get("block_share", False)))


def _tokens(raw: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Which tokens were trained alone, by the end of the names of the modules that have them."""
    found = raw.get("trainable_token_indices") or raw.get("token_indices") or {}
    by_module = found if isinstance(found, dict) else {"": found}
    for numbers in by_module.values():
        is_list = isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
        if not is_list or len(set(numbers)) < len(numbers):
            raise CheckpointError(f"{where}: trained tokens must be a list of different numbers, found {numbers!r}")
    return {bare_name(str(end)): tuple(numbers) for end, numbers in by_module.items()}


def _names(raw: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of names, each once."""
    found = raw.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{where}: {key} must be a list of names, found {found!r}")
    return tuple(dict.fromkeys(map(bare_name, found)))


def _patterns(raw: Mapping[str, Any], key: str, where: str) -> dict[str, float]:
    """A map from patterns of modules to numbers."""
    found = raw.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: {key} is no map")
    return {bare_name(_plain(pattern, where)): _number(value, where, key) for pattern, value in found.items()}


def _plain(pattern: str, where: str) -> str:
    """A pattern of modules; CheckpointError for one that could take forever, or means what we can't know."""
    if not _PLAIN.fullmatch(pattern) or pattern.endswith("\\"):
        raise CheckpointError(f"{where}: the pattern {pattern!r} of modules is none of plain names")
    return pattern


def _number(value: Any, where: str, key: str) -> float:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{where}: {key} must be a number, found {value!r}")
    return float(value)


def config_of(configs: Mapping[str, Config], module: str) -> Config | None:
    """The config that holds for a module, if any."""
    return next((config for beginning, config in configs.items() if module.startswith(beginning)), None)
