"""Exact order statistics of whole tensors without sorting them: any number of ranks of any number of vectors.

A sample tells between which two values each must lie, and one pass counts what is above and gathers what is between
(`brackets`); where the sample was no help, `histograms` find them.
"""

from __future__ import annotations

from typing import Any

from streammerge.methods.statistics.brackets import begin_bracketing
from streammerge.methods.statistics.histograms import UpperBits
from streammerge.methods.statistics.ranks import Ranking


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
