"""Recipes from YAML's values, checked piece by piece: whatever is not understood is an error that says where it is.

The YAML is mergekit's (`merge_method`, `models`, `slices`, `modules`, `base_model`, `parameters`, …) and our own
keys `layout`, `rules`, `inputs`, `seed`, `low_rank` and others; `model:` may be a whole recipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from streammerge.errors import RecipeError, suggestion
from streammerge.models.dtypes import parse_dtype
from streammerge.models.extent import MAX_DEPTH
from streammerge.models.hub import HubName
from streammerge.recipe.checks import check_recipe
from streammerge.recipe.entries import Entries
from streammerge.recipe.low_rank import parse_low_rank
from streammerge.recipe.modules import ASSEMBLY_KEYS, module_recipes
from streammerge.recipe.naming import distinct_names, given_names
from streammerge.recipe.parameters import parse_settings
from streammerge.recipe.policies import EMA_POLICIES, MISSING_POLICIES, PREDICTION_POLICIES, SHAPE_POLICIES
from streammerge.recipe.recipe import Input, Recipe
from streammerge.recipe.references import References
from streammerge.recipe.rules import with_rules
from streammerge.recipe.slices import STACK_KEYS, check_slice, named_apart, slice_recipes
from streammerge.recipe.spellings import check_keys, in_our_words, parse_flag, parse_name, parse_part, parse_seed
from streammerge.recipe.templates import parse_chat_template
from streammerge.recipe.vocabulary import parse_vocabulary

KEYS: Final = (
    *("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "name"),
    *("tokenizer", "tokenizer_source", "chat_template", "const_tag"),
    *("layout", "on_shape_mismatch", "on_missing", "on_prediction_mismatch", "rules", "inputs", "seed"),
    *("only", "ema", "prune", "low_rank"),
)
"""The keys of a recipe: mergekit's, then our own."""

RECIPE_WORDS: Final = frozenset((*KEYS, *STACK_KEYS, *ASSEMBLY_KEYS))
"""All keys that mean something at the top of a recipe."""

NEEDED: Final = {
    "merge_method": "Name the method, as in merge_method: linear.",
    "models": "List the models, as in models: [a.safetensors, b.safetensors].",
}
"""The keys that every recipe has, and what to do if one is missing."""


def parse_recipe(
    raw: Any,  # noqa: ANN401  (whatever YAML gave)
    folder: Path,
    bindings: Mapping[str, Path | HubName] | None = None,
    where: str = "recipe",
    *,
    strict: bool = False,
) -> Recipe:
    """A recipe from YAML's values; relative paths start at `folder`, and `bindings` fill the names under `inputs`.

    `where` is what a RecipeError calls the recipe: its file, if it has one.
    """
    parser = _RecipeParser(folder, bindings or {}, where)
    try:
        return check_recipe(parser.parse(raw), where, strict=strict)
    except RecipeError as error:
        if where != "recipe" and where not in error.what:
            error.what = f"{where}: {error.what}"
        raise


