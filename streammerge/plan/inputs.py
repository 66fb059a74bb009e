"""Opening what a recipe names, each file once, and making one model of it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from streammerge.errors import CheckpointError, PlanError
from streammerge.formats.files import ByteFile
from streammerge.formats.tables import names_bytes
from streammerge.methods import find_method
from streammerge.methods.place import Within
from streammerge.methods.registry import BlockMethod, WholeMethod
from streammerge.models.adapters.dialects import Dialect
from streammerge.models.by_token import names_by_token
from streammerge.models.checkpoints import Checkpoint, open_model
from streammerge.models.configs import has_head
from streammerge.models.dialects import Naming
from streammerge.models.extent import check_steps
from streammerge.models.flattened import check_not_flattened
from streammerge.models.merged import Merged, files_of
from streammerge.models.modules import Part, assembled, check_modules, layout_of, outside, rest_of
from streammerge.models.prefixes import Prefixed
from streammerge.models.slices import LayerRange, Span, stacked
from streammerge.models.tied import with_heads
from streammerge.models.unwrapped import unwrapped
from streammerge.plan.adapting import accounted, told_of, with_adapters
from streammerge.plan.decide import merge_models
from streammerge.plan.naming import of_models
from streammerge.plan.sources import Sources, reading_bytes
from streammerge.plan.summing import are_adapters, is_sum, sum_of_adapters
from streammerge.plan.vocabularies import MATCHED, Settled, settled, tokenizer_beside
from streammerge.recipe.recipe import Input, Recipe
from streammerge.tensors import Model

PartOf = Callable[[Input, Model], Model]
"""What is meant of an input's model."""

NESTED: Final = "Options are for the outer recipe: write them in this one, as keys (on_missing: keep) and rules."
"""What to say of advice that is meant for a nested recipe."""


