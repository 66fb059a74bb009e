"""Exact order statistics of whole tensors without sorting them: any number of ranks of any number of vectors.

A sample tells between which two values each must lie, and one pass counts what is above and gathers what is between
(`brackets`); where the sample was no help, `histograms` find them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from streammerge.methods.statistics.brackets import begin_bracketing, held_by_brackets
from streammerge.methods.statistics.histograms import UpperBits, held_by_histograms
from streammerge.methods.statistics.ranks import Ranking

if TYPE_CHECKING:
    from streammerge.methods.place import Target


def begin_ranking(ranking: Ranking, count: int) -> Any:  # noqa: ANN401
    """The first pass over so many vectors; or the result, where nothing has to be counted."""
    if callable(ranking.ranks):
        if not ranking.elements:
            return ranking.settle([0] * count)
        ranking.look_for(ranking.ranks([ranking.elements] * count))  # until it is known how many are not zero
    else:
        ranking.look_for(ranking.ranks)
        if not ranking.unsettled:
            return ranking.result()
    can_gather = ranking.gather and not ranking.wide and not (ranking.signed and ranking.counts)
    return begin_bracketing(ranking) if can_gather else UpperBits(ranking, count)


def held_by_ranks(each: int = 1, *, vectors: int | None = None, gather: bool = True) -> Callable[[Target, object], int]:
    """What a search for so many ranks of each vector holds in bytes: of every task vector, or of so many vectors."""

    def held(target: Target, parameters: object) -> int:
        count = target.inputs - 1 if vectors is None else vectors
        histograms = held_by_histograms(count, each * count)
        return max(histograms, held_by_brackets(target.elements, count, each * count)) if gather else histograms

    return held
