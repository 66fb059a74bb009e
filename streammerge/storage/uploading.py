"""Pushing a finished output to Hugging Face's hub, by its library: its own files, and nothing else in its folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from streammerge.errors import OutputError
from streammerge.formats.layout import OutputLayout, is_file_name
from streammerge.models.downloads import INSTALL, is_offline, told
from streammerge.models.hub import HubName


def target_of(text: str) -> HubName:
    """The model, and the branch, to push to; OutputError for what is no such name."""
    name = HubName.of(f"hf://{text.removeprefix('hf://')}")
    if name is None:
        raise OutputError(f"--upload {text[:100]}: is no model's name", advice="Write org/name, or org/name@branch.")
    return name


def check_upload(text: str, layout: OutputLayout) -> None:
    """OutputError if an output could not be pushed when it is done, as far as anybody can tell before."""
    name = target_of(text)
    if is_file_name(layout.path):
        raise OutputError(
            f"--upload {name}: the output is a file, and what is pushed is a folder with a config and a card",
            advice=f"Write -o {layout.path.with_suffix('')}, without an ending.",
        )
    if is_offline():
        raise OutputError(f"--upload {name}: this machine is offline (HF_HUB_OFFLINE)", advice="Unset it.")
    hub = _library(name)
    if not hub.get_token():
        raise OutputError(f"--upload {name}: nobody is logged in", advice="hf auth login, or set HF_TOKEN.")


def upload(text: str, layout: OutputLayout, tell: Callable[[str], None]) -> None:
    """Push an output that is complete; OutputError, which says how to push it again, if that fails.

    A model that is not there yet is made, and is private.
    """
    name, folder = target_of(text), layout.folder
    own = [path.relative_to(folder).as_posix() for path in layout.paths]
    try:
        hub = _library(name)
        api = hub.HfApi()
        if not api.repo_exists(name.name):
            api.create_repo(name.name, private=True, exist_ok=True)
            tell(f"{name.name} was made on the hub, and is private: its settings there can change that")
        if name.revision:
            api.create_branch(name.name, branch=name.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name.name,
            folder_path=str(folder),
            revision=name.revision or None,
            allow_patterns=[re.sub(r"([\[*?])", r"[\1]", each) for each in own],
            commit_message="Upload a merge made by streammerge",
        )
    except OutputError:
        raise
    except Exception as error:  # the library's own are of many kinds, and change
        problem = told(error, str(name))
        branch = f" --revision {name.revision}" if name.revision else ""
        raise OutputError(
            f"the output was not uploaded: {problem.what}",
            advice=f"{problem.advice} To upload it again: hf upload {name.name} {folder} .{branch}",
        ) from error
    tell(f"uploaded: {getattr(done, 'commit_url', None) or name}")


def _library(name: HubName) -> Any:  # noqa: ANN401
    try:
        import huggingface_hub
    except ImportError:
        told_so = f"--upload {name}: takes huggingface_hub, which isn't installed"
        raise OutputError(told_so, advice=f"{INSTALL}.") from None
    return huggingface_hub


UPLOADED: Final = "The output is complete."
"""What is on the disk when an upload fails."""
