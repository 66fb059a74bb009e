"""A virtual environment for every peer, made once and kept in pytest's cache."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.make.models import Tensors, save_model

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "benchmarks" / "peers"
SCRIPTS = Path(__file__).parent / "scripts"


def interpreter(peer: str, config: pytest.Config) -> Path:
    """The Python that has the peer's pinned versions; skips where they can't be installed."""
    requirements = REQUIREMENTS / f"{peer}.txt"
    assert config.cache is not None
    place = config.cache.mkdir("peers") / peer
    python = place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    installed, wanted = place / "installed", hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        words = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(requirements)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{peer} can't be installed: {done.stderr.strip().splitlines()[-1:]}")
        installed.write_text(wanted, encoding="utf-8")
    return python


def run_peer(
    python: Path, script: str, folder: Path, cases: Sequence[dict[str, Any]], models: Sequence[Tensors]
) -> list[Tensors]:
    """Run every case in one process of the peer; what it made of them. The first model is the base."""
    paths = [str(save_model(folder / f"{number}.safetensors", model)) for number, model in enumerate(models)]
    job = folder / "job.json"
    job.write_text(json.dumps({"cases": cases, "models": paths, "output": str(folder)}), encoding="utf-8")
    done = subprocess.run(
        [str(python), str(SCRIPTS / script), str(job)], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"out-{number}.safetensors") for number in range(len(cases))]
