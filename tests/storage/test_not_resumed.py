"""A merge that can't go on from what is on the disk says why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.errors import OutputError
from streammerge.methods import METHODS
from streammerge.storage.journal import lock_journal
from streammerge.storage.records import JOURNAL_SUFFIX
from tests.make.models import MemoryModel, make_tensors, near, save_models, with_integers
from tests.storage.outputs import digests
from tests.storage.stopped_merges import SHAPES, Stopping, recipe_of, run, stop, whole


@pytest.fixture
def paths(tmp_path):
    base = with_integers(make_tensors(1, shapes=SHAPES))
    return save_models(tmp_path / "models", a=near(base, 2), b=near(base, 3), base=base)


def weaker(raw, paths):
    raw["models"] = [str(paths["a"]), {"model": str(paths["b"]), "parameters": {"weight": 0.25}}]


def touched(raw, paths):
    os.utime(paths["a"], ns=(0, 0))


def replaced(raw, paths):
    status = paths["a"].stat()
    shutil.copy(paths["a"], paths["a"].with_suffix(".new"))
    paths["a"].with_suffix(".new").replace(paths["a"])
    os.utime(paths["a"], ns=(status.st_atime_ns, status.st_mtime_ns))


def rewritten(raw, paths):
    status = paths["a"].stat()
    with paths["a"].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(paths["a"], ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Path]], None], str]] = {
    "a weight": (weaker, r"recipe models\.1\.parameters\.weight: was not there, is 0.25"),
    "the dtype": (lambda raw, _: raw.update(dtype="fp16"), "recipe dtype: was not there, is float16"),
    "the seed": (lambda raw, _: raw.update(seed=3), "recipe seed: was not there, is 3"),
    "the order": (lambda raw, _: raw["models"].reverse(), r"recipe models\.0\.model: was a.safetensors, is b"),
    "a time": (touched, r"input .*a\.safetensors \(time of change in ns\): was \d+, is 0"),
    "a file": (replaced, r"input .*a\.safetensors \(inode\): was \d+, is \d+"),
    "a byte": (rewritten, r"content .*a\.safetensors: is another"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_said_and_nothing_is_lost(tmp_path, paths, monkeypatch, change):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output)
    before = digests(tmp_path / "new")
    changed, line = CHANGES[change]
    changed(raw, paths)
    problem = f"can't be resumed: what is merged has changed\n  (.*\n  )*{line}(.*\n)*.*is left as it is"
    with pytest.raises(OutputError, match=problem):
        run(raw, output, resume=True)
    assert digests(tmp_path / "new") == before


@pytest.mark.parametrize("options", [{"shard_size": 2_000_000}, {"metadata": False}, {"device": "auto"}])
def test_other_options_that_change_the_bytes_are_refused(tmp_path, paths, monkeypatch, options):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    monkeypatch.setattr("streammerge.plan.plan.choose_device", lambda name: name)  # there may be a card
    stop(monkeypatch, raw, output)
    with pytest.raises(OutputError, match="can't be resumed"):
        run(raw, output, resume=True, **options)


def test_a_method_that_was_rewritten_is_refused(tmp_path, paths, monkeypatch):
    source = tmp_path / "own.py"
    text = '''
from streammerge.methods import BlockMethod, method

@method(BlockMethod)
def rewritten(*models):
    """θ = θ₁"""
    return models[0] * 1
'''
    try:
        source.write_text(text)
        streammerge.load_methods(source)
        raw, output = recipe_of(paths, "rewritten"), tmp_path / "new" / "out.safetensors"
        stop(monkeypatch, raw, output)
        source.write_text(text.replace("* 1", "* 2"))
        with pytest.raises(OutputError, match="method rewritten: is another"):
            run(raw, output, resume=True)
    finally:
        METHODS.pop("rewritten", None)


def test_parameters_of_python_calls_count(tmp_path, paths, monkeypatch):
    """There is no recipe to be compared."""
    output = tmp_path / "new" / "out.safetensors"
    with monkeypatch.context() as patches:
        Stopping(patches, 4)
        with pytest.raises(KeyboardInterrupt):
            streammerge.merge(streammerge.slerp(paths["a"], paths["b"], t=0.3), output=output, threads=1)
    with pytest.raises(OutputError, match=r"tensor layers\.\d+\.w: is another"):
        streammerge.merge(streammerge.slerp(paths["a"], paths["b"], t=0.4), output=output, resume=True)
    report = streammerge.merge(streammerge.slerp(paths["a"], paths["b"], t=0.3), output=output, resume=True)
    assert report.resumed_bytes


def test_models_without_identity_can_not_be_resumed(tmp_path):
    model = MemoryModel({"x": torch.ones(3)})
    with pytest.raises(OutputError, match="models that are Python objects can't be resumed"):
        streammerge.merge(streammerge.scale(model, alpha=2.0), output=tmp_path / "out.safetensors", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_with_nothing_to_resume_it_begins_and_says_so(tmp_path, paths):
    told: list[str] = []
    run(recipe_of(paths), tmp_path / "out.safetensors", told.append, resume=True)
    assert told == ["nothing to resume: merging from the beginning"]
    with pytest.raises(OutputError, match="the output exists"):
        run(recipe_of(paths, dtype="fp16"), tmp_path / "out.safetensors", resume=True)


@pytest.mark.parametrize("damage", ["removed", "cut", "another header"])
def test_files_that_are_not_what_was_left_are_not_gone_on_with(tmp_path, paths, monkeypatch, damage):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    right = whole(raw, tmp_path / "right")
    stop(monkeypatch, raw, output)
    (partial,) = (tmp_path / "new").glob(".*.partial")
    if damage == "removed":
        partial.unlink()
        run(raw, output, resume=True)
    else:
        with partial.open("r+b") as file:
            if damage == "cut":
                file.truncate(1000)
            else:
                file.write(b"\x01")
        with pytest.raises(OutputError, match="is not what the interrupted merge left"):
            run(raw, output, resume=True)
        run(raw, output)
    assert digests(tmp_path / "new").items() >= right.items()


@pytest.mark.parametrize("topics", [(), ("recipe",), ("program", "recipe", "output"), ("output", "tensor")])
def test_what_does_not_tell_of_the_inputs_is_not_gone_on_with(tmp_path, paths, monkeypatch, topics):
    """Or a journal from elsewhere could have anything put into the output."""
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output)
    journal = lock_journal(output.with_name(f".out.safetensors{JOURNAL_SUFFIX}"), create=False)
    assert journal is not None
    contents = journal.contents
    journal.begin(contents.output, contents.files)
    journal.identify({topic: contents.fingerprint[topic] for topic in topics if contents.fingerprint})
    journal.add(contents.entry)
    journal.close()
    with pytest.raises(OutputError, match="can't be resumed: what is merged has changed"):
        run(raw, output, resume=True)
