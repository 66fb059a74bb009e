"""What the user asked for, checked as far as no model is needed to tell.

The YAML is mergekit's (`merge_method`, `models`, `base_model`, `parameters`, `dtype`, `out_dtype`) and our own keys
`layout`, `on_shape_mismatch`, `on_missing`, `rules`, `inputs`, `seed`; `model:` may be a whole recipe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from streammerge.errors import RecipeError
from streammerge.methods import find_method
from streammerge.methods.registry import suggestion
from streammerge.parameters import Settings, check_settings, describe_settings, parse_settings
from streammerge.scalars import parse_key, parse_seed
from streammerge.tensors import DTYPES, DType

ShapePolicy = Literal["error", "overlap", "keep", "pad", "slice"]
MissingPolicy = Literal["error", "keep", "drop"]
RuleAction = Literal["merge", "take", "keep", "drop"]

SHAPE_POLICIES: Final = ("error", "overlap", "keep", "pad", "slice")
MISSING_POLICIES: Final = ("error", "keep", "drop")

STORED_DTYPES: Final[Mapping[str, DType | None]] = {
    "keep": None,
    **{
        spelling: DTYPES[name]
        for name, spellings in {
            "F64": ("fp64", "float64"),
            "F32": ("fp32", "float32"),
            "F16": ("fp16", "float16"),
            "BF16": ("bf16", "bfloat16"),
            "F8_E4M3": ("fp8_e4m3", "float8_e4m3fn"),
            "F8_E5M2": ("fp8_e5m2", "float8_e5m2"),
        }.items()
        for spelling in spellings
    },
}
"""Every spelling of a dtype that options and recipes know; `keep` is the layout model's own."""

