"""Several adapters as one: which of their modules each module is, what they change there, and what it is called."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.errors import PlanError, listed, plural
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.config import Config, config_of
from streammerge.models.adapters.dialects import SPELLINGS, Dialect
from streammerge.models.adapters.files import Adapter
from streammerge.models.adapters.matching import BAKE, Matched, matched
from streammerge.models.adapters.meanings import Part
from streammerge.models.adapters.parts import stands_for_itself
from streammerge.models.adapters.products import as_lora, lifted, with_halves_swapped
from streammerge.models.wrappers import bare_name
from streammerge.tensors import DType


@dataclass(frozen=True, slots=True)
class Own:
    """An adapter's own module, and which rows of the common one it is, if not all."""

    adapter: str
    module: str
    file: Adapter
    rows: Part | None

    @property
    def roles(self) -> Mapping[str, str]:
        """Its tensors, by their roles."""
        return self.file.roles[self.module]

    @property
    def config(self) -> Config | None:
        """What the adapter's config says of it."""
        return config_of(self.file.configs, self.module)

    def change(self, part: str) -> Change | None:
        """What it does to its weight, or its bias, if anything."""
        return self.file.changes(self.module).get(part)


@dataclass(frozen=True, eq=False)
class Together:
    """Adapters by name, their modules under the names of a dialect; without one it is the first adapter's."""

    adapters: Mapping[str, Adapter]
    names: Dialect | None = None

    @functools.cached_property
    def matched(self) -> Matched:
        """Which modules of the adapters are the same, and what they are called; PlanError for MLX's."""
        of_mlx = [
            name for name, adapter in self.adapters.items() if any("mlx.a" in own for own in adapter.roles.values())
        ]
        if of_mlx:
            raise PlanError(
                f"{listed(of_mlx)} {plural(of_mlx, 'is', 'are')} MLX's, whose adapters are put into models, and not "
                "written",
                advice=f"{BAKE} streammerge extract OUT MODEL --rank R makes one adapter of that.",
            )
        return matched({name: adapter.roles.keys() for name, adapter in self.adapters.items()}, self.names)

    @property
    def is_pefts(self) -> bool:
        """Whether it is a folder with a config."""
        return self.matched.dialect == "peft"

    @property
    def configs(self) -> list[Config]:
        """What the adapters' configs say, in their order."""
        return [config for adapter in self.adapters.values() for config in adapter.configs.values()]

    def remarks(self) -> Iterator[str]:
        """What is to be known of adapters that have nothing in common, as those of different models have not."""
        shared = {name for own in self.matched.modules.values() if len(own) > 1 for name in own}
        alone = [name for name in self.adapters if name not in shared]
        if alone and len(self.adapters) > 1:
            has = plural(alone, "has", "have")
            yield f"{listed(alone)} {has} no module that another has too: are all of them adapters of one model?"

    def own(self, module: str) -> Iterator[Own]:
        """The modules of adapters that a module is."""
        for name, own in self.matched.modules[module].items():
            yield from (Own(name, each, self.adapters[name], rows) for each, rows in own)

    @functools.cached_property
    def parameters(self) -> Mapping[str, str]:
        """Which parameter each of the modules is that are wrappers of one; PlanError if adapters have others there."""
        found: dict[str, str] = {}
        for module in self.matched.modules if any(file.parameters for file in self.adapters.values()) else ():
            names = {own.file.parameters.get(own.module, "") for own in self.own(module)}
            if len(names) > 1 or (names != {""} and not self.is_pefts):
                raise PlanError(
                    f"{module} is of {' and '.join(sorted(filter(None, names)))} in some of the adapters alone",
                    advice="Only PEFT's adapters of the same parameters (target_parameters) of a module are merged, "
                    f"under PEFT's names. {BAKE}",
                )
            found[module] = next(iter(names))
        return {module: name for module, name in found.items() if name}

    def parts(self, module: str) -> tuple[str, ...]:
        """What of a module may be changed: its weight and its bias, or one parameter."""
        return (self.parameters[module],) if module in self.parameters else ("weight", "bias")

    def changes(self, module: str, part: str, adapters: Collection[str]) -> list[tuple[str, Change]]:
        """What these adapters change of a module's weight, or its bias, each with its adapter: all of one height."""
        having = [
            (own, as_lora(change) if own.rows else change)
            for own in self.own(module)
            if own.adapter in adapters and (change := own.change(part)) is not None
        ]
        height = next((change.shape[0] for own, change in having if own.rows is None), 0)
        height = height or _height([(change, own.rows) for own, change in having if own.rows])
        return [
            (own.adapter, change if own.rows is None else _raised(module, change, own.rows, height))
            for own, change in having
        ]

    def has(self, module: str, role: str) -> bool:
        """Whether any adapter has a tensor that plays this role in the module."""
        return any(role in own.roles for own in self.own(module))

    def is_turned(self, module: str) -> bool:
        """Whether PEFT keeps the factors of a module the other way round: of embeddings, and by `fan_in_fan_out`."""
        configs = (own.config for own in self.own(module))
        return self.has(module, "embedding.up") or any(config and config.fan_in_fan_out for config in configs)

    def dtype(self, module: str, role: str) -> DType:
        """The dtype of the first tensor that plays the role, or else of any."""
        infos = [
            (each, own.file.checkpoint.tensors[name]) for own in self.own(module) for each, name in own.roles.items()
        ]
        playing = [info for each, info in infos if each.removeprefix("embedding.") == role]
        return (playing or [info for each, info in infos if each != "alpha"])[0].dtype

    def tensor(self, module: str, role: str) -> str:
        """A tensor's name; PlanError if it has none."""
        name = self.known_tensor(module, role)
        if name is None:
            raise PlanError(
                f"{module} is {role.replace('_b', ' of a bias')}, for which {self.matched.dialect} has no name",
                advice="Write it under other names: --names comfy.",
            )
        return name

    def known_tensor(self, module: str, role: str) -> str | None:
        """A tensor's name: as in the first adapter that has this module under this name, else as the dialect has it."""
        own = (bare_name(each.roles[role]) for each in self.own(module) if each.module == module and role in each.roles)
        dialect = self.matched.dialect or "kohya"
        has_none = dialect == "kohya" and any(stands_for_itself(each.module) for each in self.own(module))
        tail = None if has_none else SPELLINGS[dialect].tensors.get(role)
        return next(own, None if tail is None else f"{module}.{tail}")


