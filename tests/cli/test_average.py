"""`streammerge average`: weighted means of checkpoints of one training, against float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_saver import save

from streammerge import open_model
from streammerge.recipe.averaging import DECAYS, weights_of

STEPS = (90, 100, 1000, 1100)
BY_TEXT = sorted(f"run/checkpoint-{step}" for step in STEPS)
"""As a shell has `run/checkpoint-*`."""


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(6, 5, generator=generator) for name in ("embed_tokens.weight", "layers.0.x.weight")}
    return {f"model.{name}": tensor for name, tensor in made.items()}


def save_step(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors(seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "step": seed, "torch_dtype": "float32"}))
    (folder / "tokenizer.json").write_text(json.dumps({"step": seed}))
    torch.save({"state": {0: torch.ones(3)}}, folder / "optimizer.pt")
    return folder


@pytest.fixture
def training(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for step in STEPS:
        save_step(Path("run") / f"checkpoint-{step}", step)
    (Path("run") / "logs2024").mkdir()
    return tmp_path


@pytest.fixture
def refuse(run):
    """What the program says of something that it refuses."""

    def refuse(*words):
        done = run(*words)
        assert done.code == 1
        return done.err

    return refuse


def mean(weights, steps=STEPS) -> dict[str, torch.Tensor]:
    total = math.fsum(weights)
    return {
        name: sum(w * tensors(step)[name].double() for w, step in zip(weights, steps, strict=True)) / total
        for name in tensors(0)
    }


def check(found: Path | str, weights, steps=STEPS) -> None:
    for name, expected in mean(weights, steps).items():
        torch.testing.assert_close(load_file(found)[name].double(), expected, rtol=0, atol=2**-23)


def test_all_checkpoints_of_a_folder_weigh_the_same(training, run):
    done = run("average", "run", "-o", "out")
    assert "checkpoint-90 (0.25), run/checkpoint-100 (0.25), run/checkpoint-1000 (0.25)" in done.err
    check("out/model.safetensors", [1, 1, 1, 1])
    assert json.loads(Path("out/config.json").read_text())["step"] == 1100
    assert json.loads(Path("out/tokenizer.json").read_text())["step"] == 1100
    assert not list(Path("out").glob("*.pt"))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("linear", [0.25] * 4),
        ("1-sqrt", [math.sqrt(j + 1) / 2 - math.sqrt(j) / 2 for j in range(4)]),
        ("cosine", [(math.cos(math.pi * j / 4) - math.cos(math.pi * (j + 1) / 4)) / 2 for j in range(4)]),
        ("1,2,3,4", [0.1, 0.2, 0.3, 0.4]),
        ("0,0,-1,3", [0, 0, -0.5, 1.5]),
    ],
)
def test_weights_are_those_of_a_decay_or_given(training, run, weights, expected):
    run("average", "run", "--weights", weights, "-o", "out.safetensors")
    check("out.safetensors", expected)


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_mean_is_what_a_training_gives_whose_rate_falls_so(name, count):
    """Every step's change counts as often as the rate says: θ₀ + Σ d(j/K) (θⱼ − θⱼ₋₁)."""
    weights = weights_of(name, count)
    share = [weight / math.fsum(weights) for weight in weights]
    for j in range(1, count):
        assert math.fsum(share[j:]) == pytest.approx(DECAYS[name](j / count), abs=1e-12)


def test_the_last_ones_alone_and_a_note_on_steps_that_are_not_even(training, run):
    done = run("average", "run", "--last", "3", "--weights", "cosine", "-o", "out.safetensors")
    assert "equally far apart, and between these are 100 to 900 steps" in done.err
    check("out.safetensors", [0.25, 0.5, 0.25], STEPS[1:])


def test_folders_by_name_in_the_order_in_which_they_are_named(training, run):
    run("average", "run/checkpoint-1100", "run/checkpoint-90", "--weights", "3,1", "-o", "out")
    check("out/model.safetensors", [1, 3], (90, 1100))
    assert run("average", *BY_TEXT, "-o", "all.safetensors", "-q").code == 0  # all weigh the same
    assert json.loads(Path("out/config.json").read_text())["step"] == 90
    assert (
        run("verify", "out", "checkpoint-90=run/checkpoint-90", "checkpoint-1100=run/checkpoint-1100", "--all").code
        == 0
    )


def test_a_folder_with_weights_of_its_own_stands_for_its_checkpoints(training, run):
    save_file(tensors(5), Path("run") / "model.safetensors")
    assert "has weights of its own, which are not taken" in run("average", "run", "-o", "out.safetensors").err
    check("out.safetensors", [1, 1, 1, 1])


def test_distributed_checkpoints_are_averaged_and_optimizers_left_out(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    for step in STEPS:
        state = {"model": tensors(step), "optim": {"state": tensors(step)}, "step": step}
        save(state, checkpoint_id=Path("run") / f"step-{step}")
    done = run("average", "run", "--last", "2", "--dtype", "bf16", "-o", "out.safetensors")
    assert "optim.state" in done.err
    found = load_file("out.safetensors")
    assert set(found) == set(tensors(0))
    for name, expected in mean([1, 1], STEPS[2:]).items():
        assert torch.equal(found[name], expected.float().bfloat16())
    with open_model("run/step-90") as model:
        assert set(model.tensors) == set(tensors(0))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "--weights", "foo"], "no such weights"),
        (["run", "--weights", "1,2"], "2 numbers are given, for 4 checkpoints"),
        (["run", "--weights", "1,-1,2,-2"], "the sum of the weights is 0"),
        (["run", "--weights", "nan,1,1,1"], "expected a decimal number"),
        (["run", "--weights", "1,,1,1"], "expected a decimal number"),
        (["run", "--last", "5"], "the last 5 of 4 checkpoints"),
        (["run", "--last", "1"], "two checkpoints or more"),
        (["run/checkpoint-90"], "two checkpoints or more"),
        (["nowhere", "run/checkpoint-90"], "nowhere: can't be read"),
        (["run", "run/../run/checkpoint-90"], "a checkpoint is named more than once"),
        (["run", "run/checkpoint-90/model.safetensors"], "a checkpoint is named more than once"),
        ([*BY_TEXT, "--last", "2"], "--last goes by the order of the checkpoints"),
        ([*BY_TEXT, "--weights", "1-sqrt"], "--weights 1-sqrt goes by the order of the checkpoints"),
    ],
)
def test_what_makes_no_average_is_refused(training, refuse, words, told):
    assert told in refuse("average", *words, "-o", "out.safetensors")
    assert not Path("out.safetensors").exists()


def test_a_checkpoint_that_was_never_finished_is_not_passed_over(training, refuse):
    (Path("run") / "checkpoint-1200").mkdir()
    assert "called like the checkpoints beside it" in refuse("average", "run", "-o", "out")


def test_checkpoints_whose_order_nobody_knows_are_refused(training, refuse):
    save_step(Path("run") / "tmp-checkpoint-1200", 1200)
    assert "called in 2 ways" in refuse("average", "run", "-o", "out")


def test_two_checkpoints_of_one_step_are_refused(training, refuse):
    save_step(Path("run") / "checkpoint-0090", 90)
    assert "two checkpoints are of step 90" in refuse("average", "run", "-o", "out")
