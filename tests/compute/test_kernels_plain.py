"""The loops as they are where a processor has none of the instructions that they are written for: the same bytes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from streammerge.compute.kernels import library as kernel_library
from streammerge.compute.lanes import torch_dtype
from streammerge.tensors import DTYPES
from tests.make import programs
from tests.make.programs import applied, check, measured, problems, small_pieces, stored

FLAGS = ["-std=c11", "-O1", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-shared", "-fPIC"]

COMPILER = None if sys.platform == "win32" else shutil.which("cc")

SOURCES = sorted(str(path) for path in Path(kernel_library.__file__).parent.glob("*.c"))

pytestmark = pytest.mark.skipif(COMPILER is None or not SOURCES, reason="no compiler, or no sources")


@pytest.fixture(scope="module", autouse=True)
def plain(tmp_path_factory):
    """The library, built for no processor in particular, in place of the one that comes with the package."""
    path = tmp_path_factory.mktemp("plain") / "plain.so"
    subprocess.run([str(COMPILER), *FLAGS, "-o", str(path), *SOURCES, "-lm"], check=True)
    library = kernel_library.declared(ctypes.CDLL(str(path)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "kernels", lambda: library)
        yield


@pytest.mark.parametrize("name", ["ties", "breadcrumbs_ties", "dare_ties"])
@given(problem=problems())
@settings(max_examples=30, deadline=None)
def test_merges(name, problem):
    inputs, parameters, compute = problem
    with small_pieces():
        check(applied(name, inputs, **parameters), compute=compute)


@given(problem=problems())
@settings(max_examples=30, deadline=None)
def test_passes(problem):
    inputs, parameters, compute = problem
    with small_pieces():
        measured(applied("breadcrumbs", inputs, **parameters), torch_dtype(DTYPES[compute]))


@pytest.mark.parametrize("dtype", ["F16", "F64"])
def test_ranks_in_rows(dtype):
    inputs = [stored(torch.randn(20, 3001), dtype) for _ in range(3)]
    check(applied("della", inputs, density=0.5))
