"""Rows by token over whole tensors in float64, as the documentation says them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Ids = Mapping[str, int]


def rows_by_token(
    tensors: Sequence[torch.Tensor],
    ids: Sequence[Ids],
    out: Ids,
    *,
    base: int | None = None,
    chosen: Mapping[str, torch.Tensor] | None = None,
    forced: Sequence[str] = (),
    count: int | None = None,
) -> list[torch.Tensor]:
    """Each model's tensor with the rows of the vocabulary `out`: its own row for a token that it has, else what is
    chosen for the token, or the only one that there is, or the base's, or the mean of all there are, or zeros. Rows
    beyond the vocabulary are the mean of all rows before."""
    known = [
        {token: place for token, place in own.items() if place < len(t)} for own, t in zip(ids, tensors, strict=True)
    ]
    size = max(out.values()) + 1
    made = []
    for values, own in zip(tensors, known, strict=True):
        rows = torch.zeros(size if count is None else count, *values.shape[1:], dtype=torch.float64)
        for token, place in out.items():
            there = [t[o[token]].double() for t, o in zip(tensors, known, strict=True) if token in o]
            if token in own and token not in forced:
                rows[place] = values[own[token]].double()
            elif token in (chosen or {}):
                rows[place] = (chosen or {})[token].double()
            elif base is not None and token in known[base]:
                rows[place] = tensors[base][known[base][token]].double()
            elif there:
                rows[place] = torch.stack(there).mean(0)
        rows[size:] = rows[:size].mean(0)
        made.append(rows)
    return made
