"""The kinds of adapters: which parts make one, and what change they come to.

A kind is a function of a module's parts, by role, that gives changes of the module's tensors; who writes another adds
it to `KINDS`. Shapes are checked here, as far as the adapter's own go; `Malformed` says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from streammerge.compute.expressions import ByBlock, Node, Product, Viewed
from streammerge.compute.matrices import permuted, transposed, vector, zeros
from streammerge.compute.parts import in_shape, rows_of
from streammerge.models.adapters.changes import MULTIPLY, SAVED_WHOLE, Change
from streammerge.models.adapters.experts import of_parameter
from streammerge.models.adapters.mlx import mlx
from streammerge.models.adapters.modules import Changes, Malformed, Module
from streammerge.models.adapters.rotations import input_butterfly, input_rotation, rotation
from streammerge.models.adapters.tokens import tokens
from streammerge.tensors import DTYPES, TensorInfo


def _lora(module: Module) -> Changes:
    """Δ = B A, as a convolution's kernels B A[…], with a core between them Σₙₘ B[o, n] C[n, m, …] A[m, i]."""
    if module.parameter:
        return of_parameter(module)
    up, down = module.part("up", 2), module.part("down", 2)
    change = module.turned(_low_rank(module, up, down))
    if "magnitude" in module or "dora_scale" in module:
        change = _with_magnitude(module, change)
    else:
        _refuse_without_magnitude(module)
    if "up.bias" in module:
        bias = module.part("up.bias", 1)
        if bias.info.shape != up.info.shape[:1]:
            raise module.differ("up", "up.bias", "don't fit")
        return {"weight": change, "bias": Change("LoRA bias", bias.info.shape, bias, scale=change.scale)}
    return {"weight": change}


def _refuse_without_magnitude(module: Module) -> None:
    """Malformed for a DoRA without its lengths: as a LoRA it would be another change."""
    if module.config is not None and module.config.is_dora:
        raise Malformed(f"{module.name}   has no lora_magnitude_vector, and {module.config.where} says use_dora")


def _low_rank(module: Module, up: Node, down: Node) -> Change:
    rank = down.info.shape[0]
    scale, told = module.scale(rank)
    if any(size != 1 for size in up.info.shape[2:]):
        raise Malformed(f"{module.names['up']}   is of the shape {list(up.info.shape)}: its kernel should be 1")
    if "mid" in module:
        mid = module.part("mid", 3)
        if mid.info.shape[:2] != (up.info.shape[1], rank):
            raise module.differ("mid", "down", "have no rank in common")
        shape = (up.info.shape[0], down.info.shape[1], *mid.info.shape[2:])
        return Change("LoRA", shape, _tucker(up, mid, down), rank=rank, scale=scale, told=told)
    if up.info.shape[1] != rank:
        raise module.differ("up", "down", "have no rank in common")
    shape = (up.info.shape[0], *down.info.shape[1:])
    return Change("LoRA", shape, _product(shape, up, down), rank=rank, scale=scale, told=told)


def _adalora(module: Module) -> Changes:
    """Δ = B diag(λ) A, whose ranks were pruned, to none perhaps (Zhang et al. 2023, arXiv:2303.10512)."""
    if module.config is None:
        raise Malformed(f"{module.name}   is AdaLoRA, and adapter_config.json, for its scale, is not there")
    up, down, values = (module.nodes.get(role) for role in ("up", "down", "singular"))
    if up and down and values and not values.info.elements and len(up.info.shape) == len(down.info.shape) == 2:
        shape = (up.info.shape[0], down.info.shape[1])
        return {"weight": module.turned(Change("AdaLoRA", shape, zeros(shape)))}
    up, down, values = module.part("up", 2), module.part("down", 2), module.part("singular", 2)
    if values.info.shape != (down.info.shape[0], 1):
        raise module.differ("down", "singular", "don't fit")
    change = _low_rank(module, up, _rows_scaled(down, down.info.shape[0], in_shape(values, values.info.shape[:1])))
    return {"weight": module.turned(replace(change, kind="AdaLoRA"))}


