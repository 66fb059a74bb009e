"""The tools that people would otherwise use."""

from __future__ import annotations

from typing import Final

from benchmarks.tools import Tool

PEERS: Final[tuple[Tool, ...]] = ()
"""Every peer, in the order of the report."""
