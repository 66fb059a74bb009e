"""The tools that people would otherwise use."""

from __future__ import annotations

from typing import Final

from benchmarks.peers.kohya import KOHYA
from benchmarks.peers.mergekit import MERGEKIT_PYTORCH, MERGEKIT_YAML
from benchmarks.peers.plain import ARTICLE, PLAIN
from benchmarks.peers.sd_mecha import SD_MECHA
from benchmarks.peers.sd_meh import SD_MEH
from benchmarks.tools import Tool

PEERS: Final[tuple[Tool, ...]] = (PLAIN, ARTICLE, MERGEKIT_PYTORCH, MERGEKIT_YAML, SD_MECHA, SD_MEH, KOHYA)
"""Every peer, in the order of the report."""
