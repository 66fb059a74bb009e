"""The tensors of an adapter's file, sorted by the modules that they change: each is a part, and has a role there.

    lora_unet_mid_block_attentions_0_proj_in.lora_up.weight  ─►  module lora_unet_mid_block_attentions_0_proj_in, up

Every tensor has to have a role: what has none is an error that names it. What torch's wrappers put into names counts
for nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from streammerge.models.wrappers import bare_name

_NAMED: Final = r"(?:\.[\w-]+?)?"
"""What PEFT puts behind a role: the adapter's name, as in `lora_A.default.weight`."""

_XLABS: Final = r"(?<=_lora[12]\.)"
"""What stands before a role in XLabs' names of double blocks, and is their modules' own."""

_ROLES: Final[Mapping[str, str]] = {
    "up.bias": rf"lora_(?:up|B){_NAMED}\.bias",
    "up": rf"lora_up\.weight|lora(?:_linear_layer)?\.up\.weight|lora_B{_NAMED}(?:\.weight)?|{_XLABS}up\.weight",
    "down": rf"lora_down\.weight|lora(?:_linear_layer)?\.down\.weight|lora_A{_NAMED}(?:\.weight)?|{_XLABS}down\.weight",
    "mid": r"lora_mid\.weight|lora\.mid\.weight",
    "embedding.up": rf"lora_embedding_B{_NAMED}",
    "embedding.down": rf"lora_embedding_A{_NAMED}",
    "alpha": r"(?:lora\.)?alpha",
    "dora_scale": r"dora_scale",
    "magnitude": rf"lora_magnitude_vector{_NAMED}(?:\.weight)?",
    **{f"hada.{part}": rf"hada_{part}{_NAMED}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr.{part}": rf"lokr_{part}{_NAMED}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{part: rf"{part}\.weight" for part in ("a1", "a2", "b1", "b2")},
    "ia3": rf"ia3_l{_NAMED}",
    "on_input": r"on_input",
    "diff": r"diff|w_norm",
    "diff_b": r"diff_b|b_norm",
    "set_weight": r"set_weight",
    "singular": rf"lora_E{_NAMED}",
    "oft_blocks": r"oft_blocks",
    "rescale": r"rescale",
    "oft_R": rf"oft_R{_NAMED}\.weight",
    "oft.embedding": rf"oft_embedding_R{_NAMED}\.weight",
    "boft_R": rf"boft_R{_NAMED}",
    "boft_s": rf"boft_s{_NAMED}",
    "vera.b": rf"vera_lambda_b{_NAMED}",
    "vera.d": rf"vera_lambda_d{_NAMED}",
    "mlx.a": r"lora_a",
    "mlx.b": r"lora_b",
    "mlx.m": r"m",
    "tokens": rf"(?:token_adapter\.)?trainable_tokens_delta{_NAMED}",
    "base": r"base_layer\.weight",
    "weight": rf"(?:modules_to_save{_NAMED}\.)?weight",
    "bias": rf"(?:modules_to_save{_NAMED}\.)?bias|base_layer\.bias",
}
"""The roles, each with how the names of its tensors go on after their module's."""


def _called(role: int, tail: str) -> str:
    """How a name may end by which a tensor has this role, with what PEFT put there as the adapter's name."""
    captured = rf"(?:\.(?P<n{role}>[\w-]+?))?"
    return f"(?P<r{role}>{tail.replace(_NAMED, captured)})"


_ANY_ROLE: Final = "|".join(itertools.starmap(_called, enumerate(_ROLES.values())))
_ROLE: Final = re.compile(rf"(?P<module>.*?)(?:\.|_(?=lora\.))(?:{_ANY_ROLE})", re.DOTALL)
_NAMES: Final = tuple(_ROLES)

INVERSION: Final = "a textual inversion"

MODULATION: Final = ".diff_m"
"""How lightx2v's names of differences end that are of no module's weight, but of the tensor `modulation` beside it."""

_ITSELF: Final = ".modulation"


def stands_for_itself(module: str) -> bool:
    """Whether a module is a tensor that is no module's weight, as Wan's modulations are."""
    return module.endswith(_ITSELF)


_FOREIGN: Final[Mapping[str, str]] = {
    r"blk\.\d+\..*\.lora_[ab]": "llama.cpp's LoRA",
    r".*\.lora_[ab]\.weight": "torchtune's LoRA",
    r".*[._]adapter\.linear_(?:in|out)\.weight": "a LoRA of NeMo or Megatron",
    r"lllite_.*": "a ControlNet-LLLite",
}
"""What is known and not read, by names that else would be taken for another module's part."""

_REFUSED: Final[Mapping[str, str]] = {
    r".*\.lora_(?:down|up)": "Nunchaku's LoRA, packed for its kernels",
    r".*\.norm\.(?:query|key)_norm\.scale": "Black Forest Labs' control LoRA",
    r".*[._]oft_(?:diag|[rR])(?:\..*)?": "OFT of an older form",
    r".*[._]ranknum(?:\..*)?": "AdaLoRA under way",
    r".*[._]glora_[A-E](?:\..*)?": "PEFT's GLoRA",
    r".*[._](?:bias_indices|bias_values|bias_size)": "LyCORIS' sparse biases",
    r".*[._]reshape_weight": "a LoRA that enlarges its weights",
    r".*(?:fourierft_spectrum|hra_u|bone_block|miss_block|vblora_\w+|shira_weight|road_theta).*": "one of PEFT's kinds "
    "that is not read",
    r"bundle_emb\..*|.*string_to_param.*|emb_params|clip_[lg]|t5xxl": INVERSION,
    r"(?:.*\.)?prompt_embeddings": "a trained prompt",
    r"lora_controlnet": "a control LoRA",
}
"""What is known of adapters and not read, by the names of tensors."""

SHARED: Final[Mapping[str, str]] = {
    "base_model.vera_A": "vera.A",
    "base_model.vera_B": "vera.B",
}
"""Tensors of no module, which all modules share."""


@dataclass
class Sorted:
    """An adapter's tensors by module and role; `shared` by role alone, and `inversions` for themselves.

    What is wrong is told in `problems`; `is_known` says that some of it is of a kind that is known. `names` are those
    that PEFT gives to the adapters of a model.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    inversions: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    is_known: bool = False
    names: set[str] = field(default_factory=set)

    def note(self, name: str, module: str, role: str) -> None:
        """A tensor has this role."""
        roles = self.modules.setdefault(module, {})
        if role in roles:
            self.problems.append(f"{name}   is the same part of its module as {roles[role]}")
        roles[role] = name


def sorted_parts(names: Iterable[str]) -> Sorted:
    """Every tensor of these names by its module and role."""
    found = Sorted()
    for name in names:
        bare = bare_name(name)
        if role := SHARED.get(re.sub(r"^(base_model\.vera_[AB])\.[\w-]+$", r"\1", bare)):
            found.shared[role] = name
        elif bare.endswith(MODULATION):
            found.note(name, bare.removesuffix(MODULATION) + _ITSELF, "diff")
        elif (match := _ROLE.fullmatch(bare)) and not _kind_in(_FOREIGN, bare):
            number = str(match.lastgroup)[1:]
            found.note(name, match["module"], _NAMES[int(number)])
            given = match[f"n{number}"] if f"n{number}" in _ROLE.groupindex else ""
            found.names.update([given] if given and given != "weight" else [])
        elif (refused := refused_kind(bare)) == INVERSION:
            found.inversions.append(name)
        elif refused:
            found.problems.append(f"{name}   is of {refused}, which is not read")
            found.is_known = True
        else:
            found.problems.append(f"{name}   is no known part of an adapter")
    if len(found.names) > 1:
        names = " and ".join(sorted(found.names))
        found.problems.append(f"{names}   are several adapters, of which PEFT applies one: save that alone")
    return found


def refused_kind(name: str) -> str:
    """What a tensor is of that is known, and not read; else nothing."""
    return _kind_in(_FOREIGN, name) or _kind_in(_REFUSED, name)


def _kind_in(kinds: Mapping[str, str], name: str) -> str:
    return next((kind for pattern, kind in kinds.items() if re.fullmatch(pattern, name)), "")
