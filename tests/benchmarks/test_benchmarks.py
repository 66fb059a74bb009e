"""The benchmarks work as a whole, in miniature; a wrong output is called wrong; figures and reports are right."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks import __main__ as program
from benchmarks import (
    checking,
    environments,
    figures,
    groups,
    inputs,
    limits,
    own,
    plots,
    report,
    results,
    running,
    targets,
)
from benchmarks.cases import CASES, COMPARED, Case, Merge, Take
from benchmarks.groups import memory_group
from benchmarks.limits import Limit, Search
from benchmarks.results import CaseResult, Run, ToolResult
from benchmarks.running import Settings
from benchmarks.tools import CannotRun, Command, Job, Tool
from streammerge import open_model
from streammerge.compute.machine import MIB
from streammerge.methods import METHODS
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.bench.benchmark import Spread
from streammerge.tools.bench.floor import Floor
from streammerge.tools.bench.measuring import Measured, Sample
from streammerge.tools.demo.files import write_torch_zip
from streammerge.tools.demo.noise import Noise

GB = 1_000_000_000

# ── cases and inputs ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_has_its_inputs(case):
    tensors = inputs.SETS[case.input_set].tensors(True)
    assert inputs.used_roles(case) <= set(tensors)
    assert case.layout in case.merge.roles
    assert inputs.SETS[case.input_set].container == case.container
    for merge in (case.merge, *case.variants.values()):
        assert merge.method in METHODS
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


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return Path(tmp_path_factory.mktemp("bench"))


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


# ── the whole, in miniature ──────────────────────────────────────────────────────────────────────────────────────────


def bench(*words: object) -> int:
    return program.main([str(word) for word in words])


@pytest.fixture(scope="module")
def quick(made) -> Path:
    """The article and SLERP, measured in miniature: streammerge, the plain script and one variant."""
    words = ["--quick", "--no-limits", "--runs", "1", "--folder", made, "--keep"]
    assert bench("run", *words, "--cases", "article-fp16", "slerp", "--tools", "streammerge", "script") == 0
    return Path(made) / "results-quick"


def test_all_are_measured_and_right(quick):
    for name in ("article-fp16", "slerp"):
        result = results.load(quick / f"{name}.json")
        assert result.complete
        assert not result.skipped
        for tool in ("streammerge", "script"):
            found = result.tool(tool)
            assert found is not None
            assert found.failure == ""
            assert found.check is not None
            assert found.check.ok, found.check.text
            (run,) = found.good()
            assert 0 < run.loop < run.process.wall
            assert run.process.curve
        assert result.floor(0) > 0


def test_variants_are_measured_too(quick):
    result = results.load(quick / "slerp.json")
    assert figures.ratio(result, "streammerge", "streammerge:linear", figures.loop) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="drops pages of single files")
def test_cold_runs_are_measured(quick):
    result = results.load(quick / "article-fp16.json")
    assert len(result.disk_rates) == 1
    share = figures.of_disk(result, result.tool("streammerge"))
    assert share is not None
    assert share.median > 0


def test_the_report_is_whole(quick):
    text = (quick / report.REPORT).read_text(encoding="utf-8")
    assert "miniatures" in text
    for heading in ("## Targets", "## article-fp16", "## slerp", "## How it is measured"):
        assert heading in text
    for picture in ("article-fp16-memory.png", "article-fp16-time.png"):
        assert picture in text
        data = (quick / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 200_000


def test_nothing_is_left_behind(quick, made):
    assert not (made / "work").exists()
    assert not (made / "logs").exists()


def test_what_is_done_is_not_done_again(quick, made, capsys):
    before = (quick / "slerp.json").stat().st_mtime_ns
    assert bench("run", "--quick", "--folder", made, "--cases", "slerp", "--keep") == 0
    assert "0 of 1 cases to measure" in capsys.readouterr().out
    assert (quick / "slerp.json").stat().st_mtime_ns == before
    settings = Settings(made, quick=True, results=quick)
    assert program.is_done(CASES["slerp"], settings, "2026-01-01")
    assert not program.is_done(CASES["slerp"], settings, "2999-01-01")
    assert not program.is_done(CASES["slerp"], dataclasses.replace(settings, quick=False), "")


def test_miniatures_never_replace_real_results(made):
    arguments = program.parser().parse_args(["run", "--quick", "--folder", str(made)])
    assert program.settings_from(arguments).results != results.FOLDER


def test_list_and_help_tell_everything(capsys):
    assert bench("list") == 0
    out = capsys.readouterr().out
    for case in CASES:
        assert case in out
    with pytest.raises(SystemExit):
        bench("--help")
    assert "resumes" in capsys.readouterr().out


def test_a_case_that_breaks_down_does_not_stop_the_others(made, monkeypatch, tmp_path, capsys):
    done = []

    def run(self):
        if self.case.name == "ties":
            raise RuntimeError("broken")
        done.append(self.case.name)
        return self.result

    monkeypatch.setattr(running.CaseRunner, "run", run)
    words = ["--quick", "--folder", made, "--results", tmp_path, "--again", "--keep", "--cases", "ties", "sdxl"]
    assert bench("run", *words) == 1
    assert done == ["sdxl"]
    assert "RuntimeError: broken" in capsys.readouterr().err


# ── tools that go wrong ──────────────────────────────────────────────────────────────────────────────────────────────


def scripted(name: str, code: str) -> Tool:
    """A tool that runs some Python with `job` fields filled in."""

    def command(job: Job) -> Command:
        words = [
            str(job.python),
            "-c",
            code,
            str(job.output),
            *(str(job.models[role]) for role in job.case.merge.roles),
        ]
        return Command(tuple(words), note="a tool for tests")

    return Tool(name, name, command, packages=())


COPY = "import shutil, sys; shutil.copy(sys.argv[2], sys.argv[1] + '/merged.safetensors')"


def measured(tools: list[Tool], made: Path, place: Path, **changes: object) -> CaseResult:
    settings = Settings(made, runs=1, quick=True, cold=False, limits=False, results=place)
    settings = dataclasses.replace(settings, **changes)  # type: ignore[arg-type]
    return running.CaseRunner(CASES["one-tensor"], tools, settings, lambda text: None).run()


def test_a_fast_wrong_answer_is_shown_as_wrong(made, tmp_path):
    result = measured([scripted("copier", COPY)], made, tmp_path)
    (tool,) = result.tools
    assert tool.check is not None
    assert not tool.check.ok
    assert "wrong numbers in 1 of 1" in tool.check.text
    assert "**wrong**" in report.case_section(result, tmp_path)
    assert plots.label(tool) == "copier (wrong output)"


@pytest.mark.parametrize(("asked", "allowed", "rounds"), [(5, 3, 3), (1, 3, 1), (6, None, 6)])
def test_a_case_of_hours_has_fewer_rounds(made, tmp_path, asked, allowed, rounds):
    settings = Settings(made, runs=asked, quick=True, cold=False, limits=False, results=tmp_path)
    case = dataclasses.replace(CASES["one-tensor"], rounds=allowed)
    result = running.CaseRunner(case, [own.STREAMMERGE], settings, lambda text: None).run()
    assert [len(tool.warm) for tool in result.tools] == [rounds]


def test_failures_are_told_and_do_not_stop_others(made, tmp_path):
    crash = scripted("crasher", "raise SystemExit('no such model')")
    slow = scripted("sleeper", "import time; time.sleep(60)")
    garbage = scripted("liar", "import sys; open(sys.argv[1] + '/merged.safetensors', 'w').write('nothing')")
    nothing = scripted("idler", "pass")
    tools = [crash, slow, garbage, nothing, own.STREAMMERGE]
    result = measured(tools, made, tmp_path, runs=2, timeout=8.0)
    found = {tool.name: tool for tool in result.tools}
    assert found["crasher"].failure == "failed: no such model"
    assert len(found["crasher"].warm) == 1
    assert (made / "logs" / "one-tensor-crasher.log").read_text().strip() == "no such model"
    assert found["sleeper"].failure == "stopped after 8 s"
    assert found["liar"].check is not None
    assert found["liar"].check.text.startswith("can't be read")
    assert found["idler"].check is not None
    assert found["idler"].check.text == "no output"
    assert len(found["streammerge"].good()) == 2
    text = report.case_section(results.load(tmp_path / "one-tensor.json"), tmp_path)
    assert "no such model" in text
    for log in (made / "logs").iterdir():
        log.unlink()
    (made / "logs").rmdir()


def test_what_a_tool_cannot_do_is_a_reason(made, tmp_path):
    def refuse(job: Job) -> Command:
        raise CannotRun("it knows no tensors")

    result = measured([Tool("refuser", "the refuser", refuse)], made, tmp_path)
    assert result.tools[0].skipped == "it knows no tensors"
    assert "- the refuser: not run: it knows no tensors" in report.case_section(result, tmp_path)


def test_a_tool_whose_environment_cannot_be_made_is_a_reason(made, tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "PEERS_FOLDER", tmp_path)
    tool = dataclasses.replace(scripted("peer", COPY), requirements="peer.txt")
    with pytest.raises(CannotRun, match=r"peer\.txt, are missing"):
        environments.python_of(tool, tmp_path)
    (tmp_path / "peer.txt").write_text("--no-index\nno-such-package-anywhere==1.0\n")
    with pytest.raises(CannotRun, match="not installed"):
        environments.python_of(tool, tmp_path, install=False)
    with pytest.raises(CannotRun, match=r"could not be made \(ERROR: .*no-such-package-anywhere.*log: "):
        environments.python_of(tool, tmp_path)
    monkeypatch.setattr("benchmarks.environments.subprocess.run", None)  # it is not tried again
    with pytest.raises(CannotRun, match="could not be made"):
        environments.python_of(tool, tmp_path)
    environments.forget_failures(tmp_path)
    assert not list((tmp_path / "environments").glob("*.failed"))


def test_versions_are_those_of_the_environment():
    found = environments.versions(Path(sys.executable), ["torch", "no-such-package"])
    assert found == {"torch": torch.__version__}


def test_too_small_a_disk_is_a_reason(made, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    result = measured([own.STREAMMERGE], made, tmp_path)
    assert "are free" in result.skipped
    assert "Skipped: it takes" in report.case_section(result, tmp_path)


def test_the_budget_ends_the_runs_of_slow_tools(made):
    one = running.Contestant(scripted("x", ""), Path(sys.executable), ToolResult("x", "x"))
    assert one.may_run("warm", 0.0)
    one.used["warm"], one.last["warm"] = 60.0, 30.0
    assert one.may_run("warm", 90.0)
    assert not one.may_run("warm", 89.0)
    assert one.may_run("cold", 1.0)


# ── checking ─────────────────────────────────────────────────────────────────────────────────────────────────────────

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


# ── the smallest memory ──────────────────────────────────────────────────────────────────────────────────────────────


@given(need=st.integers(20, 20_000), guess=st.integers(20, 20_000))
def test_bisection_finds_the_need(need, guess):
    tried: list[int] = []

    def works(limit: int) -> bool:
        tried.append(limit)
        return bool(limit >= need * MIB)

    found = Search(works).run(guess * MIB)
    assert found.tries == len(tried) <= limits.MOST_TRIES
    if found.finishes:
        assert found.finishes >= need * MIB
    if found.fails:
        assert found.fails < need * MIB
    if found.complete:
        assert found.finishes <= max(found.fails * limits.NEAR, limits.LEAST)
    if guess / 2 < need < guess * 2:
        assert found.complete


def test_bisection_stops_when_its_time_is_up():
    calls = []

    def works(limit: int) -> bool:
        calls.append(limit)
        time.sleep(0.05)
        return False

    assert Search(works, budget=0.01).run(100 * MIB) == Limit(0, 100 * MIB, 1, False)
    assert len(calls) == 1


def test_nothing_smaller_than_the_least_is_tried():
    found = Search(lambda limit: True).run(30 * MIB)
    assert found.finishes == limits.LEAST
    assert found.complete


@pytest.mark.parametrize(
    ("files", "limit_file", "swap"),
    [
        (("memory/cgroup.procs",), "memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", "5000")),
        (("cgroup.subtree_control",), "memory.max", ("memory.swap.max", "0")),
    ],
)
def test_groups_of_both_versions(tmp_path, monkeypatch, files, limit_file, swap):
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("cpu memory io")
    real = Path.mkdir

    def mkdir(path: Path, *rest: object, **more: object) -> None:
        real(path, *rest, **more)  # type: ignore[arg-type]
        if path.name.startswith("streammerge-bench-") and limit_file == "memory.limit_in_bytes":
            (path / limit_file).write_text("0")  # the kernel's files are there at once

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with memory_group(5000, tmp_path) as group:
        assert (group / limit_file).read_text() == "5000"
        assert (group / swap[0]).read_text() == swap[1]


def test_a_machine_without_groups_is_a_reason(tmp_path, monkeypatch):
    with pytest.raises(CannotRun, match="no memory controller"), memory_group(5000, tmp_path):
        pass
    (tmp_path / "cgroup.subtree_control").write_text("memory")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CannotRun, match=r"can't be made here \(Permission denied\)"), memory_group(5000, tmp_path):
        pass


def can_make_groups() -> bool:
    try:
        with memory_group(100 * MIB):
            return True
    except CannotRun:
        return False


@pytest.mark.skipif(not can_make_groups(), reason="memory control groups can't be made here")
def test_a_limit_is_felt():
    from streammerge.tools.bench.measuring import Surroundings, measure

    greedy = [sys.executable, "-c", "x = bytearray(200_000_000)"]
    with memory_group(100 * MIB) as small:
        assert measure(greedy, Surroundings(group=small)).ending == "killed"
    with memory_group(400 * MIB) as large:
        assert measure(greedy, Surroundings(group=large)).ok
    assert not small.exists()
    assert not large.exists()
    assert groups.folder(groups.ROOT).is_dir()


# ── figures, results, report ─────────────────────────────────────────────────────────────────────────────────────────


def process(wall: float, rss: int = 300 * MIB) -> Measured:
    curve = tuple(Sample(wall * place / 10, rss * place // 10, rss * place // 20) for place in range(1, 11))
    return Measured("done", 0, wall, wall * 2, rss, rss // 2, curve=curve)


def tool_result(name: str, walls: list[float], loop: float = 0.0, rss: int = 300 * MIB, **more: object) -> ToolResult:
    runs = [Run(number, process(wall, rss), loop * wall) for number, wall in enumerate(walls)]
    return ToolResult(name, name, {"torch": "2.0"}, warm=runs, check=checking.Verdict(True, "right"), **more)  # type: ignore[arg-type]


def case_result(name: str = "article-fp16", **more: object) -> CaseResult:
    machine = dict.fromkeys(("system", "processor", "cores", "python", "torch", "safetensors", "cuda"), "")
    machine["ram_bytes"] = str(24 * GB)
    values: dict[str, object] = {
        "tools": [
            tool_result("streammerge", [2.0, 4.0, 3.0], 0.5, limit=Limit(160 * MIB, 150 * MIB, 5, True)),
            tool_result("streammerge:base-read", [4.0, 8.0, 6.0], 0.5),
            tool_result("script", [20.0, 44.0], rss=9000 * MIB),
        ],
        "floors": [[Floor(0.5, 0.5), Floor(1.0, 0.0)], [Floor(1.0, 1.0)], [Floor(1.0, 1.0)]],
        "input_bytes": 8 * GB,
        "output_bytes": 3 * GB,
        "import_torch_rss": 270 * MIB,
        "complete": True,
    }
    values |= more
    return CaseResult(name, CASES[name].title, "2026-01-01", "abc", "0.1", False, machine, **values)  # type: ignore[arg-type]


def test_ratios_are_taken_within_a_round():
    found = figures.ratio(case_result(), "script", "streammerge", figures.wall)
    assert found == Spread(10.5, 10.0, 11.0)
    assert figures.ratio(case_result(), "nobody", "streammerge", figures.wall) is None


def test_the_loop_is_compared_with_the_floor_of_its_round():
    result = case_result()
    assert figures.over_floor(result, result.tool("streammerge")) == Spread(1.0, 0.75, 1.0)
    assert figures.over_floor(result, result.tool("script")) is None


def test_the_share_of_the_disk_counts_what_must_be_read_once():
    cold = [
        Run(0, process(5.0), loop=4.0, own={"bytes_read": 20 * GB}),
        Run(1, process(5.0), 4.0, {"bytes_read": 4 * GB}),
    ]
    tool = ToolResult("streammerge", "streammerge", cold=cold)
    result = case_result(tools=[tool], disk_rates=[2.0 * GB, 2.0 * GB])
    assert figures.of_disk(result, tool) == Spread(0.75, 0.5, 1.0)


def test_memory_is_told_above_the_import_of_torch():
    result = case_result()
    tool = result.tool("streammerge")
    assert tool is not None
    assert figures.above_torch(result, tool) == 30
    assert targets.most_memory({"article-fp16": result}) == 30


def test_what_fits_the_page_cache():
    assert figures.fits_cache(case_result())
    assert not figures.fits_cache(case_result(input_bytes=20 * GB))


@given(slope=st.floats(0.1, 10), start=st.floats(0, 5))
def test_a_line_is_a_line(slope, start):
    points = [(float(x), start + slope * x) for x in (1, 3, 10, 30)]
    assert figures.line_through(points) < 1e-6
    bent = [*points[:-1], (30.0, 2 * points[-1][1])]
    assert figures.line_through(bent) > 0.03


def test_targets_are_judged():
    rows = {row[0]: row for row in (target.row({"article-fp16": case_result()}) for target in targets.TARGETS)}
    loop = next(row for text, row in rows.items() if "`cat`" in text)
    assert loop[2:] == ("1.00 (0.75 to 1.00)", "reached")
    script = next(row for text, row in rows.items() if "plain script" in text)
    assert script[3] == "reached"
    halves = next(row for text, row in rows.items() if "0.5/0.4" in text)
    assert halves[2].startswith("0.50 ")
    assert next(row for text, row in rows.items() if "sd-mecha" in text)[3] == "not measured"


@pytest.mark.parametrize(
    ("upper", "value", "said"),
    [
        (True, 1.2, "reached"),
        (True, 1.5, "**not reached**, by 20%"),
        (False, 1.3, "reached"),
        (False, 1.0, "**not reached**, by 20%"),
    ],
)
def test_by_how_much_a_target_is_missed(upper, value, said):
    assert targets.Target("x", 1.25, upper, "", lambda _: value).row({})[3] == said


def test_scaling_is_judged_over_what_fits_the_cache():
    found = {}
    for gigabytes, loop in (("0.3", 0.1), ("1", 0.1), ("3", 0.1), ("30", 0.9)):
        size = int(float(gigabytes) * GB)
        tool = tool_result("streammerge", [size / GB * 10] * 3, loop)
        found[f"scale-{gigabytes}GB"] = case_result(
            f"scale-{gigabytes}GB", tools=[tool], input_bytes=size, output_bytes=size // 2
        )
    off = targets.off_the_line(models=False)(found)
    assert off is not None
    assert off < 0.01
    assert targets.memory_range(models=False)(found) == 0
    assert targets.off_the_line(models=True)(found) is None
    assert report.scaling_row(found["scale-30GB"])[7] == "too small: the disk sets the pace"


def test_results_survive_the_file(tmp_path):
    result = case_result()
    found = results.load(results.save(result, tmp_path))
    expected = results.to_json(result)
    assert results.to_json(found) == expected
    (_, _, script) = found.tools
    assert [bool(run.process.curve) for run in script.warm] == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["article-fp16.json"]
    assert next(results.load_all([*CASES], tmp_path)).name == "article-fp16"


def test_results_can_be_read_by_people(tmp_path):
    lines = results.save(case_result(), tmp_path).read_text().splitlines()
    assert len(lines) < 1000
    assert any(line.strip().startswith("[0.3, ") for line in lines)


def test_the_report_tells_what_is_missing(tmp_path):
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert "There are no results yet" in text
    results.save(case_result(), tmp_path)
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert "Not measured: article-fp32-ckpt, sdxl" in text
    assert "10.5x" in text
    assert "160 MiB" in text
    assert "miniatures" not in text


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (Limit(200 * MIB, 190 * MIB, 4, True), "200 MiB"),
        (Limit(200 * MIB, 100 * MIB, 9, False), "100 to 200 MiB"),
        (Limit(200 * MIB, 0, 9, False), "at most 200 MiB"),
        (Limit(0, 100 * MIB, 9, False), "more than 100 MiB"),
        (None, ""),
    ],
)
def test_the_smallest_memory_in_words(limit, said):
    assert report.smallest(ToolResult("x", "x", limit=limit)) == said


def test_there_is_nothing_about_gpus_where_there_is_none():
    result = case_result()
    result.tools.append(ToolResult(own.CUDA.name, own.CUDA.title, skipped="there is no CUDA device here"))
    assert "cuda" not in report.tools_table(result)
    assert "CUDA" not in report.notes_of(result)


def test_tables_are_markdown():
    assert report.table(("a", "b"), [("1|2", "3\n4")]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 4 |"


def test_the_readme_shows_the_article():
    text = report.readme_table(case_result())
    assert "| **streammerge** | 3.0 s | 1.5 s |" in text
    assert "`cat` of the inputs and `cp` of one output, takes " in text
    assert "Medians of 2 to 3 runs" in text
    assert "2026-01-01" in text


# ── streammerge as a tool ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_own_recipes_are_recipes(case: Case, tmp_path):
    from streammerge.recipe.parse import parse_recipe

    raw = yaml.safe_load(yaml.safe_dump(own.recipe(case.merge, case.layout)))
    bound = {role: tmp_path / role for role in case.merge.roles}
    recipe = parse_recipe(raw, tmp_path, bound, "recipe")
    assert recipe.method == case.merge.method


@pytest.mark.parametrize("name", sorted(CASES["methods"].variants))
def test_every_method_can_be_measured(made, tmp_path, name):
    """What the case `methods` asks of a method is a merge that it can do."""
    from streammerge.cli.main import main

    case = CASES["methods"]
    models = inputs.find_or_make(case, made, quick=True)
    job = Job(case, models, tmp_path, tmp_path, Path(sys.executable))
    command = own.variant(name, case.variants[name]).command(job)
    assert main(["plan", *command.words[3:], "-q"]) == 0


def test_the_gpu_is_asked_for_where_there_is_one(made, tmp_path, monkeypatch):
    case = CASES["one-tensor"]
    job = Job(case, inputs.find_or_make(case, made, quick=True), tmp_path, tmp_path, Path(sys.executable))
    monkeypatch.setattr(own, "has_cuda", lambda: True)
    assert own.CUDA.command(job).words[-2:] == ("--device", "cuda")
    monkeypatch.setattr(own, "has_cuda", lambda: False)
    with pytest.raises(CannotRun, match="no CUDA device"):
        own.CUDA.command(job)


def test_peers_are_compared_without_the_sync():
    names = [tool.name for tool in own.own_tools(CASES["ties"])]
    assert names == ["streammerge", "streammerge-sync", "streammerge-cuda", "streammerge:linear"]
