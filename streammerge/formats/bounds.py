"""How much reading a header, a directory or a pickle may take: little for a small file, in proportion for a large one.

What a stranger sends must not take more time and memory than it is long; what a large model needs must not be refused.
"""

from __future__ import annotations

from typing import Final

TENSOR_BYTES: Final = 1024
"""What a tensor takes of a file on average, at least, in a model with more tensors than the bounds of small files
allow."""

PICKLE_BYTES: Final = 300
"""What a tensor takes of a pickle on average, at most."""


def bound(least: int, file_bytes: int, each: int) -> int:
    """`least`, or so much for each tensor that the file has room for if that is more."""
    return max(least, each * (file_bytes // TENSOR_BYTES))
