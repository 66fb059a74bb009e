"""Merge from Python: nest merges, look at some values before anything is written, then write the file.

    python examples/from_python.py A B OUT.safetensors

OUT is A with a fifth of the point that lies halfway between A and B on the sphere.
"""

from __future__ import annotations

import sys

import streammerge


def main(first: str, second: str, output: str) -> None:
    """Make a model of two others, and write it."""
    with streammerge.open_model(first) as a, streammerge.open_model(second) as b:
        between = streammerge.slerp(a, b, t=0.5)
        mixed = streammerge.linear(a, between, weight=[0.8, 0.2])
        for name, info in list(mixed.tensors.items())[:3]:
            print(f"{name} {info}: {mixed.read(name, 0, min(3, info.elements)).tolist()} …")
        report = streammerge.merge(mixed, output=output)
    print(f"{output}: {report.merged} tensors merged, {report.copied} copied, in {report.seconds['total']:.1f} s")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(str(__doc__))
    try:
        main(*sys.argv[1:])
    except streammerge.MergeError as error:
        sys.exit(f"error: {error}")
