"""Measurements of RAM and time that anyone can repeat: `python -m benchmarks.article --help`."""
