"""Cases have the inputs that they say, in full size and in miniature."""

from __future__ import annotations

import hashlib

import pytest

from benchmarks import checking, inputs
from benchmarks.cases import CASES
from streammerge import open_model
from streammerge.methods import METHODS


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_has_its_inputs(case):
    tensors = inputs.SETS[case.input_set].tensors(True)
    assert inputs.used_roles(case) <= set(tensors)
    assert case.layout in case.merge.roles
    assert inputs.SETS[case.input_set].container == case.container
    for merge in (case.merge, *case.variants.values()):
        assert merge.method in {*METHODS, "bake"}
        assert len(merge.weights) in (0, len(merge.models))


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        *(("article-fp16", 8.04), ("article-fp32-ckpt", 16.08), ("sdxl", 13.88), ("sd2", 7.8), ("llama", 19.3)),
        *(("one-tensor", 8.0), ("scale-30GB", 30.0), ("scale-models", 6.2)),
    ],
)
def test_full_size_is_what_it_says(name, gigabytes):
    assert inputs.SETS[name].nbytes(quick=False) / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_one_tensor_is_beyond_31_bits():
    (info,) = inputs.SETS["one-tensor"].tensors(False)["a"].values()
    assert info.nbytes == 4_000_000_000


def test_the_llama_has_3_billion_parameters_and_a_large_embedding():
    tensors = inputs.SETS["llama"].tensors(False)["a"]
    assert 3.0e9 < sum(info.elements for info in tensors.values()) < 3.5e9
    assert tensors["model.embed_tokens.weight"].nbytes / 1e9 == pytest.approx(0.79, rel=0.01)


def test_every_method_that_streams_is_measured():
    streaming = {name for name, method in METHODS.items() if method.kind != "whole"}
    assert set(CASES["methods"].variants) == streaming


@pytest.mark.parametrize("name", ["article-fp16", "article-fp32-ckpt", "llama", "ties"])
def test_inputs_are_models_with_values(made, name):
    paths = inputs.find_or_make(CASES[name], made, quick=True)
    assert set(paths) == inputs.used_roles(CASES[name])
    for path in paths.values():
        with open_model(path) as model:
            assert len(model.tensors) > 200
        opened = checking.Opened(path)
        zeros = [tensor for tensor in sorted(opened.names) if not opened[tensor].any()]
        opened.closing.close()
        assert not zeros


def test_inputs_are_made_once(made):
    case = CASES["sixteen"]
    paths = inputs.find_or_make(case, made, quick=True)
    before = {path: path.stat().st_mtime_ns for path in paths.values()}
    assert inputs.find_or_make(case, made, quick=True) == paths
    assert {path: path.stat().st_mtime_ns for path in paths.values()} == before


def test_inputs_that_were_not_finished_are_made_again(made):
    case = CASES["one-tensor"]
    paths = inputs.find_or_make(case, made, quick=True)
    digest = hashlib.sha256(paths["a"].read_bytes()).digest()
    (inputs.set_folder(case, made, quick=True) / inputs.COMPLETE).unlink()
    paths["a"].write_bytes(b"half")
    inputs.find_or_make(case, made, quick=True)
    assert hashlib.sha256(paths["a"].read_bytes()).digest() == digest


def test_models_are_not_alike(made):
    paths = inputs.find_or_make(CASES["sixteen"], made, quick=True)
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in paths.values()}) == 16
