"""Which modules of several adapters are the same, and what each of them is called in the sum."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.errors import PlanError
from streammerge.models.adapters.dialects import DIALECTS, Dialect, beginning_of, dialect_of, spelled, underscored
from streammerge.models.adapters.meanings import Meaning, Part, are_told, dotted, meaning_of, meanings
from streammerge.models.adapters.synonyms import XLABS
from streammerge.models.dialects.places import Role

BAKE: Final = "Bake the adapters into their model: streammerge bake MODEL ADAPTER ADAPTER -o OUT."

OF_UNETS: Final = ("down_blocks", "mid_block", "up_blocks")
"""How diffusers' names of a U-Net's modules begin, of most of them."""

OF_FOUR_LEVELS: Final = re.compile(r"(?:down|up)_blocks[._]3[._]")
"""What the modules of Stable Diffusion 1 and 2 are told by from those of SDXL, which has three levels."""

Own = tuple[str, Part | None]
"""A module of an adapter, and which rows of one of the sum's it is, if not all."""

Meant = Mapping[str, Mapping[str, Meaning]]
"""What modules mean, by adapter and module."""


@dataclass(frozen=True)
class Matched:
    """The modules of a sum by name: which modules of which adapter each of them is, and what each means; and the
    dialect of the names.

    Without a dialect nothing of the names tells one, and all of them are as they are.
    """

    modules: Mapping[str, Mapping[str, Sequence[Own]]]
    meant: Mapping[str, Meaning]
    dialect: Dialect | None
    is_renamed: bool


def matched(adapters: Mapping[str, Collection[str]], names: Dialect | None) -> Matched:
    """The modules of adapters by what they mean, under the names of a dialect, or else the first adapter's; PlanError
    where nobody can tell which are the same, or what they would be called."""
    try:
        meant = meanings(adapters, original=names if _is_for_original_names(adapters, names) else None)
    except ValueError as error:
        raise PlanError(
            "the adapters' modules are named in several ways, and nobody can tell which are which",
            found=[str(error)],
            advice=BAKE,
        ) from None
    dialect = names or _first_dialect(meant)
    found: dict[object, dict[str, list[Own]]] = {}
    first: dict[object, tuple[str, Meaning]] = {}
    for name, module, meaning in _all(meant):
        found.setdefault(meaning.key, {}).setdefault(name, []).append((module, meaning.part))
        known = first.setdefault(meaning.key, (module, meaning))
        if _is_as_it_is(module, meaning, dialect) and not _is_as_it_is(*known, dialect):
            first[meaning.key] = module, meaning
    naming = _Naming(meant, dialect)
    called = {key: naming.called(*first[key]) for key in found}
    _refuse_doubles(found.values(), called.values())
    is_renamed = any(called[key] != first[key][0] for key in found)
    modules = {called[key]: own for key, own in found.items()}
    return Matched(modules, {called[key]: first[key][1] for key in found}, dialect, is_renamed)


def _is_for_original_names(adapters: Mapping[str, Collection[str]], names: Dialect | None) -> bool:
    """Whether modules of other dialects are to be named as the original has them; those of this one stay as they are.

    Kohya's names are the original's, but for Stable Diffusion 1 and 2.
    """
    all_modules = [module for modules in adapters.values() for module in modules]
    if names == "kohya" and any(map(OF_FOUR_LEVELS.search, all_modules)):
        return False
    return names in ("kohya", "comfy") and any(dialect_of(module) != names for module in all_modules)


def _all(meant: Meant) -> Iterator[tuple[str, str, Meaning]]:
    return ((name, module, meaning) for name, own in meant.items() for module, meaning in own.items())


def _first_dialect(meant: Meant) -> Dialect | None:
    """The dialect of the first module that is not translated."""
    own = (dialect_of(module) for _, module, meaning in _all(meant) if _is_untranslated(module, meaning))
    return next(filter(None, own), None)


def _is_untranslated(module: str, meaning: Meaning) -> bool:
    """Whether it means its own path, or the end of that behind what wrappers put before it."""
    return meaning.part is None and underscored(meaning_of(module).path).endswith(underscored(meaning.path))


