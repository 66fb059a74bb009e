"""Peers are asked for what the cases say, or refuse with a reason; the plain scripts merge rightly."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks import checking, inputs
from benchmarks.cases import CASES, Merge, article
from benchmarks.peers import PEERS, kohya, mergekit, sd_meh
from benchmarks.peers.description import SCRIPTS, weights_of
from benchmarks.tools import PEERS_FOLDER, CannotRun, Command, Job, Tool
from streammerge import open_model

COMPARED = [case for case in CASES.values() if case.peers]
TOOLS = {tool.name: tool for tool in PEERS}

RUNS = {
    "script": {"article-fp16", "bake", "sdxl", "slerp", "llama", "sixteen", "one-tensor"},
    "article-script": {"article-fp32-ckpt"},
    "mergekit-pytorch": {"article-fp16", "article-fp32-ckpt", "sdxl", "slerp", "ties", "sixteen", "one-tensor"},
    "mergekit-yaml": {"llama"},
    "sd-mecha": {"article-fp16", "sdxl", "slerp", "ties", "sixteen", "one-tensor"},
    "kohya": set[str](),  # of miniatures none
    "sd-meh": {"article-fp16", "article-fp32-ckpt", "sdxl", "ties"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return Path(tmp_path_factory.mktemp("peers"))


def job(name: str, made: Path, tmp_path: Path) -> Job:
    case = CASES[name]
    places = {place: tmp_path / place for place in ("output", "scratch")}
    for folder in places.values():
        folder.mkdir(exist_ok=True)
    return Job(case, inputs.find_or_make(case, made, quick=True), **places, python=Path(sys.executable))


def written(command: Command) -> dict[str, object]:
    (path,) = [word for word in command.words if word.endswith("recipe.yaml")]
    found: dict[str, object] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return found


# ── what runs, and what does not ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
@pytest.mark.parametrize("tool", PEERS, ids=lambda tool: tool.name)
def test_a_peer_runs_a_case_or_says_why_not(tool, case, made, tmp_path):
    asked = job(case.name, made, tmp_path)
    if case.name in RUNS[tool.name]:
        command = tool.command(asked)
        assert all(isinstance(word, str) and word for word in command.words)
        assert str(asked.output) in " ".join(command.words) or (asked.scratch / "job.json").exists()
    else:
        with pytest.raises(CannotRun, match=r"\w+ \w+ \w+"):
            tool.command(asked)


def test_every_case_has_a_peer():
    assert {case.name for case in COMPARED} <= set().union(*RUNS.values())


def test_peers_leave_the_inputs_alone(made, tmp_path):
    asked = job("article-fp16", made, tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in asked.models.values()}
    for tool in PEERS:
        if "article-fp16" in RUNS[tool.name]:
            tool.command(asked)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in asked.models.values()} == before


# ── requirements ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tool", [tool for tool in PEERS if tool.requirements], ids=lambda tool: tool.name)
def test_requirements_are_pinned(tool: Tool):
    lines = (PEERS_FOLDER / tool.requirements).read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in packages)
    names = {line.partition("==")[0].lower() for line in packages}
    assert {name.lower() for name in tool.packages} <= names


def test_all_peers_have_the_same_torch_and_safetensors():
    files = {tool.requirements for tool in PEERS if tool.requirements}
    for package in ("torch", "safetensors"):
        lines = [
            line
            for file in files
            for line in (PEERS_FOLDER / file).read_text(encoding="utf-8").splitlines()
            if line.startswith(f"{package}==")
        ]
        assert len(lines) == len(files)
        assert len(set(lines)) == 1


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_need_nothing_of_this_project(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not {name.partition(".")[0] for name in named} & {"benchmarks", "streammerge"}


# ── mergekit ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_coefficients_of_task_arithmetic():
    assert mergekit.coefficients(article(0.5, 0.5)) == {"depth": 0.5, "waifu": 0.5}
    found = mergekit.coefficients(article(0.5, 0.4))
    assert list(found) == ["base", "depth", "waifu"]
    assert math.isclose(sum(found.values()), 1.0)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("first_stage_model.decoder.conv_in.weight", (0.0, 1.0)),
        ("cond_stage_model.model.ln_final.bias", (1.0, 0.0)),
        ("depth_model.model.scratch.layer1_rn.weight", (1.0, 0.0)),
        ("model.diffusion_model.input_blocks.0.0.weight", (1.0, 0.0)),
        ("model.diffusion_model.input_blocks.0.0.bias", (0.5, 0.5)),
    ],
)
def test_the_first_filter_in_a_name_holds(name, weights):
    merge = article(0.5, 0.5)
    found = []
    for role in ("depth", "waifu"):
        conditions = mergekit.weight_per_tensor(merge, role, 0.5)
        found.append(next(one["value"] for one in conditions if one.get("filter", "") in name))
    assert tuple(found) == weights


@pytest.mark.parametrize("name", ["article-fp16", "article-fp32-ckpt"])
def test_mergekit_gets_models_of_equal_shapes(name, made, tmp_path):
    asked = job(name, made, tmp_path)
    command = TOOLS["mergekit-pytorch"].command(asked)
    models = [Path(model["model"]) for model in written(command)["models"]]  # type: ignore[attr-defined]
    depth, waifu = (open_model(path).tensors for path in models)
    assert all(waifu[name].shape == depth[name].shape for name in set(waifu) & set(depth))
    assert len(waifu) == len(open_model(asked.models["waifu"]).tensors) - 1
    assert set(depth) == set(open_model(asked.models["depth"]).tensors)
    assert "--tensor-union" in command.words
    assert "not timed" in command.note


def test_a_copied_state_dict_is_the_same_but_for_what_is_left_out(made, tmp_path):
    asked = job("article-fp32-ckpt", made, tmp_path)
    left_out = "model.diffusion_model.input_blocks.0.0.weight"
    copy = torch.load(mergekit.copied(asked, "waifu", [left_out]))
    state = torch.load(asked.models["waifu"])["state_dict"]
    assert set(state) - set(copy) == {left_out}
    assert all(torch.equal(values, state[name]) for name, values in copy.items())


@pytest.mark.parametrize(
    ("name", "method", "parameters"),
    [("ties", "ties", {"density": 0.3}), ("slerp", "slerp", {"t": 0.3}), ("sdxl", "linear", {})],
)
def test_recipes_have_the_cases_parameters(name, method, parameters, made, tmp_path):
    found = written(TOOLS["mergekit-pytorch"].command(job(name, made, tmp_path)))
    assert found["merge_method"] == method
    assert found["parameters"] == parameters
    assert found["dtype"] == "float16"


def test_slerp_starts_at_the_first_model(made, tmp_path):
    asked = job("slerp", made, tmp_path)
    assert written(TOOLS["mergekit-pytorch"].command(asked))["base_model"] == str(asked.models["a"])


def test_language_models_are_folders(made, tmp_path):
    asked = job("llama", made, tmp_path)
    found = written(TOOLS["mergekit-yaml"].command(asked))
    assert found["dtype"] == "bfloat16"
    assert found["base_model"] == str(asked.models["base"])
    assert [model["parameters"] for model in found["models"]] == [{"weight": 0.5}, {"weight": 0.4}]  # type: ignore[attr-defined]


# ── sd-mecha and sd-meh ──────────────────────────────────────────────────────────────────────────────────────────────


def test_known_defects_are_noted(made, tmp_path):
    assert "text encoder is missing" in TOOLS["sd-mecha"].command(job("ties", made, tmp_path)).note
    assert "by count" in TOOLS["sd-meh"].command(job("ties", made, tmp_path)).note
    assert TOOLS["sd-mecha"].command(job("sdxl", made, tmp_path)).note == ""


def test_kohya_is_asked_for_a_bake_of_the_whole_model(made, tmp_path, monkeypatch):
    asked = job("bake", made, tmp_path)
    whole = tmp_path / "whole.safetensors"
    with whole.open("wb") as file:
        file.truncate(kohya.FULL_BYTES)  # sparse
    asked = replace(asked, models={**asked.models, "model": whole})
    monkeypatch.delenv(kohya.CHECKOUT, raising=False)
    with pytest.raises(CannotRun, match=kohya.CHECKOUT):
        kohya.command(asked)
    (tmp_path / "networks").mkdir()
    monkeypatch.setenv(kohya.CHECKOUT, str(tmp_path))
    command = kohya.command(asked)
    assert (
        " ".join(command.words[2:9]) == f"--sd_model {whole} --models {asked.models['lora']} --ratios 0.8 --precision"
    )
    assert command.environment["PYTHONPATH"].startswith(str(tmp_path))


def test_sd_meh_can_not_add_two_task_vectors():
    case = CASES["article-fp16"]
    assert sd_meh.why_not(case) == ""
    assert "one task vector" in sd_meh.why_not(replace(case, merge=article(0.5, 0.4)))


# ── the plain scripts, which can be run here ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        pytest.param(tool, name, marks=[] if name in ("article-fp16", "slerp", "bake") else pytest.mark.slow)
        for tool in ("script", "article-script")
        for name in sorted(RUNS[tool])
    ],
)
def test_a_plain_script_merges_rightly(tool, name, made, tmp_path):
    asked = job(name, made, tmp_path)
    command = TOOLS[tool].command(asked)
    subprocess.run(command.words, check=True)
    found = checking.check(asked.case.merge, asked.case.layout, asked.models, asked.output)
    assert found.ok, found.text
    assert json.loads(asked.timing.read_text())["loop"] > 0
    if tool == "script":
        assert found.text == "right"


def test_the_script_rounds_once_where_the_base_is_read(made, tmp_path):
    asked = job("article-fp16", made, tmp_path)
    merge = article(0.5, 0.4)
    asked = replace(asked, case=replace(asked.case, merge=merge))
    subprocess.run(TOOLS["script"].command(asked).words, check=True)
    assert checking.check(merge, "depth", asked.models, asked.output).text == "right"


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("plain")
    for name in ("plain", "described"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.5, 3.0])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_scripts_slerp(plain, angle, t):
    a = torch.tensor([2.0, 0.0])
    b = torch.tensor([3 * math.cos(angle), 3 * math.sin(angle)])
    wanted = checking.slerp(a.double(), b.double(), t)
    torch.testing.assert_close(plain.slerp(a, b, t).double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_scripts_slerp_of_nothing(plain):
    assert torch.equal(plain.slerp(torch.zeros(3), torch.ones(3), 0.25), torch.full((3,), 0.25))


def test_the_scripts_mean_is_weighted(plain):
    found = plain.weighted_mean([torch.tensor([1.0]), torch.tensor([4.0])], [2.0, 1.0])
    assert found.item() == pytest.approx(2.0)


def test_whole_numbers_are_copied(tmp_path):
    for role, value in (("a", 3), ("b", 5)):
        save_file({"w": torch.ones(2).half() * value, "steps": torch.tensor([value])}, tmp_path / f"{role}.safetensors")
    case = CASES["sdxl"]
    models = {role: tmp_path / f"{role}.safetensors" for role in ("a", "b")}
    (tmp_path / "out").mkdir()
    asked = Job(case, models, tmp_path / "out", tmp_path, Path(sys.executable))
    subprocess.run(TOOLS["script"].command(asked).words, check=True)
    merged = load_file(tmp_path / "out" / "merged.safetensors")
    assert merged["steps"].tolist() == [3]
    assert merged["w"].tolist() == pytest.approx([3.8, 3.8], abs=2e-3)


def test_descriptions_read_as_they_were_written(made, tmp_path, monkeypatch):
    asked = job("article-fp16", made, tmp_path)
    command = TOOLS["sd-mecha"].command(asked)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", list(command.words[1:]))
    try:
        found = importlib.import_module("described").described_job()
    finally:
        sys.modules.pop("described")
    merge = asked.case.merge
    assert found.files == {role: str(path) for role, path in asked.models.items()}
    assert tuple(found.weights) == merge.weights
    for name in open_model(asked.models["depth"]).tensors:
        assert found.taken_from(name) == merge.taken_from(name)


def test_weights_of_shards_are_all_its_files(made, tmp_path):
    asked = job("llama", made, tmp_path)
    files = weights_of(asked.models["base"])
    assert len(files) > 1
    assert sum(len(load_file(file)) for file in files) == len(open_model(asked.models["base"]).tensors)


def test_a_merge_without_takes_takes_nothing():
    assert mergekit.weight_per_tensor(Merge("linear", ("a", "b"), weights=(1.0, 2.0)), "a", 1.0) == [{"value": 1.0}]
