"""The difference of a merge and its base as an adapter: what is extracted of a model that was trained further."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from streammerge.compute.combining import combine
from streammerge.compute.expressions import Node, Term
from streammerge.compute.matrices import transposed
from streammerge.compute.parts import joined, rows_of
from streammerge.errors import PlanError, count, listed, plural
from streammerge.formats.companions import Companion
from streammerge.models.adapters.config import IN_METADATA, TRANSPOSED
from streammerge.models.adapters.dialects import DIALECTS, PEFT, Dialect
from streammerge.models.adapters.factored import ALWAYS, Factored, Part
from streammerge.models.adapters.naming import (
    NO_VECTORS,
    Module,
    is_table,
    modules_of,
    tensor_names,
    usual_dialect,
)
from streammerge.models.adapters.peft_config import config_of_ranks, is_taken, task_of
from streammerge.models.adapters.ranks import LowRank
from streammerge.models.adapters.saved import Saved, saved_of
from streammerge.models.dialects import Naming, Source
from streammerge.models.hub import SCHEME, HubName, name_of
from streammerge.models.merged import Merged
from streammerge.models.views import Decoded, beneath
from streammerge.plan.beside import stated_in
from streammerge.recipe.recipe import Recipe
from streammerge.tensors import DTYPES, DType, Model, described

NO_KERNELS: Final = "kernels larger than 1: --conv-rank R"

NOT_TAKEN: Final = "PEFT takes no factors of them in models of this type: --names comfy"

NEEDS_FACTORS: Final = "PEFT has biases of modules that have factors"

WIDE: Final = ("F16", "BF16", "F32", "F64")
"""Dtypes that factors may have; of all others they are float16."""

GPT2: Final = "c_attn"

RESTATED: Final = {"ss_network_args": "", "ss_network_module": "networks.lora", IN_METADATA: ""}
"""What metadata say of factors that are others now: what is "" is left out."""

KOHYA: Final = {"ss_network_module": RESTATED["ss_network_module"]}
"""What metadata say of adapters in kohya's names, beside their rank: programs show it, and go by it."""


def with_names(recipe: Recipe, naming: Naming | Dialect | None) -> tuple[Recipe, Naming | Dialect | None]:
    """The recipe with the dialect that is asked for as an option; and the naming, if that is none of these."""
    dialect = next((each for each in DIALECTS if each == naming), None)
    if recipe.low_rank is None or dialect is None:
        return recipe, naming
    return replace(recipe, low_rank=replace(recipe.low_rank, names=dialect)), None


def to_be_merged(recipe: Recipe, naming: Naming | Dialect | None) -> Recipe:
    """The merge whose difference from its base is extracted; PlanError if it says no base, or another layout."""
    if recipe.base is None:
        raise PlanError(
            "a rank makes an adapter, of adapters or of the difference from a base, and no base is named",
            advice="Use streammerge extract TUNED BASE, or name the base: --base or base_model.",
        )
    if recipe.layout not in ("", recipe.base.name):
        raise PlanError(
            f"an adapter is made for the base, and the layout is to be {recipe.layout}", advice="Leave the layout out."
        )
    wrong = {
        "only": recipe.only,
        "prune": recipe.prune,
        "ema": recipe.ema != "keep",
        "names of a model": naming is not None,
    }
    if asked := [key for key, is_asked in wrong.items() if is_asked]:
        raise PlanError(
            f"{listed(asked)} has no meaning for an adapter", advice="Leave tensors out of it with --drop GLOB."
        )
    return replace(recipe, low_rank=None, dtype=None, layout=recipe.base.name)


def extracted(recipe: Recipe, merged: Merged, models: Mapping[str, Model]) -> Merged:
    """The adapter of what a merge is beyond its base."""
    assert recipe.low_rank is not None
    assert recipe.base is not None
    base = Decoded(models[recipe.base.name])
    dialect = recipe.low_rank.names or usual_dialect(base.tensors)
    made = _Extraction(recipe, merged, base, recipe.low_rank, dialect)
    return made.adapter()


