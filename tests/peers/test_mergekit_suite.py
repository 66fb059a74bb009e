"""mergekit's own end-to-end tests pass with what streammerge makes of their recipes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

import streammerge
from tests.peers.environments import SCRIPTS, interpreter
from tests.peers.source import mergekit_source

pytestmark = pytest.mark.peers

COUNTS = {"test_basic_merges.py": 33, "test_chat_template.py": 2, "test_tokenizer.py": 8}
"""How many tests each file has."""


@pytest.mark.parametrize("file", COUNTS)
def test_mergekits_tests_pass(file, tmp_path, pytestconfig):
    python, source = interpreter("mergekit", pytestconfig), mergekit_source(pytestconfig)
    ours = Path(streammerge.__file__).parent
    shutil.copytree(ours, tmp_path / "lib" / "streammerge", ignore=shutil.ignore_patterns("__pycache__"))
    told = tmp_path / "told.xml"
    places = os.pathsep.join(map(str, (source, SCRIPTS, tmp_path / "lib")))
    words = ["-m", "pytest", "-q", "-p", "mergekit_shim", "-p", "no:cacheprovider", f"--junitxml={told}"]
    done = subprocess.run(
        [str(python), *words, "--rootdir", str(source), str(source / "tests" / file)],
        env={**os.environ, "PYTHONPATH": places, "HF_HUB_OFFLINE": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
        cwd=source,
    )
    assert told.exists(), done.stdout + done.stderr
    cases = list(ElementTree.parse(told).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    assert len(cases) == COUNTS[file]
    assert not failed, done.stdout[-5000:]
