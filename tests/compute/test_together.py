"""Statistics of the whole model: over all tensors as if they were one, before the first is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import streammerge
import streammerge.workers.machine
from streammerge.cli.main import main
from streammerge.compute import costs
from streammerge.compute.expressions import ByBlock, Together
from streammerge.compute.survey import Survey, TogetherSurvey
from streammerge.errors import PlanError
from streammerge.plan.plan import Plan
from streammerge.storage.copying import Copying
from streammerge.storage.ledger import Ledger
from tests.make.models import assert_same_bytes, load_model, make_tensors, merge_to, near, save_models

NAME = "layers.1.block"


@pytest.fixture
def paths(tmp_path):
    base = make_tensors(0)
    # tensors whose changes differ in size: one threshold for all is not one for each
    models = [
        {
            name: base[name] + (tensor - base[name]) * (1 + place)
            for place, (name, tensor) in enumerate(near(base, s).items())
        }
        for s in (1, 2)
    ]
    return save_models(tmp_path, base=base, a=models[0], b=models[1])


def merge(paths, **parameters: Any):
    chosen = {"density": 0.2, "scope": "model", **parameters}
    return streammerge.ties(paths["a"], paths["b"], base=paths["base"], **chosen)


def kept(paths, merged) -> dict[str, float]:
    base = load_model(paths["base"])
    return {name: float((merged[name] != base[name]).float().mean()) for name in base if base[name].numel()}


def test_one_threshold_for_all_is_not_one_for_each(paths, tmp_path):
    of_model = kept(paths, merge_to(tmp_path / "model.safetensors", merge(paths)))
    of_tensor = kept(paths, merge_to(tmp_path / "tensor.safetensors", merge(paths, scope="tensor")))
    assert of_tensor[NAME] == pytest.approx(of_tensor["layers.2.large"], rel=0.05)
    assert of_model["layers.2.large"] > 1.2 * of_model[NAME]


def test_exactly_the_share_of_the_whole_model_is_kept(paths, tmp_path):
    merged = merge_to(
        tmp_path / "out.safetensors", streammerge.ties(paths["a"], base=paths["base"], density=0.2, scope="model")
    )
    base = load_model(paths["base"])
    changed = sum(int((merged[name] != base[name]).sum()) for name in base)
    assert changed == int(0.2 * sum(tensor.numel() for tensor in base.values()))


def test_of_equal_elements_the_first_of_the_model_are_kept(tmp_path):
    base = {name: torch.zeros(40) for name in ("a", "b", "c")}
    paths = save_models(tmp_path, base=base, one={name: torch.ones(40) for name in base})
    merged = merge_to(
        tmp_path / "out.safetensors", streammerge.ties(paths["one"], base=paths["base"], density=0.5, scope="model")
    )
    assert {name: int(tensor.sum()) for name, tensor in merged.items()} == {"a": 40, "b": 20, "c": 0}
    assert merged["b"][:20].all()


def test_parameters_that_do_not_touch_the_statistics_may_change_from_tensor_to_tensor(paths, tmp_path):
    raw: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(paths["base"]),
        "models": [str(paths["a"]), str(paths["b"])],
        "parameters": {"density": 0.2, "scope": "model", "lambda": [{"filter": "block", "value": 0.5}, {"value": 1}]},
    }
    merged = merge_to(tmp_path / "out.safetensors", raw)
    plain = merge_to(tmp_path / "plain.safetensors", merge(paths))
    base = load_model(paths["base"])
    assert_same_bytes({n: t for n, t in merged.items() if n != NAME}, {n: t for n, t in plain.items() if n != NAME})
    torch.testing.assert_close(merged[NAME] - base[NAME], (plain[NAME] - base[NAME]) / 2, rtol=1e-3, atol=1e-6)


def test_tensors_with_other_parameters_are_ranked_among_themselves(paths, tmp_path):
    rules = [{"match": "layers.1.*", "parameters": {"density": 0.9}}]
    raw: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(paths["base"]),
        "models": [str(paths["a"])],
        "parameters": {"density": 0.2, "scope": "model"},
        "rules": rules,
    }
    merged, base = merge_to(tmp_path / "out.safetensors", raw), load_model(paths["base"])
    for density, names in ((0.9, [n for n in base if n.startswith("layers.1.")]), (0.2, ["layers.2.large"])):
        others = names if density == 0.9 else [n for n in base if not n.startswith("layers.1.")]
        changed = sum(int((merged[n] != base[n]).sum()) for n in others)
        assert changed == int(density * sum(base[n].numel() for n in others))


def test_ranges_can_be_read_without_merging_first(paths, tmp_path):
    plain = merge_to(tmp_path / "plain.safetensors", merge(paths))
    fresh = merge(paths)
    assert torch.equal(fresh.read(NAME, 1000, 2000), plain[NAME][1000:2000])
    assert torch.equal(fresh.read("layers.0.bias", 0, 63), plain["layers.0.bias"])


@pytest.fixture
def begun(monkeypatch) -> list[Together]:
    """What was measured, each time that it was."""
    noted: list[Together] = []
    begin = TogetherSurvey.__init__

    def noting(self: TogetherSurvey, together: Together, *rest: Any) -> None:
        noted.append(together)
        begin(self, together, *rest)

    monkeypatch.setattr(TogetherSurvey, "__init__", noting)
    return noted


def test_reading_measures_the_model_once(paths, begun):
    made = merge(paths)
    outer = streammerge.linear(made, merge(paths, density=0.6), weight=[0.5, 0.5])
    for _ in range(2):
        made.read(NAME, 0, 100)
        made.read("layers.0.bias", 0, 63)
    assert len(begun) == 1
    for _ in range(2):
        outer.read(NAME, 0, 100)
    assert len(begun) == 3
    assert begun[0] in begun[1:]
    assert len(set(begun)) == 2


def test_writing_and_checking_measure_the_model_once(paths, tmp_path, begun):
    made = merge(paths)
    merge_to(tmp_path / "1.safetensors", made, verify=True)
    assert len(begun) == 1
    merge_to(tmp_path / "2.safetensors", made, compute_dtype="fp64")  # the statistics of another run are not this one's
    assert len(begun) == 2


def test_blocks_are_counted_through_all_tensors(paths):
    made = merge(paths)
    node = made.nodes[NAME]
    assert isinstance(node, ByBlock)
    assert node.together is not None
    counts = [costs.piece_count(member) for member in node.together.members]
    firsts = [member.first_block for member in node.together.members]
    assert firsts == [sum(counts[:place]) for place in range(len(counts))]
    assert costs.together_blocks(node.together) == sum(counts)
    assert [costs.target_of(member).first_block for member in node.together.members] == firsts


def test_what_is_not_measured_yet_is_refused(paths):
    with pytest.raises(RuntimeError, match="statistics of a whole model have to be taken before"):
        Survey(merge(paths).nodes[NAME])


def test_samples_can_be_computed_again(paths, tmp_path, capsys):
    models = [str(paths[name]) for name in "ab"]
    method = ["--base", str(paths["base"]), "-m", "ties", "-p", "density=0.2", "-p", "scope=model"]
    assert main([*models, *method, "-o", str(tmp_path / "out.safetensors")]) == 0
    assert main(["verify", str(tmp_path / "out.safetensors")]) == 0
    assert "of 9 tensors are what the recipe gives" in capsys.readouterr().out


def test_a_merge_can_be_merged_again(paths, tmp_path):
    made = merge(paths)
    first = merge_to(tmp_path / "1.safetensors", made, threads=1)
    assert_same_bytes(merge_to(tmp_path / "2.safetensors", made, threads=3, verify=True), first)
    doubled = merge_to(tmp_path / "3.safetensors", made, compute_dtype="fp64")
    for name, tensor in doubled.items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outer", ["linear", "slerp", "ties", "truncate_rank"])
def test_it_can_be_part_of_another_merge(paths, tmp_path, outer):
    by_method: dict[str, dict[str, Any]] = {
        "slerp": {"t": 0.3},
        "ties": {"density": 0.5},
        "truncate_rank": {"rank": 3},
    }
    settings = by_method.get(outer, {})
    base = {"base": paths["base"]} if outer in ("ties", "truncate_rank") else {}
    others = [] if outer == "truncate_rank" else [paths["b"]]

    def outer_merge(inner: Any) -> Any:
        return getattr(streammerge, outer)(inner, *others, **base, **settings)

    merge_to(tmp_path / "inner.safetensors", merge(paths))
    expected = merge_to(tmp_path / "stepwise.safetensors", outer_merge(tmp_path / "inner.safetensors"))
    nested = merge_to(tmp_path / "nested.safetensors", outer_merge(merge(paths)), threads=3)
    for name, tensor in nested.items():
        apart = np.linalg.norm((tensor - expected[name]).double().numpy())
        assert apart <= 1e-5 * max(float(expected[name].norm()), 1.0), name


def test_what_has_to_be_measured_itself_can_not_be_measured_together(paths):
    slerp = streammerge.slerp(paths["a"], paths["b"], t=0.5)
    with pytest.raises(
        PlanError, match="'ties' measures the whole model at once, and one of its inputs is a merge"
    ) as e:
        streammerge.ties(slerp, base=paths["base"], density=0.5, scope="model")
    assert "scope: tensor" in str(e.value)
    streammerge.ties(slerp, base=paths["base"], density=0.5)  # as each tensor is
    linear = streammerge.linear(paths["a"], paths["b"])
    streammerge.ties(linear, base=paths["base"], density=0.5, scope="model")


def test_the_plan_shows_the_passes_before_the_writing(paths, tmp_path, capsys):
    made: Plan = streammerge.make_plan(merge(paths), output=tmp_path / "out.safetensors")
    floats = sum(tensor.numel() * 4 for tensor in load_model(paths["base"]).values())
    assert made.bytes_before_writing == 2 * 3 * floats
    words = ["plan", str(paths["a"]), str(paths["b"]), "--base", str(paths["base"]), "-m", "ties", "-p", "density=0.2"]
    assert main([*words, "-p", "scope=model"]) == 0
    assert "before writing  " in (shown := capsys.readouterr().out)
    assert "2 passes over the whole model, in which 9 tensors are measured together" in shown
    assert main(words) == 0
    assert "before writing" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["ties", "pcb", "emr"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_windows_may_lie_in_several_tensors(paths, tmp_path, monkeypatch, method, threads):
    settings: dict[str, Any] = {"ties": {"density": 0.3, "scope": "model", "rescale": True}, "emr": {"task": 1}}
    made = [
        getattr(streammerge, method)(paths["a"], paths["b"], base=paths["base"], **settings.get(method, {}))
        for _ in range(2)
    ]
    plain = merge_to(tmp_path / "plain.safetensors", made[0], threads=1)
    monkeypatch.setattr(costs, "WINDOW", 1)
    assert_same_bytes(merge_to(tmp_path / "out.safetensors", made[1], threads=threads), plain)


def test_a_stage_of_its_own_is_shown(paths, tmp_path):
    stages: list[str] = []
    made = merge(paths)
    with streammerge.engine.planned(made, tmp_path / "out.safetensors", streammerge.recipe.options.Options()) as plan:
        machine = streammerge.workers.machine.Machine(plan)

        class Sink:
            def write(self, job: Any, position: int, data: memoryview) -> None:
                """Nothing."""

            def copy(self, ranges: Any) -> None:
                """Nothing."""

        ledger = Ledger(plan.jobs.nbytes)
        copying = Copying(plan.jobs, Sink(), ledger)
        machine.run(Sink(), ledger, lambda progress: stages.append(progress.stage), copying)
    assert set(stages) == {"measure the whole model", ""}
    assert ledger.done_bytes == ledger.total_bytes == sum(job.info.nbytes for job in plan.jobs)


def test_an_output_is_computed_again_by_what_is_measured_anew(paths, tmp_path, capsys):
    words = [*map(str, (paths["a"], paths["b"])), "--base", str(paths["base"]), "-m", "ties", "-p", "scope=model"]
    output = str(tmp_path / "out.safetensors")
    assert main([*words, "-o", output]) == 0
    assert main(["verify", output]) == 0
    assert main([*words, "-o", output, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "of 9 tensors are what the recipe gives" in out
    assert "nothing to do: the output is there already" in err
