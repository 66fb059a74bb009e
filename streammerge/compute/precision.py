"""Products of float32 matrices to all digits of float32, whatever torch is told otherwise.

A program may let torch cut their inputs to 10 or 7 digits of two (`torch.set_float32_matmul_precision`), and so may the
environment: NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE. Products of 16 bits CUDA's library may even by
default add up in 16 bits. These are settings of the whole process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch


class ExactProducts:
    """Turns the setting off as long as anybody multiplies, and then sets what there was."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.restore: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """As long as this lasts, in this thread or another, products are exact to rounding."""
        with self.lock:
            if not self.users:
                self.restore = set_exact()
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    self.restore()


exact_products: Final = ExactProducts()


IN_16_BITS: Final = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
"""What CUDA's library may be allowed of products of 16 bits, as torch calls it."""


def set_exact() -> Callable[[], None]:
    """Have products made exactly; gives what sets it back."""
    changed = [set_float32_exact(), *map(forbid, IN_16_BITS)]

    def restore() -> None:
        for back in changed:
            back()

    return restore


def forbid(name: str) -> Callable[[], None]:
    """Have CUDA's library not do this; gives what sets it back. What this torch doesn't know is not done."""
    matmul: Any = torch.backends.cuda.matmul
    if not getattr(matmul, name, False):
        return lambda: None
    split = getattr(matmul, f"{name}_split_k", None)  # what is kept in the same place

    def allow(*, allowed: bool) -> None:
        setattr(matmul, name, allowed if split is None else (allowed, split))

    allow(allowed=False)
    return lambda: allow(allowed=True)


def set_float32_exact() -> Callable[[], None]:
    """The same of products of float32."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # as before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(before)
    told = [backend.fp32_precision for backend in backends]

    def restore() -> None:
        for backend, word in zip(backends, told, strict=True):
            backend.fp32_precision = word

    for backend in backends:
        backend.fp32_precision = "ieee"
    return restore