@dataclass(frozen=True)
class _RecipeParser:
    """Turns YAML's values into a Recipe, saying where it finds something that it doesn't expect."""

    folder: Path
    bindings: Mapping[str, Path | HubName]
    where: str = "recipe"
    known: dict[int, Recipe] = field(default_factory=dict)
    depth: int = 1
    is_slice: bool = False

    @property
    def entries(self) -> Entries:
        """What reads the entries of its models."""
        return Entries(self.folder, self.bindings, self._nested, self.is_slice)

    def parse(self, raw: Any) -> Recipe:  # noqa: ANN401
        if not isinstance(raw, dict):
            raise RecipeError(f"{self.where}: expected a map with merge_method and models, found {type(raw).__name__}")
        raw = in_our_words(raw)
        if "modules" in raw:
            return self._assembly(raw)
        if "slices" in raw:
            return self._stack(raw)
        if "experts" in raw and "merge_method" not in raw:
            from streammerge.recipe.mixtures import mixture_recipe

            return mixture_recipe(raw, self.where, References(self.entries))
        check_keys(raw, KEYS, self.where)
        self._check_needed(raw)
        if not isinstance(raw["models"], list):
            raise RecipeError(f"{self.where}: models must be a list, found {raw['models']!r}")
        self._check_bound(raw.get("inputs"))
        given = given_names(raw["models"], self.where)
        inputs = [self.entries.input(entry, f"{self.where}: model {n}") for n, entry in enumerate(raw["models"], 1)]
        shared = {name for name, times in Counter(entry.name for entry in inputs).items() if times > 1}
        recipe = Recipe(
            where=self.where,
            method=parse_name(raw["merge_method"], f"{self.where}: merge_method"),
            inputs=tuple(distinct_names(inputs)),
            parameters=parse_settings(raw.get("parameters"), self.where),
            on_shape_mismatch=self._choice(raw, "on_shape_mismatch", SHAPE_POLICIES),
            on_missing=self._choice(raw, "on_missing", MISSING_POLICIES),
            on_prediction_mismatch=self._choice(raw, "on_prediction_mismatch", PREDICTION_POLICIES),
            dtype=parse_dtype(self._first(raw, "out_dtype", "dtype", "keep"), self.where),
            only=parse_part(raw.get("only"), f"{self.where}: only"),
            ema=self._choice(raw, "ema", EMA_POLICIES),
            prune=parse_flag(raw.get("prune", False), f"{self.where}: prune"),
            seed=parse_seed(raw.get("seed"), self.where),
            low_rank=parse_low_rank(raw.get("low_rank"), self.where),
            chat_template=parse_chat_template(raw.get("chat_template"), self.where),
        )
        return self._with_references(recipe, raw, References(self.entries, shared, given))

    def _stack(self, raw: dict[str, Any]) -> Recipe:
        """mergekit's `slices`: a recipe for each, which has the keys of the whole where it has none of its own."""
        self._check_parted(raw, "slices", STACK_KEYS)
        slices = []
        for number, each in enumerate(slice_recipes(raw, self.where), 1):
            where = f"{self.where}: slice {number}"
            parser = _RecipeParser(self.folder, self.bindings, where, self.known, self.depth + 1, is_slice=True)
            recipe = parser.parse(each)
            slices.append(check_slice(check_recipe(recipe, where), where))
        slices, first = named_apart(slices), slices[0]
        made = Recipe(
            where=self.where,
            method=first.method,
            inputs=tuple(Input(f"slice {number}", each) for number, each in enumerate(slices, 1)),
            dtype=first.dtype,
            seed=first.seed,
            is_stack=True,
            chat_template=first.chat_template,
        )
        return replace(made, vocabulary=parse_vocabulary(raw, self.where, References(self.entries).among(slices)))

    def _assembly(self, raw: dict[str, Any]) -> Recipe:
        """mergekit's `modules`: a recipe for each, which has the keys of the whole where it has none of its own."""
        self._check_parted(raw, "modules", ASSEMBLY_KEYS)
        modules = []
        for name, each in module_recipes(raw, self.where):
            where = f"{self.where}: module {name}"
            parser = _RecipeParser(self.folder, self.bindings, where, self.known, self.depth + 1)
            modules.append(Input(name, check_recipe(parser.parse(each), where)))
        first = modules[0].source
        assert isinstance(first, Recipe)
        inner = [each for module in modules if isinstance(module.source, Recipe) for each in module.source.parts]
        return Recipe(
            where=self.where,
            method=first.method,
            inputs=tuple(modules),
            on_missing=first.on_missing,
            dtype=first.dtype,
            seed=first.seed,
            by_module=True,
            vocabulary=parse_vocabulary(raw, self.where, References(self.entries).among(inner)),
            chat_template=parse_chat_template(raw.get("chat_template"), self.where),
        )

    def _check_parted(self, raw: dict[str, Any], parts: str, known: Iterable[str]) -> None:
        """That a recipe of slices or modules has what it needs, and nothing that is meant for whole models."""
        for key in ("models", "slices", "modules", "rules", "layout"):
            if key in raw and key != parts:
                raise RecipeError(
                    f"{self.where}: {parts} and {key} can't be combined", advice="Merge to a file, and go on with that."
                )
        check_keys(raw, known, self.where)
        if raw.get("merge_method") in (None, ""):
            raise RecipeError(f"{self.where}: the key 'merge_method' is missing", advice=NEEDED["merge_method"])
        if self.depth >= MAX_DEPTH:
            raise RecipeError(f"recipes are nested deeper than {MAX_DEPTH}")
        self._check_bound(raw.get("inputs"))

    def _with_references(self, recipe: Recipe, raw: dict[str, Any], references: References) -> Recipe:
        """Add what refers to inputs: the base, the layout, the rules, the tokens."""
        if raw.get("base_model") is not None:
            recipe = replace(recipe, base=references.base(recipe, raw["base_model"], self.where))
        if raw.get("layout") is not None:
            recipe, name = references.mention(recipe, raw["layout"], f"{self.where}: layout")
            recipe = replace(recipe, layout=name)
        recipe = with_rules(recipe, raw.get("rules"), self.where, references)
        return replace(recipe, vocabulary=parse_vocabulary(raw, self.where, references.among([recipe])))

    def _check_needed(self, raw: dict[str, Any]) -> None:
        """What no recipe can do without must be there, and must not be empty."""
        for key, advice in NEEDED.items():
            if key not in raw:
                raise RecipeError(f"{self.where}: the key {key!r} is missing", advice=advice)
            if raw[key] in (None, "", []):
                raise RecipeError(f"{self.where}: {key} is empty", advice=advice)

    def _check_bound(self, wanted: Any) -> None:  # noqa: ANN401
        """Every name under `inputs` must be bound to a file."""
        if wanted is not None and not isinstance(wanted, dict):
            raise RecipeError(f"{self.where}: inputs must map names to what they are, found {wanted!r}")
        wanted = wanted or {}
        names = [str(name) for name in wanted]
        missing = [f"{name}=PATH   {what}" for name, what in wanted.items() if name not in self.bindings]
        if missing:
            raise RecipeError(
                f"{self.where}: it needs {len(names)} models", found=missing, advice="Add them to the command."
            )
        if unknown := sorted(set(self.bindings) - set(names)):
            raise RecipeError(
                f"{self.where}: it has no input {unknown[0]!r}",
                advice=f"{suggestion(unknown[0], names)}Its inputs: {', '.join(names) or 'none'}.",
            )

    @staticmethod
    def _first(raw: dict[str, Any], *keys: str) -> Any:  # noqa: ANN401
        """The value of the first key that has one; else the last word."""
        return next((raw[key] for key in keys[:-1] if raw.get(key) is not None), keys[-1])

    def _choice(self, raw: dict[str, Any], key: str, choices: tuple[str, ...]) -> Any:  # noqa: ANN401
        value = raw.get(key, choices[0])
        if value not in choices:
            raise RecipeError(f"{self.where}: {key} must be one of {', '.join(choices)}, found {value!r}")
        return value

    def _nested(self, raw: dict[str, Any], where: str) -> Recipe:
        """A recipe within this one. What YAML's aliases repeat is read once."""
        if id(raw) not in self.known:
            if self.depth >= MAX_DEPTH:
                raise RecipeError(
                    f"recipes are nested deeper than {MAX_DEPTH}",
                    advice="Merge one of the inner ones to a file, and go on with that.",
                )
            nested = _RecipeParser(self.folder, {}, where, self.known, self.depth + 1).parse(raw)
            if nested.mixture is not None:
                raise RecipeError(
                    f"{where}: a mixture of experts can't be part of another recipe",
                    advice="Build it in a folder of its own, and name that.",
                )
            self.known[id(raw)] = check_recipe(nested, where)
        return self.known[id(raw)]
