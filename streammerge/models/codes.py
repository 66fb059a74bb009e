"""Weights that are stored as codes: how they are known, by names and by what stands beside them in their module.

What is called as a known kind of quantisation calls it is that. All else is told by structure: 8-bit floats beside
something that fits them as a scale, and integers where a layer has its weights.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from streammerge.models.scales import is_multiplied, is_scale_of, spread
from streammerge.tensors import TensorInfo

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight stored as codes: what kind of them, in which tensor, which tensors stand beside it.

    `scale` is the one among these that the codes are multiplied by; "" where that would not be all.
    """

    codes: str
    kind: str
    companions: tuple[str, ...]
    scale: str = ""

    @property
    def is_readable(self) -> bool:
        """Whether it can be decoded while it is read."""
        return bool(self.scale)


@dataclass(frozen=True, slots=True)
class _Sign:
    """A name that tells of a quantised weight: what follows its stem, what follows the stem of its codes, the kind."""

    pattern: re.Pattern[str]
    codes: str
    kind: str


def _sign(companion: str, codes: str, kind: str) -> _Sign:
    return _Sign(re.compile(rf"(?P<stem>.*?)(?:{companion})"), codes, kind)


SIGNS: Final = (
    _sign(r"\.weight\.(nested_)?(absmax|quant_map)|\.weight\.quant_state\..+", ".weight", "bitsandbytes, 4 or 8 bits"),
    _sign(r"\.(SCB|weight_format)", ".weight", "bitsandbytes, 8 bits"),
    _sign(r"\.weight_(scale_2|global_scale)", ".weight", "NVFP4"),
    _sign(r"\.weight_(scale|scale_2|global_scale|shape|zero_point|g_idx)", ".weight_packed", "packed integers"),
    _sign(r"_scales", "_blocks", "MXFP4"),
    _sign(r"\._(scale|shift|zeropoint)", "._data", "quanto"),
)
"""In their order: what several signs tell, the first of them says. Each name is looked at with a dot before it."""

_SIGN_MARKS: Final = re.compile(
    r"absmax|quant_map|quant_state|SCB|_scales|\._|weight_(?:format|scale|scale_2|global_scale|shape|zero_point|g_idx)\Z"
)

_TORCHAO: Final = {"_weight_qdata": "_weight_scale", "weight:qdata": "weight:scale"}

_CODES: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "W_q": (("scale", "HQQ"), ("zero", "HQQ"), ("meta", "HQQ")),
    "qweight": (
        *(("wscales", "SVDQuant (nunchaku)"), ("forward_hadamard_matrix", "FP-Quant")),
        *(("qzeros", "GPTQ or AWQ"), ("g_idx", "GPTQ or AWQ"), ("scales", "GPTQ, AWQ or FP-Quant")),
    ),
    "codes": (("codebooks", "AQLM"),),
    "B": (("s", "Marlin"),),
    "Qidxs": (("SU", "QuIP#"), ("SV", "QuIP#"), ("codebook_id", "QuIP#")),
    "trellis": (("suh", "EXL3"), ("svh", "EXL3"), ("su", "EXL3"), ("SU", "QTIP"), ("SV", "QTIP")),
    "q_weight": (("q_scale", "EXL2"), ("q_groups", "EXL2"), ("q_scale_max", "EXL2")),
    "dense_weights": (("row_offsets", "SpQR"), ("col_vals", "SpQR"), ("in_perm", "SpQR")),
    "indices": (("centroids.weight", "VPTQ"),),
    **{name: ((scale, "torchao"),) for name, scale in _TORCHAO.items()},
    "float8_data": (("scale", "flux-fp8-api"),),
    "weight": (("tables", "HIGGS"), ("biases", "MLX"), ("weight_scales", "EETQ"), ("svd_up", "SDNQ")),
}
"""What codes are called in their module, and, by one of the tensors that then stand beside them, the kind."""

