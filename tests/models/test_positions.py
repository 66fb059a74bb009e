"""Text encoders' positions: the integers from 0, told where they aren't, mended when they are written."""

from __future__ import annotations

import pytest
import torch

import streammerge
from streammerge.models.positions import broken_positions
from tests.make.models import MemoryModel, load_model, merge_to, save_model, save_models
from tests.storage.outputs import digests
from tests.storage.stopped_merges import run, stop, whole

NAME = "cond_stage_model.transformer.text_model.embeddings.position_ids"
WEIGHT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
RIGHT = torch.arange(77).reshape(1, 77)


def encoder(positions: torch.Tensor | None = RIGHT, name: str = NAME) -> dict[str, torch.Tensor]:
    weight = {WEIGHT: torch.linspace(0, 1, 8)}
    return weight if positions is None else {**weight, name: positions.clone()}


AVERAGED = RIGHT.float() * 0.9999 - 0.003
BROKEN = {
    "averaged": AVERAGED.half(),
    "cut": AVERAGED.long(),
    "in 16 bits": RIGHT.half(),
    "in bfloat16": AVERAGED.bfloat16(),
    "in fp32": RIGHT.float(),
    "halved": RIGHT // 2,
    "not numbers": torch.full((1, 77), torch.nan),
    "negative": -RIGHT,
    "as int32": RIGHT.int() + 1,
    "a row": AVERAGED.half().reshape(77),
    "of one": torch.ones(1, 1, dtype=torch.int64),
    "long": torch.arange(512).half().reshape(1, 512) + 0.5,
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_ones_are_told_and_mended(tmp_path, case):
    broken = BROKEN[case]
    paths = save_models(tmp_path, a=encoder(broken), b=encoder(RIGHT))
    with streammerge.open_model(paths["a"]) as model:
        assert set(broken_positions(model)) == {NAME}
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(paths["b"])]}
    plan = streammerge.make_plan(recipe, output=tmp_path / "out.safetensors")
    assert any(NAME in note and "written as 0, 1, 2" in note for note in plan.notes())
    made = merge_to(tmp_path / "out.safetensors", recipe, verify=True)[NAME]
    assert made.dtype == torch.int64
    assert torch.equal(made, torch.arange(broken.numel()).reshape(broken.shape))


def test_a_merge_that_mends_them_is_resumed(tmp_path, monkeypatch):
    weights = {f"model.diffusion_model.{number}": torch.full((300, 300), float(number)) for number in range(6)}
    paths = save_models(tmp_path, a=encoder(BROKEN["averaged"]) | weights, b=encoder() | weights)
    raw = {"merge_method": "linear", "models": list(map(str, paths.values()))}
    right = whole(raw, tmp_path / "whole")
    stop(monkeypatch, raw, tmp_path / "out" / "out.safetensors", after=1)
    told: list[str] = []
    run(raw, tmp_path / "out" / "out.safetensors", told.append, resume=True)
    assert any("resum" in line for line in told)
    assert digests(tmp_path / "out") == right


def test_reports_tell_it(tmp_path):
    paths = save_models(tmp_path, a=encoder(BROKEN["averaged"]), b=encoder())
    recipe = {"merge_method": "linear", "models": list(map(str, paths.values()))}
    report = streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False)
    (note,) = report.to_json()["notes"]
    assert note == f"{NAME}: a's are no positions (stored as F16), and are written as 0, 1, 2 …"


@pytest.mark.parametrize("positions", [RIGHT, RIGHT.int(), RIGHT.reshape(77), RIGHT.to(torch.int16)])
def test_right_ones_are_copied_as_they_are(tmp_path, positions):
    paths = save_models(tmp_path, a=encoder(positions), b=encoder(AVERAGED.half()))
    recipe = {"merge_method": "linear", "models": [str(paths["a"]), str(paths["b"])], "dtype": "float16"}
    assert not streammerge.make_plan(recipe, output=tmp_path / "out.safetensors").notes()
    made = merge_to(tmp_path / "out.safetensors", recipe)[NAME]
    assert made.dtype == positions.dtype
    assert torch.equal(made, positions)


@pytest.mark.parametrize("action", [{"keep": True}, {"take": "b"}])
def test_rules_mend_too(tmp_path, action):
    paths = save_models(tmp_path, a=encoder(AVERAGED.half()), b=encoder(BROKEN["cut"]))
    models = [{"model": str(path), "name": name} for name, path in paths.items()]
    recipe = {"merge_method": "linear", "models": models, "rules": [{"match": "*position_ids", **action}]}
    assert torch.equal(merge_to(tmp_path / "out.safetensors", recipe)[NAME], RIGHT)
    recipe["rules"] = [{"match": "*position_ids", "drop": True}]
    assert NAME not in merge_to(tmp_path / "out.safetensors", recipe)


@pytest.mark.parametrize(("own", "other"), [(AVERAGED.half(), None), (None, AVERAGED.half())])
def test_positions_that_one_lacks_are_no_error(tmp_path, own, other):
    paths = save_models(tmp_path, a=encoder(own), b=encoder(other))
    made = merge_to(tmp_path / "out.safetensors", {"merge_method": "linear", "models": list(map(str, paths.values()))})
    assert (NAME in made) == (own is not None)
    assert own is None or torch.equal(made[NAME], RIGHT)


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("model.position_ids", AVERAGED.half()),
        ("visual.embeddings.position_ids", RIGHT + 2),
        (NAME, AVERAGED.half().expand(2, 77).contiguous()),
        (NAME, torch.zeros(1, 5000, dtype=torch.int64)),
    ],
)
def test_what_is_something_else_is_left_alone(tmp_path, name, positions):
    path = save_model(tmp_path / "a.safetensors", encoder(positions, name))
    with streammerge.open_model(path) as model:
        assert not broken_positions(model)
    made = merge_to(tmp_path / "out.safetensors", {"merge_method": "linear", "models": [str(path), str(path)]})
    assert torch.equal(made[name], positions)


def test_models_of_ones_own_and_nested_merges(tmp_path):
    broken = MemoryModel(encoder(BROKEN["cut"]))
    inner = streammerge.linear(broken, broken)
    streammerge.merge(streammerge.linear(inner, inner), output=tmp_path / "out.safetensors", sync=False)
    assert torch.equal(load_model(tmp_path / "out.safetensors")[NAME], RIGHT)


def test_torch_files(tmp_path):
    torch.save({"state_dict": encoder(BROKEN["cut"])}, tmp_path / "a.ckpt")
    made = merge_to(tmp_path / "out.safetensors", {"merge_method": "linear", "models": [str(tmp_path / "a.ckpt")] * 2})
    assert torch.equal(made[NAME], RIGHT)
