"""Numbers beyond what a tensor is computed in are errors before anything is written; every method takes every dtype."""

from __future__ import annotations

import contextlib

import pytest
import torch

import streammerge
from streammerge.errors import MergeError, PlanError
from streammerge.methods import METHODS
from tests.make.models import make_tensors, merge_to, near, save_models

SHAPES = {"layers.0.w": (4, 6), "conv": (2, 3, 3, 3), "norm": (5,), "scalar": (), "empty": (0, 2)}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    base = {name: tensor.half() for name, tensor in make_tensors(0, shapes=SHAPES).items()}
    folder = tmp_path_factory.mktemp("models")
    return save_models(folder, base=base, **{name: near(base, seed, 0.1) for seed, name in enumerate("abc", 1)})


def call(name, paths, **keywords):
    found = METHODS[name]
    count = max(found.models[0], min(found.models[1] or 2, 2))
    needed = {parameter.name: 0.5 for parameter in found.parameters if parameter.required}
    base = {"base": paths["base"]} if found.base == "required" else {}
    return getattr(streammerge, name)(*[paths[each] for each in "abc"[:count]], **base, **{**needed, **keywords})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_method_computes_in_16_bits(paths, tmp_path, name, dtype):
    made = merge_to(tmp_path / "out.safetensors", call(name, paths), compute_dtype=dtype)
    exact = merge_to(tmp_path / "exact.safetensors", call(name, paths), compute_dtype="fp64")
    assert made.keys() == exact.keys()
    assert all(tensor.isfinite().all() for tensor in made.values())


@pytest.mark.parametrize("number", [1e39, -1e300, 3.5e38])
@pytest.mark.parametrize(
    ("name", "parameter"),
    [(m.name, p.name) for m in METHODS.values() for p in m.parameters if p.type == "number" and p.range is None],
)
def test_a_number_beyond_the_dtype_is_an_error_or_harmless(paths, tmp_path, monkeypatch, name, parameter, number):
    out = tmp_path / "out.safetensors"
    for _ in range(2):  # with the check of the plan, and without: torch's own refusal is an error of ours all the same
        with contextlib.suppress(MergeError):
            out.unlink(missing_ok=True)
            streammerge.merge(call(name, paths, **{parameter: number}), output=out, sync=False, threads=1)
            assert out.exists()
        monkeypatch.setattr("streammerge.compute.magnitudes.LARGEST", {})


@pytest.mark.parametrize(("number", "dtype"), [(1e5, "fp16"), (1e39, "fp32"), (1e39, "bf16")])
def test_the_advice_helps(paths, tmp_path, number, dtype):
    made = streammerge.add(paths["a"], paths["b"], scale=number)
    with pytest.raises(PlanError, match=r"is beyond (F16|F32|BF16), in which it would be computed\n  Use --compute"):
        merge_to(tmp_path / "out.safetensors", made, compute_dtype=dtype)
    assert merge_to(tmp_path / "out.safetensors", made, compute_dtype="fp64", on_nonfinite="ignore")


def test_coefficients_that_grow_by_nesting_are_looked_at(paths, tmp_path):
    inner = streammerge.scale(paths["a"], alpha=1e30)
    with pytest.raises(PlanError, match=r"1e\+60 is beyond F32"):
        merge_to(tmp_path / "out.safetensors", streammerge.scale(inner, alpha=1e30))
    back = streammerge.scale(streammerge.scale(paths["a"], alpha=1e60), alpha=1e-60)
    found = merge_to(tmp_path / "out.safetensors", back)
    assert torch.allclose(found["norm"], make_tensors(0, shapes=SHAPES)["norm"].half(), atol=1)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("tol", [0, 1e-300, 1.0, 100.0])
def test_karcher_with_any_tolerance(paths, tmp_path, tol, same):
    second = paths["a"] if same else paths["b"]
    made = merge_to(tmp_path / "out.safetensors", streammerge.karcher(paths["a"], second, tol=tol))
    assert all(tensor.isfinite().all() for tensor in made.values())