def _product(shape: tuple[int, ...], left: Node, *factors: Node) -> Product:
    return Product(TensorInfo(DTYPES["F32"], shape), left, factors)


def _tucker(left: Node, core: Node, right: Node) -> Node:
    """Σₙₘ L[o, n] C[n, m, …] R[m, i], its kernels behind: what the core makes of the right is one factor."""
    (n, m), kernel, i = core.info.shape[:2], math.prod(core.info.shape[2:]), right.info.shape[1]
    made = _product((n, kernel, i), permuted(core, (n, m, kernel), (0, 2, 1)), right)
    factor = permuted(made, (n, kernel, i), (0, 2, 1))
    return _product((left.info.shape[0], i, *core.info.shape[2:]), left, factor)


def _with_magnitude(module: Module, change: Change) -> Change:
    """DoRA: along which axis the magnitudes go is told by their shape, o × 1 or 1 × i; PEFT's go along the output."""
    role = "dora_scale" if "dora_scale" in module else "magnitude"
    node = module.part(role, 1)
    if module.config is not None and module.config.fan_in_fan_out:
        raise Malformed(f"{module.names[role]}   is DoRA of a weight that lies transposed, which is not read")
    shape, (outputs, inputs) = node.info.shape, change.shape[:2]
    is_vector = math.prod(shape) == max(shape)
    if is_vector and max(shape) == outputs and (role == "magnitude" or (len(shape) > 1 and shape[0] == outputs)):
        return replace(change, kind="DoRA", magnitude=node, axis=0)
    if is_vector and role == "dora_scale" and shape[:2] == (1, inputs):
        return replace(change, kind="DoRA", magnitude=node, axis=1)
    raise Malformed(
        f"{module.names[role]}   is of the shape {list(shape)}, and should be {outputs} × 1 (a length for every "
        f"output) or 1 × {inputs} (for every input)"
    )


def _embedding(module: Module) -> Changes:
    """Δ = (B A)ᵀ: PEFT's LoRA of an embedding, whose rows are the vocabulary."""
    up, down = module.part("embedding.up", 2), module.part("embedding.down", 2)
    rank = down.info.shape[0]
    if up.info.shape[1] != rank:
        raise module.differ("embedding.up", "embedding.down", "have no rank in common")
    if "magnitude" in module:
        raise Malformed(f"{module.names['magnitude']}   is DoRA of an embedding, which is not read")
    _refuse_without_magnitude(module)
    scale, told = module.scale(rank)
    shape = (down.info.shape[1], up.info.shape[0])
    made = _product(shape, transposed(down), transposed(up))
    return {"weight": Change("LoRA", shape, made, rank=rank, scale=scale, told=told)}


def _loha(module: Module) -> Changes:
    """Δ = (A₁ B₁) ⊙ (A₂ B₂), each with a core if there is one (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098)."""
    sides = [_hadamard_side(module, number) for number in (1, 2)]
    if sides[0].info.elements != sides[1].info.elements or sides[0].info.shape[0] != sides[1].info.shape[0]:
        raise module.differ("hada.w1_b", "hada.w2_b", "don't fit")
    rank = module.part("hada.w1_b").info.shape[0]
    scale, told = module.scale(rank)
    made = ByBlock(sides[0].info, MULTIPLY, {}, tuple(sides), module.name)
    change = Change("LoHa", sides[0].info.shape, made, rank=rank, scale=scale, told=told)
    return {"weight": _with_magnitude(module, change) if "dora_scale" in module else change}


def _hadamard_side(module: Module, number: int) -> Node:
    a, b, core = f"hada.w{number}_a", f"hada.w{number}_b", f"hada.t{number}"
    return _factored(module, a, b, core, "hada.t1" in module or "hada.t2" in module)


