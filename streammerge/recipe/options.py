"""How a merge is to be run: everything that is not part of what is merged.

Each option is told once, as a field of `Options`: its value, its help, and how it is typed. The command line, the
keywords of `streammerge.merge` and the documentation follow from that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal

from streammerge.errors import RecipeError
from streammerge.tensors import DTYPES, DType

if TYPE_CHECKING:
    from streammerge.compute.machine import IoMode
    from streammerge.models.adapters.dialects import Dialect
    from streammerge.models.dialects import Naming
    from streammerge.report import NonfinitePolicy

COMPUTE_DTYPES: Final[Mapping[str, DType]] = {
    "fp32": DTYPES["F32"],
    "fp64": DTYPES["F64"],
    "fp16": DTYPES["F16"],
    "bf16": DTYPES["BF16"],
}


NAMINGS: Final[tuple[Naming, ...]] = ("original", "diffusers", "bare")
"""Names that diffusion models may be given."""

DIALECTS: Final[tuple[Dialect, ...]] = ("kohya", "peft", "comfy", "diffusers")
"""Names that adapters may be given."""

NAMES: Final[tuple[Naming | Dialect, ...]] = tuple(dict.fromkeys((*NAMINGS, *DIALECTS)))
"""Names that an output may be given: diffusers' are of both."""


_UNITS: Final = {
    "": 1,
    **{prefix + suffix: 1000**power for power, prefix in enumerate("kmgt", 1) for suffix in ("", "b")},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
    "b": 1,
}


_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from `512MB`, `2GiB`, `1.5G` or a plain number; powers of 1000 unless the unit has an i."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise RecipeError(f"{text!r} is no size", advice="Write it like 512MB, 2GiB or 1.5G.")
    return size


def parse_seconds(text: str) -> float:
    """A number of seconds that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e6:
        raise RecipeError(f"expected a number of seconds, found {text!r}")
    return value


def parse_positive(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


LONGEST: Final = 1_000_000
"""Values of metadata of more characters are not written."""


OURS: Final = "streammerge."
"""How the keys of metadata begin that are written by streammerge, and by nobody else."""


HASHES: Final = frozenset({"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"})
"""Keys of metadata that say what the tensors' bytes hash to, which nobody knows before they are written."""


