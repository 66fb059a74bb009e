"""A merge of adapters alone, by any method, written as factors anew: of a rank, or of what has to be kept.

    Δ = method(Δ₁, Δ₂, …)  with Δᵢ = scaleᵢ · Bᵢ Aᵢ, 0 where an adapter has no such module, and a base that is 0
    B A ≈ Δ                 of the largest singular values

A sum of products is decomposed between their factors, exactly, and is never there itself. One adapter alone is resized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from streammerge.models.adapters.decompositions import SAVED
from streammerge.models.adapters.dialects import Dialect
from streammerge.models.adapters.factored import ALWAYS, Factored, Part
from streammerge.models.adapters.files import Adapter, read_adapter
from streammerge.models.adapters.matching import BAKE
from streammerge.models.adapters.parts import sorted_parts
from streammerge.models.adapters.peft_config import OF_SAVED, config_of_ranks, said_alike
from streammerge.models.adapters.products import as_lora
from streammerge.models.adapters.together import Together
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.dialects import Naming
from streammerge.models.hub import HubName
from streammerge.models.merged import Merged
from streammerge.plan.ensemble import Ensemble
from streammerge.plan.extracting import factors_dtype, merged_of
from streammerge.plan.strengths import Strengths
from streammerge.plan.summing import are_adapters, check_asked, dialect_asked
from streammerge.recipe.recipe import Recipe
from streammerge.tensors import DTYPES, Model, described


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
    _check(recipe)
    rule = recipe.low_rank
    dialect = dialect_asked(naming or (rule.names if rule else None))
    together = Together(
        {entry.name: _read(entry.name, entry.source, models[entry.name]) for entry in recipe.models}, dialect
    )
    if together.parameters:
        raise PlanError(
            "adapters of parameters (target_parameters), such as all experts of a layer, are added up, not decomposed",
            found=[f"{module}   {name}" for module, name in together.parameters.items()],
            advice=f"Leave the rank and the method out. {BAKE}",
        )
    strengths = Strengths(recipe, together)
    return _Refactoring(recipe, together, find_method(recipe.method), strengths, within).adapter()


def _read(name: str, source: Path | HubName | Recipe, model: Model) -> Adapter:
    if not isinstance(model, Checkpoint) or not isinstance(source, Path):
        raise PlanError(f"{name} is an adapter that a recipe makes", advice="Write it to a file, and merge that.")
    return read_adapter(model, str(source))


def _check(recipe: Recipe) -> None:
    """PlanError for what can't be asked for where adapters are merged."""
    rule = recipe.low_rank
    more = {
        "biases": rule is not None and rule.biases,
        "a least difference": rule is not None and rule.min_diff > 0,
        "a rank of 0": rule is not None and rule.conv_rank == 0,
    }
    check_asked(recipe, "merged", **more)


