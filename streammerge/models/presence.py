"""Which tensors some models have and others lack, by their names alone."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping

from streammerge.models.quantised import CodedModels
from streammerge.models.views import beneath
from streammerge.tensors import Model

Names = Mapping[str, tuple[str, ...]]
"""Names of tensors by model; models of which there are none have no entry."""


def names_outside(models: Mapping[str, Model], layout: Collection[str], coded: CodedModels) -> Names:
    """The tensors of every model that the layout does not have, but for those with which others are decoded."""
    outside = {}
    for name, model in models.items():
        accounted = coded.accounted(name, model.tensors)
        outside[name] = names_beside(model.tensors, {*layout, *accounted} if accounted else layout)
    return {name: tensors for name, tensors in outside.items() if tensors}


def names_lacking(models: Mapping[str, Model], layout: Iterable[str], coded: CodedModels) -> Names:
    """The layout's tensors that a model does not have, for every model."""
    layout = tuple(layout)
    lacking = {
        name: names_beside(layout, {*model.tensors, *coded.weights[name]} if coded.weights[name] else model.tensors)
        for name, model in models.items()
    }
    return {name: tensors for name, tensors in lacking.items() if tensors}


def with_inner(own: Names, models: Mapping[str, Model], which: str) -> Names:
    """The names, and those (`left_out`, `lacking`) that models tell of their own inputs, as `inner/model`."""
    inner = {
        f"{name}/{below}": names
        for name, model in models.items()
        for below, names in getattr(beneath(model), which, {}).items()
    }
    return {**own, **inner}


def names_beside(names: Iterable[str], others: Container[str]) -> tuple[str, ...]:
    """The names that are not among the others."""
    return tuple(name for name in names if name not in others)