def parse_entry(text: str) -> tuple[str, str]:
    """A key of metadata and its value, of `KEY=VALUE`; RecipeError for a key that is not the user's to write."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"expected KEY=VALUE, found {text[:80]!r}")
    if key == "format" or key.startswith(OURS) or key in HASHES:
        raise RecipeError(f"{key!r} is not to be written by hand", advice="Hashes are told by --hash.")
    if len(text) > LONGEST:
        raise RecipeError(f"the value of {key[:80]!r} has {len(value):,} characters; {LONGEST:,} are written at most")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RecipeError(f"the value of {key[:80]!r} is no text in UTF-8")
    return key, value


Group = Literal["how to run", "what to write and to show"]


@dataclass(frozen=True, slots=True)
class Typed:
    """How an option is typed: `parse` makes its value of a word, `words` are all there are; without either, a flag.

    One that `is_repeated` has a value for each time that it is typed; programs give a map.
    """

    name: str
    default: Any
    group: Group
    help: str
    metavar: str = ""
    parse: Callable[[str], Any] | None = None
    words: Mapping[str, Any] = field(default_factory=dict)
    is_repeated: bool = False

    @property
    def flag(self) -> str:
        """`--name`, or `--no-name` of what is on unless it is turned off."""
        return f"--{'no-' if self.default is True else ''}{self.name.replace('_', '-')}"

    @property
    def is_flag(self) -> bool:
        """Whether it is typed without a value."""
        return self.parse is None and not self.words

    def value(self, given: Any) -> Any:  # noqa: ANN401
        """The option's value of what a program gives: the same as when it is typed, so "no" is no flag, -1 no size."""
        if given is None and self.default is None:
            return None
        if self.is_repeated:
            return self._all(given)
        if self.is_flag and not isinstance(given, bool):
            raise RecipeError(f"{self.name} must be True or False, found {given!r}")
        if self.words and given not in (*self.words, *self.words.values()):
            raise RecipeError(f"{self.name} must be one of {', '.join(self.words)}, found {given!r}")
        if self.words:
            return self.words[given] if isinstance(given, str) else given
        return self._parsed(str(given)) if self.parse else given

    def _all(self, given: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """The pairs of a map, or those that were typed, each checked; RecipeError for two of one key."""
        pairs = [*given.items()] if isinstance(given, Mapping) else [*given]
        words = [word if isinstance(word, str) else "=".join(map(str, word)) for word in pairs]
        found = tuple(self._parsed(word) for word in words)
        for key in {key for key, _ in found}:
            if sum(own == key for own, _ in found) > 1:
                raise RecipeError(f"{self.name}: {key!r} is given twice", advice="Give it once.")
        return found

    def _parsed(self, text: str) -> Any:  # noqa: ANN401
        """The value of a word; RecipeError, which names the option, if it has none."""
        assert self.parse is not None
        try:
            return self.parse(text)
        except RecipeError as error:
            error.what = f"{self.name}: {error.what}"
            raise


def option(default: Any, help: str, group: Group = "how to run", **typed: Any) -> Any:  # noqa: ANN401
    """A field of `Options`."""
    return field(default=default, metadata={"default": default, "help": help, "group": group, **typed})


def written(default: Any, help: str, **typed: Any) -> Any:  # noqa: ANN401
    """A field of `Options` that is about the output."""
    return option(default, help, "what to write and to show", **typed)


def same(*words: str) -> Mapping[str, str]:
    """Words that are the values themselves."""
    return {word: word for word in words}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The bounds and the manner of a run. Sizes are in bytes; None leaves the choice to streammerge.

    Every `journal` seconds what is written is synced and written down, so that `resume` can go on with it; 0: never.
    """

    device: str = option("cpu", "(default: cpu)", parse=str, metavar="auto|cpu|cuda|cuda:N|cuda:all|mps|xpu")
    compute_dtype: DType | None = option(None, "of the arithmetic (default: fp32 or better)", words=COMPUTE_DTYPES)
    max_ram: int | None = option(None, "bound of the whole process, such as 512MB", parse=parse_size, metavar="SIZE")
    max_vram: int | None = option(
        None, "bound of the buffers on the device, each one", parse=parse_size, metavar="SIZE"
    )
    threads: int | None = option(
        None, "workers (default: the cores, within the RAM)", parse=parse_positive, metavar="N"
    )
    io: IoMode = option("auto", "how inputs are read", words=same("auto", "mmap", "pread"))
    sync: bool = option(True, "don't wait for the disk at the end")
    shard_size: int | None = written(
        None,
        "write shards of at most this size, and an index (default: 5GB for folders of more than 10 GB)",
        parse=parse_size,
        metavar="SIZE",
    )
    names: Naming | Dialect | None = written(
        None,
        "whose names a diffusion model gets, or an adapter (default: the layout's, the first's)",
        words=same(*NAMES),
    )
    resume: bool = written(False, "continue an interrupted merge")
    journal: float = written(
        15.0,
        "how often what is written is synced and noted for --resume (default: 15; 0: never)",
        parse=parse_seconds,
        metavar="SECONDS",
    )
    force: bool = written(False, "replace an existing output")
    metadata: bool = written(True, "don't write the recipe into the output's metadata")
    companions: bool = written(True, "write weights alone to a folder: no config, tokenizer or card beside them")
    meta: tuple[tuple[str, str], ...] = written(
        (),
        "an entry of the output's metadata, such as modelspec.author=me; may be repeated",
        parse=parse_entry,
        metavar="KEY=VALUE",
        is_repeated=True,
    )
    verify: bool = written(False, "read the output back and compute it again to compare")
    on_nonfinite: NonfinitePolicy = written(
        "warn", "infinite values and NaN (default: warn)", words=same("error", "warn", "ignore")
    )
    upload: str | None = written(
        None, "push the finished folder to Hugging Face's hub, with its card", parse=str, metavar="ORG/NAME[@BRANCH]"
    )
    hash: bool = written(False, "write the output's sha256 beside it, to OUT.sha256")
    hash_inputs: bool = written(False, "put the inputs' sha256 into the output's metadata")

    @property
    def torch_must_check(self) -> bool:
        """Whether only torch can tell if a device is there, or how much it leaves of a bound on memory."""
        return self.device != "cpu" or self.max_ram is not None or self.max_vram is not None


def typed_options() -> Iterator[Typed]:
    """Every option, as it is typed."""
    return (Typed(entry.name, **entry.metadata) for entry in fields(Options))


RECIPE_KEYS: Final = (
    *("dtype", "layout", "on_shape_mismatch", "on_missing", "on_prediction_mismatch", "seed", "only", "ema", "prune"),
    "tokenizer_source",
)
"""Options that change a recipe's own keys."""


def as_options(given: Mapping[str, Any]) -> Options:
    """Options from keywords; TypeError for an unknown one, RecipeError for a word that is none of an option's."""
    typed = {entry.name: entry for entry in typed_options()}
    chosen = {name: value for name, value in given.items() if name not in RECIPE_KEYS}
    return Options(**{name: typed[name].value(value) if name in typed else value for name, value in chosen.items()})
