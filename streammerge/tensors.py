"""The vocabulary: element types, tensor descriptions, and what a model is.

A model is anything that has named tensors and can produce any flat range of any of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

DTypeKind = Literal["float", "integer", "bool", "complex", "packed"]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type of the safetensors format.

    `bits` is the size of one element; `torch_name` the attribute of `torch` that stands for it, "" where torch has
    none that holds single elements. Only `kind == "float"` can be merged; everything else can be copied.
    """

    name: str
    bits: int
    kind: DTypeKind
    torch_name: str

    @property
    def mergeable(self) -> bool:
        """Whether arithmetic on such elements means anything: true for floating point, never for integers."""
        return self.kind == "float"

    @property
    def has_nonfinite(self) -> bool:
        """Whether single elements may be infinite or no numbers."""
        return self.kind in ("float", "complex")

    def __str__(self) -> str:
        return self.name


DTYPES: Final[Mapping[str, DType]] = {
    dtype.name: dtype
    for dtype in (
        DType("BOOL", 8, "bool", "bool"),
        DType("F4", 4, "packed", ""),
        DType("F6_E2M3", 6, "packed", ""),
        DType("F6_E3M2", 6, "packed", ""),
        DType("U8", 8, "integer", "uint8"),
        DType("I8", 8, "integer", "int8"),
        DType("F8_E5M2", 8, "float", "float8_e5m2"),
        DType("F8_E4M3", 8, "float", "float8_e4m3fn"),
        DType("F8_E8M0", 8, "packed", "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz"),
        DType("I16", 16, "integer", "int16"),
        DType("U16", 16, "integer", "uint16"),
        DType("F16", 16, "float", "float16"),
        DType("BF16", 16, "float", "bfloat16"),
        DType("I32", 32, "integer", "int32"),
        DType("U32", 32, "integer", "uint32"),
        DType("F32", 32, "float", "float32"),
        DType("C64", 64, "complex", "complex64"),
        DType("F64", 64, "float", "float64"),
        DType("I64", 64, "integer", "int64"),
        DType("U64", 64, "integer", "uint64"),
    )
}
"""Every element type of the format, in the order in which the format's library sorts them (largest last)."""

DTYPE_RANK: Final[Mapping[str, int]] = {name: rank for rank, name in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor: its element type and its shape."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements; 1 for a 0-d tensor, 0 for an empty one."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of the elements in bytes; elements of less than a byte are packed."""
        return -(-self.elements * self.dtype.bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@functools.lru_cache(maxsize=4096)
def described(dtype: DType, shape: tuple[int, ...]) -> TensorInfo:
    """A description that is one object for all tensors that it fits: models have thousands of a shape."""
    return TensorInfo(dtype, shape)


@runtime_checkable
class Model(Protocol):
    """Named tensors, of which any flat range can be read: a checkpoint on disk, a view of one, a merge of several."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors' names and descriptions, in the model's own order."""
        ...

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in the stored dtype: 1-d, on the CPU, the caller's own."""
        ...


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a row-major tensor of this shape."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