@dataclass
class OpenInputs:
    """Checkpoints that are open, each path and entry once, however often recipes name them."""

    checkpoints: dict[tuple[Path, str], Checkpoint] = field(default_factory=dict)
    merges: dict[str, Merged] = field(default_factory=dict)
    steps: int = 0

    def open(self, path: Path, entry: str = "") -> Checkpoint:
        """The checkpoint at this path, its state dict being the entry of this name where one has to be chosen."""
        try:
            key = path.resolve()
        except RuntimeError as error:  # Python's word, before 3.13, for links that lead to each other
            loop = os.strerror(errno.ELOOP)
            raise CheckpointError(f"{path}: can't be read: {loop}", advice="Name a checkpoint file.") from error
        if (key, entry) not in self.checkpoints:
            self.checkpoints[key, entry] = opened = open_model(path, entry)
            check_not_flattened(str(path), opened)
        return self.checkpoints[key, entry]

    def opened(self, path: Path) -> Checkpoint:
        """A checkpoint at this path that is open already, whichever its entry: for what it has in its files."""
        return next(opened for (key, _), opened in self.checkpoints.items() if key == path.resolve())

    def merge(
        self,
        recipe: Recipe,
        within: Within = (),
        naming: Naming | Dialect | None = None,
        part: PartOf | None = None,
    ) -> Merged:
        """The recipe as a model, its nested recipes opened first; `within` is where it stands in another, if it does.

        It has its layout's names, unless a naming is asked for; `part` gives what is meant of each model, if not all.

        Nested recipes that are equal are gone through once, unless random numbers have to differ.
        """
        made = self._made(recipe, within, naming, part)
        return made if within else accounted(made, recipe)

    def _made(self, recipe: Recipe, within: Within, naming: Naming | Dialect | None, part: PartOf | None) -> Merged:
        if recipe.by_module:
            return self._assembly(recipe, within, of_models(naming))
        if recipe.is_stack:
            return self._stack(recipe, within, of_models(naming), part)
        models = self._models(recipe, within, part)
        if recipe.mixture is not None:
            from streammerge.plan.mixing import mixture_of  # late: who builds no mixture needs none of it

            bare = unwrapped(models, recipe.layout_name)
            made = mixture_of(recipe, recipe.mixture, bare.models, naming)
            return told_of(replace(made, remarks=(*bare.remarks, *made.remarks)), models)
        if recipe.low_rank is None and is_sum(recipe, models):
            return sum_of_adapters(recipe, models, naming)
        if recipe.low_rank is not None or (recipe.method != "linear" and are_adapters(models)):
            return self._of_low_rank(recipe, models, within, naming)
        whole, told = _alike(recipe, models)
        one = _settled(recipe, whole)
        return told_of(one.told(self._merged(recipe, one.models, within, of_models(naming), told)), models)

    def _of_low_rank(
        self, recipe: Recipe, models: dict[str, Model], within: Within, naming: Naming | Dialect | None
    ) -> Merged:
        """Adapters merged to a rank, or the adapter of what a merge is beyond its base."""
        from streammerge.plan import extracting, refactoring  # late: few merges are of these

        refactoring.refuse_without_rank(recipe, models)
        recipe, naming = extracting.with_names(recipe, naming)
        if are_adapters(models):
            return refactoring.refactored(recipe, models, within, naming)
        refactoring.refuse_malformed(recipe, models)
        plain = extracting.to_be_merged(recipe, naming)
        whole, told = _alike(recipe, models, anyway=True)
        one = _settled(recipe, whole)
        merged = told_of(one.told(self._merged(plain, one.models, within, None, told)), models)
        return extracting.extracted(recipe, merged, one.models)

    def _models(self, recipe: Recipe, within: Within, part: PartOf | None = None) -> dict[str, Model]:
        """The recipe's inputs by name, nested recipes made models, adapters put into them, under the names wanted."""
        drop, models = recipe.on_missing == "drop", {}
        for place, entry in recipe.by_place.items():
            model = with_adapters(entry, self._input(entry, recipe, (*within, place)), self.open, drop=drop)
            model = Prefixed(model, entry.prefixes, entry.name) if entry.prefixes else model
            models[entry.name] = model if part is None else part(entry, model)
        return models

    def _assembly(self, recipe: Recipe, within: Within, naming: Naming | None) -> Merged:
        """The modules of a recipe, each a merge of parts of models, as one model."""
        parts = {entry.name: entry.source for entry in recipe.inputs if isinstance(entry.source, Recipe)}
        modules, wholes, made = tuple(parts), dict[str, Model](), dict[str, Merged]()
        for number, (module, each) in enumerate(parts.items()):
            for inner in each.parts:
                models = self._models(inner, (*within, number))
                wholes.update({_called(module, inner.named[name]): model for name, model in models.items()})
        wholes, told = _bare(wholes, next(iter(wholes)), "/")
        check_modules(wholes, modules)
        having = _having_tokens(wholes, modules)
        one = _settled_modules(recipe, parts, wholes, having)
        layout = layout_of({called: one.models[called] for called in (*having, *wholes)}, modules)
        if extra := outside(one.models.values() if recipe.on_missing == "error" else [layout], modules):
            made |= rest_of(extra, layout, modules, recipe.on_missing)
        for number, (module, each) in enumerate(parts.items()):

            def part(entry: Input, _: Model, module: str = module) -> Model:
                return Part(one.models[_called(module, entry)], module, modules)

            with saying_where(module):
                made[module] = self.merge(replace(each, vocabulary=MATCHED), (*within, number), naming, part)
        whole = assembled(made, layout)
        texts = (merged for merged in made.values() if names_by_token(merged.tensors))
        whole = replace(whole, tokenizer=tokenizer_beside(next(texts, whole), layout))
        return one.told(replace(whole, remarks=(*told, *whole.remarks)))

    def _stack(self, recipe: Recipe, within: Within, naming: Naming | None, part: PartOf | None) -> Merged:
        """The slices of a stack, each a merge of some layers, as one model."""
        slices = [entry.source for entry in recipe.inputs if isinstance(entry.source, Recipe)]
        models = [self._models(each, (*within, number), part) for number, each in enumerate(slices)]
        called = [f"slice {number + 1}" for number in range(len(slices))]
        named = {f"{called[number]}: {name}": model for number, own in enumerate(models) for name, model in own.items()}
        bare, unwrapping = _bare(named, f"{called[0]}: {slices[0].layout_name}", ": ")
        headed, told = with_heads(bare)
        one = _settled_stack(recipe, slices, headed)
        made, first = [], 0
        for number, (each, own) in enumerate(zip(slices, models, strict=True)):
            views = {
                name: LayerRange(
                    one.models[f"{called[number]}: {name}"], _span(entry, first, number, len(slices)), name
                )
                for name in own
                if (entry := each.named[name])
            }
            with saying_where(called[number]):
                made.append(self._merged(each, views, (*within, number), naming))
            first += max(len(range(*entry.layers)) for entry in each.inputs if entry.layers is not None)
        merged = told_of(one.told(stacked(made)), named)
        return replace(merged, remarks=(*unwrapping, *told, *merged.remarks))

    def _merged(
        self,
        recipe: Recipe,
        models: Mapping[str, Model],
        within: Within,
        naming: Naming | None,
        told: Iterable[str] = (),
    ) -> Merged:
        """The recipe's merge of these models, which counts towards what is planned; with what is to be told."""
        merged = merge_models(recipe, models, within, naming)
        self.steps += merged.extent.own
        check_steps(self.steps)
        return replace(merged, remarks=(*told, *merged.remarks)) if told else merged

    def _input(self, entry: Input, recipe: Recipe, within: Within) -> Model:
        """An input's model, without the adapters that it may have."""
        if isinstance(entry.source, Recipe):
            return self._nested(entry.name, seeded(entry.source, recipe.seed), within)
        return self.open(entry.path, entry.entry)

    def _nested(self, name: str, recipe: Recipe, within: Within) -> Merged:
        """A nested recipe as a model; a PlanError says that it is meant, which options don't reach."""
        key = "" if may_draw(recipe) else repr(recipe)
        if key in self.merges:
            return self.merges[key]
        with saying_where(name):
            merged = self.merge(recipe, within)
        if key:
            self.merges[key] = merged
        return merged

    @property
    def files(self) -> list[ByteFile]:
        """Every file of every open checkpoint."""
        return [file for opened in self.checkpoints.values() for file in opened.files]

    def sources(self, merged: Merged) -> Sources:
        """What is read for a merge: of models that were opened elsewhere, their files."""
        opened = self.checkpoints.values()
        tables = [one.names for one in opened if one.names is not None]
        described_bytes = names_bytes(tables) + sum(one.described_bytes for one in opened)
        left = {one.path: one.left for one in opened if one.left.count}
        return Sources(tuple(self.files or files_of(merged)), described_bytes, left, reading_bytes(tables))

    def close(self) -> None:
        """Close all files."""
        for opened in self.checkpoints.values():
            opened.close()