@dataclass(frozen=True, eq=False)
class _Extraction:
    """The work of `extracted`."""

    recipe: Recipe
    merged: Merged
    base: Decoded
    rule: LowRank
    dialect: Dialect

    def adapter(self) -> Merged:
        """The adapter, as a merge."""
        parts = list(self._parts())
        if not any(part.names for part in parts):
            raise PlanError(
                "there is nothing of which an adapter could be made",
                found=[f"{part.name}   {part.reason}" for part in parts],
                advice="Name two models whose tensors have the same names and shapes.",
            )
        self._check_names(parts)
        made = Factored(parts, self.rule, differs=True)
        stated = KOHYA if self.dialect == "kohya" else {}
        return merged_of(made, self.merged, self._remarks(), self._companions, stated)

    def _parts(self) -> Iterator[Part]:
        for module in modules_of(self.base.tensors, self.dialect):
            if self._merged.issuperset(module.source.tensors) and module.source.info.elements:
                yield self._part(module)

    @functools.cached_property
    def _merged(self) -> frozenset[str]:
        """The names of what is merged."""
        return frozenset(name for name, fate in self.merged.decisions.told() if fate.action == "merged")

    def _part(self, module: Module) -> Part:
        info, reason = module.source.info, module.reason
        names = tensor_names(module, self.dialect) if module.name else {}
        if "diff" in names and not self.rule.biases:
            names, reason = {}, NO_VECTORS
        if "up" in names and self.rule.conv_rank == 0 and self.rule.most(info.shape) == 0:
            names, reason = {}, NO_KERNELS
        if self.dialect == "peft" and not is_taken(self._config, module.name):
            names, reason = {}, NOT_TAKEN
        part = Part(
            module.key,
            names,
            info.shape,
            self._dtype(module),
            self._difference(module.source),
            f"difference of {self._names}",
            self._is_turned(module),
            reason,
        )
        return self._as_saved(part, module.source.tensors[0])

    def _as_saved(self, part: Part, name: str) -> Part:
        """The part, held whole where PEFT's adapters do so."""
        saved = self._saved.get(name)
        if saved is None:
            return replace(part, reason=NO_VECTORS) if name in self._vectors else part
        return replace(
            part,
            name=name,
            names={"saved": saved.called(name)},
            turned=False,
            reason=NEEDS_FACTORS if saved.beside else "",
            whole=lambda: self.merged.nodes[name],
            group=ALWAYS if saved.is_head else "" if saved.beside else "vectors",
            needs=f"{PEFT}{saved.beside}" if saved.beside else "",
        )

    @functools.cached_property
    def _vectors(self) -> Mapping[str, Saved]:
        """What is held whole if vectors are asked for, by the names of tensors: of modules all that they have."""
        if self.dialect != "peft":
            return {}
        found = saved_of(self.base.tensors, self._of_model.get("task_type"), vectors=True)
        lacking = {saved.module for name, saved in found.items() if saved.module and name not in self._merged}
        return {name: saved for name, saved in found.items() if saved.module not in lacking}

    @functools.cached_property
    def _saved(self) -> Mapping[str, Saved]:
        """What is held whole: of that, heads in any case."""
        return {name: saved for name, saved in self._vectors.items() if saved.is_head or self.rule.biases}

    @property
    def _names(self) -> str:
        inputs = " and ".join(entry.name for entry in self.recipe.models)
        return f"{inputs} and {self.recipe.base.name if self.recipe.base else ''}"

    def _dtype(self, module: Module) -> DType:
        return factors_dtype(self.recipe, self.merged.tensors[module.source.tensors[0]].dtype)

    def _is_turned(self, module: Module) -> bool:
        if self.dialect != "peft" or not module.name:
            return False
        return is_table(module.name, module.source.info.shape) or self._lies_transposed(module.name)

    def _lies_transposed(self, module: str) -> bool:
        """Whether it is a linear module of GPT-2, or of its kin."""
        is_gpt2 = any(f".{GPT2}." in name for name in self.base.tensors)
        return is_gpt2 and TRANSPOSED.fullmatch(module) is not None

    def _difference(self, source: Source) -> Callable[[], Node]:
        """What makes the difference of the tensors that a module is."""

        def make() -> Node:
            pieces = [rows_of(self._of(piece.tensor), piece.start, piece.stop) for piece in source.pieces]
            info = described(DTYPES["F32"], source.info.shape)
            return transposed(pieces[0]) if source.transposed else joined(pieces, info)

        return make

    def _of(self, name: str) -> Node:
        """θ − θ₀"""
        info = described(DTYPES["F32"], self.base.tensors[name].shape)
        return combine(info, (Term(1.0, self.merged.nodes[name]), Term(-1.0, self.base.node(name))))

    def _remarks(self) -> Iterator[str]:
        yield from self.merged.remarks
        kept: dict[str, list[str]] = {}
        for name, fate in self.merged.decisions.told():
            if fate.action != "merged":
                kept.setdefault(f"{fate.action}: {fate.why}", []).append(name)
        for why, names in kept.items():
            is_left = f"{plural(names, 'is', 'are')} not looked at, and not in the adapter"
            yield f"{count(names, 'tensor')} {is_left} ({why}): {listed(names)}"

    def _companions(self, made: Factored) -> tuple[Companion, ...] | None:
        """PEFT's config; None for adapters that are files."""
        if self.dialect != "peft":
            return None
        factored = (part for part in made.written if part.has_factors)
        ranks = {part.name.removesuffix(".weight"): made.ranks[part.name] for part in factored}
        if not ranks:
            raise PlanError(
                "nothing differs that has factors, and PEFT reads no adapter of norms, biases and heads alone",
                found=[part.name for part in made.written],
                advice="Use --names comfy, which writes differences.",
            )
        turned = any(map(self._lies_transposed, ranks))
        of_model = {**self._of_model, **self._said_of_saved([part.name for part in made.written if part.whole])}
        return (config_of_ranks(ranks, fan_in_fan_out=turned, of_model=of_model),)

    def _said_of_saved(self, names: Collection[str]) -> dict[str, Any]:
        """What PEFT's config says of tensors that are held whole; of the task nothing where its head isn't there."""
        saved = [self._saved[name] for name in names]
        heads = saved_of(self.base.tensors, self._of_model.get("task_type"), vectors=False)
        said: dict[str, Any] = {} if set(names).issuperset(heads) else {"task_type": None}
        if modules := sorted({each.module for each in saved if each.module}):
            said["modules_to_save"] = modules
        if any(each.beside for each in saved):
            said["bias"] = "all"
        return said

    @property
    def _folder(self) -> Path | None:
        """Where the base is; None if it is no file."""
        path: Path | None = getattr(beneath(self.base), "path", None)
        return path if path is None or path.is_dir() else path.parent

    @functools.cached_property
    def _config(self) -> Mapping[str, Any]:
        """What the base's config.json says."""
        return stated_in(self._folder) if self._folder is not None else {}

    @functools.cached_property
    def _of_model(self) -> dict[str, str]:
        """What PEFT's config says of the base: its name on the hub or in its own config, and its task; a path is none
        of that, because it is of this machine."""
        if self._folder is None:
            return {}
        config = self._config
        named = name_of(self._folder) or HubName.of(f"{SCHEME}{config.get('_name_or_path', '')}")
        said = {"base_model_name_or_path": named.name, "revision": named.revision} if named is not None else {}
        return {key: value for key, value in {**said, "task_type": task_of(config)}.items() if value}

    def _check_names(self, parts: list[Part]) -> None:
        """PlanError if two tensors of the model would be one module of the adapter."""
        seen: dict[str, str] = {}
        for part in parts:
            for name in part.names.values():
                if seen.setdefault(name, part.name) != part.name:
                    raise PlanError(f"two tensors would both be {name}", advice="Use --names comfy.")


