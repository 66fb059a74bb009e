"""Models that are fetched from Hugging Face's hub: the files of one that are needed, into the cache, by its library.

Safetensors are preferred to pickles, and nothing is fetched twice: one kind of weights, its index, and what belongs to
the model beside them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError, listed
from streammerge.formats.companions import is_companion_name
from streammerge.formats.pipelines import INDEX
from streammerge.formats.shards import PREFERRED, find_weights, is_index, is_model, read_index, single_of

INSTALL: Final = "pip install huggingface_hub (or streammerge[hub])"

_YES: Final = ("1", "on", "yes", "true")
_SHARD: Final = re.compile(r"(?P<stem>.+)-\d+-of-\d+\.(?P<kind>safetensors|bin)")
_SUBFOLDER: Final = re.compile(r"additional_chat_templates|\d{1,2}_[A-Za-z]{1,40}")
_LEFT_OF_PIPELINES: Final = re.compile(
    r".*\.(?:fp16|bf16|non_ema|ema|onnx|msgpack|onnx_data|h5|xml|pb|ckpt)(?:\..*|-\d+.*)?|[^/]*\.safetensors"
)
"""What of a pipeline is there in another form too: variants, other frameworks, a single file of all."""


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the hub is not to be asked, by the variables that its library reads."""
    return any(environment.get(name, "").lower() in _YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def is_whole(snapshot: Path) -> bool:
    """Whether a model's weights are all in its folder of the cache, which may have been fetched in part."""
    if (snapshot / INDEX).is_file():
        return True
    try:
        weights = find_weights(snapshot)
        return not is_index(weights) or all(shard.is_file() for shard in read_index(weights).shards)
    except (CheckpointError, OSError):
        return False


def needed_files(names: Sequence[str], called: str) -> list[str]:
    """Those of a model's files that are needed; CheckpointError if none are weights, or nobody can tell which."""
    if INDEX in names:
        return _of_pipeline(names)
    weights = next((name for name in PREFERRED if name in names), "")
    models = [name for name in names if "/" not in name and is_model(Path(name))]
    if not weights and len(models) == 1:
        weights = models[0]
    if not weights:
        raise CheckpointError(
            f"{called}: on the hub, it holds {'no model' if not models else 'several files that could be the model'}",
            found=models or list(names),
            advice="Download the file that is meant, and name that.",
        )
    if is_index(Path(weights)) and single_of(weights) in names:
        raise CheckpointError(
            f"{called}: on the hub, it holds two models, one in shards and one in a single file",
            found=[weights, single_of(weights)],
            advice="Download the one that is meant, and name that; transformers loads the single file.",
        )
    shards = _shards_of(weights, names) if is_index(Path(weights)) else []
    beside = [name for name in names if _is_beside(name) and name not in (weights, *shards)]
    return [weights, *shards, *beside]


def _shards_of(index: str, names: Sequence[str]) -> list[str]:
    """The shards that an index is likely to name."""
    stem, kind = index.split(".")[:2]
    matches = ((name, _SHARD.fullmatch(name)) for name in names)
    return [name for name, match in matches if match and (match["stem"], match["kind"]) == (stem, kind)]


def _is_beside(name: str) -> bool:
    """Whether a file belongs to a model beside its weights."""
    folder, _, last = name.rpartition("/")
    return is_companion_name(name) and not is_model(Path(last)) and (not folder or bool(_SUBFOLDER.fullmatch(folder)))


def _of_pipeline(names: Sequence[str]) -> list[str]:
    kept = [name for name in names if not _LEFT_OF_PIPELINES.fullmatch(name) and not name.startswith(".")]
    safe = {name.rpartition("/")[0] for name in kept if name.endswith(".safetensors")}
    pickles = {name for name in kept if name.endswith((".bin", ".bin.index.json"))}
    return [name for name in kept if name not in pickles or name.rpartition("/")[0] not in safe]


@dataclass(frozen=True)
class Order:
    """What is to be fetched of a model on the hub: the files that are needed, and how large they are together.

    `called` is how the user named it.
    """

    name: str
    revision: str
    called: str
    files: tuple[str, ...]
    nbytes: int
    cache: Path

    def fetched(self) -> Path:
        """The model's folder in the cache, into which its files are fetched; CheckpointError if they can't be."""
        hub = _library(self.called, self.cache)
        with _telling(self.called):
            found = _snapshot(hub, self.name, self.revision, self.files, self.cache)
            weights = find_weights(found) if not (found / INDEX).is_file() else found
            if is_index(weights):
                more = [shard.name for shard in read_index(weights).shards if not shard.is_file()]
                found = _snapshot(hub, self.name, self.revision, more, self.cache) if more else found
            return found


def order(name: str, revision: str, called: str, cache: Path) -> Order:
    """What there is to be fetched of a model, as the hub tells; CheckpointError, which says what to do, if it can't."""
    if is_offline():
        raise CheckpointError(
            f"{called}: it is not in Hugging Face's cache ({cache}), and this machine is offline (HF_HUB_OFFLINE)",
            advice=f"Unset HF_HUB_OFFLINE, or copy the model's folder of a cache that has it to {cache}.",
        )
    hub = _library(called, cache)
    with _telling(called):
        info = hub.HfApi().model_info(name, revision=revision, files_metadata=True)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        files = needed_files(list(sizes), called)
        return Order(name, revision, called, tuple(files), sum(sizes[file] for file in files), cache)


def check_disk(orders: Sequence[Order]) -> None:
    """CheckpointError if the files of these models don't fit the disk that the cache is on."""
    if not orders:
        return
    cache, nbytes = orders[0].cache, sum(each.nbytes for each in orders)
    here = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(here).free
    if nbytes > free:
        raise CheckpointError(
            f"{listed([each.called for each in orders])}: the files to be fetched take {nbytes / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free at {cache}",
            advice="Free some disk, or set HF_HUB_CACHE to a folder on another one.",
        )


def _library(called: str, cache: Path) -> Any:  # noqa: ANN401  (a module)
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{called}: it is not in Hugging Face's cache ({cache}), and huggingface_hub, which fetches models, isn't "
            "installed",
            advice=f"{INSTALL}; or check the path, if a file or folder here is meant.",
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _telling(called: str) -> Iterator[None]:
    """Have what the hub's library raises say what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the library's own are of many kinds, and change
        raise told(error, called) from error


def _snapshot(hub: Any, name: str, revision: str, files: Sequence[str], cache: Path) -> Path:  # noqa: ANN401
    patterns = [_literal(file) for file in files]
    return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, cache_dir=str(cache)))


def _literal(name: str) -> str:
    """A pattern that fits this name alone."""
    pattern = re.sub(r"([\[*?])", r"[\1]", name)
    assert fnmatch.fnmatchcase(name, pattern)
    return pattern


def told(error: Exception, called: str) -> CheckpointError:
    """What the hub's library says, in our words, and what to do."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    page = f"https://huggingface.co/{called.partition('@')[0]}"
    if "GatedRepoError" in kinds:
        what = "it is for those who have accepted its terms"
        advice = f"Accept them at {page}, then log in: hf auth login, or set HF_TOKEN."
    elif "RevisionNotFoundError" in kinds:
        what, advice = "the hub has no such revision of it", f"Look at {page}/tree/main for its branches and tags."
    elif "RepositoryNotFoundError" in kinds:
        what = "there is no such file or folder here, and on the hub there is none of that name, or it is private"
        advice = "Check the spelling; for a private one log in: hf auth login, or set HF_TOKEN."
    elif "LocalTokenNotFoundError" in kinds:
        what, advice = "the hub wants to know who asks", "Log in: hf auth login, or set HF_TOKEN."
    elif kinds & {"ConnectionError", "ConnectError", "ConnectTimeout", "TimeoutException", "OfflineModeIsEnabled"}:
        what = "the hub can't be reached"
        advice = "Check the network; HF_ENDPOINT names a mirror. What was fetched is kept."
    else:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        what, advice = f"the hub's library says: {first[:300]}", "What was fetched is kept; try again."
    return CheckpointError(f"{called}: {what}", advice=advice)
