"""Comparisons with the tools that have the same methods, each in an environment of its own: `pytest -m peers`."""
