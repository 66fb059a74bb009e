"""Rotations of weights: OFT and BOFT, whose blocks become orthogonal matrices by Cayley's transform.

    C(Q) = (I + Q) (I − Q)⁻¹    with Q = B − Bᵀ of a block B

    W'[k] = C(Q[k])ᵀ W[k]               LyCORIS' and kohya's OFT: blocks k of outputs
    W' = P₁ᵀ C(Q₁) P₁ … W               LyCORIS' BOFT: outputs in another order at every stage
    W'[:, k] = W[:, k] C(Q[k])          PEFT's OFT and BOFT: blocks k of inputs, kernels included

Qiu et al. 2023, arXiv:2306.07280; Liu et al. 2024, arXiv:2311.06243. What outputs are scaled by comes last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from streammerge.compute.expressions import ByBlock, ByWhole, Node, Viewed
from streammerge.compute.matrices import padded, times_blocks, vector
from streammerge.compute.parts import in_shape
from streammerge.methods.contract import ParameterValue
from streammerge.methods.registry import BlockMethod, Needs, WholeMethod
from streammerge.models.adapters.changes import MULTIPLY, Change
from streammerge.models.adapters.modules import Changes, Malformed, Module
from streammerge.tensors import DTYPES, described

if TYPE_CHECKING:
    from torch import Tensor

KOHYA: Final = "oft_unet_"
"""How modules begin in kohya's OFT, whose alpha 0 lets nothing turn; LyCORIS' alpha 0 sets no bounds."""


def _cayley(blocks: Tensor, *, size: int, sign: float, limit: float, freedom: float, terms: int) -> Tensor:
    """C(±Q), or so many terms of the series 1 + 2 Q + 2 Q² + …, with Q made no longer than the bounds allow.

    Of packed blocks the elements above the diagonal come first in a row, one row after the other.
    """
    import torch

    skew = _unpacked(blocks.double(), size) if blocks.dim() == 2 else blocks.double()
    skew = sign * (skew - skew.mT)
    if limit:
        skew = skew * min(1.0, limit / float(skew.norm() + 1e-8))
    if freedom:
        lengths, bound = skew.flatten(1).norm(dim=1), freedom / math.sqrt(len(skew))
        skew = skew * torch.where(lengths > bound, bound / lengths, 1.0)[:, None, None]
    one = torch.eye(size, dtype=skew.dtype)
    made = _series(one, skew, terms) if terms else torch.linalg.solve(one - skew, one + skew)
    return made.reshape(blocks.shape).to(blocks.dtype)


def _unpacked(rows: Tensor, size: int) -> Tensor:
    """Blocks of these elements above the diagonal, and zeros."""
    import torch

    blocks = rows.new_zeros(len(rows), size, size)
    above, beside = torch.triu_indices(size, size, 1)
    blocks[:, above, beside] = rows[:, : len(above)]
    return blocks


def _series(one: Tensor, skew: Tensor, terms: int) -> Tensor:
    """1 + 2 Q + … + 2 Qⁿ⁻² + Qⁿ⁻¹ as PEFT has it: of n = 2 the last is whole, and n = 3 is as 4."""
    made, power = one.expand_as(skew).clone(), skew
    count = 4 if terms == 3 else terms
    for number in range(1, count):
        is_last = number == count - 1 and number > 1
        made, power = made + (1 if is_last else 2) * power, power @ skew
    return made


CAYLEY: Final = WholeMethod("cayley", (), "none", (1, 1), "θ = (I + Q) (I − Q)⁻¹", function=_cayley, temporaries=14)


def _turned(weights: Tensor, rotations: Tensor, *, size: int) -> Tensor:
    """θ = R W of blocks of rows, each of which lies in one row here, and so does its R."""
    import torch

    width = weights.shape[1] // size
    turned = rotations[:, : size * size].reshape(-1, size, size) @ weights[:, : size * width].reshape(-1, size, width)
    return torch.nn.functional.pad(turned.flatten(1), (0, weights.shape[1] - size * width))


TURN: Final = BlockMethod(
    "oft",
    (),
    "none",
    (2, 2),
    "θ = R W",
    function=_turned,
    needs=Needs(rows="rows", temporaries=4, temporaries_each=1),
)


def _mixed(weights: Tensor, stages: Tensor, *, shape: tuple[int, ...], width: int) -> Tensor:
    """θ = … P₂ᵀ R₂ P₂ P₁ᵀ R₁ P₁ W: stage i turns rows together that lie 2ⁱ half blocks apart."""
    import torch

    count, blocks, size, _ = shape
    made = weights.reshape(-1)[: blocks * size * width].reshape(blocks * size, width)
    rotations = stages.reshape(-1)[: math.prod(shape)].reshape(shape)
    for stage in range(count):
        apart = 2**stage * (size // 2)
        paired = made.reshape(-1, 2, apart, width).transpose(1, 2).reshape(blocks, size, width)
        made = (rotations[stage] @ paired).reshape(-1, apart, 2, width).transpose(1, 2).reshape(-1, width)
    return torch.nn.functional.pad(made.reshape(-1), (0, weights.numel() - made.numel())).reshape(weights.shape)


MIX: Final = WholeMethod("boft", (), "none", (2, 2), "θ = … R₂ R₁ W", function=_mixed, temporaries=4)


@dataclass(frozen=True)
class Rotation(Change):
    """A change that turns a tensor: blocks of its outputs (`axis` 0), or of each output's inputs (1).

    `value` are the matrices, in stages where there are four dimensions. Blocks that are `shared` are one, for all.
    """

    lengths: Node | None = None
    is_shared: bool = False

    @property
    def is_linear(self) -> bool:
        """It goes by the tensor."""
        return False

    @property
    def can_be_turned(self) -> bool:
        """It is of outputs, or of inputs."""
        return False

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the tensor has as many outputs, or inputs, as are turned."""
        if len(shape) < 2 or (self.lengths is not None and self.lengths.info.elements != shape[0]):
            return False
        size = shape[0] if self.axis == 0 else math.prod(shape[1:])
        return size % self.shape[-1] == 0 if self.is_shared else size == self.shape[-1]

    def applied(self, weight: Node, strength: float) -> Node:
        """The turned tensor, or what lies between it and the one that was."""
        made = self._turned(weight)
        if self.lengths is not None:
            over = vector(self.lengths, weight.info.shape, 0)
            made = ByBlock(weight.info, MULTIPLY, {}, (made, over), self.kind)
        return replace(self.replacing, value=made).applied(weight, strength)

    @property
    def replacing(self) -> Change:
        """A change that puts another tensor in a tensor's place."""
        return Change(self.kind, self.shape, self.value, "replace")

    def _turned(self, weight: Node) -> Node:
        rows, elements = weight.info.shape[0], weight.info.elements
        if len(self.value.info.shape) == 4:
            return self._mixed(weight)
        if self.axis == 1:
            blocks = elements // rows // self.value.info.shape[-1]
            matrix = in_shape(weight, (rows, elements // rows))
            return in_shape(times_blocks(matrix, self._repeated(blocks)), weight.info.shape)
        count, size, _ = self.value.info.shape
        own, other = elements // count, size * size
        longest = -(-max(own, other) // size) * size
        flat = in_shape(weight, (count, own)), in_shape(self.value, (count, other))
        wide = tuple(node if node.info.shape[1] == longest else padded(node, (count, longest)) for node in flat)
        made = ByBlock(wide[0].info, TURN, {"size": size}, wide, self.kind)
        cut = Viewed(flat[0].info, made, 0, (longest, 1), flat[0].info.shape) if own < longest else made
        return in_shape(cut, weight.info.shape)

    def _repeated(self, blocks: int) -> Node:
        size = self.value.info.shape[-1]
        info = described(self.value.info.dtype, (blocks, size, size))
        return Viewed(info, self.value, 0, (0, size, 1), info.shape) if self.is_shared else self.value

    def _mixed(self, weight: Node) -> Node:
        elements, stages = weight.info.elements, self.value.info
        longest = max(elements, stages.elements)
        flat = [in_shape(node, (1, node.info.elements)) for node in (weight, self.value)]
        info = described(weight.info.dtype, (1, longest))
        given = tuple(node if node.info.shape == info.shape else padded(node, (1, longest)) for node in flat)
        parameters: dict[str, ParameterValue] = {"shape": stages.shape, "width": elements // weight.info.shape[0]}
        return in_shape(ByWhole(info, MIX, parameters, given, self.kind), weight.info.shape)


def rotation(module: Module) -> Changes:
    """OFT, of three dimensions, and BOFT, of four, as LyCORIS and kohya have them: of outputs, α bounding ‖Q‖."""
    blocks = module.part("oft_blocks", 3)
    *stages, count, size, across = blocks.info.shape
    if size != across or len(stages) > 1 or (stages and (size % 2 or count % 2 ** (stages[0] - 1))):
        raise Malformed(f"{module.names['oft_blocks']}   is of the shape {list(blocks.info.shape)}, which is no OFT's")
    outputs = count * size
    alpha = module.number("alpha") if "alpha" in module else 0.0
    if alpha < 0 or (not alpha and module.name.startswith(KOHYA)):
        raise Malformed(f"{module.name}   has the alpha {alpha:g}: nothing may turn")
    sign = 1.0 if stages else -1.0
    matrices = _matrices(blocks, size, sign, limit=alpha * outputs)
    kind = "BOFT" if stages else "OFT"
    return {"weight": Rotation(kind, (outputs,), matrices, axis=0, lengths=_lengths(module, "rescale", outputs))}


def input_rotation(module: Module) -> Changes:
    """PEFT's OFT, whose blocks are packed, and of embeddings; its config says how exactly they become rotations."""
    role = "oft_R" if "oft_R" in module else "oft.embedding"
    packed, config = module.part(role, 2), module.config
    count, above = packed.info.shape[:2]
    size = (1 + math.isqrt(1 + 8 * above)) // 2
    if config is None or config.turning is None:
        raise Malformed(f"{module.name}   is PEFT's OFT, and adapter_config.json, which would tell of it, is not there")
    if len(packed.info.shape) != 2 or size * (size - 1) // 2 != above or (config.turning.is_shared and count != 1):
        raise Malformed(f"{module.names[role]}   is of the shape {list(packed.info.shape)}, which is no OFT's")
    if config.fan_in_fan_out:
        raise Malformed(f"{module.names[role]}   is OFT of a weight that lies transposed, which is not read")
    terms = config.turning.terms
    sign = (-1.0 if terms else 1.0) * (1.0 if role == "oft_R" else -1.0)
    blocks = padded(packed, (count, size * size))
    matrices = _matrices(blocks, size, sign, freedom=config.turning.freedom, terms=terms)
    inputs = size if config.turning.is_shared else count * size
    return {"weight": Rotation("OFT", (inputs,), matrices, axis=1, is_shared=config.turning.is_shared)}


def input_butterfly(module: Module) -> Changes:
    """PEFT's BOFT of one factor: Q = ½ (B − Bᵀ), and a length for every output."""
    blocks = module.part("boft_R", 4)
    factors, count, size, across = blocks.info.shape
    if factors != 1 or size != across or len(blocks.info.shape) != 4:
        raise Malformed(
            f"{module.names['boft_R']}   is of the shape {list(blocks.info.shape)}: PEFT's BOFT is read with one "
            "butterfly factor, of square blocks"
        )
    if module.config is not None and module.config.fan_in_fan_out:
        raise Malformed(f"{module.names['boft_R']}   is BOFT of a weight that lies transposed, which is not read")
    matrices = _matrices(in_shape(blocks, (count, size, size)), size, 0.5)
    lengths = module.part("boft_s", 2)
    outputs = lengths.info.elements
    return {"weight": Rotation("BOFT", (count * size,), matrices, axis=1, lengths=_lengths(module, "boft_s", outputs))}


def _matrices(
    blocks: Node, size: int, sign: float, *, limit: float = 0.0, freedom: float = 0.0, terms: int = 0
) -> Node:
    """The rotations that blocks become."""
    parameters = {"size": size, "sign": sign, "limit": limit, "freedom": freedom, "terms": terms}
    info = described(DTYPES["F32"], blocks.info.shape)
    made = ByWhole(info, CAYLEY, parameters, (blocks,), "rotations")
    return in_shape(made, (*info.shape[:-1], size, size)) if len(info.shape) == 2 else made


def _lengths(module: Module, role: str, outputs: int) -> Node | None:
    """What every output is multiplied by at last, if anything."""
    if role not in module:
        return None
    node = module.part(role, 1)
    if node.info.elements != outputs or max(node.info.shape) != outputs:
        shape = list(node.info.shape)
        raise Malformed(f"{module.names[role]}   is of the shape {shape}, and should be {outputs} × 1")
    return in_shape(node, (outputs,))
