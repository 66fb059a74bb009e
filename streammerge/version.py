"""The version, in the one place where everybody reads it."""

from __future__ import annotations

__version__ = "0.3.0"
