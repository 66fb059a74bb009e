"""MLX's LoRA: its factors lie as inputs meet them, and what they are multiplied by is no α/r.

    W' = W + s (A B)ᵀ, A of inputs × r and B of r × outputs; of embeddings W' = W + s A B

`lora_parameters.scale` of its adapter_config.json is s. (mlx-lm, `tuner/lora.py` and `tuner/dora.py`.)
"""

from __future__ import annotations

from dataclasses import replace

from streammerge.compute.expressions import Product
from streammerge.compute.matrices import transposed
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.config import MLX
from streammerge.models.adapters.modules import Changes, Malformed, Module
from streammerge.models.adapters.naming import is_table
from streammerge.tensors import DTYPES, TensorInfo


def mlx(module: Module) -> Changes:
    """Δ = (A B)ᵀ, or A B of an embedding; with lengths a DoRA of outputs."""
    a, b = module.part("mlx.a", 2), module.part("mlx.b", 2)
    if module.config is None or module.config.kind != MLX:
        raise Malformed(
            f"{module.name}   is MLX's, and its adapter_config.json, which would tell the scale, is not there"
        )
    if len(a.info.shape) > 2 or len(b.info.shape) > 2:
        raise Malformed(
            f"{module.names['mlx.a']}   is of the shape {list(a.info.shape)}: of experts, which is not read"
        )
    if a.info.shape[1] != b.info.shape[0]:
        raise module.differ("mlx.a", "mlx.b", "have no rank in common")
    (inputs, rank), outputs = a.info.shape, b.info.shape[1]
    is_embedding = is_table(module.own_name, a.info.shape)
    shape = (inputs, outputs) if is_embedding else (outputs, inputs)
    left, right = (a, b) if is_embedding else (transposed(b), transposed(a))
    made = Product(TensorInfo(DTYPES["F32"], shape), left, (right,))
    change = Change("LoRA", shape, made, rank=rank, scale=module.scale(rank)[0])
    return {"weight": _with_lengths(module, change, is_embedding=is_embedding)}


def _with_lengths(module: Module, change: Change, *, is_embedding: bool) -> Change:
    if "mlx.m" not in module:
        if module.config is not None and module.config.is_dora:
            raise Malformed(f"{module.name}   has no m, and {module.config.where} says that it is a DoRA")
        return change
    lengths = module.part("mlx.m", 1)
    if is_embedding:
        raise Malformed(f"{module.names['mlx.m']}   is DoRA of an embedding, which is not read")
    if lengths.info.shape != change.shape[:1]:
        raise Malformed(
            f"{module.names['mlx.m']}   is of the shape {list(lengths.info.shape)}, and outputs are {change.shape[0]}"
        )
    return replace(change, kind="DoRA", magnitude=lengths, axis=0)