@dataclass(frozen=True, eq=False)
class _Refactoring:
    """The work of `refactored`."""

    recipe: Recipe
    together: Together
    method: Method
    strengths: Strengths
    within: Within
    ensemble: Ensemble = field(default_factory=Ensemble)

    def adapter(self) -> Merged:
        """The adapter, as a merge."""
        assert self.recipe.low_rank is not None
        self._check_directions()
        self._check_kinds()
        parts = [self._part(module, part) for module, part in self._modules()]
        if not parts:
            raise PlanError("nothing is left of the adapters: all weights are 0", advice="Give one a weight.")
        return merged_of(Factored(parts, self.recipe.low_rank), None, self._remarks(), self._companions)

    def _modules(self) -> Iterator[tuple[str, str]]:
        """Every module and part that an adapter with a weight has."""
        for module in self.together.matched.modules:
            having = self._having(module)
            for part in ("weight", "bias"):
                if any(own.adapter in having and own.change(part) for own in self.together.own(module)):
                    yield module, part

    def _weights(self, module: str) -> Mapping[str, float]:
        """How much of each adapter is in a module, where methods add up; they are given weights otherwise."""
        if self.method.name != "linear":
            return dict.fromkeys(self.together.adapters, 1.0)
        return dict(zip(self.together.adapters, self.strengths.of(module), strict=True))

    def _having(self, module: str) -> frozenset[str]:
        """The adapters that have a weight in a module."""
        return frozenset(name for name, weight in self._weights(module).items() if weight)

    def _changes(self, module: str, part: str) -> list[tuple[str, Change]]:
        """What adapters with a weight do to a module's part; several where one of them has it in parts."""
        return self.together.changes(module, part, self._having(module))

    def _part(self, module: str, part: str) -> Part:
        [(_, first), *_] = self._changes(module, part)
        if first.is_saved:
            return self._saved(module, part, first)
        return Part(
            module if part == "weight" else f"{module}.{part}",
            self._names(module, part, first),
            first.shape,
            factors_dtype(self.recipe, self.together.dtype(module, "up" if len(first.shape) > 1 else "diff")),
            lambda: self._merged(module, part, first.shape),
            self.method.name,
            self.together.is_turned(module),
        )

    def _saved(self, module: str, part: str, change: Change) -> Part:
        """What the one adapter that there is has saved whole: it stays what it is."""
        [own] = self.together.own(module)
        name = own.roles["bias" if part == "bias" else "weight" if "weight" in own.roles else "base"]
        dtype = factors_dtype(self.recipe, own.file.checkpoint.tensors[name].dtype)
        made, why = (lambda: change.value), "saved whole"
        return Part(name, {"saved": name}, change.shape, dtype, made, why, whole=made, group=ALWAYS)

    def _merged(self, module: str, part: str, shape: tuple[int, ...]) -> Node:
        """What becomes of a module's part, as an expression."""
        info, changes = described(DTYPES["F32"], shape), self._changes(module, part)
        weights = self._weights(module)
        terms = {
            name: tuple(
                Term(weights[name] * own.scale, in_shape(own.value, shape)) for each, own in changes if each == name
            )
            for name in self.together.adapters
        }
        if self.method.name == "linear":
            return combine(info, tuple(term for own in terms.values() for term in own))
        inputs = [combine(info, own) if own else zeros(shape) for own in terms.values()]
        base = [zeros(shape)] if self.method.base == "required" else []
        values, seed = self.strengths.values(module), self.recipe.seed or 0
        name = module if part == "weight" else f"{module}.{part}"
        return self.ensemble.joined(apply_method(self.method, info, values, [*base, *inputs], name, seed, self.within))

    def _names(self, module: str, part: str, change: Change) -> Mapping[str, str]:
        """What the tensors of a module are called: as the adapters have them, else as the dialect does."""
        called, has = self.together.tensor, self.together.has
        if part == "bias":
            is_ups = has(module, "up.bias") and not has(module, "diff_b")
            return {"diff_b": called(module, "up.bias" if is_ups else "diff_b")}
        if len(change.shape) < 2:
            return {"diff": called(module, "diff")}
        if has(module, "embedding.up"):
            return {role: called(module, f"embedding.{role}") for role in ("up", "down")}
        alpha = self.together.known_tensor(module, "alpha") if has(module, "alpha") else None
        factors = {role: called(module, role) for role in ("up", "down")}
        return factors if alpha is None or self.together.is_pefts else {**factors, "alpha": alpha}

    # ── what is refused, and what is told ────────────────────────────────────────────────────────────────────────────

    def _check_directions(self) -> None:
        """PlanError if only some were made for weights that lie transposed."""
        adapters = self.together.adapters.values()
        turned = {adapter.configs[""].fan_in_fan_out for adapter in adapters if "" in adapter.configs}
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
                advice="Only what adds a difference to a weight is. Bake others into their model: streammerge bake "
                "MODEL ADAPTER ADAPTER -o TUNED. One adapter of that is made by streammerge extract TUNED MODEL "
                "--rank R.",
            )

    def _problems(self, module: str, part: str) -> Iterator[str]:
        first, having = None, self._having(module)
        for own in self.together.own(module):
            change = own.change(part) if own.adapter in having else None
            if change is None:
                continue
            if change.is_saved:
                yield from self._problems_of_saved(own.module, own.adapter)
                continue
            made = as_lora(change) if own.rows else change
            first = first or (None if own.rows else made)
            if not change.is_linear:
                yield f"{own.module}   of {own.adapter} is {change.kind}, which depends on the weight that it changes"
            elif own.rows and made.kind != "LoRA":
                yield f"{own.module}   of {own.adapter} is {change.kind}, and rows of {module}: only LoRAs may be"
            elif first and not own.rows and not _fit(made, first):
                yield f"{module}   is {list(first.shape)}, and of {own.adapter} {list(made.shape)}"

    def _problems_of_saved(self, module: str, adapter: str) -> Iterator[str]:
        """Why a module that is saved whole can't be in the output: it can be where it stays what it is."""
        is_alone = len(self.together.adapters) == 1 and self.method.name == "linear"
        if not (is_alone and self._weights(module)[adapter] == 1 and self.together.is_pefts):
            yield f"{module}   of {adapter} is saved whole, which one adapter that is resized keeps, of weight 1"

    def _remarks(self) -> Iterator[str]:
        yield from self.strengths.remarks()
        adapters, found = self.together.adapters, self.together.matched
        what = "is resized" if len(adapters) == 1 else f"are merged by {self.method.name}, as products"
        names = f"; modules are named as in {found.dialect}'s files" if found.is_renamed else ""
        yield f"{listed(list(adapters))} {what}{names}"
        yield from self.together.remarks()

    def _companions(self, made: Factored) -> tuple[Companion, ...] | None:
        """PEFT's config; None for adapters that are files."""
        if not self.together.is_pefts:
            return None
        ranks = {part.name: made.ranks[part.name] for part in made.written if part.has_factors}
        of_model = said_alike(self.together.configs)
        if any(part.whole for part in made.written):
            [config] = self.together.configs
            of_model |= {key: config.said[key] for key in OF_SAVED if key in config.said}
        return (config_of_ranks(ranks, self.together.configs, of_model=of_model),)


def _fit(one: Change, other: Change) -> bool:
    return one.fits(other.shape) and len(one.shape) >= min(len(other.shape), 2)
