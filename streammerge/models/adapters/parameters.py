"""Which parameters an adapter changes by themselves (PEFT's `target_parameters`), and not as their module's weight.

    model.layers.0.mlp.experts.base_layer.lora_A.weight  ─►  gate_up_proj of model.layers.0.mlp.experts

A module has a wrapper for each of its parameters that is changed, one around the other, in the order in which the model
made the parameters; the adapter's names say how deep a wrapper lies (`base_layer`), and not which parameter is its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from streammerge.models.adapters.config import Config
from streammerge.models.adapters.dialects import PEFT

ORDER: Final = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""In which order models make the parameters of their experts: the first is wrapped first."""

WRAPPED: Final = ".base_layer"
"""What the name of a wrapper within another has behind the module's."""


def bare(module: str) -> str:
    """A module's name without what says how deep a wrapper lies in it."""
    while module.endswith(WRAPPED):
        module = module.removesuffix(WRAPPED)
    return module


def ends(name: str) -> Iterator[str]:
    """A name, and what stands behind each of its dots: all that PEFT's configs may call it."""
    yield name
    yield from (name[place + 1 :] for place, letter in enumerate(name) if letter == ".")


def parameter_path(wrapper: str, parameter: str) -> str:
    """What the model calls the parameter that a wrapper is of."""
    return f"{bare(wrapper.removeprefix(PEFT))}.{parameter}"


def parameters_of(modules: Iterable[str], config: Config) -> dict[str, str]:
    """Which parameter is changed by each of the modules that are wrappers of one; ValueError where nobody can tell."""
    wrappers: dict[str, list[str]] = {}
    for module in modules if config.parameters else ():
        wrappers.setdefault(bare(module), []).append(module)
    found: dict[str, str] = {}
    for module, own in wrappers.items():
        path = module.removeprefix(PEFT)
        is_plain = own == [module] and config.has_module(path)
        called = [] if is_plain else _called(path, config.parameters, len(own))
        if own == [module] and not called:
            continue  # a module, and no wrapper
        if len(called) != len(own) or (len(called) > 1 and not {*called} <= {*ORDER}):
            told = f"has {len(own)} parameters that are changed, called {' and '.join(called) or 'nobody knows how'}"
            raise ValueError(f"{module}   {told}: nobody can tell which are which")
        in_order = sorted(called, key=ORDER.index) if len(called) > 1 else called
        found.update(zip(sorted(own, key=len, reverse=True), in_order, strict=True))
    return found


def _called(module: str, targets: Sequence[str], number: int) -> list[str]:
    """What the parameters of a module are called that keys of `target_parameters` mean, if there are so many.

    A key without a dot may be any module's, and is not this one's if there are enough that name it.
    """
    parted = [key.rpartition(".") for key in targets]
    own = [name for where, _, name in parted if where and f".{module}".endswith(f".{where}")]
    return own if len(own) >= number else own + [name for where, _, name in parted if not where]
