"""Recipes from YAML's values, checked piece by piece: whatever is not understood is an error that says where it is.

The YAML is mergekit's (`merge_method`, `models`, `slices`, `modules`, `base_model`, `parameters`, …) and our own
keys `layout`, `rules`, `inputs`, `seed`, `low_rank` and others; `model:` may be a whole recipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError, RecipeError, suggestion
from streammerge.formats.files import path_of
from streammerge.models.dtypes import parse_dtype
from streammerge.models.extent import MAX_DEPTH
from streammerge.models.hub import HubName, meant
from streammerge.recipe.adapters import adapter_entry, adapters_of, is_recipe, with_lora
from streammerge.recipe.documents import Document
from streammerge.recipe.low_rank import parse_low_rank
from streammerge.recipe.modules import ASSEMBLY_KEYS, module_recipes
from streammerge.recipe.naming import (
    check_one_is_meant,
    default_name,
    distinct_names,
    given_names,
    has_adapted,
    revised,
    same_source,
    unused_name,
)
from streammerge.recipe.parameters import parse_settings
from streammerge.recipe.policies import EMA_POLICIES, MISSING_POLICIES, PREDICTION_POLICIES, SHAPE_POLICIES
from streammerge.recipe.recipe import Input, Recipe, Rule, RuleAction, check_recipe
from streammerge.recipe.slices import STACK_KEYS, check_slice, named_apart, parse_layers, slice_recipes
from streammerge.recipe.spellings import (
    check_keys,
    in_our_words,
    parse_flag,
    parse_globs,
    parse_key,
    parse_name,
    parse_part,
    parse_prefixes,
    parse_seed,
)
from streammerge.recipe.templates import parse_chat_template
from streammerge.recipe.vocabulary import parse_vocabulary

__all__ = ["Input", "Recipe", "Rule", "check_recipe"]

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


@dataclass
class _RecipeParser:
    """Turns YAML's values into a Recipe, saying where it finds something that it doesn't expect."""

    folder: Path
    bindings: Mapping[str, Path | HubName]
    where: str = "recipe"
    known: dict[int, Recipe] = field(default_factory=dict)
    depth: int = 1
    shared: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    is_slice: bool = False

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

            return mixture_recipe(raw, self.where, self._input, distinct_names, self._base)
        check_keys(raw, KEYS, self.where)
        self._check_needed(raw)
        if not isinstance(raw["models"], list):
            raise RecipeError(f"{self.where}: models must be a list, found {raw['models']!r}")
        self._check_bound(raw.get("inputs"))
        self.given = given_names(raw["models"], self.where)
        inputs = [self._input(entry, f"{self.where}: model {n}") for n, entry in enumerate(raw["models"], 1)]
        self.shared = {name for name, times in Counter(entry.name for entry in inputs).items() if times > 1}
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
        return self._with_references(recipe, raw)

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
        return replace(made, vocabulary=parse_vocabulary(raw, self.where, self._known_among(slices)))

    def _known_among(self, recipes: Iterable[Recipe]) -> Callable[[Any, str], str]:
        """What gives the name of the input of these recipes that is meant."""
        named = {name: entry for recipe in recipes for name, entry in recipe.named.items()}
        one = Recipe("linear", tuple(replace(entry, parameters={}) for entry in named.values()))

        def name_of(raw: Any, where: str) -> str:  # noqa: ANN401
            entry = self._reference(one, raw, where)
            if entry.name in named:
                return entry.name
            raise RecipeError(
                f"{where}: {str(raw)[:80]!r} is none of the models", advice=f"Models: {', '.join(named)}."
            )

        return name_of

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
            vocabulary=parse_vocabulary(raw, self.where, self._known_among(inner)),
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

    def _with_references(self, recipe: Recipe, raw: dict[str, Any]) -> Recipe:
        """Add what refers to inputs: the base, the layout, the rules."""
        if raw.get("base_model") is not None:
            recipe = replace(recipe, base=self._base(recipe, raw["base_model"]))
        if raw.get("layout") is not None:
            recipe, name = self._mention(recipe, raw["layout"], f"{self.where}: layout")
            recipe = replace(recipe, layout=name)
        rules = [] if raw.get("rules") is None else raw["rules"]
        if not isinstance(rules, list):
            raise RecipeError(f"{self.where}: rules must be a list, found {rules!r}")
        for number, rule in enumerate(rules, 1):
            recipe = self._add_rule(recipe, rule, f"{self.where}: rule {number}")
        return replace(recipe, vocabulary=parse_vocabulary(raw, self.where, self._known_among([recipe])))

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

    def _input(self, raw: Any, where: str) -> Input:  # noqa: ANN401
        entry = with_lora(raw, self._is_there) if not is_recipe(raw) else {"model": raw}
        known = ("model", "name", "parameters", "entry", "adapters", "prefix", *(["layer_range"] * self.is_slice))
        check_keys(entry, known, where)
        if "model" not in entry:
            raise RecipeError(f"{where}: the key 'model' is missing")
        source = self._source(entry["model"], where)
        given = entry.get("name")
        name = self._default_name(entry["model"], source) if given is None else parse_name(given, f"{where}: name")
        key = parse_key(entry.get("entry"), f"{where}: entry")
        if key and isinstance(source, Recipe):
            raise RecipeError(f"{where}: a nested recipe has no entry", advice="Put it beside one of its models.")
        adapters = tuple(self._adapter(each, f"{where}: adapter {n}") for n, each in adapters_of(entry, where))
        distinct = tuple(distinct_names(list(adapters)))
        layers = parse_layers(entry.get("layer_range"), where) if "layer_range" in entry else None
        prefixes = parse_prefixes(entry.get("prefix"), where)
        return Input(name, source, parse_settings(entry.get("parameters"), where), key, distinct, layers, prefixes)

    def _adapter(self, raw: Any, where: str) -> Input:  # noqa: ANN401
        """An adapter of an input: as an input it has one parameter, which is its weight."""
        entry = adapter_entry(raw, where)
        return self._input({key: value for key, value in entry.items() if key != "adapters"}, where)

    def _is_there(self, path: str) -> bool:
        """Whether a file lies at this path, or one is bound to it."""
        return path in self.bindings or (self.folder / path).exists()

    def _default_name(self, model: Any, source: Path | HubName | Recipe) -> str:  # noqa: ANN401
        while isinstance(model, dict) and not is_recipe(model) and "model" in model:
            model = model["model"]
        if isinstance(source, Recipe):
            return model.name if isinstance(model, Document) else source.method
        if isinstance(model, str) and model in self.bindings:
            return model
        return default_name(source)

    def _source(self, model: Any, where: str) -> Path | HubName | Recipe:  # noqa: ANN401
        while isinstance(model, dict) and not is_recipe(model) and (len(model) == 1 or "revision" in model):
            model = model.get("model", revised(model, self._is_there, where))  # mergekit: {model: {path: …}}
        if is_recipe(model):
            return self._nested(model, f"{where}: nested recipe")
        if isinstance(model, dict) and "model" in model:
            check_keys(model, ("model", "lora"), where)
        if not isinstance(model, str) or not model:
            raise RecipeError(f"{where}: expected a path or a recipe, found {model!r}")
        if model in self.bindings:
            return self.bindings[model]
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in model):
            raise RecipeError(f"{where}: no file can be called {model!r}")
        try:
            return meant(self.folder / path_of(model), model)
        except CheckpointError as error:
            raise RecipeError(f"{where}: {error.what}", found=error.found, advice=error.advice) from error

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

    def _reference(self, recipe: Recipe, raw: Any, where: str) -> Input:  # noqa: ANN401
        """The input that is meant: by its name, by its path, or a new one."""
        if isinstance(raw, str) and raw in recipe.named:
            check_one_is_meant(raw, recipe, self.shared, where)
            return recipe.named[raw]
        return self._at(recipe, raw, where)

    def _at(self, recipe: Recipe, raw: Any, where: str) -> Input:  # noqa: ANN401
        """The input at a path, or a new one."""
        entry = self._input(raw, where)
        for known in recipe.named.values():
            if same_source(known, entry):
                return known
        return replace(entry, name=unused_name(entry.name, recipe))

    def _base(self, recipe: Recipe, raw: Any) -> Input:  # noqa: ANN401
        """The base: one of the models, or a new input that is called `base` unless it has a name of its own."""
        find = self._at if self._is_adapted(recipe, raw) else self._reference
        base = find(recipe, raw, f"{self.where}: base_model")
        named = raw in self.bindings if isinstance(raw, str) else raw.get("name") is not None
        if base.name in recipe.named or named:
            return base
        return replace(base, name=unused_name("base", recipe))

    def _is_adapted(self, recipe: Recipe, raw: Any) -> bool:  # noqa: ANN401
        """Whether a word is the path of a model that is an input with adapters in it, which has its name from there:
        mergekit's `base_model: llama` beside `model: llama+lora` is the model without them."""
        if not isinstance(raw, str) or raw not in recipe.named or raw in self.given or not self._is_there(raw):
            return False
        return has_adapted(recipe, self._input(raw, self.where))

    def _mention(self, recipe: Recipe, raw: Any, where: str) -> tuple[Recipe, str]:  # noqa: ANN401
        """The name of the input that is meant, and the recipe with that input among its own."""
        entry = self._reference(recipe, raw, where)
        if entry.name not in recipe.named:
            recipe = replace(recipe, others=(*recipe.others, entry))
        return recipe, entry.name

    def _add_rule(self, recipe: Recipe, raw: Any, where: str) -> Recipe:  # noqa: ANN401
        if not isinstance(raw, dict):
            raise RecipeError(f"{where}: expected a map with match or component, found {raw!r}")
        check_keys(raw, ("match", "component", "take", "keep", "drop", "parameters", "dtype"), where)
        component = parse_part(raw.get("component"), f"{where}: component")
        globs = [] if component and "match" not in raw else parse_globs(raw.get("match"), where)
        if component and globs:
            raise RecipeError(f"{where}: one of match and component, found both", advice="Make two rules of it.")
        flags: tuple[RuleAction, ...] = ("keep", "drop")
        actions: list[RuleAction] = [key for key in flags if key in raw and parse_flag(raw[key], f"{where}: {key}")]
        actions += ["take"] if "take" in raw else []
        if len(actions) > 1:
            raise RecipeError(f"{where}: one of take, keep and drop, found {' and '.join(actions)}")
        action: RuleAction = actions[0] if actions else "merge"
        model = ""
        if action == "take":
            recipe, model = self._mention(recipe, raw["take"], where)
        parameters = parse_settings(raw.get("parameters"), where, models=recipe.named)
        if action == "drop" and "dtype" in raw:
            raise RecipeError(f"{where}: dtype has no effect on what is dropped", advice="Remove it.")
        dtype = parse_dtype(raw["dtype"], where) if "dtype" in raw else None
        keeps_dtype = "dtype" in raw and dtype is None
        rule = Rule(tuple(globs), action, model, parameters, dtype, component, keeps_dtype)
        return replace(recipe, rules=(*recipe.rules, rule))