def _factored(module: Module, a: str, b: str, core: str, has_core: bool) -> Node:
    """A B, or with a core Σ A[r, o] C[r, s, …] B[s, i], whose A lies the other way."""
    one, other = module.part(a, 2), module.part(b, 2)
    if not has_core:
        if one.info.shape[1] != other.info.shape[0]:
            raise module.differ(a, b, "have no rank in common")
        return _product((one.info.shape[0], *other.info.shape[1:]), one, other)
    middle = module.part(core, 3)
    if middle.info.shape[:2] != (one.info.shape[0], other.info.shape[0]):
        raise module.differ(core, a, "have no rank in common")
    return _tucker(transposed(one), middle, other)


def _lokr(module: Module) -> Changes:
    """Δ = W₁ ⊗ W₂, either of them whole or of factors (Yeh et al. 2023, arXiv:2309.14859)."""
    small, small_rank = _kronecker_side(module, "w1")
    large, large_rank = _kronecker_side(module, "w2")
    if len(small.info.shape) != 2 or len(large.info.shape) < 2:
        raise Malformed(
            f"{module.name}   has factors of the shapes {list(small.info.shape)} and "
            f"{list(large.info.shape)}, which are no matrices"
        )
    rank = large_rank or small_rank
    scale, told = module.scale(rank) if rank or module.config else (1.0, "")
    (a, b), (c, d), behind = small.info.shape, large.info.shape[:2], large.info.shape[2:]
    grid, row = (a, c, b, d * math.prod(behind)), d * math.prod(behind)
    info = TensorInfo(DTYPES["F32"], grid)
    one = Viewed(info, small, 0, (b, 0, 1, 0), grid)
    other = Viewed(info, large, 0, (0, row, 0, 1), grid)
    made = ByBlock(info, MULTIPLY, {}, (one, other), module.name)
    change = Change("LoKr", (a * c, b * d, *behind), made, rank=rank, scale=scale, told=told)
    return {"weight": _with_magnitude(module, change) if "dora_scale" in module else change}


def _kronecker_side(module: Module, which: str) -> tuple[Node, int]:
    """A side, and its rank: 0 if it is whole."""
    whole, a, b = f"lokr.{which}", f"lokr.{which}_a", f"lokr.{which}_b"
    if whole in module:
        if a in module or b in module:
            raise Malformed(f"{module.names[whole]}   is there whole, and of factors too")
        return module.part(whole, 2), 0
    rank = module.part(b, 2).info.shape[0]
    return _factored(module, a, b, "lokr.t2", which == "w2" and "lokr.t2" in module), rank


def _ia3(module: Module) -> Changes:
    """W' = W ⊙ l for every output, and its bias too, or every input (Liu et al. 2022, arXiv:2205.05638)."""
    node = module.part("ia3", 2)
    shape = node.info.shape
    if len(shape) != 2 or 1 not in shape:
        raise Malformed(f"{module.names['ia3']}   is of the shape {list(shape)}; those read are n × 1 and 1 × n")
    change = module.turned(Change("(IA)³", shape, node, "multiply", axis=int(shape[0] == 1)))
    return {"weight": change, "bias": replace(change, axis=0, optional=True)} if shape[1] == 1 else {"weight": change}


def _lycoris_ia3(module: Module) -> Changes:
    """W' = W + W ⊙ w for every output, or, if `on_input` is 1, every input: LyCORIS' (IA)³."""
    node, on_input = module.part("weight", 1), module.is_true("on_input")
    size = node.info.elements
    if size not in node.info.shape:
        raise Malformed(f"{module.names['weight']}   is of the shape {list(node.info.shape)}, and should be a vector")
    return {"weight": Change("(IA)³", (size,), node, "add multiplied", axis=int(on_input))}


def _whole(module: Module) -> Changes:
    """Δ itself, of a weight or a norm and of its bias; what is to stand in its place; what PEFT saves whole."""
    found: dict[str, Change] = {}
    for role, part in WHOLES.items():
        if role in module:
            node, adds = module.part(role), role.startswith("diff")
            if part in found:
                raise _twice(module, part)
            kind = SAVED_WHOLE if role in SAVED else "difference"
            found[part] = Change(kind, node.info.shape, node, "add" if adds else "replace")
    return found