def factors_dtype(recipe: Recipe, own: DType) -> DType:
    """What factors are stored as: what is asked for, else what the tensor is; PlanError for a dtype of 8 bits."""
    asked = recipe.dtype
    if asked is None:
        return own if own.name in WIDE else DTYPES["F16"]
    if not isinstance(asked, DType) or asked.name not in WIDE:
        raise PlanError(f"factors are not stored as {asked.torch_name}", advice="Use fp16, bf16 or fp32.")
    return asked


def merged_of(
    made: Factored,
    like: Merged | None,
    told: Iterator[str] | tuple[str, ...],
    companions: Callable[[Factored], tuple[Companion, ...] | None],
    stated: Mapping[str, str] = MappingProxyType({}),
) -> Merged:
    """An adapter as a merge that is carried out, with what is told of it, and stated in its metadata beside its rank
    if anything is."""
    told, like = tuple(told), like or Merged(made.decisions)

    def complete(made: Factored) -> Merged:
        low, high = min(made.by_rank, default=0), max(made.by_rank, default=0)
        rank = str(low) if low == high else "Dynamic"
        ranks = {"ss_network_dim": rank, "ss_network_alpha": rank}
        return Merged(
            made.decisions,
            remarks=tuple(dict.fromkeys((*told, *made.remarks()))),
            kept_bytes=like.kept_bytes + made.kept_bytes,
            layout=like.layout,
            extent=like.extent,
            accounts=like.accounts,
            restated={**RESTATED, **ranks},
            stated={**stated, **ranks} if stated else {},
            factored=made,
            companions=companions(made),
            settle=lambda spectra: complete(made.settled(spectra)),
        )

    return complete(made)
