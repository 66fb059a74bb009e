"""Merge model checkpoints of any size in a small, stated amount of RAM."""

__version__ = "0.1.0"