_BESIDE: Final = frozenset(
    {
        *("input_scale", "scale_input", "output_scale", "scale_output", "act_scale", "activation_scale"),
        *("input_scale_ub", "k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "prob_output_scale"),
        *("comfy_quant", "weight_zero_point"),
    }
)
"""What may stand beside scaled codes without changing their meaning: scales of activations, and marks."""

_OWN: Final = re.compile(r"(?!weight_bias)(?:.*[._])?bias(?:[._].*|\d*)|weight_g|original0|.*_bias_.*")
"""What is merged on its own where it stands beside codes: biases, and the norms of a weight normalisation."""

_HONEST: Final = re.compile(
    r"(?:.*_)?(?:ids|id|index|indexes|indices|idx|idxs|mask|masks|position|positions|coords|perm|steps|tracked|tid2eid|model)"
)
"""What integers are called that are integers, and no codes; a `model` is a tokenizer's, in bytes."""

_ROTATIONS: Final = re.compile(r"freq|rope|rotary|cis\b|pos")
"""What complex numbers are called that turn positions."""

_LAYER: Final = 64
"""The most tensors that a layer has; in larger modules only names that begin with the codes' are looked at."""

_ENDINGS: Final = ("_scale", "_scale_inv", "_scales", "_absmax")
"""How names go on then."""

_DEPTH: Final = 16
"""How many modules above a tensor's own are told that they have modules inside."""

_LONG: Final = 1024
"""From how many bytes on a vector of bytes may be packed codes."""


def find_quantised(tensors: Tensors) -> dict[str, Quantised]:
    """The quantised weights of a model, by the name of their codes, and by the name that the weight would have."""
    signed = _by_signs(tensors)
    claimed = {name for weight in signed for name in (weight.codes, *weight.companions)}
    suspects = [name for name, info in tensors.items() if _may_be_codes(name, info) and name not in claimed]
    found = _Structure.of(tensors, suspects, claimed).judge(signed) if suspects or signed else []
    by_name = {weight.codes: weight for weight in found}
    for weight in found:
        by_name.setdefault(weight_name(weight.codes), weight)
    return by_name


def weight_name(codes: str) -> str:
    """What a weight is called where it isn't quantised."""
    for ending, plain in (("._data", ""), ("_blocks", "")):
        if codes.endswith(ending):
            return codes.removesuffix(ending) + plain
    module, own = split_name(codes)
    return f"{module}weight" if own == "weight_packed" or own in _CODES else codes


def split_name(name: str) -> tuple[str, str]:
    """The module that a tensor belongs to, with the dot after it, and what the tensor is called there."""
    cut = name.rfind(".") + 1
    return name[:cut], name[cut:]


def _by_signs(tensors: Tensors) -> list[Quantised]:
    """What is told by names that stand beside the codes of one kind of quantisation only."""
    companions: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in tensors:
        dotted = f".{name}"
        if not _SIGN_MARKS.search(dotted):
            continue
        for sign in SIGNS:
            match = sign.pattern.fullmatch(dotted)
            codes = f"{match['stem']}{sign.codes}"[1:] if match else name
            if codes in tensors and codes != name:
                companions[codes][name] = sign.kind
                break
    order = [sign.kind for sign in SIGNS]
    return [Quantised(codes, min(kinds.values(), key=order.index), tuple(kinds)) for codes, kinds in companions.items()]


def _may_be_codes(name: str, info: TensorInfo) -> bool:
    """Whether a tensor alone looks as if it could be codes."""
    own = name[name.rfind(".") + 1 :]
    match info.dtype.kind:
        case "float":
            return info.dtype.bits == 8 or own == "W_q"
        case "packed":
            return info.dtype.bits < 8
        case "integer":
            return (own in _CODES or _is_bulky(info)) and info.elements > 1 and not _is_mask(own, info.shape)
    return False


def may_be_weights(name: str, info: TensorInfo) -> bool:
    """Whether elements that are neither averaged nor codes may be weights all the same, as complex matrices may be.

    Complex numbers that are computed from positions, and masks, are no weights.
    """
    is_matrix = sum(size > 1 for size in info.shape) >= 2
    match info.dtype.kind:
        case "packed":
            return True
        case "complex":
            return is_matrix and not _ROTATIONS.search(name)
        case "bool":
            return is_matrix and split_name(name)[1] == "weight"
    return False


def _is_bulky(info: TensorInfo) -> bool:
    """Whether there are so many integers as weights take: a matrix, or many bytes."""
    is_matrix = sum(size > 1 for size in info.shape) >= 2
    return (is_matrix and info.dtype.bits < 64) or (info.dtype.bits == 8 and info.elements >= _LONG)


def _is_mask(own: str, shape: tuple[int, ...]) -> bool:
    """Whether integers are a causal mask, as GPT-2 has them: a square, called `bias`."""
    return own == "bias" and len(shape) >= 2 and shape[-1] == shape[-2] and all(size == 1 for size in shape[:-2])


@dataclass(frozen=True)
class _Structure:
    """The modules of a model that have suspects: tensors that look like codes.

    `modules` are the names of the tensors that stand in each module, `inner` the modules that are in each, `floats`
    those that have tensors to be merged.
    """

    tensors: Tensors
    suspects: list[str]
    modules: Mapping[str, list[str]]
    inner: Mapping[str, set[str]]
    floats: set[str]
    judged: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, tensors: Tensors, suspects: list[str], claimed: set[str]) -> _Structure:
        """Look at the model's names; those that are claimed already are nobody's neighbours."""
        modules: defaultdict[str, list[str]] = defaultdict(list)
        inner: defaultdict[str, set[str]] = defaultdict(set)
        for name in tensors:
            modules[split_name(name)[0]].append(name)
        for module in list(modules):
            below = module
            for _ in range(_DEPTH):
                above = split_name(below[:-1])[0]
                if not below or below in inner[above]:
                    break
                inner[above].add(below)
                below = above
        free = {module: [name for name in names if name not in claimed] for module, names in modules.items()}
        floats = {module for module, names in free.items() if any(_is_merged(tensors[name]) for name in names)}
        return cls(tensors, suspects, free, inner, floats)

    def judge(self, signed: list[Quantised]) -> list[Quantised]:
        """What names tell, with all that stands beside it, and those of the suspects that are codes.

        Integers come first, beside which 8-bit floats may be scales.
        """
        floats: list[str] = []
        others: list[str] = []
        for name in self.suspects:
            is_float = self.tensors[name].dtype.kind == "float" and not _named(name)
            (floats if is_float else others).append(name)
        others.sort(key=lambda name: (not _named(name), -self.tensors[name].nbytes))
        known = {weight.codes: weight for weight in signed}
        return [
            *self._judged(known, lambda codes: self._completed(known[codes])),
            *self._judged(others, self._judge_integers),
            *self._judged(floats, self._judge_floats),
        ]

    def _completed(self, weight: Quantised) -> Quantised:
        """The weight with all that stands beside it, where it is all that its module holds."""
        is_all = split_name(weight.codes)[1].startswith("weight") and self._is_leaf(weight.codes)
        beside = self._beside(weight.codes) if is_all else ()
        return replace(weight, companions=(*weight.companions, *beside))

    def _judged(self, names: Iterable[str], judge: _Judge) -> Iterator[Quantised]:
        for name in names:
            found = None if name in self.judged else judge(name)
            if found is not None:
                self.judged.update((name, *found.companions))
                yield found

    def _beside(self, codes: str) -> list[str]:
        """What stands beside codes in their module, or below their own name; what is merged on its own is left out."""
        module = split_name(codes)[0]
        around = self.modules[module]
        if len(around) > _LAYER:
            around = [name for ending in _ENDINGS if (name := codes + ending) in self.tensors]
        around = [*around, *self.modules.get(f"{codes}.", ())[:_LAYER]]
        free = (name for name in around if name != codes and name not in self.judged)
        return [name for name in free if not _is_own(name[len(module) :])]

    def _books(self, module: str) -> list[str]:
        """What stands in the modules of VPTQ's codebooks inside a module."""
        books = (f"{module}{part}centroids." for part in ("", "res_", "outlier_"))
        return [name for book in books for name in self.modules.get(book, ())[:_LAYER] if name not in self.judged]

    def _is_leaf(self, codes: str) -> bool:
        """Whether the codes' module is as layers are: of few tensors, with no modules inside."""
        module = split_name(codes)[0]
        return (
            bool(module) and len(self.modules[module]) <= _LAYER and not self.inner.get(module, set()) - {f"{codes}."}
        )

    def _judge_integers(self, codes: str) -> Quantised | None:
        module, own = split_name(codes)
        beside = [*self._beside(codes), *(self._books(module) if own == "indices" else ())]
        names = {name[len(module) :] for name in beside}
        kind = next((kind for mark, kind in _CODES.get(own, ()) if mark in names), "")
        if kind:
            return Quantised(codes, kind, tuple(beside))
        info = self.tensors[codes]
        if info.dtype.kind == "float" or _HONEST.fullmatch(own) or (info.dtype.bits == 64 and "weight" not in own):
            return None
        if any(is_scale_of(own, name[len(module) :]) for name in beside if _may_be_codes(name, self.tensors[name])):
            return None
        scales = [name for name in beside if is_scale_of(name[len(module) :], own)]
        if not (scales or module in self.floats or "weight" in own):
            return None
        kind = f"{info.dtype} {'with a scale' if scales else 'codes'}"
        return Quantised(codes, kind, tuple(beside if self._is_leaf(codes) else scales))

    def _judge_floats(self, codes: str) -> Quantised | None:
        module, own = split_name(codes)
        called = {name: name[len(module) :] for name in self._beside(codes)}
        beside = [name for name, word in called.items() if word in _BESIDE]
        scales = [name for name, word in called.items() if word not in _BESIDE and is_scale_of(word, own)]
        others = [name for name in called if name not in (*beside, *scales) and self._may_scale(name, codes)]
        if not (scales or others) or is_scale_of(own, "weight"):
            return None
        info, found = self.tensors[codes], (*scales, *others)
        if len(found) > 1 or not scales:
            return Quantised(codes, f"{info.dtype} with {', '.join(found)}", (*found, *beside))
        scale = self.tensors[scales[0]]
        if spread(info.shape, scale.shape) is None:
            kind = f"{info.dtype} with {list(scale.shape)} scales for {list(info.shape)}"
        elif not _is_scale_dtype(scale) or not is_multiplied(called[scales[0]], own, info.shape, scale.shape):
            kind = f"{info.dtype} with {scales[0]} ({scale})"
        else:
            return Quantised(codes, f"{info.dtype} with a scale", (*scales, *beside), scales[0])
        return Quantised(codes, kind, (*scales, *beside))

    def _may_scale(self, name: str, codes: str) -> bool:
        """Whether what stands beside the 8-bit floats of a layer fits them as a scale, whatever it is called."""
        info, weight = self.tensors[name], self.tensors[codes]
        fits = len(weight.shape) >= 2 and _is_scale_dtype(info) and spread(weight.shape, info.shape) is not None
        return fits and (name.startswith(f"{codes}.") or self._is_leaf(codes))


_Judge = Callable[[str], Quantised | None]
"""What says of suspects whether they are codes."""


@functools.lru_cache(maxsize=1024)
def _is_own(own: str) -> bool:
    """Whether what stands beside codes is merged on its own, by what it is called in its module."""
    return _OWN.fullmatch(own) is not None


def _is_merged(info: TensorInfo) -> bool:
    return info.dtype.mergeable and bool(info.elements)


def _is_scale_dtype(info: TensorInfo) -> bool:
    """Whether scales are stored so: in more than 8 bits, or as exponents."""
    return (info.dtype.mergeable and info.dtype.bits > 8) or info.dtype.name == "F8_E8M0"


def _named(name: str) -> bool:
    """Whether codes are called so, whatever their dtype."""
    return split_name(name)[1] in _CODES and split_name(name)[1] != "weight"