def _glora(module: Module) -> Changes:
    """Δ = B₁ B₂ + W A₁ A₂; in older files Δ = B₂ B₁ + W A₂ A₁ (Chavan et al. 2023, arXiv:2306.07967)."""
    a1, a2, b1, b2 = (module.part(role, 2) for role in ("a1", "a2", "b1", "b2"))
    shapes = [node.info.shape for node in (a1, a2, b1, b2)]
    new = shapes[0][1] == shapes[1][0] == shapes[2][1] == shapes[3][0]
    old = shapes[0][0] == shapes[1][1] == shapes[2][0] == shapes[3][1]
    if new == old:
        raise Malformed(
            f"{module.name}   has a1, a2, b1, b2 of the shapes {[list(shape) for shape in shapes]}, "
            f"{'whose rank can not be told' if new else 'which have no rank in common'}"
        )
    left, right, first, second = (b1, b2, a1, a2) if new else (b2, b1, a2, a1)
    if any(math.prod(node.info.shape[2:]) != 1 for node in (left, first, second)):
        raise Malformed(f"{module.name}   has a kernel in another part than the first that inputs meet")
    shape = (left.info.shape[0], *right.info.shape[1:])
    if first.info.shape[0] != shape[1] or second.info.shape[1] != shape[1]:
        raise module.differ("a1", "b1", "don't fit")
    rank = right.info.shape[0]
    scale, told = module.scale(rank)
    made = _product(shape, left, right)
    return {"weight": Change("GLoRA", shape, made, rank=rank, scale=scale, factors=(first, second), told=told)}


def _vera(module: Module) -> Changes:
    """Δ = diag(b) B diag(d) A with A and B that all modules share (Kopiczko et al. 2024, arXiv:2310.11454)."""
    shared = module.shared or {}
    if not {"vera.A", "vera.B"} <= shared.keys():
        raise Malformed(f"{module.name}   lacks the shared vera_A and vera_B: save it with save_projection=True")
    lengths, depths = module.part("vera.b", 1), module.part("vera.d", 1)
    left, right = shared["vera.B"], shared["vera.A"]
    outputs, rank = lengths.info.shape[0], depths.info.shape[0]
    if len(left.info.shape) != 2 or len(right.info.shape) != 2:
        raise Malformed(f"{module.name}   has a shared vera_A or vera_B that is no matrix")
    if left.info.shape[0] < outputs or left.info.shape[1] != rank or right.info.shape[0] != rank:
        raise module.differ("vera.b", "vera.d", "don't fit the shared vera_A and vera_B")
    shape = (outputs, right.info.shape[1])
    made = _product(shape, _rows_scaled(left, outputs, lengths), _rows_scaled(right, rank, depths))
    return {"weight": module.turned(Change("VeRA", shape, made, rank=rank))}


def _rows_scaled(matrix: Node, rows: int, numbers: Node) -> Node:
    """The first rows of a matrix, each multiplied by its number."""
    cut = rows_of(matrix, 0, rows)
    over = vector(numbers, cut.info.shape, 0)
    return ByBlock(TensorInfo(DTYPES["F32"], cut.info.shape), MULTIPLY, {}, (cut, over), "vera")


Kind = Callable[[Module], Changes]