KEYS: Final = (
    *("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "name"),
    *("layout", "on_shape_mismatch", "on_missing", "rules", "inputs", "seed"),
)
"""The keys of a recipe: mergekit's, then our own."""

MERGEKIT_ONLY: Final = {
    "slices": "layers of several models stacked into one",
    "modules": "models of several modules",
    "tokenizer": "a merged vocabulary",
    "tokenizer_source": "a merged vocabulary",
    "chat_template": "a chat template",
}
"""mergekit's keys that ask for something that streammerge does not do, and what that is."""


@dataclass(frozen=True)
class Input:
    """A model of the recipe: what it is called, where it is (a path, or a recipe of its own), and its parameters.

    `entry` names the dict of a torch file that is the model, where several could be.
    """

    name: str
    source: Path | Recipe
    parameters: Settings = field(default_factory=dict)
    entry: str = ""


@dataclass(frozen=True)
class Rule:
    """What happens to tensors whose name matches one of the globs. `model` is the name of the one to take from."""

    match: tuple[str, ...]
    action: RuleAction = "merge"
    model: str = ""
    parameters: Settings = field(default_factory=dict)
    dtype: DType | None = None

    def __str__(self) -> str:
        return ", ".join(self.match)


@dataclass(frozen=True)
class Recipe:
    """A merge as asked for. `base`, `layout` and rules name inputs; `others` are inputs that are only taken from.

    A nested recipe without a seed has that of the recipe it is part of; the outermost one has 0.
    """

    method: str
    inputs: tuple[Input, ...]
    base: Input | None = None
    others: tuple[Input, ...] = ()
    parameters: Settings = field(default_factory=dict)
    layout: str = ""
    on_shape_mismatch: ShapePolicy = "error"
    on_missing: MissingPolicy = "error"
    rules: tuple[Rule, ...] = ()
    dtype: DType | None = None
    seed: int | None = None

    @property
    def named(self) -> dict[str, Input]:
        """Every input by name: the models, the base, and those that are only taken from."""
        return {entry.name: entry for entry in (*self.inputs, *([self.base] if self.base else []), *self.others)}

    @property
    def layout_name(self) -> str:
        """The input whose tensors, order and shapes the output has: the first model unless said otherwise."""
        return self.layout or self.inputs[0].name

    def describe(self, names: Mapping[Path, str] | None = None) -> dict[str, Any]:
        """The recipe in its own vocabulary, with file names instead of paths: what goes into the output's metadata.

        It can be parsed again. `names` are the texts to write for paths, if not their last parts.
        """
        names = names or {}
        beside = {entry.name: _describe_input(entry, names) for entry in self.others}
        described: dict[str, Any] = {
            "merge_method": self.method,
            "models": [_describe_input(entry, names) for entry in self.inputs],
            "base_model": self._describe_base(names),
            "parameters": describe_settings(self.parameters),
            "layout": beside.get(self.layout_name, self.layout_name),
            "on_shape_mismatch": self.on_shape_mismatch,
            "on_missing": self.on_missing,
            "rules": [_describe_rule(rule, beside) for rule in self.rules],
            "dtype": self.dtype.torch_name if self.dtype else None,
            "seed": self.seed,
        }
        return {key: value for key, value in described.items() if value not in (None, [], {}, "error")}

    def _describe_base(self, names: Mapping[Path, str]) -> Any:  # noqa: ANN401  (a name, or an input of its own)
        if self.base is None or self.base.name in {entry.name for entry in self.inputs}:
            return self.base.name if self.base else None
        return _describe_input(self.base, names)

    def paths(self) -> Iterator[Path]:
        """Every file or folder that is read, those of nested recipes included."""
        for entry in self.named.values():
            if isinstance(entry.source, Recipe):
                yield from entry.source.paths()
            else:
                yield entry.source


def _describe_input(entry: Input, names: Mapping[Path, str]) -> dict[str, Any]:
    source = entry.source
    described = source.describe(names) if isinstance(source, Recipe) else names.get(source, source.name)
    more = {"entry": entry.entry, "parameters": describe_settings(entry.parameters)}
    return {"model": described, "name": entry.name, **{key: value for key, value in more.items() if value}}


def _describe_rule(rule: Rule, beside: Mapping[str, Any]) -> dict[str, Any]:
    action: dict[str, Any] = {} if rule.action == "merge" else {rule.action: beside.get(rule.model, rule.model) or True}
    parameters = {"parameters": describe_settings(rule.parameters)} if rule.parameters else {}
    dtype = {"dtype": rule.dtype.torch_name} if rule.dtype else {}
    return {"match": list(rule.match), **action, **parameters, **dtype}


def check_recipe(recipe: Recipe, where: str = "recipe") -> Recipe:
    """The recipe, if its method can do with its inputs and parameters; else RecipeError, which calls it `where`."""
    method = find_method(recipe.method)
    models = [entry for entry in recipe.inputs if recipe.base is None or entry.name != recipe.base.name]
    if method.base == "required" and recipe.base is None:
        raise RecipeError(f"method {method.name!r} needs a base model", advice="Name it with --base or base_model.")
    if method.base == "none" and recipe.base is not None and recipe.base.name not in {e.name for e in recipe.inputs}:
        raise RecipeError(
            f"method {method.name!r} has no base model, and {recipe.base.name!r} is not among its models",
            advice="Leave the base out, list it among the models, or choose a method that has one.",
        )
    method.check_count(len(recipe.inputs if method.base == "none" else models), has_base=recipe.base is not None)
    check_settings(recipe.parameters, method, where)
    for entry in recipe.inputs:
        check_settings(entry.parameters, method, f"{where}: model {entry.name}")
    for number, rule in enumerate(recipe.rules, 1):
        check_settings(rule.parameters, method, f"{where}: rule {number}")
    return recipe


def parse_recipe(
    raw: Any,  # noqa: ANN401  (whatever YAML gave)
    folder: Path,
    bindings: Mapping[str, Path] | None = None,
    where: str = "recipe",
) -> Recipe:
    """A recipe from YAML's values; relative paths start at `folder`, and `bindings` fill the names under `inputs`.

    `where` is what a RecipeError calls the recipe: its file, if it has one.
    """
    parser = _RecipeParser(folder, bindings or {}, where)
    try:
        return check_recipe(parser.parse(raw), where)
    except RecipeError as error:
        if where != "recipe" and where not in error.what:
            error.what = f"{where}: {error.what}"
        raise


@dataclass
class _RecipeParser:
    """Turns YAML's values into a Recipe, saying where it finds something that it doesn't expect."""

    folder: Path
    bindings: Mapping[str, Path]
    where: str = "recipe"

    def parse(self, raw: Any) -> Recipe:  # noqa: ANN401
        if not isinstance(raw, dict):
            raise RecipeError(f"{self.where}: expected a map with merge_method and models, found {type(raw).__name__}")
        self._check_keys(raw, KEYS, self.where)
        for key in ("merge_method", "models"):
            if not raw.get(key):
                raise RecipeError(f"{self.where}: the key {key!r} is missing")
        if not isinstance(raw["models"], list):
            raise RecipeError(f"{self.where}: models must be a list, found {raw['models']!r}")
        self._check_bound(raw.get("inputs"))
        inputs = distinct_names(
            [self._input(entry, f"{self.where}: model {n}") for n, entry in enumerate(raw["models"], 1)]
        )
        recipe = Recipe(
            method=str(raw["merge_method"]),
            inputs=tuple(inputs),
            parameters=parse_settings(raw.get("parameters"), self.where),
            on_shape_mismatch=self._choice(raw, "on_shape_mismatch", SHAPE_POLICIES),
            on_missing=self._choice(raw, "on_missing", MISSING_POLICIES),
            dtype=parse_dtype(raw.get("out_dtype") or raw.get("dtype") or "keep", self.where),
            seed=parse_seed(raw.get("seed"), self.where),
        )
        return self._with_references(recipe, raw)

    def _with_references(self, recipe: Recipe, raw: dict[str, Any]) -> Recipe:
        """Add what refers to inputs: the base, the layout, the rules."""
        if raw.get("base_model") is not None:
            recipe = replace(recipe, base=self._base(recipe, raw["base_model"]))
        if raw.get("layout") is not None:
            recipe, name = self._mention(recipe, raw["layout"], "layout")
            recipe = replace(recipe, layout=name)
        rules = raw.get("rules") or []
        if not isinstance(rules, list):
            raise RecipeError(f"{self.where}: rules must be a list, found {rules!r}")
        for number, rule in enumerate(rules, 1):
            recipe = self._add_rule(recipe, rule, f"{self.where}: rule {number}")
        return recipe

    def _check_keys(self, raw: dict[str, Any], known: Iterable[str], where: str) -> None:
        for key in raw:
            if key in MERGEKIT_ONLY and where == self.where:
                raise RecipeError(
                    f"{where}: {key!r} asks for {MERGEKIT_ONLY[key]}, which streammerge does not do",
                    advice="Remove the key to merge tensors of the same name.",
                )
            if key not in known:
                raise RecipeError(
                    f"{where}: unknown key {key!r}",
                    advice=f"{suggestion(str(key), list(known))}Known: {', '.join(known)}.",
                )

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
        unknown = sorted(set(self.bindings) - set(names))
        if unknown:
            raise RecipeError(
                f"{self.where}: it has no input {unknown[0]!r}",
                advice=f"{suggestion(unknown[0], names)}Its inputs: {', '.join(names) or 'none'}.",
            )

    def _choice(self, raw: dict[str, Any], key: str, choices: tuple[str, ...]) -> Any:  # noqa: ANN401
        value = raw.get(key, choices[0])
        if value not in choices:
            raise RecipeError(f"{self.where}: {key} must be one of {', '.join(choices)}, found {value!r}")
        return value

    def _input(self, raw: Any, where: str) -> Input:  # noqa: ANN401
        entry = raw if isinstance(raw, dict) and "merge_method" not in raw else {"model": raw}
        self._check_keys(entry, ("model", "name", "parameters", "entry"), where)
        if "model" not in entry:
            raise RecipeError(f"{where}: the key 'model' is missing")
        source = self._source(entry["model"], where)
        name = str(entry.get("name") or self._default_name(entry["model"], source))
        key = parse_key(entry.get("entry"), f"{where}: entry")
        if key and isinstance(source, Recipe):
            raise RecipeError(f"{where}: a nested recipe has no entry", advice="Put it beside one of its models.")
        return Input(name, source, parse_settings(entry.get("parameters"), where), key)

    def _default_name(self, model: Any, source: Path | Recipe) -> str:  # noqa: ANN401
        if isinstance(source, Recipe):
            return source.method
        return model if isinstance(model, str) and model in self.bindings else source.stem or str(source)

    def _source(self, model: Any, where: str) -> Path | Recipe:  # noqa: ANN401
        if isinstance(model, dict) and "merge_method" in model:
            nested = _RecipeParser(self.folder, {}, where=f"{where}: nested recipe")
            return check_recipe(nested.parse(model), nested.where)
        while isinstance(model, dict) and len(model) == 1:  # mergekit's long form: {model: {path: …}}
            model = model.get("model", model.get("path"))
        if not isinstance(model, str) or not model:
            raise RecipeError(f"{where}: expected a path or a recipe, found {model!r}")
        if model in self.bindings:
            return self.bindings[model]
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in model):
            raise RecipeError(f"{where}: no file can be called {model!r}")
        if model == "~" or model.startswith("~/"):  # nothing else is expanded: no variables, nobody else's folder
            with contextlib.suppress(RuntimeError):  # nobody knows where home is
                return Path(model).expanduser()
        return self.folder / model

    def _reference(self, recipe: Recipe, raw: Any, where: str) -> Input:  # noqa: ANN401
        """The input that is meant: by its name, by its path, or a new one."""
        if isinstance(raw, str) and raw in recipe.named:
            return recipe.named[raw]
        entry = self._input(raw, f"{self.where}: {where}")
        for known in recipe.named.values():
            if same_source(known, entry):
                return known
        return replace(entry, name=unused_name(entry.name, recipe))

    def _base(self, recipe: Recipe, raw: Any) -> Input:  # noqa: ANN401
        """The base: one of the models, or a new input that is called `base` unless it has a name of its own."""
        base = self._reference(recipe, raw, "base_model")
        named = raw in self.bindings if isinstance(raw, str) else raw.get("name") is not None
        if base.name in recipe.named or named:
            return base
        return replace(base, name=unused_name("base", recipe))

    def _mention(self, recipe: Recipe, raw: Any, where: str) -> tuple[Recipe, str]:  # noqa: ANN401
        """The name of the input that is meant, and the recipe with that input among its own."""
        entry = self._reference(recipe, raw, where)
        if entry.name not in recipe.named:
            recipe = replace(recipe, others=(*recipe.others, entry))
        return recipe, entry.name

    def _add_rule(self, recipe: Recipe, raw: Any, where: str) -> Recipe:  # noqa: ANN401
        if not isinstance(raw, dict):
            raise RecipeError(f"{where}: expected a map with match, found {raw!r}")
        self._check_keys(raw, ("match", "take", "keep", "drop", "parameters", "dtype"), where)
        globs = raw.get("match")
        globs = [globs] if isinstance(globs, str) else globs
        if not isinstance(globs, list) or not globs or not all(isinstance(glob, str) for glob in globs):
            raise RecipeError(f"{where}: match must be a glob or a list of globs, found {raw.get('match')!r}")
        actions: list[RuleAction] = [key for key in ("take", "keep", "drop") if raw.get(key)]
        if len(actions) > 1:
            raise RecipeError(f"{where}: one of take, keep and drop, found {' and '.join(actions)}")
        action: RuleAction = actions[0] if actions else "merge"
        model = ""
        if action == "take":
            recipe, model = self._mention(recipe, raw["take"], where)
        parameters = parse_settings(raw.get("parameters"), where, models=recipe.named)
        dtype = parse_dtype(raw["dtype"], where) if "dtype" in raw else None
        return replace(recipe, rules=(*recipe.rules, Rule(tuple(globs), action, model, parameters, dtype)))


