"""The package's rooms, from the program at the top to its vocabulary at the bottom, and what each is for.

A room imports only those that stand below it. The picture in the documentation is made from this list.
"""

from __future__ import annotations

from typing import Final

ROOMS: Final[tuple[tuple[str, str], ...]] = (
    ("cli", "the program: what may be typed, what is shown"),
    ("tools", "inspect, compare, verify, bench, demo: everything beside merging"),
    ("engine", "the whole program in one file: open, plan, work, verify, commit, report"),
    ("workers", "who does what when: windows of tensors, threads, computing again to check"),
    ("storage", "what is written: the file under way, its journal, resuming, putting in place, hashes"),
    ("plan", "what will happen to every tensor, where it goes, and what it costs, from headers alone"),
    ("recipe", "what the user asked for: recipes, parameters, values by block, options, metadata"),
    ("models", "what has named tensors: checkpoints, merges, quantised weights; what a model looks like"),
    ("compute", "expressions over byte ranges, what they cost, and their evaluation on CPU or GPU"),
    ("methods", "the merge methods by family, one registry, and the statistics that they share"),
    ("formats", "bytes on disk: safetensors, shards, torch zips, and how they are read"),
    ("report", "how far it is, how it went"),
    ("findings", "what is wrong with the numbers of a merge"),
    ("tensors", "dtypes, shapes, and what a model is"),
    ("errors", "what went wrong, in words"),
    ("version", "the number"),
)
