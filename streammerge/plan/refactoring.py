"""A merge of adapters alone, by any method, written as factors anew: of a rank, or of what has to be kept.

    Δ = method(Δ₁, Δ₂, …)  with Δᵢ = scaleᵢ · Bᵢ Aᵢ, 0 where an adapter has no such module, and a base that is 0
    B A ≈ Δ                 of the largest singular values

A sum of products is decomposed between their factors, exactly, and is never there itself. One adapter alone is resized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streammerge.compute.application import apply_method
from streammerge.compute.combining import combine
from streammerge.compute.expressions import Node, Term
from streammerge.compute.matrices import zeros
from streammerge.compute.parts import in_shape
from streammerge.errors import PlanError, count, listed, plural
from streammerge.formats.companions import Companion
from streammerge.methods import find_method
from streammerge.methods.place import Within
from streammerge.methods.registry import Method
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.config import FILE, config_of
from streammerge.models.adapters.decompositions import SAVED
from streammerge.models.adapters.dialects import PEFT, Dialect
from streammerge.models.adapters.factored import Factored, Part
from streammerge.models.adapters.files import Adapter, read_adapter
from streammerge.models.adapters.matching import matched
from streammerge.models.adapters.parts import sorted_parts
from streammerge.models.adapters.peft_config import config_of_ranks
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.dialects import Naming
from streammerge.models.merged import Merged
from streammerge.plan.ensemble import Ensemble
from streammerge.plan.extracting import factors_dtype, merged_of
from streammerge.plan.summing import are_adapters
from streammerge.plan.tuning import Tuning
from streammerge.recipe.parameters import WEIGHT
from streammerge.recipe.recipe import Recipe
from streammerge.tensors import DTYPES, DType, Model, described


def refuse_without_rank(recipe: Recipe, models: Mapping[str, Model]) -> None:
    """PlanError for adapters that are to be merged by a method whose result has no factors of its own."""
    if recipe.low_rank is None and recipe.method != "linear" and are_adapters(models):
        raise PlanError(
            f"{count(models, 'model')} {plural(models, 'is an adapter', 'are adapters')}: factors of changes to a "
            "model, whose average is not the average of the changes",
            found=list(models),
            advice=f"By {recipe.method} their products are merged, and factors made of that: say of which rank (--rank "
            "32), or how much they have to hold (--energy 0.95). Or bake each into its model, and merge the models.",
        )


def refuse_malformed(recipe: Recipe, models: Mapping[str, Model]) -> None:
    """CheckpointError for what would be an adapter, were all of its parts there and of shapes that fit."""
    for entry in recipe.models if recipe.low_rank is not None and recipe.base is None else ():
        model = models[entry.name]
        parts = sorted_parts(model.tensors)
        is_one = not parts.problems and any(not SAVED.issuperset(roles) for roles in parts.modules.values())
        if is_one and isinstance(model, Checkpoint) and isinstance(entry.source, Path):
            read_adapter(model, str(entry.source))


def refactored(
    recipe: Recipe, models: Mapping[str, Model], within: Within = (), naming: Naming | Dialect | None = None
) -> Merged:
    """The adapters merged by the recipe's method, as factors of a rank; PlanError for what has no meaning there."""
    _check(recipe, naming)
    adapters = {entry.name: _read(entry.name, entry.source, models[entry.name]) for entry in recipe.models}
    tuning = Tuning(recipe, models[recipe.inputs[0].name])
    return _Refactoring(recipe, adapters, find_method(recipe.method), tuning, within).adapter()


def _read(name: str, source: Path | Recipe, model: Model) -> Adapter:
    if not isinstance(model, Checkpoint) or not isinstance(source, Path):
        raise PlanError(f"{name} is an adapter that a recipe makes", advice="Write it to a file, and merge that.")
    return read_adapter(model, str(source))


def _check(recipe: Recipe, naming: Naming | Dialect | None) -> None:
    """PlanError for what can't be asked for where adapters are merged."""
    rule = recipe.low_rank
    asked = {
        "a base": recipe.base is not None,
        "rules or a conversion": bool(recipe.rules),
        "only one component": bool(recipe.only),
        "what training left": recipe.prune or recipe.ema != "keep",
        "a layout": recipe.layout_name != recipe.inputs[0].name,
        "other names": naming is not None or bool(rule and rule.names),
        "adapters inside of adapters": any(entry.adapters for entry in recipe.inputs),
        "biases": rule is not None and rule.biases,
        "a least difference": rule is not None and rule.min_diff > 0,
        "a rank of 0": rule is not None and rule.conv_rank == 0,
    }
    if meaningless := [what for what, is_asked in asked.items() if is_asked]:
        raise PlanError(
            f"adapters are merged, where {listed(meaningless)} has no meaning", advice="Leave that out of the merge."
        )