def distinct_names(inputs: list[Input]) -> list[Input]:
    """The inputs with their names made different, where two files have the same: `model`, `model#2`."""
    named: dict[str, Input] = {}
    for entry in inputs:
        name, number = entry.name, 1
        while name in named:
            number += 1
            name = f"{entry.name}#{number}"
        named[name] = replace(entry, name=name)
    return list(named.values())


def same_source(one: Input, other: Input) -> bool:
    """Whether two inputs are the same path, or the same recipe."""
    if isinstance(one.source, Path) and isinstance(other.source, Path):
        return one.source.absolute() == other.source.absolute() and one.entry == other.entry
    return one.source == other.source


def unused_name(name: str, recipe: Recipe) -> str:
    """The name, or one made of it that no input has yet."""
    return distinct_names([*recipe.named.values(), Input(name, Path())])[-1].name


def parse_dtype(raw: Any, where: str) -> DType | None:  # noqa: ANN401
    """The stored dtype that is meant, None for `keep`."""
    spelling = str(raw).removeprefix("torch.")
    if spelling not in STORED_DTYPES:
        raise RecipeError(
            f"{where}: unknown dtype {raw!r}",
            advice=f"{suggestion(spelling, list(STORED_DTYPES))}Known: {', '.join(STORED_DTYPES)}.",
        )
    return STORED_DTYPES[spelling]
