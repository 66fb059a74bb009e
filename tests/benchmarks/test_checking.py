"""A wrong output is called wrong, and a right one right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import checking
from benchmarks.cases import Merge, Take
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.demo.files import write_torch_zip
from streammerge.tools.demo.noise import Noise

SHAPES = {"unet.a": (300, 200), "unet.b": (7,), "vae.c": (40, 50), "scalar": ()}
LINEAR = Merge("linear", ("a", "b"), weights=(3.0, 1.0), takes=(Take("vae.*", "b"),))
ARITHMETIC = Merge("task_arithmetic", ("a", "b"), "base", (0.5, 0.4), takes=(Take("vae.*", "b"),))
SLERP = Merge("slerp", ("a", "b"), t=0.3)
TIES = Merge("ties", ("a", "b"), "base", (1.0, 1.0), density=0.3)


def some_models(folder: Path, dtype: torch.dtype = torch.float16) -> dict[str, Path]:
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    paths = {}
    for role, distance in (("base", 0.0), ("a", 0.2), ("b", 0.3)):
        moved = {name: value + distance * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        tensors = {name: value.to(dtype) for name, value in moved.items()}
        tensors["steps"] = torch.tensor([3, 5])
        paths[role] = folder / f"{role}.safetensors"
        save_file(tensors, paths[role])
    return paths


def right_output(merge: Merge, models: dict[str, Path], layout: str) -> dict[str, torch.Tensor]:
    loaded = {role: load_file(path) for role, path in models.items()}
    out = {}
    for name, like in loaded[layout].items():
        taken = merge.taken_from(name)
        exact = {role: loaded[role][name].double().flatten() for role in merge.roles}
        if taken or not like.is_floating_point():
            out[name] = loaded[taken or layout][name]
        else:
            out[name] = checking.reference(merge, exact).to(like.dtype).view(like.shape)
    return out


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return Path(tmp_path)


def verdict(merge: Merge, place: Path, change: object = None, dtype: torch.dtype = torch.float16) -> checking.Verdict:
    models = some_models(place, dtype)
    out = right_output(merge, models, "a")
    if callable(change):
        change(out)
    save_file(out, place / "out" / "merged.safetensors")
    return checking.check(merge, "a", models, place / "out")


@pytest.mark.parametrize("merge", [LINEAR, ARITHMETIC, SLERP, TIES], ids=lambda merge: merge.method)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_right_output_is_right(place, merge, dtype):
    found = verdict(merge, place, dtype=dtype)
    assert found.ok
    assert found.text == "right"
    assert found.checked == len(SHAPES) + 1


def drop(out: dict[str, torch.Tensor]) -> None:
    del out["unet.b"]


def add(out: dict[str, torch.Tensor]) -> None:
    out["more"] = torch.ones(3)


def reshape(out: dict[str, torch.Tensor]) -> None:
    out["unet.a"] = out["unet.a"].T.contiguous()


def nudge(out: dict[str, torch.Tensor]) -> None:
    out["unet.a"][299, 199] += 0.25


def poison(out: dict[str, torch.Tensor]) -> None:
    out["unet.b"][0] = math.nan


def mistake(out: dict[str, torch.Tensor]) -> None:
    out["vae.c"] = out["vae.c"] * 1.1


def count(out: dict[str, torch.Tensor]) -> None:
    out["steps"] = out["steps"] + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "missing 1 of 5 tensors"),
        (add, "1 tensors too many"),
        (reshape, "1 tensors of another shape"),
        (nudge, "wrong numbers in 1 of 5"),
        (poison, "wrong numbers in 1 of 5"),
        (mistake, "wrong numbers in 1 of 5"),
        (count, "wrong numbers in 1 of 5"),
    ],
)
@pytest.mark.parametrize("merge", [LINEAR, ARITHMETIC], ids=lambda merge: merge.method)
def test_a_wrong_output_is_wrong(place, merge, change, said):
    found = verdict(merge, place, change)
    assert not found.ok
    assert said in found.text


@pytest.mark.parametrize("merge", [SLERP, TIES], ids=lambda merge: merge.method)
def test_a_merge_by_another_method_is_wrong(place, merge):
    def average(out: dict[str, torch.Tensor]) -> None:
        loaded = some_models(place)
        a, b = (load_file(loaded[role])["unet.a"] for role in ("a", "b"))
        out["unet.a"] = (a + b) / 2

    assert not verdict(merge, place, average).ok


def test_arithmetic_in_the_stored_dtype_is_rough_but_not_wrong(place):
    def in_half(out: dict[str, torch.Tensor]) -> None:
        paths = some_models(place)
        base, a, b = (load_file(paths[role])["unet.a"] for role in ("base", "a", "b"))
        out["unet.a"] = base + (0.5 * (a - base) + 0.4 * (b - base))

    found = verdict(ARITHMETIC, place, in_half)
    assert found.ok
    assert found.rough == 1
    assert "rounded more than once in 1 of 5" in found.text


def test_another_dtype_is_noted_but_not_wrong(place):
    def wider(out: dict[str, torch.Tensor]) -> None:
        out["unet.a"] = out["unet.a"].float()

    found = verdict(LINEAR, place, wider)
    assert found.ok
    assert "1 tensors of another dtype" in found.text


def test_whole_numbers_stored_as_halves_are_compared_as_whole_numbers(place):
    def halved(out: dict[str, torch.Tensor]) -> None:
        out["steps"] = out["steps"].half()

    found = verdict(LINEAR, place, halved)
    assert "1 tensors of another dtype" in found.text
    assert "wrong" not in found.text


def test_averaged_whole_numbers_are_wrong(place):
    def averaged(out: dict[str, torch.Tensor]) -> None:
        out["steps"] = out["steps"].half() * 0.6

    assert "wrong numbers in 1 of 5" in verdict(LINEAR, place, averaged).text


def test_outputs_of_every_form_are_found(place):
    models = some_models(place)
    out = right_output(LINEAR, models, "a")
    torch.save({"state_dict": out, "epoch": 3}, place / "out" / "merged.ckpt")
    assert checking.check(LINEAR, "a", models, place / "out").ok
    (place / "out" / "merged.ckpt").unlink()
    names = sorted(out)
    shards = {"x-1.safetensors": names[:2], "x-2.safetensors": names[2:]}
    for file, some in shards.items():
        save_file({name: out[name] for name in some}, place / "out" / file)
    assert checking.check(LINEAR, "a", models, place / "out").ok
    weight_map = {name: file for file, some in shards.items() for name in some}
    save_file({"stray": torch.ones(1)}, place / "out" / "stray.safetensors")
    (place / "out" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert checking.check(LINEAR, "a", models, place / "out").ok


def test_large_zips_are_mapped_and_not_read(tmp_path):
    infos = {"x": TensorInfo(DTYPES["F32"], (1000, 10))}
    write_torch_zip(tmp_path / "m.ckpt", infos, Noise(infos).values)
    opened = checking.Opened(tmp_path / "m.ckpt")
    assert opened.names == {"x"}
    assert opened.describe("x") == ((1000, 10), torch.float32)


def test_every_place_of_a_tensor_is_looked_at():
    assert checking.pieces(10) == [slice(0, checking.PIECE)]
    first, middle, last = checking.pieces(10**6)
    assert (first.start, last.stop) == (0, 10**6)
    assert first.stop < middle.start < 5 * 10**5 < middle.stop < last.start


def test_there_is_no_reference_for_unknown_methods():
    with pytest.raises(ValueError, match="no reference for slurp"):
        checking.reference(Merge("slurp", ("a",)), {"a": torch.ones(2)})