@contextlib.contextmanager
def saying_where(name: str) -> Iterator[None]:
    """Have a PlanError say that a recipe within another is meant, which options don't reach."""
    try:
        yield
    except PlanError as error:
        error.what = f"{name}: {error.what}"
        if not error.advice.endswith(NESTED):
            error.advice = f"{error.advice} {NESTED}"
        raise


def _bare(models: Mapping[str, Model], layout: str, behind: str) -> tuple[dict[str, Model], list[str]]:
    """The models of parts of a recipe without wrappers' names; and what was done, once for each of them: their names
    stand `behind` that of the part."""
    bare = unwrapped(models, layout)
    return dict(bare.models), list(dict.fromkeys(remark.partition(behind)[2] for remark in bare.remarks))


def _alike(
    recipe: Recipe, models: Mapping[str, Model], *, anyway: bool = False
) -> tuple[Mapping[str, Model], list[str]]:
    """The models without wrappers' names, those that are tied with the head that is their embedding; and what was done.

    Where the layout's tensors are kept that others have not, it is not missing in a tied model, if the layout has one.
    """
    bare = unwrapped(models, recipe.layout_name, anyway=anyway)
    may_be_missing = recipe.on_missing == "keep" and not has_head(bare.models[recipe.layout_name].tensors)
    if recipe.on_missing == "drop" or may_be_missing:
        return bare.models, [*bare.remarks]
    whole, told = with_heads(bare.models)
    return whole, [*bare.remarks, *told]


