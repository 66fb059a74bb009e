"""Recipes and indexes of shards by the ten thousand: values or an error, and no way out of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from streammerge.formats.shards import read_index
from streammerge.methods import METHODS
from streammerge.recipe.description import describe
from streammerge.recipe.files import read_recipe_file
from streammerge.recipe.parse import parse_recipe
from tests.stress.campaign import Campaign, Effort, Figure
from tests.stress.fuzzing import Fuzzer, WrongAnswerError, fuzz
from tests.stress.text_inputs import RECIPES as VALID
from tests.stress.text_inputs import indexes, recipes


def read_recipe(path: Path, data: bytes) -> str:
    """Plain values; and where they are a recipe, one whose text can be told."""
    values = read_recipe_file(path)
    if not _is_plain(values):
        raise WrongAnswerError(f"the YAML made a {type(values)}")
    recipe = parse_recipe(values, Path("folder"), {"x": Path("x")} if b"inputs" in data else None)
    if any("\0" in str(source) for source in recipe.paths()):
        raise WrongAnswerError("a path with NUL")
    describe(recipe)
    return "accepted"


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or type(value).__module__ in ("builtins", "datetime")


def load_all() -> None:
    """Methods, PyYAML: what is loaded when it is first needed."""
    import yaml

    assert METHODS
    for text in VALID:
        yaml.safe_load(text)
    Path("~/x").expanduser()


def read_shards(path: Path, data: bytes) -> str:
    """Whatever the index says, the shards are beside it."""
    for shard in read_index(path).shards:
        if shard.parent != path.parent or shard.name in ("", ".", "..") or "\0" in shard.name:
            raise WrongAnswerError(f"{shard} is not in the folder of the index")
    return "accepted"


RECIPES: Final = Fuzzer("r.yaml", recipes, read_recipe, load_all)
INDEXES: Final = Fuzzer("x.safetensors.index.json", indexes, read_shards)


def run(effort: Effort) -> list[Figure]:
    """Tens of thousands of each."""
    return [
        fuzz(__name__, "RECIPES", "fuzzed recipes", 30_000, effort),
        fuzz(__name__, "INDEXES", "fuzzed indexes of shards", 50_000, effort),
    ]


CAMPAIGN: Final = Campaign("texts", "Recipes and indexes made to do harm", run)
