"""What a merge will do and cost, from headers alone, held to what it then does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import streammerge
from streammerge.compute.expressions import BLOCK
from streammerge.compute.kernels.library import kernels
from streammerge.compute.machine import DEFAULT_WORK_BYTES, MAPPED_BYTES, MIB, share_out
from streammerge.engine import planned, run_merge
from streammerge.errors import OutputError, PlanError
from streammerge.plan.plan import Plan, by_component, existing_folder, plan_merge
from streammerge.plan.sources import Sources
from streammerge.recipe.options import Options, parse_size
from streammerge.recipe.parse import parse_recipe
from streammerge.tensors import DTYPES
from tests.make.headers import header, merged
from tests.make.models import make_tensors, save_models, with_integers

OUT = Path("out.safetensors")


def plan(by_name, method="linear", *, options: Options | None = None, **keys) -> Plan:
    return plan_merge(merged(by_name, method, **keys), OUT, options or Options(), Sources())


def pair(dtype: str = "F16", **shapes):
    return {"a": header(dtype, **shapes), "b": header(dtype, **shapes)}


def trio(**shapes):
    return {name: header("F16", **shapes) for name in ("depth", "waifu", "base")}


# ── what is done to the tensors ──────────────────────────────────────────────────────────────────────────────────────


def test_jobs_are_in_the_order_of_the_outputs_bytes():
    made = plan(pair(z=(3,), a="F32 2", ids="I64 4", m=(1,)), rules=[{"match": "m", "drop": True}])
    assert [job.name for job in made.jobs] == ["ids", "a", "z"]
    assert [job.offset for job in made.jobs] == list(made.output.files[0].header.offsets.values())
    assert made.jobs[-1].offset + made.jobs[-1].info.nbytes == made.output.nbytes
    assert [made.count(action) for action in ("merged", "copied", "dropped")] == [2, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "keys", "compute"),
    [
        ("F16", {}, "F32"),
        ("BF16", {}, "F32"),
        ("F8_E4M3", {}, "F32"),
        ("F64", {}, "F64"),
        ("F32", {}, "F64"),  # a combination stored as float32 shows every rounding
        ("F16", {"dtype": "fp32"}, "F64"),
        ("F16", {"method": "ties", "base": "b"}, "F32"),
        ("F32", {"method": "ties", "base": "b"}, "F32"),
        ("F64", {"method": "ties", "base": "b"}, "F64"),
    ],
)
def test_the_dtype_of_the_arithmetic(dtype, keys, compute):
    assert [job.compute for job in plan(pair(dtype, x=(1,)), **keys).jobs] == [DTYPES[compute]]


def test_the_users_choice_of_arithmetic_holds_for_what_is_merged():
    rules = [{"match": "y", "take": "b", "dtype": "bf16"}]
    made = plan(pair(x=(1,), y=(1,)), rules=rules, options=Options(compute_dtype=DTYPES["F64"]))
    assert {job.name: str(job.compute) for job in made.jobs} == {"x": "F64", "y": "F32"}


@pytest.mark.parametrize("keys", [{"rules": [{"match": "x", "take": "b"}]}, {"parameters": {"weight": {"value": 1}}}])
def test_bytes_that_are_copied_are_not_computed(keys):
    models = pair(x=(5,), ids="I64 3")
    if "parameters" in keys:
        models.pop("b")
    made = plan(models, **keys)
    assert [job.compute for job in made.jobs] == [None, None]


def test_a_model_that_is_cast_is_computed():
    made = plan({"a": header("F16", x=(5,))}, dtype="fp32")
    assert [job.compute for job in made.jobs] == [DTYPES["F64"]]


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_base_that_cancels_is_not_read():
    shapes = {"x": (1000,)}
    halves = [{"model": name, "parameters": {"weight": 0.5}} for name in ("depth", "waifu")]
    assert plan(trio(**shapes), "task_arithmetic", base="base", models=halves).bytes_to_read == 2 * 2000
    thirds = [{"model": name, "parameters": {"weight": 0.3}} for name in ("depth", "waifu")]
    assert plan(trio(**shapes), "task_arithmetic", base="base", models=thirds).bytes_to_read == 3 * 2000
    tenths = [
        {"model": name, "parameters": {"weight": share}} for name, share in (("depth", 0.3), ("waifu", 0.7))
    ]  # 1 - 0.3 - 0.7 is not 0 in binary
    assert plan(trio(**shapes), "task_arithmetic", base="base", models=tenths).bytes_to_read == 2 * 2000


def test_a_model_of_weight_zero_is_not_read():
    weights = {"weight": [{"filter": "x", "value": 0}, {"value": 1}]}
    models = [{"model": "a", "parameters": weights}, {"model": "b"}]
    made = plan(pair(x=(1000,), y=(10,)), models=models)
    assert made.bytes_to_read == 2000 + 2 * 20


def test_a_file_that_is_merged_twice_is_read_once():
    models = pair(x=(1000,))
    models["b"] = models["a"]
    assert plan(models).bytes_to_read == 2000


def test_copies_are_read_once_and_dropped_tensors_not_at_all():
    rules = [{"match": "x", "take": "b"}, {"match": "y", "drop": True}]
    assert plan(pair(x=(100,), y=(100,), ids="I64 5"), rules=rules).bytes_to_read == 200 + 40


@pytest.mark.parametrize(
    ("method", "keys", "passes"),
    [
        ("linear", {}, 1),
        ("slerp", {"parameters": {"t": 0.5}}, 2),
        ("ties", {"base": "b"}, 3),
    ],
)
def test_every_pass_is_counted(method, keys, passes):
    made = plan(pair(x=(100,)), method, **keys)
    assert made.passes == passes
    assert made.bytes_to_read == passes * 2 * 200


def test_passes_of_nested_merges_follow_each_other():
    inner = merged(pair(x=(100,)), "slerp", parameters={"t": 0.5})
    made = plan({"inner": inner, "c": header("F16", x=(100,))}, "slerp", parameters={"t": 0.5})
    assert made.passes == 3
    assert plan({"a": header("F16")}).passes == 0


RECIPES = {
    "linear": {"merge_method": "linear", "models": ["a", "b", "c"]},
    "task arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "c",
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"],
    },
    "three": {"merge_method": "task_arithmetic", "base_model": "c", "models": ["a", "b"], "dtype": "fp16"},
    "add difference": {"merge_method": "add_difference", "base_model": "c", "models": ["a", "b"]},
    "copies": {
        "merge_method": "linear",
        "models": ["a", "b"],
        "rules": [{"match": "*bias", "take": "c"}, {"match": "*.odd", "keep": True, "dtype": "bf16"}],
    },
    "nested": {
        "merge_method": "linear",
        "models": ["a", {"merge_method": "task_arithmetic", "base_model": "c", "models": ["a", "b"]}],
    },
    "slerp": {"merge_method": "slerp", "models": ["a", "b"], "parameters": {"t": 0.5}},
}


@pytest.mark.parametrize("raw", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_what_is_read_is_what_was_planned(tmp_path, raw, io):
    paths = save_models(tmp_path, **{name: with_integers(make_tensors(seed)) for seed, name in enumerate("abc")})
    bindings = {name: str(path) for name, path in paths.items()}
    text = json.dumps(raw)
    for name, path in bindings.items():
        text = text.replace(f'"{name}"', json.dumps(path))
    recipe = parse_recipe(json.loads(text), tmp_path)
    options = Options(sync=False, io=io)
    with planned(recipe, tmp_path / OUT, options) as made:
        expected, jobs = made.bytes_to_read, len(made.jobs)
    report = run_merge(recipe, tmp_path / OUT, options)
    assert report.bytes_read == expected
    assert report.merged + report.copied == jobs
    assert report.bytes_written == (tmp_path / OUT).stat().st_size


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lane_holds_a_block_of_everything_and_no_more_for_large_tensors(monkeypatch):
    monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    small, large = (plan(pair(x=(size,))).memory.lane_bytes for size in (BLOCK, 1000 * BLOCK))
    assert small == large
    two_slots, stored, output = 2 * 4 * BLOCK, 2 * 2 * BLOCK, 2 * BLOCK
    assert large == two_slots + stored + output
    assert plan(pair(x=(10,))).memory.lane_bytes == large * 10 // BLOCK
    assert plan({"a": header()}).memory.lane_bytes == 0


@pytest.mark.skipif(kernels() is None, reason="compiled loops were not built")
def test_compiled_loops_hold_what_is_read_and_written_and_little_beside():
    small, large = (plan(pair(x=(size,))).memory.lane_bytes for size in (BLOCK, 1000 * BLOCK))
    assert small == large
    assert 0 < large - 3 * 2 * BLOCK <= 64 * 1024
    assert not plan(pair(x=(BLOCK,))).needs_torch


def test_the_largest_lane_is_that_of_the_hungriest_tensor():
    models = pair(x=(BLOCK,), ids=f"I64 {BLOCK}")
    assert plan(models).memory.lane_bytes == plan(pair(x=(BLOCK,))).memory.lane_bytes
    copied = plan(models, rules=[{"match": "x", "keep": True}])
    assert copied.memory.lane_bytes == 0  # what is only copied takes no lane


def test_threads_and_limits_are_shared_out():
    most, least = MAPPED_BYTES
    one = share_out(4 * MIB, 1)
    assert (one.threads, one.mapped_bytes, one.work_bytes) == (1, most, 4 * MIB + most)
    assert share_out(4 * MIB, 3).threads == 3
    assert share_out(4 * MIB, 100).threads == DEFAULT_WORK_BYTES // (4 * MIB + least)
    tight = share_out(4 * MIB, 8, 2 * (4 * MIB + least))
    assert (tight.threads, tight.mapped_bytes) == (2, least)
    assert share_out(500 * MIB, 8).threads == 1  # one worker there is always
    assert share_out(500 * MIB, 8).work_bytes == 500 * MIB + least
    assert share_out(4 * MIB, 8, 1000 * MIB, device_limit=9 * MIB).threads == 2
    assert share_out(4 * MIB, 8, 1000 * MIB, device_limit=MIB).threads == 1


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("limit", [None, 20 * MIB, 200 * MIB])
def test_what_is_allotted_stays_within_its_limit(threads, limit):
    made = plan(pair(x=(10 * BLOCK,)), options=Options(threads=threads))
    allotted = made.memory.allot(limit)
    assert 1 <= allotted.threads <= threads
    assert allotted.work_bytes <= (limit or DEFAULT_WORK_BYTES)
    assert allotted.work_bytes == allotted.threads * (made.memory.lane_bytes + allotted.mapped_bytes)
    assert made.work_bytes == made.memory.fixed_bytes + made.described_bytes + made.memory.allot().work_bytes


@pytest.mark.parametrize("limit", [43_000_000, 400 * MIB])
def test_what_is_told_keeps_the_bound_under_which_it_was_allotted(limit):
    made = plan(pair(x=(10 * BLOCK,)), options=Options(threads=2, max_ram=limit))
    allotted = made.memory.allot(2 * MIB)
    usual = made.memory.fixed_bytes + made.described_bytes + allotted.work_bytes
    assert usual < made.work_bytes
    assert replace(made, allotted=allotted).work_bytes == (usual if made.needs_torch else min(limit, usual))


def test_a_plan_holds_as_many_whole_tensors_as_its_bound_allows(tmp_path):
    paths = save_models(tmp_path, **{name: {f"x{n}": torch.ones(300, 400) for n in range(4)} for name in "ab"})
    recipe = {"merge_method": "iso_c", "base_model": str(paths["a"]), "models": [str(paths["b"])]}
    out, options = tmp_path / "out.safetensors", {"threads": 4}
    with pytest.raises(PlanError, match=r"--max-ram 1 MB is too small") as raised:
        streammerge.make_plan(recipe, output=out, max_ram="1MB", **options)
    least = parse_size(str(raised.value.advice).rpartition(" ")[2].rstrip("."))
    little = streammerge.make_plan(recipe, output=out, max_ram=least, **options)
    much = streammerge.make_plan(recipe, output=out, max_ram=least + 64 * MIB, **options)
    assert little.work_bytes + 2 * little.memory.held_bytes <= much.work_bytes


# ── disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_free_disk_is_that_of_the_folder_that_will_hold_the_output(tmp_path, monkeypatch):
    asked = []

    def disk_usage(path):
        asked.append(Path(path))
        return SimpleNamespace(free=0)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    model = merged(pair(x=(10,)))
    (tmp_path / "mounted").mkdir()
    for output in ("out.safetensors", "new/deep/out.safetensors", "mounted", "new/folder"):
        assert plan_merge(model, tmp_path / output, Options(), Sources()).free_disk == 0
    assert asked == [tmp_path, tmp_path, tmp_path / "mounted", tmp_path]
    assert existing_folder(tmp_path / "x" / "y" / "z") == tmp_path


@pytest.mark.parametrize("short", [0, 1])
def test_too_little_disk_is_an_error_with_what_is_missing(monkeypatch, short):
    made = plan(pair(x=(10**6,)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=made.output.nbytes - short * 5000))
    if not short:
        made.check_disk()
        return
    with pytest.raises(OutputError, match="not enough disk: the output takes 2 MB, 2 MB are free\n  Free 5 kB, or"):
        made.check_disk()


# ── for machines and people ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_plan_as_json_is_plain():
    models = {"a": header(x=(3,), y=(2, 2), ids="I64 3", gone=(1,)), "b": header(x=(3,), y=(2, 2), z=(1,), gone=(1,))}
    made = plan(models, rules=[{"match": "y", "take": "b"}, {"match": "gone", "drop": True}], on_missing="keep")
    plain = made.to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["free_disk_bytes"] > 0
    assert plain["work_ram_bytes"] == made.work_bytes
    assert {key: value for key, value in plain.items() if key not in ("free_disk_bytes", "work_ram_bytes")} == {
        "method": "",  # a recipe tells it, and there is none
        "output": ["out.safetensors"],
        "output_bytes": made.output.nbytes,
        "bytes_to_read": 6 + 6 + 8 + 24,
        "passes": 1,
        "inputs": [],
        "companions": [],
        "not_copied": [],
        "left_out": {"b": ["z"]},
        "lacking": {"b": ["ids"]},
        "beside_models": {},
        "tensors": [
            {
                "name": "x",
                "action": "merged",
                "why": "linear",
                "parameters": {"weight": [1.0, 1.0], "normalize": True},
                "dtype": "F16",
                "shape": [3],
            },
            {"name": "y", "action": "copied", "why": "from b: taken by rule y", "dtype": "F16", "shape": [2, 2]},
            {
                "name": "ids",
                "action": "copied",
                "why": "from a: I64 is never averaged",
                "dtype": "I64",
                "shape": [3],
            },
            {"name": "gone", "action": "dropped", "why": "rule gone", "dtype": "F16", "shape": [1]},
        ],
    }


def test_fates_are_summed_up():
    made = plan(pair(x=(1,), y=(1,), ids="I64 1"))
    assert made.summary() == {"merged: linear": 2, "copied: from a: I64 is never averaged": 1}


def test_what_models_have_too_much_or_too_little_is_noted():
    shapes = {f"model.diffusion_model.x{n}": (1,) for n in range(2)}
    depth = shapes | {f"depth_model.model.x{n}": (1,) for n in range(3)}
    models = {
        "depth": header("F16", **depth),
        "waifu": header("F16", **shapes, **{"first_stage_model.x": (1,)}),
    }
    lacking = ", ".join(list(depth)[2:])
    made = plan(models, on_missing="keep")
    assert made.notes() == [
        "1 tensor (1 VAE) of waifu is not in the layout and left out: first_stage_model.x",
        f"waifu lacks 3 tensors (3 depth model) of the layout's; all come from other models: {lacking}",
    ]
    made = plan(models, on_missing="drop")
    assert "; 3 of them are dropped: depth_model.model.x0, " in made.notes()[1]
    assert by_component(list(depth)) == "5 tensors (2 diffusion model, 3 depth model)"
    assert plan(pair(x=(1,))).notes() == []


def test_make_plan_is_for_python_too(tmp_path):
    paths = save_models(tmp_path, a={"x": torch.ones(3)}, b={"x": torch.zeros(3)})
    recipe = {"merge_method": "linear", "models": [str(path) for path in paths.values()]}
    made = streammerge.make_plan(recipe, output=tmp_path / "out", shard_size="1kB", threads=1)
    assert made.output.paths == [tmp_path / "out" / "model.safetensors"]
    assert [file.path for file in made.inputs] == list(paths.values())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [None, 3, ["a.safetensors"], b"a.safetensors", {"w": torch.ones(2)}], ids=repr)
def test_what_is_no_model_is_told_by_its_kind(given, tmp_path):
    with pytest.raises(TypeError, match=f"expected a model, or the path of one, found {type(given).__name__}"):
        streammerge.linear(given)
    if not isinstance(given, dict):
        with pytest.raises(TypeError, match=f"or a model, found {type(given).__name__}"):
            streammerge.merge(given, output=tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
