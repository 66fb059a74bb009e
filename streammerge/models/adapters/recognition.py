"""Adapters: files of changes to a model (LoRA, LyCORIS and their kin), known by how their tensors belong together.

A LoRA holds the factors of W' = W + s·B·A. The average of two adapters' factors is not a factor of the average of their
changes, and no factor stands for a weight of a checkpoint: what is such a factor must never be averaged.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.errors import PlanError, count, one_line, plural
from streammerge.tensors import TensorInfo

CONTROL_LORA: Final = "lora_controlnet"
"""The empty tensor by which Stability's control LoRAs are known, whose factors are called `.up` and `.down` only."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a model has of an adapter: its kind, and its tensors in the model's order.

    `is_inside` tells that the weights that it changes are in the same model; else the model is an adapter and no more.
    """

    kind: str
    tensors: tuple[str, ...]
    is_inside: bool

    def __str__(self) -> str:
        return f"{self.kind} adapter"


@dataclass(frozen=True, slots=True)
class _Family:
    """A kind of adapter: how the names of its tensors go on after their module's, and which of these make one.

    Every pattern names a `role`. What has all roles of one of `wholes` is an adapter's share in a module.
    """

    kind: str
    pattern: re.Pattern[str]
    wholes: tuple[frozenset[str], ...]

    def is_whole(self, parts: Mapping[str, TensorInfo]) -> bool:
        """Whether these parts, by role, are an adapter's. Two that are multiplied have their rank in common."""
        return any(whole <= parts.keys() and _may_be_multiplied(parts) for whole in self.wholes)


def _family(kind: str, tail: str, *wholes: str) -> _Family:
    return _Family(kind, re.compile(rf"(?P<stem>.*?)[._]{tail}"), tuple(frozenset(whole.split()) for whole in wholes))


_NAME: Final = r"(?:\.[\w-]+?)?(?:\.weight)?"
"""How a tensor's name may end in PEFT's dialect: with the adapter's name, and with `weight`."""

_FAMILIES: Final = (
    _family(
        "LoRA",
        rf"?lora(?:\d+|_linear_layer|_embedding)?[._](?P<role>up|down|[ABab]){_NAME}",
        *("up down", "A B", "a b"),
    ),
    _family("control LoRA", r"(?P<role>up|down)", "up down"),
    _family("LoHa", rf"hada_(?P<role>w[12]_[ab]){_NAME}", "w1_a w1_b w2_a w2_b"),
    _family(
        "LoKr",
        rf"lokr_(?P<role>w[12](?:_[ab])?){_NAME}",
        *("w1 w2", "w1 w2_a w2_b", "w1_a w1_b w2", "w1_a w1_b w2_a w2_b"),
    ),
    _family("GLoRA", r"(?P<role>[ab][12])\.weight", "a1 a2 b1 b2"),
    _family("OFT", rf"(?P<role>oft_(?:blocks|diag|[Rr])){_NAME}", "oft_blocks", "oft_diag", "oft_R", "oft_r"),
    _family("BOFT", rf"(?P<role>boft_(?:blocks|R)){_NAME}", "boft_blocks", "boft_R"),
    _family("(IA)³", rf"(?P<role>ia3_l){_NAME}", "ia3_l"),
    _family("LyCORIS (IA)³", r"(?P<role>weight|on_input)", "weight on_input"),
    _family("VeRA", rf"vera_lambda_(?P<role>[bd]){_NAME}", "b d"),
    _family(
        "full-difference",
        r"(?P<role>diff|diff_b|diff_m|w_norm|b_norm|set_weight)",
        *("diff", "diff_b", "diff_m", "w_norm", "b_norm"),
    ),
    _family("trained tokens", rf"(?P<role>trainable_tokens_delta){_NAME}", "trainable_tokens_delta"),
    _family(
        "PEFT",
        rf"(?P<role>fourierft_spectrum|hra_u|(?:bone|miss)_block|vblora_logits_[AB]|shira_weight|road_theta){_NAME}",
        *("fourierft_spectrum", "hra_u", "bone_block", "miss_block", "vblora_logits_A", "shira_weight", "road_theta"),
    ),
)
"""What the first of them takes for its own is none of another's."""