KINDS: Final[tuple[tuple[frozenset[str], frozenset[str], Kind], ...]] = (
    (frozenset({"up", "down"}), frozenset({"mid", "alpha", "dora_scale", "magnitude", "up.bias"}), _lora),
    (frozenset({"singular"}), frozenset({"up", "down"}), _adalora),
    (frozenset({"embedding.up", "embedding.down"}), frozenset({"alpha", "magnitude"}), _embedding),
    (
        frozenset({"hada.w1_a", "hada.w1_b", "hada.w2_a", "hada.w2_b"}),
        frozenset({"hada.t1", "hada.t2", "alpha", "dora_scale"}),
        _loha,
    ),
    (
        frozenset({"lokr.w1", "lokr.w1_a", "lokr.w1_b", "lokr.w2", "lokr.w2_a", "lokr.w2_b"}),
        frozenset({"lokr.t2", "alpha", "dora_scale"}),
        _lokr,
    ),
    (frozenset({"a1", "a2", "b1", "b2"}), frozenset({"alpha"}), _glora),
    (frozenset({"ia3"}), frozenset(), _ia3),
    (frozenset({"on_input"}), frozenset({"weight", "alpha"}), _lycoris_ia3),
    (frozenset({"vera.b", "vera.d"}), frozenset(), _vera),
    (frozenset({"oft_blocks"}), frozenset({"rescale", "alpha"}), rotation),
    (frozenset({"oft_R", "oft.embedding"}), frozenset(), input_rotation),
    (frozenset({"boft_R", "boft_s"}), frozenset(), input_butterfly),
    (frozenset({"tokens"}), frozenset(), tokens),
    (frozenset({"mlx.a", "mlx.b"}), frozenset({"mlx.m"}), mlx),
)
"""The kinds: by which roles each is known, which others may stand beside these, and what it comes to."""

WHOLES: Final = {
    "diff": "weight",
    "diff_b": "bias",
    "set_weight": "weight",
    "weight": "weight",
    "base": "weight",
    "bias": "bias",
}
"""The tensor that each of these roles changes, whole."""

WHOLE: Final = frozenset({"diff", "diff_b", "set_weight"})
"""Differences that may stand beside any kind, if only for the tensor that it doesn't change."""

SAVED: Final = frozenset({"weight", "bias", "base"})
"""What a PEFT adapter has of modules that were trained whole, or of embeddings: the weight beneath its factors."""


def changes_of(module: Module) -> Changes:
    """What a module changes, and to what; Malformed if its parts make nothing, or too much."""
    roles = frozenset(module.nodes)
    found = [kind for kind in KINDS if kind[0] & roles and not (kind[2] is _lora and "singular" in roles)]
    if len(found) > 1:
        raise Malformed(f"{module.name}   is of several kinds at once: {', '.join(sorted(module.names.values()))}")
    known, beside, make = found[0] if found else (frozenset(), frozenset({"alpha"}), None)
    whole = roles & (WHOLE | (SAVED if module.config is not None and make is not _lycoris_ia3 else frozenset()))
    if (over := roles - known - beside - whole) and over <= SAVED:
        raise Malformed(f"{module.names[min(over)]}   is no known part of an adapter")
    if over:
        raise Malformed(f"{module.names[min(over)]}   has no meaning beside {_others(module, over)}")
    if make is None and not whole:
        raise Malformed(f"{next(iter(module.names.values()))}   stands alone: its factors are missing")
    made = dict(make(module)) if make else {}
    for part, change in _whole(replace(module, nodes={role: module.nodes[role] for role in whole})).items():
        if part in made and "base" in whole and part == "weight":
            made[part] = _upon(module, change, made[part])
            continue
        if part in made:
            raise _twice(module, part)
        made[part] = change
    return made


def _twice(module: Module, part: str) -> Malformed:
    return Malformed(f"{module.name}   changes its {part} in two ways: {', '.join(module.names.values())}")


def _upon(module: Module, saved: Change, change: Change) -> Change:
    """What PEFT saves of an embedding that it changes: the weight too, which has other rows if tokens were added."""
    if not change.fits(saved.shape):
        raise Malformed(f"{module.names['base']}   is {list(saved.shape)}, and {list(change.shape)} of it are changed")
    kind = f"{change.kind} on a saved weight"
    return replace(saved, kind=kind, rank=change.rank, scale=change.scale, value=change.applied(saved.value, 1.0))


def _others(module: Module, over: frozenset[str]) -> str:
    others = [name for role, name in module.names.items() if role not in over]
    return ", ".join(sorted(others)) if others else "nothing else of its module"
