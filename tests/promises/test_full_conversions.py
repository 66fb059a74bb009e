"""Whole checkpoints of true size, from their original names to diffusers' and back: the same bytes, in little RAM."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streammerge.compute.machine import MIB
from streammerge.formats.safetensors import build_header
from streammerge.storage.hashing import hashes_of
from streammerge.tools.demo.layouts import checkpoint
from tests.make.models import normal, raw_bytes

PROMISED = 64 * MIB
POOL = 3_000_017
"""Random values of which every tensor is made, from one place or another; far from a round number of anything."""

GIGABYTES = {"sd1": 2.1, "sdxl": 6.9}

pytestmark = pytest.mark.slow


def write_checkpoint(path: Path, layout: str) -> str:
    """Write a checkpoint of half precision without ever holding it; a digest of its tensors."""
    infos, pool, digest = checkpoint(layout), raw_bytes(normal((POOL,), 1, torch.float16, 0.05)), hashlib.sha256()
    header = build_header(infos, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header.encoded)
        for number, name in enumerate(header.names):
            left, start = infos[name].nbytes, 2 * number * 7919
            if infos[name].dtype.name == "I64":
                piece = raw_bytes(torch.arange(infos[name].elements))
                file.write(piece)
                digest.update(piece)
                continue
            while left:
                piece = pool[start % len(pool) :][:left]
                file.write(piece)
                digest.update(piece)
                left -= len(piece)
                start = 0
    return digest.hexdigest()


def convert(source: Path, output: Path, naming: str) -> None:
    """Have a process of its own write it in another naming, and see what RAM that took; the source is deleted."""
    report = output.with_suffix(".json")
    words = ["convert", str(source), "--names", naming, "-o", str(output), "--report", str(report), "--no-sync", "-q"]
    done = subprocess.run([sys.executable, "-m", "streammerge", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    source.unlink()
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["peak_rss_bytes"] - found["baseline_rss_bytes"] <= PROMISED


@pytest.mark.parametrize("layout", GIGABYTES)
def test_there_and_back_are_the_same_bytes(tmp_path, layout):
    original, theirs, back = (tmp_path / f"{name}.safetensors" for name in ("original", "theirs", "back"))
    try:
        digest = write_checkpoint(original, layout)
        assert original.stat().st_size == pytest.approx(GIGABYTES[layout] * 1e9, rel=0.05)
        convert(original, theirs, "diffusers")
        assert hashes_of(theirs).tensors != digest
        convert(theirs, back, "original")
        assert hashes_of(back).tensors == digest
    finally:
        for path in (original, theirs, back):
            path.unlink(missing_ok=True)
