"""safetensors' own judgement of a file, in this process or in one of its own: the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.formats import library
from streammerge.formats.library import RefusedError, library_digest, names_digest

NAMES = ("weight", "ünïcode", 'quo"te', "new\nline", "日本", "")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({name: torch.ones(number) for number, name in enumerate(NAMES)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.fixture(params=["here", "elsewhere"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "elsewhere":
        monkeypatch.setattr(library, "LONG_HEADER", 1)
    return str(request.param)


def test_the_library_finds_the_names(file, way):
    assert library_digest(file) == names_digest(reversed(NAMES))


def test_what_the_library_refuses_is_refused(file, way):
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RefusedError, match=r"(?i)header|incomplete|metadata"):
        library_digest(file)


def test_a_long_header_is_not_read_in_this_process(file, monkeypatch):
    monkeypatch.setattr(library, "LONG_HEADER", 1)
    monkeypatch.setattr(library, "_ask", lambda path: pytest.fail("it was"))
    assert library_digest(file) == names_digest(NAMES)


@pytest.mark.parametrize("executable", ["", "/nowhere/python", sys.executable])
def test_where_no_process_can_be_had_it_is_asked_here(file, monkeypatch, executable):
    monkeypatch.setattr(library, "LONG_HEADER", 1)
    monkeypatch.setattr(sys, "executable", executable)
    assert library_digest(file) == names_digest(NAMES)


def test_other_names_have_another_digest():
    digests = {names_digest(names) for names in (NAMES, NAMES[1:], (), ("a", "b"), ("ab",), ('a""b',))}
    assert len(digests) == 6
