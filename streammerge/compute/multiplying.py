"""Products of matrices, whose factors may be blocks that stand along a diagonal, or that are each for some rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streammerge.compute.expressions import Product


def multiplied(
    node: Product, rows: torch.Tensor, factors: Sequence[torch.Tensor], first: int, out: torch.Tensor
) -> torch.Tensor:
    """Rows of `left`, of which these begin with the first one, times one factor after the other, flattened."""
    *others, factor = factors
    for other in others:
        rows = rows @ other
    if node.bands > 1:
        _by_bands(node, rows, factor, first, out)
    elif node.groups > 1:
        _by_groups(node, rows, factor, out)
    else:
        torch.mm(rows, factor, out=out)
    return out.view(-1)


def _by_bands(node: Product, rows: torch.Tensor, factor: torch.Tensor, first: int, out: torch.Tensor) -> None:
    """The rows of each band times its own block: of no other blocks than those of bands in which rows lie."""
    blocks, stop = factor.view(node.bands, node.inner, -1), first + len(rows)
    height = node.info.elements // (node.width * node.bands)
    for band in range(first // height, -(-stop // height)):
        own = slice(max(band * height - first, 0), min((band + 1) * height, stop) - first)
        torch.mm(rows[own], blocks[band], out=out[own])


def _by_groups(node: Product, rows: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """Each group's share of the rows times its own block."""
    blocks = factor.view(node.groups, -1, factor.shape[1])
    shares = rows.view(len(rows), node.groups, -1).transpose(0, 1)
    out.view(len(rows), node.groups, -1).copy_((shares @ blocks).transpose(0, 1))