def _settled(recipe: Recipe, models: Mapping[str, Model]) -> Settled:
    """The models of a recipe, whose rows are of the same tokens."""
    base = recipe.base.name if recipe.base else ""
    cuts = recipe.on_shape_mismatch == "error"
    return settled(recipe.vocabulary, models, layout=recipe.layout_name, base=base, cuts=cuts)


def _settled_stack(recipe: Recipe, slices: Sequence[Recipe], models: Mapping[str, Model]) -> Settled:
    """The models of slices, by `slice N: NAME`, whose rows are of the same tokens; each model is one, however often
    slices name it."""
    first, of, whole = slices[0], dict[str, str](), dict[str, Model]()
    known: dict[tuple[str, str], str] = {}
    for number, each in enumerate(slices, 1):
        for name, entry in each.named.items():
            key = f"slice {number}: {name}"
            of[key] = known.setdefault((name, repr(entry.adapters)), key if name in whole else name)
            whole.setdefault(of[key], models[key])
    base = first.base.name if first.base else ""
    one = settled(recipe.vocabulary, whole, layout=first.layout_name, base=base)
    return replace(one, models={key: one.models[name] for key, name in of.items()})


def _called(module: str, entry: Input) -> str:
    """What a model of a module is called among those of all: by its own name, and that of what is put into it."""
    return f"{module}/{entry.name}" + "".join(f" + {adapter!r}" for adapter in entry.adapters)


def _having_tokens(wholes: Mapping[str, Model], modules: tuple[str, ...]) -> list[str]:
    """Those of the models of modules, by `MODULE/NAME`, of whose tensors by token the module has some."""
    parts = {called: Part(model, called.partition("/")[0], modules) for called, model in wholes.items()}
    return [called for called, part in parts.items() if names_by_token(part.tensors)]


def _settled_modules(
    recipe: Recipe, parts: Mapping[str, Recipe], wholes: Mapping[str, Model], having: Sequence[str]
) -> Settled:
    """The models of modules, those whose tokens count with rows of the same ones; each is one, however many modules
    name it."""
    if not having:
        return Settled(wholes)
    of = {called: called.partition("/")[2] for called in having}
    module = having[0].partition("/")[0]
    first = parts[module].parts[0]
    base = _called("", first.base)[1:] if first.base else ""
    layout = _called("", first.named[first.layout_name])[1:]
    cuts, models = first.on_shape_mismatch == "error", {of[called]: wholes[called] for called in having}
    one = settled(recipe.vocabulary, models, layout=layout, base=base, cuts=cuts)
    return replace(one, models={**wholes, **{called: one.models[name] for called, name in of.items()}})


def _span(entry: Input, first: int, number: int, count: int) -> Span:
    """The layers of a source of one of so many slices, which become layers from number `first` on."""
    start, stop = entry.layers or (0, 0)
    return Span(start, stop, first, before=number == 0, after=number == count - 1)


def seeded(recipe: Recipe, seed: int | None) -> Recipe:
    """A nested recipe with the seed of the one that it is part of, unless it has its own."""
    return recipe if recipe.seed is not None else replace(recipe, seed=seed)


def may_draw(recipe: Recipe) -> bool:
    """Whether random numbers may be drawn for the recipe: by a method that is told where its block lies."""
    method = find_method(recipe.method)
    knows_place = isinstance(method, BlockMethod | WholeMethod) and "place" in method.wanted
    if knows_place or (isinstance(method, BlockMethod) and method.statistics is not None):
        return True
    return any(may_draw(entry.source) for entry in recipe.named.values() if isinstance(entry.source, Recipe))
