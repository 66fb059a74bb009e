"""Exact order statistics of whole tensors without sorting them: any number of ranks of any number of vectors.

Where the ranks are known beforehand, a sample tells between which two values each must lie, and one pass counts what is
above and gathers what is between (`bracketing`); where they aren't, or the sample was no help, histograms find them
(`radix`).
"""

from __future__ import annotations
