"""What the tests of the benchmarks share: a folder for inputs in miniature."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return Path(tmp_path_factory.mktemp("bench"))