def _start(change: Change, part: Part) -> int:
    """With which row a part of a module begins."""
    return part.index * (math.prod(change.shape[1:]) if part.is_wide else change.shape[0])


MLP: Final = 4
"""How many times as wide as a block's tokens its MLP is in Flux and HunyuanVideo: the last part of their `linear1`."""


def _height(parts: Sequence[tuple[Change, Part]]) -> int:
    """How many rows the whole module has of which these are parts: told by the last of them, if that is wider."""
    told = [_stop(change, part) for change, part in parts if not part.is_wide or part.index == part.count - 1]
    guessed = ((part.count - 1 + MLP) * math.prod(change.shape[1:]) for change, part in parts)
    return max(told or guessed, default=0)


def _stop(change: Change, part: Part) -> int:
    """How many rows the whole module has, as far as this part of it tells."""
    return _start(change, part) + change.shape[0] if part.is_wide else part.count * change.shape[0]


def _raised(module: str, change: Change, part: Part, height: int) -> Change:
    """A change of a part of a module as one of the whole; PlanError if that has not so many rows."""
    first, is_last = _start(change, part), part.index == part.count - 1
    fits = _stop(change, part) == height if is_last or not part.is_wide else first + change.shape[0] < height
    fits = fits and not (part.is_swapped and height % 2)
    if not fits:
        raise PlanError(
            f"{module} has {height} rows in one adapter, of which {change.shape[0]} are no part {part.index + 1} of "
            f"{part.count}",
            advice="Are these adapters of one model?",
        )
    return with_halves_swapped(change) if part.is_swapped else lifted(change, first, height)