def _is_as_it_is(module: str, meaning: Meaning, dialect: Dialect | None) -> bool:
    """Whether a module keeps its name in the dialect."""
    is_called_so = underscored(meaning_of(module).path) == underscored(meaning.path)
    return dialect in (None, dialect_of(module)) and meaning.part is None and is_called_so


def _others(dialect: Dialect) -> str:
    """The dialects that might do where this one doesn't."""
    *most, last = (each for each in DIALECTS if each != dialect)
    return f"{', '.join(most)} or {last}"


@dataclass(frozen=True, eq=False)
class _Naming:
    """What modules are called in a dialect, if these are all of them."""

    meant: Meant
    dialect: Dialect | None

    @functools.cached_property
    def told(self) -> frozenset[Role | None]:
        """The components of which it is known where dots stand in the names of modules."""
        flat: dict[Role | None, list[Meaning]] = {}
        for _, _, meaning in _all(self.meant):
            flat.setdefault(meaning.role, []).append(meaning)
        return frozenset(role for role, own in flat.items() if are_told(role, own))

    def called(self, module: str, meaning: Meaning) -> str:
        """A module's name: its own in the dialect's adapters, else spelled anew."""
        if self.dialect is None or _is_as_it_is(module, meaning, self.dialect):
            return module
        name = spelled(self.dialect, meaning.role, dotted(meaning), self.roles, self.prefixes)
        reason = self._reason(meaning, self.dialect)
        if reason or name is None:
            raise PlanError(
                f"{module} has no name as {self.dialect} would have it: {reason}",
                advice=f"Choose other names: --names {_others(self.dialect)}; or bake the adapters.",
            )
        return name

    def _reason(self, meaning: Meaning, dialect: Dialect) -> str:
        """Why a module has no name in a dialect; nothing if it has one."""
        if XLABS.fullmatch(meaning.path):
            return "XLabs has queries, keys and values in it, without what else the original has there"
        if dialect == "kohya":
            return "" if meaning.role else "kohya's names are those of diffusion models"
        if meaning.is_flat and meaning.role not in self.told:
            return "nobody can tell which of its underscores are dots"
        if dialect == "peft":
            return "" if len(self.roles) == 1 else "PEFT's files are of one component, and these are of several"
        path = dotted(meaning)
        if meaning.role is None:
            return f"nothing says which component {path} is of"
        if meaning.role == "denoiser" and meaning.side == ("theirs" if dialect == "comfy" else "ours"):
            return f"{path} is {'no original name' if dialect == 'comfy' else 'an original name'}"
        return ""

    @functools.cached_property
    def roles(self) -> frozenset[Role | None]:
        """The components of all modules."""
        return frozenset(each.role for _, _, each in _all(self.meant))

    @functools.cached_property
    def prefixes(self) -> dict[Role | None, str]:
        """What stands before modules in the dialect, as an adapter has it; and diffusers has UNets apart."""
        found: dict[Role | None, str] = {}
        for _, module, meaning in _all(self.meant):
            if _is_as_it_is(module, meaning, self.dialect):
                found.setdefault(meaning.role, beginning_of(module))
        blocks = (each.path.startswith(OF_UNETS) for _, _, each in _all(self.meant) if each.role == "denoiser")
        if self.dialect == "diffusers" and any(blocks):
            found.setdefault("denoiser", "unet.")
        return found


def _refuse_doubles(found: Collection[Mapping[str, Sequence[Own]]], called: Collection[str]) -> None:
    """PlanError if an adapter has a module twice, or two modules would be called the same."""
    own = (modules for parts in found for modules in parts.values())
    again = (modules for modules in own if len({part for _, part in modules}) < len(modules))
    doubles = ["   and ".join(module for module, _ in modules) for modules in again]
    doubles += [name for name, number in Counter(called).items() if number > 1]
    if doubles:
        raise PlanError("modules of an adapter are one and the same", found=doubles, advice=BAKE)