@dataclass(frozen=True, eq=False)
class _Refactoring:
    """The work of `refactored`."""

    recipe: Recipe
    adapters: Mapping[str, Adapter]
    method: Method
    tuning: Tuning
    within: Within
    ensemble: Ensemble = field(default_factory=Ensemble)

    def adapter(self) -> Merged:
        """The adapter, as a merge."""
        assert self.recipe.low_rank is not None
        self._check_dialects()
        self._check_kinds()
        parts = [self._part(module, part) for module, part in self._modules()]
        if not parts:
            raise PlanError("nothing is left of the adapters: all weights are 0", advice="Give one a weight.")
        return merged_of(Factored(parts, self.recipe.low_rank), None, self._remarks(), self._companions)

    def _modules(self) -> Iterator[tuple[str, str]]:
        """Every module and part that an adapter with a weight has."""
        names = dict.fromkeys(module for adapter in self.adapters.values() for module in adapter.roles)
        for module in names:
            for part in ("weight", "bias"):
                if any(self._changes(module, part)):
                    yield module, part

    def _changes(self, module: str, part: str) -> list[Change | None]:
        """What each adapter does to a module's part; None where it does nothing, or has no weight there."""
        found = [
            adapter.changes(module).get(part) if module in adapter.roles else None for adapter in self.adapters.values()
        ]
        if self.method.name != "linear":
            return found
        return [change if weight else None for change, weight in zip(found, self._weights(module), strict=True)]

    def _weights(self, module: str) -> Sequence[float]:
        """Strengths add up: weights are not divided by their sum, unless `normalize` is said to be true."""
        found = self.tuning.values(module, None)[WEIGHT]
        own = [float(each) for each in found] if isinstance(found, tuple) else [float(found)] * len(self.adapters)
        is_normalised = self.recipe.parameters.get("normalize") is True
        return [each / sum(own) for each in own] if is_normalised else own

    def _part(self, module: str, part: str) -> Part:
        first = next(change for change in self._changes(module, part) if change is not None)
        return Part(
            module if part == "weight" else f"{module}.{part}",
            self._names(module, part, first),
            first.shape,
            self._dtype(module),
            lambda: self._merged(module, part, first.shape),
            self.method.name,
            self._is_turned(module),
        )

    def _merged(self, module: str, part: str, shape: tuple[int, ...]) -> Node:
        """What becomes of a module's part, as an expression."""
        info, changes = described(DTYPES["F32"], shape), self._changes(module, part)
        if self.method.name == "linear":
            terms = (
                Term(weight * change.scale, in_shape(change.value, shape))
                for weight, change in zip(self._weights(module), changes, strict=True)
                if change is not None
            )
            return combine(info, tuple(terms))
        inputs = [zeros(shape) if change is None else _scaled(change, shape) for change in changes]
        base = [zeros(shape)] if self.method.base == "required" else []
        values, seed = self.tuning.values(module, None), self.recipe.seed or 0
        name = module if part == "weight" else f"{module}.{part}"
        return self.ensemble.joined(apply_method(self.method, info, values, [*base, *inputs], name, seed, self.within))

    def _roles(self, module: str) -> Mapping[str, str]:
        """What the tensors of a module are called: as in the first adapter that has them."""
        found: dict[str, str] = {}
        for adapter in self.adapters.values():
            found = {**adapter.roles.get(module, {}), **found}
        return found

    def _names(self, module: str, part: str, change: Change) -> Mapping[str, str]:
        roles, is_matrix = self._roles(module), len(change.shape) > 1
        if part == "bias":
            return {"diff_b": roles.get("diff_b") or roles.get("up.bias") or f"{module}.diff_b"}
        if not is_matrix:
            return {"diff": roles.get("diff", f"{module}.diff")}
        if "embedding.up" in roles:
            return {"up": roles["embedding.up"], "down": roles["embedding.down"]}
        is_peft = module.startswith(PEFT)
        up, down = ("lora_B.weight", "lora_A.weight") if is_peft else ("lora_up.weight", "lora_down.weight")
        alpha = {} if is_peft or "alpha" not in roles else {"alpha": roles["alpha"]}
        return {"up": roles.get("up", f"{module}.{up}"), "down": roles.get("down", f"{module}.{down}"), **alpha}

    def _dtype(self, module: str) -> DType:
        """That of the first adapter's, if it is one for factors."""
        adapter = next(each for each in self.adapters.values() if module in each.roles)
        roles = adapter.roles[module]
        name = next(
            (roles[role] for role in ("up", "embedding.up", "diff") if role in roles), next(iter(roles.values()))
        )
        own = adapter.checkpoint.tensors[name].dtype
        return factors_dtype(self.recipe, own)

    def _is_turned(self, module: str) -> bool:
        """Whether the factors in the file are those of the transposed difference."""
        if "embedding.up" in self._roles(module):
            return True
        configs = (config_of(adapter.configs, module) for adapter in self.adapters.values())
        return any(config is not None and config.fan_in_fan_out for config in configs)

    # ── what is refused, and what is told ────────────────────────────────────────────────────────────────────────────

    def _check_dialects(self) -> None:
        """PlanError if modules are named in several ways, or told in several parts."""
        found = matched({name: adapter.roles.keys() for name, adapter in self.adapters.items()}, None)
        others = [
            f"{own} of {adapter}   is {module} of others, or a part of it"
            for module, by_adapter in found.modules.items()
            for adapter, modules in by_adapter.items()
            for own, part in modules
            if own != module or part is not None
        ]
        if others:
            raise PlanError(
                "the adapters' modules are named in several ways",
                found=others,
                advice="Write them under the same names first: streammerge ADAPTER --names kohya -o …; or bake them.",
            )
        turned = {adapter.configs[""].fan_in_fan_out for adapter in self.adapters.values() if "" in adapter.configs}
        if len(turned) > 1:
            raise PlanError(
                "some of the adapters were made for weights that lie transposed (fan_in_fan_out), and some not"
            )

    def _check_kinds(self) -> None:
        """PlanError for what is no difference, or not of one shape in all adapters."""
        problems = [problem for module, part in self._modules() for problem in self._problems(module, part)]
        if problems:
            raise PlanError(
                f"{count(problems, 'module')} of the adapters can't be merged",
                found=problems,
                advice="What adds a difference to a weight is; put others into their model with streammerge bake.",
            )

    def _problems(self, module: str, part: str) -> Iterator[str]:
        found = {
            name: change for name, change in zip(self.adapters, self._changes(module, part), strict=True) if change
        }
        first = next(iter(found.values()))
        for name, change in found.items():
            if not change.is_linear:
                yield f"{module}   of {name} is {change.kind}, which depends on the weight that it changes"
            elif not change.fits(first.shape) or len(change.shape) < min(len(first.shape), 2):
                yield f"{module}   is {list(first.shape)}, and of {name} {list(change.shape)}"

    def _remarks(self) -> Iterator[str]:
        for module, _ in self._modules():
            self.tuning.values(module, None)  # only then it is known what has an effect
        yield from self.tuning.remarks()
        names = listed(list(self.adapters))
        what = "is resized" if len(self.adapters) == 1 else f"are merged by {self.method.name}, as products"
        yield f"{names} {what}"

    def _companions(self, made: Factored) -> tuple[Companion, ...] | None:
        """PEFT's config; None for adapters that are files."""
        if not any(module.startswith(PEFT) for adapter in self.adapters.values() for module in adapter.roles):
            return None
        ranks = {part.name: made.ranks[part.name] for part in made.written if part.has_factors}
        own = next(entry for entry in self.recipe.models)
        assert isinstance(own.source, Path)
        folder = own.source if own.source.is_dir() else own.source.parent
        like = json.loads((folder / FILE).read_text(encoding="utf-8")) if (folder / FILE).is_file() else None
        turned = any(part.turned for part in made.written if "embedding" not in part.names.get("up", ""))
        return (config_of_ranks(ranks, like, fan_in_fan_out=turned),)


def _scaled(change: Change, shape: tuple[int, ...]) -> Node:
    return combine(described(DTYPES["F32"], shape), (Term(change.scale, in_shape(change.value, shape)),))
