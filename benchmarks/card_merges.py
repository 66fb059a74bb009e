"""The merges that are measured on a card and on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from benchmarks.cases import CASES, Case, Merge


def sd2(merge: Merge) -> Case:
    """This merge of SD 2's models."""
    return replace(CASES["ties"], name=merge.method, merge=merge, layout=merge.roles[0], variants={})


def over_base(method: str, **parameters: float) -> Case:
    """A method over the base, with these parameters."""
    return sd2(Merge(method, ("a", "b"), "base", parameters=parameters))


LINEAR: Final = sd2(Merge("linear", ("base", "a", "b"), weights=(0.1, 0.5, 0.4)))
TIES: Final = over_base("ties", density=0.3)
STREAMING: Final = (
    LINEAR,
    TIES,
    sd2(Merge("slerp", ("a", "b"), t=0.3)),
    over_base("model_stock"),
    over_base("dare_ties", density=0.5),
    over_base("della", density=0.5),
    over_base("breadcrumbs", density=0.5),
    over_base("sce", select_topk=0.5),
)
WHOLE: Final = (over_base("iso_c"), over_base("tsv_m"))
ARTICLE: Final = replace(CASES["article-fp16"], name="article", variants={}, inputs="article-fp16")
MERGES: Final = (*STREAMING, ARTICLE, *WHOLE)
"""Every merge, in the order in which they are measured."""

FEW: Final = (LINEAR, ARTICLE)
"""One of each set of models, for miniatures."""
