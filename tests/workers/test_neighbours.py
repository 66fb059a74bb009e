"""Small tensors side by side are made as one: the same bytes, and nothing is said of them that isn't true of each."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.compute.expressions import BLOCK
from streammerge.compute.kernels.library import kernels
from streammerge.compute.kernels.maker import KernelMaker
from streammerge.compute.neighbours import TOGETHER, as_one, neighbours
from streammerge.engine import planned, run_verification
from streammerge.errors import MergeError, OutputError
from streammerge.recipe.files import as_recipe
from streammerge.recipe.options import as_options

with_loops = pytest.mark.skipif(kernels() is None, reason="the compiled loops are not built")

SHAPES = {
    f"blocks.{number:02}.{part}": shape
    for number in range(12)
    for part, shape in {"bias": (7,), "scale": (), "nothing": (0, 3), "weight": (5, 33)}.items()
}


def model(seed, dtype=torch.float16, **others):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return tensors | others


def recipe(*paths, **more):
    weights = [0.25, 0.5, 0.75][: len(paths)]
    models = [
        {"model": str(path), "parameters": {"weight": weight}} for path, weight in zip(paths, weights, strict=True)
    ]
    return {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, **more}


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{letter}.safetensors" for letter in "abc"]
    for seed, path in enumerate(paths):
        save_file(model(seed), path)
    return paths


def groups(given, output, **options):
    with planned(as_recipe(given, options), output, as_options(options)) as plan:
        return [[job.name for job in group] for group in neighbours(job for job in plan.jobs if job.compute)]


def expected(*paths):
    loaded, weights = [load_file(path) for path in paths], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    values = {name: torch.stack([each[name].double() for each in loaded], dim=-1) for name in loaded[0]}
    return {name: (value @ weights[: len(loaded)]).half() for name, value in values.items()}


@with_loops
def test_all_neighbours_are_one(files, tmp_path):
    names = sorted(SHAPES)
    assert groups(recipe(*files), tmp_path / "out.safetensors") == [names[:TOGETHER], names[TOGETHER:]]


@pytest.mark.parametrize("switch", ["on", "off"])
@pytest.mark.parametrize("dtype", ["keep", "fp16", "fp32", "bf16"])
def test_the_bytes_are_those_of_each_alone(files, tmp_path, monkeypatch, switch, dtype):
    monkeypatch.setenv("STREAMMERGE_KERNELS", switch)
    together, alone = tmp_path / "together.safetensors", tmp_path / "alone.safetensors"
    streammerge.merge(recipe(*files), output=together, dtype=dtype, metadata=False)
    monkeypatch.setattr("streammerge.workers.machine.neighbours", lambda jobs: ([job] for job in jobs))
    streammerge.merge(recipe(*files), output=alone, dtype=dtype, metadata=False)
    assert together.read_bytes() == alone.read_bytes()
    if dtype == "keep":
        assert all(torch.equal(found, expected(*files)[name]) for name, found in load_file(together).items())


@with_loops
def test_where_a_model_has_them_elsewhere_they_are_read_there(files, tmp_path):
    more = torch.ones(3, dtype=torch.float16)  # only here: what comes behind it has moved
    save_file(load_file(files[1]) | {"blocks.05.more": more}, files[1])
    output, given = tmp_path / "out.safetensors", recipe(*files, on_missing="keep")
    found = groups(given, output)
    assert [name for group in found for name in group] == sorted(SHAPES)
    assert found[0][-1] == "blocks.05.bias"
    streammerge.merge(given, output=output)
    assert all(torch.equal(value, expected(*files)[name]) for name, value in load_file(output).items())


@with_loops
def test_other_weights_make_other_groups(files, tmp_path):
    given = recipe(*files[:2])
    given["models"][1]["parameters"]["weight"] = [{"filter": "bias", "value": 1.0}, {"value": 0.5}]
    found = groups(given, tmp_path / "out.safetensors")
    assert all(len({name.endswith("bias") for name in group}) == 1 for group in found)


@with_loops
def test_large_tensors_stay_alone_and_no_group_is_larger_than_a_block(tmp_path):
    sizes = [BLOCK // 2, BLOCK // 2, 1, BLOCK, 3 * BLOCK, 2, 3]
    values = {f"t{number}": torch.randn(size).half() for number, size in enumerate(sizes)}
    for letter in "ab":
        save_file(values, tmp_path / f"{letter}.safetensors")
    given = recipe(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = groups(given, tmp_path / "out.safetensors")
    assert found == [["t0", "t1"], ["t2"], ["t3"], ["t4"], ["t5", "t6"]]


@pytest.fixture
def broken(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        values = model(seed)
        values["blocks.03.bias"][2] = float("inf")
        save_file(values, path)
    return paths


def test_what_is_wrong_is_told_of_the_one_tensor(broken, tmp_path):
    report = streammerge.merge(recipe(*broken), output=tmp_path / "out.safetensors")
    assert report.nonfinite == {"blocks.03.bias": 1}
    assert set(report.findings) == {"blocks.03.bias"}


def test_what_is_refused_is_refused_for_the_one_tensor(broken, tmp_path):
    with pytest.raises(MergeError, match=r"blocks\.03\.bias") as raised:
        streammerge.merge(recipe(*broken), output=tmp_path / "out.safetensors", on_nonfinite="error")
    assert "blocks.03.nothing" not in str(raised.value)


def test_a_difference_is_told_of_the_one_tensor(files, tmp_path):
    output = tmp_path / "out.safetensors"
    streammerge.merge(recipe(*files), output=output)
    content = load_file(output)
    content["blocks.07.weight"][0, 0] += 1
    save_file(content, output)
    with pytest.raises(OutputError, match=r"1 tensor is not what the recipe gives[\s\S]*blocks\.07\.weight") as raised:
        run_verification(as_recipe(recipe(*files), {}), output, as_options({"metadata": False}))
    assert "blocks.07.scale" not in str(raised.value)


@with_loops
def test_memory_that_runs_out_makes_them_one_by_one(files, tmp_path, monkeypatch):
    made, original = [], KernelMaker.blocks

    class Scarce:
        def each(self, ranges):
            raise MemoryError
            yield

    def blocks(self, wanted, known, **how):
        is_joined = wanted.node.info.shape not in SHAPES.values()
        made.append(is_joined)
        return Scarce() if is_joined else original(self, wanted, known, **how)

    monkeypatch.setattr(KernelMaker, "blocks", blocks)
    streammerge.merge(recipe(*files), output=tmp_path / "out.safetensors", threads=1)
    assert made.count(True) == 2
    assert made.count(False) == sum(not name.endswith("nothing") for name in SHAPES)
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(value, expected(*files)[name]) for name, value in found.items())


def test_one_alone_is_itself(files, tmp_path):
    with planned(as_recipe(recipe(*files), {}), tmp_path / "out.safetensors", as_options({})) as plan:
        job = next(iter(plan.jobs))
        assert as_one([job]) is job
        assert list(neighbours([])) == []
