"""mergekit's repository, as it was at one commit: its own tests and examples, of which nothing comes into ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMMIT = "a6e402884ba9bc30da7f23e8304a35f19485de95"
ADDRESS = "https://github.com/arcee-ai/mergekit"


def mergekit_source(config: pytest.Config) -> Path:
    """A folder with `tests` and `examples`: of the clone that MERGEKIT_SOURCE names, or a new one; skips without."""
    assert config.cache is not None
    place = config.cache.mkdir("peers") / f"mergekit-{COMMIT[:12]}"
    if (place / "examples").is_dir():
        return place
    clone = Path(os.environ.get("MERGEKIT_SOURCE") or place.with_suffix(".git"))
    git = shutil.which("git")
    if git is None:
        pytest.skip("git isn't there")
    if not clone.exists():
        words = [git, "clone", "-q", "--bare", "--filter=blob:limit=1m", ADDRESS, str(clone)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mergekit can't be fetched: {done.stderr.strip().splitlines()[-1:]}")
    place.mkdir(parents=True, exist_ok=True)
    words = [git, "-C", str(clone), "archive", COMMIT, "tests", "examples"]
    archive = subprocess.run(words, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"mergekit can't be read: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "x", "-C", str(place)], input=archive.stdout, check=True)
    return place
