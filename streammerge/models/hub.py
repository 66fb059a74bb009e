"""Models by their names on Hugging Face's hub, `org/name[@revision]`: in the local cache, or else fetched into it.

The cache is what huggingface_hub has made: `models--org--name` with `refs`, which name commits, and `snapshots` of
these, whose files are links into `blobs`. For what is there no library is needed, and the hub is not asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from streammerge.errors import CheckpointError
from streammerge.formats.shards import is_model

if TYPE_CHECKING:
    from streammerge.models.downloads import Order

SCHEME: Final = "hf://"

MAIN: Final = "main"
"""The branch that is meant where no revision is named."""

MAX_REF: Final = 200
"""The longest name of a commit that is read."""

_PART: Final = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_NAME: Final = re.compile(rf"(?P<name>{_PART}/{_PART})(?:@(?P<revision>[\w.][\w./-]*))?")
_FOLDER: Final = re.compile(r"models--(?P<name>[^/\\]+)")
_COMMIT: Final = re.compile(r"[0-9a-f]{4,40}")


@dataclass(frozen=True, slots=True)
class HubName:
    """A model's name on the hub, and a revision of it: a branch, a tag or a commit, "" for the main branch."""

    name: str
    revision: str = ""

    @classmethod
    def of(cls, text: str) -> HubName | None:
        """The name that is meant, None if it is none: `org/name`, `org/name@revision`, also behind `hf://`."""
        match = _NAME.fullmatch(text.removeprefix(SCHEME))
        if match is None or ".." in text or (not text.startswith(SCHEME) and is_model(Path(match["name"]))):
            return None
        return cls(match["name"], match["revision"] or "")

    @property
    def folder(self) -> str:
        """What its folder in the cache is called."""
        return f"models--{self.name.replace('/', '--')}"

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def cache_of(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the hub's models are cached, by the variables that huggingface_hub reads."""
    own = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    if own:
        return Path(own).expanduser()
    home = environment.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    general = environment.get("XDG_CACHE_HOME")
    return (Path(general) if general else Path.home() / ".cache").expanduser() / "huggingface" / "hub"


def sought(source: Path | HubName) -> Path | Order:
    """Where a model is, or what there is to be fetched of it: what is in the cache, and whole, is not asked for.

    A model's whole folder in the cache stands for its main branch. CheckpointError for one that nobody can fetch.
    """
    if isinstance(source, Path):
        is_cached = _FOLDER.fullmatch(source.name) is not None and (source / "snapshots").is_dir()
        return snapshot(source) if is_cached else source
    from streammerge.models.downloads import is_offline, is_whole, order  # late: most models are files

    folder, revision = cache_of() / source.folder, source.revision or MAIN
    if not folder.is_dir():
        return order(source.name, revision, str(source), folder.parent)
    try:
        found = snapshot(folder, source)
    except CheckpointError as error:
        if is_offline():
            raise
        try:
            return order(source.name, revision, str(source), folder.parent)
        except CheckpointError as problem:
            error.advice = f"{error.advice} Fetching it failed: {problem.what}."
            raise error from problem
    if is_offline() or is_whole(found):
        return found
    return order(source.name, source.revision or found.name, str(source), folder.parent)


def snapshot(folder: Path, name: HubName | None = None) -> Path:
    """The revision that is meant of those in a model's folder in the cache; CheckpointError if it is not there."""
    name = name or name_of(folder) or HubName(folder.name)
    there = sorted(entry.name for entry in (folder / "snapshots").glob("*") if entry.is_dir())
    commit = _commit(folder, name.revision or MAIN)
    found = [entry for entry in there if entry == commit]
    if not found and _COMMIT.fullmatch(name.revision):
        found = [entry for entry in there if entry.startswith(name.revision)]
    if not found and not name.revision and not commit:
        found = there
    if len(found) == 1:
        return folder / "snapshots" / found[0]
    wanted = name.revision or "the main branch"
    raise CheckpointError(
        f"{name}: {wanted} is {'more than one' if found else 'none'} of the revisions in Hugging Face's cache",
        found=found or there,
        advice=f"{_fetch(name)} Or name a commit that is there, as {name.name}@COMMIT.",
    )


def _commit(folder: Path, revision: str) -> str:
    """The commit that a branch or a tag stands for in the cache; "" if that is not known."""
    file = folder / "refs" / revision
    try:
        if not file.is_file() or folder.resolve() not in file.resolve().parents:
            return ""
        with file.open("rb") as opened:
            text = opened.read(MAX_REF).decode("ascii", "replace").strip()
    except (OSError, ValueError):
        return ""
    return text if re.fullmatch(r"[\w-]+", text) else ""


def _fetch(name: HubName) -> str:
    revision = f" --revision {name.revision}" if name.revision else ""
    return f"Fetch it: pip install huggingface_hub, then hf download {name.name}{revision}."


def name_of(path: Path) -> HubName | None:
    """What a model is called on the hub, with its commit, if its path is one of the cache's; None for others."""
    parts = path.parts
    for place, part in reversed(list(enumerate(parts))):
        if match := _FOLDER.fullmatch(part):
            name = match["name"].replace("--", "/", 1)
            after = parts[place + 1 : place + 3]
            commit = after[1] if len(after) == 2 and after[0] == "snapshots" else ""
            return HubName(name, commit) if _is_name(name) else None
    return None


def _is_name(name: str) -> bool:
    return all(re.fullmatch(_PART, part) for part in name.split("/"))


def meant(path: Path, text: str) -> Path | HubName:
    """What a text means: its path if something is there, else a model of the hub if it is the name of one.

    A name whose first part is a folder here is taken for a path that is wrong. Nothing is looked for in the cache, or
    fetched. CheckpointError for what says that it is a name on the hub (`hf://`), and is none.
    """
    is_name = text.startswith(SCHEME)
    if not is_name and is_there(path):
        return path
    name = HubName.of(text)
    if name is None and is_name:
        raise CheckpointError(f"{text}: is no model's name", advice="Write hf://org/name or hf://org/name@revision.")
    return path if name is None or (path.parent.is_dir() and not is_name) else name


def located(path: Path, text: str = "", *, fetch: bool = True) -> Path:
    """Where the model is that a text means, which is fetched if it isn't here.

    Without `fetch` the hub isn't asked for anything: what is neither here nor in the cache keeps its path.
    """
    source = meant(path, text or path.as_posix())
    if isinstance(source, HubName) and not fetch:
        try:
            return snapshot(cache_of() / source.folder, source)
        except CheckpointError:
            return path
    found = sought(source)
    if isinstance(found, Path):
        return found
    from streammerge.models.downloads import check_disk

    check_disk([found])
    return found.fetched()


def is_there(path: Path) -> bool:
    """Whether there is something at the path, be it a link that leads nowhere, or something that nobody can tell."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def check_there(path: Path) -> None:
    """CheckpointError if nothing is at the path, and it could be meant as a name on the hub."""
    name = None if is_there(path) else HubName.of("/".join(path.parts[-2:]))
    if name is not None:
        raise CheckpointError(
            f"{path}: can't be read: No such file or directory, and {name} is not in Hugging Face's cache "
            f"({cache_of()})",
            advice=f"Check the path; a model of the hub is named hf://{name}.",
        )