_PROMPT: Final = "prompt_embeddings"
"""The one tensor of PEFT's prompts and prefixes."""

_MARKS: Final = frozenset(
    {
        *("lora", "lora_up", "lora_down", "up", "down", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        *("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "a1", "a2", "b1", "b2"),
        *("oft_blocks", "oft_diag", "oft_R", "oft_r", "boft_blocks", "boft_R", "ia3_l", "on_input"),
        *("vera_lambda_b", "vera_lambda_d", "diff", "diff_b", "diff_m", "w_norm", "b_norm", "set_weight"),
        *("fourierft_spectrum", "hra_u", "bone_block", "miss_block", "vblora_logits_A", "vblora_logits_B"),
        *("shira_weight", "road_theta", "trainable_tokens_delta"),
    }
)
"""The parts of names of which each adapter has one: models of many tensors must not cost many searches."""

_ACCOMPANYING: Final = re.compile(
    r"(?P<stem>.*?)[._](?:alpha|scale|rank|ranknum|dora_scale|rescale|lora_mid(?:\.weight)?|(?:hada|lokr)_t[12]"
    r"|b?oft_s|diff_b|bias_(?:indices|values|size)|lora_magnitude_vector|lora_[ESm]|reshape_weight"
    rf"|lora_(?:up|down|[ABab])\.bias){_NAME}"
)
_HALF: Final = re.compile(rf"[._](?:lora_(?:up|down|[AB])|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?){_NAME}$")
_DORA: Final = re.compile(rf".*[._](?:dora_scale|lora_magnitude_vector){_NAME}")
_OWN_WEIGHT: Final = re.compile(r"(?P<stem>.*?)(?:\.(?:base_layer|linear))?\.(?:weight|qweight|weight_packed|W_q)")
_ADAPTER_PREFIXES: Final = ("base_model.model.", "lora_unet_", "lora_te", "lora_transformer_", "lycoris_")


def find_adapter(tensors: Mapping[str, TensorInfo]) -> Adapter | None:
    """What the model has of an adapter, by the names and shapes of its tensors; None where it has nothing of one.

    One odd name makes no adapter: the factors of a module have to be together, and to fit.
    """
    changes, parts = _changed_modules(tensors)
    modules, kinds = {stem for stem, _ in changes}, {kind for _, kind in changes}
    if not modules:
        return Adapter("prompt", tuple(tensors), is_inside=False) if {*tensors} == {_PROMPT} else None
    beside = [name for name in tensors if name not in parts and _stem_of(_ACCOMPANYING, name) in modules]
    own = {*parts, *beside}
    others = [name for name in tensors if name not in own]
    if kinds == {"full-difference"} and others:
        return None
    if any(_DORA.fullmatch(name) for name in beside):
        kinds = {"DoRA", *kinds} - {"LoRA"}
    weights = {_stem_of(_OWN_WEIGHT, name) for name in others}
    loose = len(modules - weights)
    is_inside = 2 * loose < len(modules) or (len(others) > len(own) and not _has_adapter_names(tensors))
    return Adapter(" and ".join(sorted(kinds)), tuple(name for name in tensors if name in own), is_inside)


def adapter_text(tensors: Mapping[str, TensorInfo]) -> str:
    """`LoRA adapter`, of a model that is one and no more; else nothing."""
    adapter = find_adapter(tensors)
    return str(adapter) if adapter and not adapter.is_inside else ""


def _has_adapter_names(tensors: Iterable[str]) -> bool:
    """Whether all names start as they do in adapters only."""
    return all(name.startswith(_ADAPTER_PREFIXES) for name in tensors)


def _changed_modules(tensors: Mapping[str, TensorInfo]) -> tuple[set[tuple[str, str]], set[str]]:
    """The modules that an adapter changes, each with the kind of the change, and the tensors that make it so."""
    groups: defaultdict[tuple[str, str, str, str], dict[str, str]] = defaultdict(dict)
    families = {family.kind: family for family in _FAMILIES}
    for name in _candidates(tensors):
        for kind, family in families.items():
            if match := family.pattern.fullmatch(name):
                # a module may have several adapters, told by what stands before the role, and by their names after it
                before, after = name[: match.start("role")], name[match.end("role") :]
                groups[match["stem"], before, kind, after][match["role"]] = name
                break
    whole = {
        key: names
        for key, names in groups.items()
        if families[key[2]].is_whole({role: tensors[name] for role, name in names.items()})
    }
    changes = {(stem, kind) for stem, _, kind, _ in whole}
    return changes, {name for names in whole.values() for name in names.values()}


def _candidates(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """The tensors whose names have something of an adapter's."""
    has_input_scales = any(name.endswith("on_input") for name in tensors)
    is_control = CONTROL_LORA in tensors
    for name in tensors:
        tail = name.rsplit(".", 3)[-3:]
        is_marked = "lora" in name or not _MARKS.isdisjoint(tail) or (has_input_scales and tail[-1] == "weight")
        if is_marked and (is_control or tail[-1] not in ("up", "down")):
            yield name


def _may_be_multiplied(parts: Mapping[str, TensorInfo]) -> bool:
    """Whether two factors share a dimension, the rank; what is no such pair is not looked at."""
    for down, up in (("down", "up"), ("A", "B"), ("a", "b")):
        if down in parts and up in parts:
            shapes = parts[down].shape, parts[up].shape
            return min(map(len, shapes)) >= 2 and not set(shapes[0]).isdisjoint(shapes[1])
    return True


def _stem_of(pattern: re.Pattern[str], name: str) -> str | None:
    match = pattern.fullmatch(name)
    return match["stem"] if match else None


def refuse_adapters(models: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, Adapter]:
    """What the models have of adapters inside; PlanError if one of them is an adapter itself, or a part of one."""
    found = {name: adapter for name, tensors in models.items() if (adapter := find_adapter(tensors))}
    if halves := {name: own for name, tensors in models.items() if name not in found and (own := _halves(tensors))}:
        raise PlanError(
            f"{count(halves, 'model')} {plural(halves, 'has', 'have')} factors of an adapter that make no products",
            found=[f"{name}   {_first_of(own)}" for name, own in halves.items()],
            advice="Fetch it again: an adapter has two factors for each module, such as lora_up and lora_down, which "
            "have the rank in common.",
        )
    alone = {name: adapter for name, adapter in found.items() if not adapter.is_inside}
    if alone:
        raise PlanError(
            f"{count(alone, 'model')} {plural(alone, 'is an adapter', 'are adapters')}: factors of changes to a model, "
            "whose average is not the average of the changes",
            found=[f"{name}   {adapter}, {_example(adapter)}" for name, adapter in alone.items()],
            advice="Put each adapter into the model that it was made for (streammerge bake MODEL ADAPTER -o OUT, or "
            "adapters: in a recipe), and merge the models that this gives.",
        )
    return found


def _halves(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The factors of what would be an adapter, were all of its parts there; none if anything else is there too."""
    factors = [name for name in tensors if _HALF.search(name)]
    is_all = factors and all(_HALF.search(name) or _ACCOMPANYING.fullmatch(name) for name in tensors)
    return factors if is_all else []


def _example(adapter: Adapter) -> str:
    return _first_of(adapter.tensors)


def _first_of(names: Sequence[str]) -> str:
    first, *others = map(one_line, names)
    return f"{first} and {len(others):,} more" if others else first
